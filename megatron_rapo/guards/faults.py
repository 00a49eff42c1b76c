"""Faults as a step's metrics show them. Each function tells what is wrong, or None.

Metrics are a step's, or, where an update is to be kept from being applied, those of its minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from megatron_rapo.config import RunConfig

Metrics = Mapping[str, float]
Fault = Callable[[Metrics], str | None]

MISMATCH = "mismatch/log_prob_mean"
NORM = "optimizer/gradient_norm"
LEAST_NORMS = 8  # that a norm is compared with
_CONSTANT = 1e-6  # nats between the largest log-prob and the smallest
_UNIFORM = 0.01  # of log V, between −log V and the mean


def faults(config: RunConfig, vocabulary: int, norms: Sequence[float]) -> Mapping[str, Fault]:
    """All but those whose message takes more than metrics, by the option's name.

    Args:
        config: of the run.
        vocabulary: the tokenizer's size.
        norms: of the newest gradients, the newest last; it grows.
    """
    guards = config.guards
    return {
        "gradient_spike": partial(_spike, norms, guards.gradient_spike_factor),
        "entropy_collapse": partial(_collapse, guards.entropy_least),
        "equal_rewards": partial(_equal, compares=_compares(config)),
        "truncation": partial(_truncated, guards.truncated_share),
        "engine_log_probs": partial(_garbage, vocabulary),
        "mismatch": partial(_mismatch, config),
        "no_learning_rate": _no_rate,
        "unchanged_weights": _unchanged,
    }


def _compares(config: RunConfig) -> bool:
    return config.demonstrations is None and config.rollout.responses_per_prompt > 1


def _spike(norms: Sequence[float], factor: float, metrics: Metrics) -> str | None:
    norm = metrics.get(NORM, 0.0)
    if len(norms) < LEAST_NORMS or not norm > factor * (usual := median(norms)):
        return None
    return (
        f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g} "
        f"(guards.gradient_spike_factor = {factor:g}); look at this step's samples (`megatron-rapo samples`)"
    )


def _collapse(least: float, metrics: Metrics) -> str | None:
    entropy = metrics.get("loss/entropy", math.inf)
    nothing_measured = math.isnan(metrics.get(NORM, 0.0))  # no minibatch was finite
    if entropy >= least or nothing_measured:
        return None
    return (
        f"the policy's entropy is {entropy:.3g} nats a token, below guards.entropy_least = {least:g}: it has "
        "nothing left to explore; go on from an earlier checkpoint with a lower optimizer.learning_rate, "
        "more entropy or a larger divergence"
    )


def _equal(metrics: Metrics, *, compares: bool) -> str | None:
    taught = metrics.get("loss/tokens", 0) != 0 and metrics.get(NORM, 0.0) != 0
    if not (compares and metrics.get("reward/groups_without_variance") == 1 and taught):
        return None
    return (
        f"every group earned the same reward throughout (mean {metrics['reward/mean']:.3f}), so that "
        "comparing responses teaches nothing: what moves the policy is the rest of its loss, such as "
        "divergence and entropy. See by `megatron-rapo samples` whether the reward is right; else take "
        "prompts that are solved sometimes, or sample more responses a prompt"
    )


def _truncated(share: float, metrics: Metrics) -> str | None:
    truncated = metrics.get("rollout/truncated", 0.0)
    if truncated < share:
        return None
    return (
        f"{truncated:.0%} of the responses end at their limit (guards.truncated_share = {share:g}); raise "
        "rollout.max_response_tokens, or see by `megatron-rapo samples` what the policy repeats"
    )


def _garbage(vocabulary: int, metrics: Metrics) -> str | None:
    mean = metrics.get("mismatch/engine_log_prob", math.nan)
    spread = metrics.get("mismatch/engine_log_prob_spread", math.nan)
    if not math.isfinite(mean):
        return None
    uniform = math.log(vocabulary)
    same = spread <= _CONSTANT
    if not same and abs(mean + uniform) > _UNIFORM * uniform:
        return None
    what = f"are all {mean:.4g}" if same else f"are {mean:.4g} on average, as of a model that knows nothing"
    return (
        f"the engines' log-probs of the step's tokens {what} (−log of {vocabulary} tokens is "
        f"{-uniform:.4g}): are their weights damaged? `megatron-rapo doctor --mismatch` compares "
        "them with the trainer's"
    )


def _mismatch(config: RunConfig, metrics: Metrics) -> str | None:
    gap, limit = metrics.get(MISMATCH, 0.0), config.guards.mismatch_limit
    # Older weights differ as well as they should; each publication is proved on its own.
    quiet = config.rollout.max_staleness > 0 or config.algorithm.old_log_probs == "engine"
    if quiet or not gap > limit:
        return None
    return (
        f"{MISMATCH} = {gap:.3g} nats is beyond guards.mismatch_limit = {limit:g}: the engines did not "
        "sample from the policy that the trainer computes. Once the run has ended, `megatron-rapo doctor "
        "--mismatch "
        f"{config.run.directory / 'config.toml'}` finds the cause"
    )


def _no_rate(metrics: Metrics) -> str | None:
    if metrics.get("optimizer/learning_rate") != 0:
        return None
    return (
        "the learning rate is 0, so that updates change nothing; set optimizer.min_learning_rate, or raise "
        "optimizer.decay_steps"
    )


def _unchanged(metrics: Metrics) -> str | None:
    moves = metrics.get(NORM, 0.0) > 0 and metrics.get("optimizer/learning_rate", 0.0) > 0
    if not moves or metrics.get("optimizer/changed_tensors") != 0 or metrics.get("guards/skipped_updates"):
        return None
    return (
        f"no weight changed, although the gradient's norm is {metrics[NORM]:.3g} and the learning rate "
        f"{metrics['optimizer/learning_rate']:.3g}: such updates vanish in the weights' rounding; raise "
        "optimizer.learning_rate"
    )
