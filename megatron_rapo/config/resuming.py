"""What a run may go on with at another value: each option is in one of four classes (docs/resume.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from megatron_rapo.config.algorithm import DEFAULT_METHOD
from megatron_rapo.config.options import sections_of
from megatron_rapo.config.schema import RunConfig
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.section import Section


class Change(enum.Enum):
    """What becomes of an option that has another value when a run goes on."""

    FREE = "freely"
    CONTENT = "as long as what it leads to is the same"
    ASKED = "if asked for"
    NEVER = "never"


# A section's name stands for all its options that are not named.
CLASSES: Mapping[Change, tuple[str, ...]] = {
    # How and where it is computed, observed and kept; and how far the run goes.
    Change.FREE: (
        *("run.directory", "run.steps", "run.code", "run.relaunches"),
        *("parallel", "weights", "checkpoint", "observe", "guards", "slurm"),
        *("model.config", "model.recompute", "model.reference_in_host_memory", "model.vocabulary_multiple"),
        "teacher.in_host_memory",
        *("rollout.engine", "rollout.colocated", "rollout.restarts"),
        *("rollout.prompts_per_request", "rollout.requests_per_engine", "rollout.minimum_engines"),
        *("rollout.startup_timeout_s", "rollout.request_timeout_s", "rollout.health_interval_s"),
        *("reward.workers", "reward.memory_limit_gib", "reward.unknown_limit", "environment.time_limit_s"),
        "algorithm.audit_estimators",
        *("algorithm.max_tokens_per_microbatch", "algorithm.loss_chunk_tokens", "algorithm.share_prompts"),
        *("optimizer.overlap_communication", "optimizer.in_host_memory_during_rollouts"),
        *("evaluate.k", "evaluate.every", "evaluate.best", "evaluate.batch"),
    ),
    # Weights, tokenizer, prompts: identity.json has their fingerprints.
    Change.CONTENT: (
        *("model.path", "model.checkpoint", "model.reference_path", "teacher", "data", "run.date"),
        "rollout.max_prompt_tokens",
    ),
    # What is learnt, and how fast; what is measured.
    Change.ASKED: (
        *("rollout.prompts_per_step", "rollout.responses_per_prompt", "rollout.max_response_tokens"),
        *("rollout.temperature", "rollout.dynamic_sampling", "rollout.replay", "rollout.max_staleness"),
        "rollout.partial_tokens",
        *("reward", "data.reward"),
        *("model.balance_coefficient", "model.router_z_coefficient"),
        *("algorithm", "optimizer", "environment", "evaluate"),
    ),
    # Order of prompts and seeds of samples are functions of these, and the state is of these types.
    Change.NEVER: ("run.seed", "data.shuffle", "model.dtype", "optimizer.distributed", "adapter"),
}


def change_of(option: str) -> Change:
    """The class of an option: that of the longest name in CLASSES that it is, or begins with.

    Raises:
        KeyError: it is in none.
    """
    names = {name: change for change, listed in CLASSES.items() for name in listed}
    parts = option.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in names:
            return names[name]
    raise KeyError(f"{option} is in no class of config/resuming.py; put it into one")


def options_of(config: RunConfig) -> dict[str, Any]:
    """All options that have an effect, by dotted name; defaults that follow from others are written out."""
    flat = dict(_flat(config.resolved()))
    plans = {str(plan): plan for plan in map(config.verifier_of, config.training_sources)}
    if all(plan.is_verifier for plan in plans.values()):
        flat["reward.verifier"] = ", ".join(plans)
    flat["algorithm.minibatch_prompts"] = config.minibatch_prompts
    if config.optimizer.decay != "constant":
        flat["optimizer.decay_steps"] = config.decay_steps
    return flat


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options whose values differ, before and now; None where an option has none.

    One that only one of them has is none where the other has its default: options come with later versions.
    But where one of them alone has an adapter, all options of that are.
    """
    method = METHODS.get(now.get("algorithm.method", DEFAULT_METHOD), Method)  # the user's own may be gone
    defaults = _DEFAULTS | dict(_defaults(method.Options, "algorithm."))
    if not all(any(map(_of_adapter, values)) for values in (before, now)):
        defaults = {option: value for option, value in defaults.items() if not _of_adapter(option)}
    differing = {}
    for option in dict.fromkeys([*before, *now]):
        old, new = (values.get(option, defaults.get(option)) for values in (before, now))
        if old != new:
            differing[option] = (old, new)
    return differing


def table() -> str:
    """The classes as docs/resume.md has them."""
    rows = [
        f"| {change.value} | {', '.join(f'`{name}`' for name in names)} |"
        for change, names in CLASSES.items()
    ]
    return "\n".join(["| may change | options |", "|---|---|", *rows]) + "\n"


def _of_adapter(option: str) -> bool:
    return option.startswith("adapter.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _defaults(model: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        for section in sections:
            yield from _defaults(section, f"{prefix}{name}.")
        if not sections and field.default is not PydanticUndefined:
            yield prefix + name, field.default


_DEFAULTS = dict(_defaults(RunConfig))
