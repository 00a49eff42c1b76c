"""What goes with samples of another policy than the one that a step begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.term import OF_IMPORTANCE

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def check_old_log_probs(config: RunConfig, method: Method) -> None:
    """Refuses ratios over the policy that sampled where a method has none, or reads more of the other.

    Raises:
        ValueError: they are asked for.
    """
    if config.algorithm.old_log_probs != "engine":
        return
    if not method.needs & OF_IMPORTANCE or method.weighs or method.marks_tokens or method.asks:
        raise ValueError(
            f'algorithm.old_log_probs = "engine" does not go with method {config.algorithm.method}, which '
            "has no clipped ratio, or makes more of the log-probs that the step begins with; remove it"
        )


def check_partial_responses(config: RunConfig, method: Method) -> None:
    """Refuses responses of several versions where a method asks for more once it has seen them.

    Raises:
        ValueError: they are asked for.
    """
    if config.rollout.partial_tokens is not None and method.asks:
        raise ValueError(
            f"rollout.partial_tokens = {config.rollout.partial_tokens} does not go with method "
            f"{config.algorithm.method}, which asks for further responses once it has seen some, when no "
            "version is left to go on with these; remove it"
        )


def refuse_alarm_of_older_samples(config: RunConfig) -> None:
    """Refuses options of an alarm on a difference that is there as it should be.

    Raises:
        ValueError: one is not at its default.
    """
    if config.rollout.max_staleness:
        reason = f"rollout.max_staleness = {config.rollout.max_staleness}: samples are of older weights"
    elif config.algorithm.old_log_probs == "engine":
        reason = 'algorithm.old_log_probs = "engine": samples are compared with later updates as well'
    else:
        return
    for name in ("mismatch", "mismatch_limit"):
        value = getattr(config.guards, name)
        if value != type(config.guards).model_fields[name].get_default():
            raise ValueError(f"guards.{name} = {value!r} would have no effect: {reason}; remove it")
