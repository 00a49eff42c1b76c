"""The named methods: their choices as the papers have them, and what is the same quantity under all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rapo.config import Algorithm
from megatron_rapo.data.batching import pack
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.loss.objective import Objective
from megatron_rapo.policy.batch import batch_advantages, make_samples
from tests.unit.one_rank import one_rank
from tests.unit.test_batch import config, group_of
from tests.unit.test_objective import TEMPERATURE, VOCABULARY, log_distribution, states

C, W = Outcome.CORRECT, Outcome.WRONG
OPTIONS = (
    "advantage", "ratio", "clip_low", "clip_high", "divergence", "divergence_coefficient", "phi_floor",
    "entropy_coefficient", "loss_aggregation", "mask_truncated", "groups_without_variance",
)  # fmt: skip
# After arXiv 2510.03865, 2402.03300, 2503.14476, 2503.20783, 2507.18071 and 2508.08221.
PAPERS: dict[Any, tuple[Any, ...]] = {
    "rapo": ("grpo", "token", 0.2, 0.2, "forward_exact", 5e-3, 0.5, 1e-3, "token_mean", False, "keep"),
    "grpo": ("grpo", "token", 0.2, 0.2, "k3", 0.04, None, 0.0, "sequence_mean", False, "keep"),
    "dapo": ("grpo", "token", 0.2, 0.28, "none", None, None, 0.0, "token_mean", True, "keep"),
    "dr_grpo": ("dr_grpo", "token", 0.2, 0.2, "none", None, None, 0.0, "constant", False, "keep"),
    "gspo": ("grpo", "sequence", 3e-4, 4e-4, "none", None, None, 0.0, "sequence_mean", False, "keep"),
    "lite_ppo": ("lite_ppo", "token", 0.2, 0.2, "none", None, None, 0.0, "token_mean", False, "keep"),
}


@pytest.mark.parametrize("preset", PAPERS)
def test_a_preset_is_its_papers(preset: Any) -> None:
    found = Algorithm(preset=preset)
    for option, expected in zip(OPTIONS, PAPERS[preset], strict=True):
        assert expected is None or getattr(found, option) == expected, option


@pytest.mark.parametrize("divergence", ["forward_sampled", "forward_printed"])
def test_sampled_divergences_flatten_less(divergence: Any) -> None:
    assert Algorithm(divergence=divergence).phi_floor == 0.8
    assert Algorithm(divergence=divergence, flatten_floor=0.6).phi_floor == 0.6


@pytest.mark.parametrize("preset", PAPERS)
def test_entropy_and_mismatch_of_the_same_samples_are_the_same(
    preset: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever weighs or masks tokens in the loss: plain means over all response tokens."""
    run = config(preset=preset, minibatch_prompts=4)
    groups = [group_of((3, C), (10, W), truncated=[1]), group_of((1, C), (2, C))]
    samples = make_samples(groups, batch_advantages(groups, run), run, VOCABULARY)
    batch = pack(samples, sequence_multiple=1)
    policy, reference = states(16, 0), states(16, 1)
    with one_rank(tmp_path_factory.mktemp("store")):
        subject = Objective(
            Algorithm(preset=preset),
            temperature=TEMPERATURE,
            vocabulary=VOCABULARY,
            group=torch.distributed.group.WORLD,  # type: ignore[arg-type]
        )
        if subject.algorithm.wants_reference and not subject.wants_reference_hidden:
            plain, flattened = subject.reference_log_probs(reference, batch)
            batch.reference_log_probs, batch.flattened_log_probs = plain, flattened
        _, sums, mismatch = subject(batch, policy, reference if subject.wants_reference_hidden else None)
    log_policy = log_distribution(policy)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    assert subject.metrics(sums)["loss/entropy"] == pytest.approx(float(entropy.mean()))
    chosen = batch.is_response
    log_prob = log_policy.gather(1, batch.targets[chosen][:, None]).squeeze(1)
    apart = float((log_prob - batch.engine_log_probs[chosen]).abs().mean())
    assert mismatch.metrics()["mismatch/log_prob_mean"] == pytest.approx(apart)
    if preset == "dapo":
        assert subject.metrics(sums)["loss/tokens"] == 6, "the truncated response is masked out of the loss"
