"""Options that have no effect where nothing is sampled: samples are replayed, or texts are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rapo.config.write import toml_value

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig

_OF_SAMPLES = {
    "rollout": ("responses_per_prompt", "dynamic_sampling", "replay", "max_staleness", "partial_tokens"),
    "observe": ("samples_every", "samples_keep"),
    "guards": (
        *("equal_rewards", "unknown_rewards", "truncation", "truncated_share", "engine_log_probs"),
        *("mismatch", "mismatch_limit"),
    ),
}
# Where nothing is evaluated either.
_OF_ENGINES = (
    *("engine", "colocated", "prompts_per_request", "requests_per_engine"),
    *("startup_timeout_s", "request_timeout_s", "health_interval_s", "minimum_engines", "restarts"),
)
_SECTIONS = ("reward", "environment", "weights")


def refuse_options_of_samples(config: RunConfig) -> None:
    """Refuses such options where they are not at their defaults.

    Raises:
        ValueError: one is not.
    """
    if config.demonstrations is None:
        return
    found = []
    for section, names in _OF_SAMPLES.items():
        chosen = getattr(config, section)
        more = _OF_ENGINES if section == "rollout" and config.evaluate is None else ()
        for name in (*names, *more):
            value = getattr(chosen, name)
            if value != type(chosen).model_fields[name].get_default():
                found.append(
                    f"{section}.{name}" if name == "engine" else f"{section}.{name} = {_written(value)}"
                )
    if config.optimizer.in_host_memory_during_rollouts:
        found.append("optimizer.in_host_memory_during_rollouts = true")
    if config.evaluate is None:
        if config.slurm is not None:
            raise ValueError(
                f'[slurm] starts engines, and "{config.algorithm.method}" has none without [evaluate]; '
                "remove it, and start the ranks by srun or torchrun"
            )
        found += [f"[{name}]" for name in _SECTIONS if getattr(config, name) != type(getattr(config, name))()]
    for option in found:
        raise ValueError(
            f'{option} would have no effect: method "{config.algorithm.method}" learns from texts that are '
            "given, and samples nothing; remove it"
        )


def refuse_options_beside_replay(config: RunConfig) -> None:
    """Refuses sections that only sampling reads.

    Raises:
        ValueError: one is set.
    """
    if config.rollout.replay is None:
        return
    replay = f"rollout.replay = {config.rollout.replay}"
    if config.optimizer.in_host_memory_during_rollouts:
        raise ValueError(
            "optimizer.in_host_memory_during_rollouts = true would have no effect: "
            f"{replay} takes recorded samples, so there is no rollout; remove it"
        )
    inert = {"evaluate": config.evaluate is not None}
    inert |= {
        name: getattr(config, name) != type(getattr(config, name))() for name in ("weights", "environment")
    }
    for section, is_set in inert.items():
        if is_set:
            raise ValueError(
                f"[{section}] would have no effect: {replay} takes recorded samples, without engines; "
                "remove it"
            )


def _written(value: object) -> str:
    return "{…}" if hasattr(value, "model_dump") else toml_value(value)
