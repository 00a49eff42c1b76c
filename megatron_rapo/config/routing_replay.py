"""Where choices of experts can be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rapo.config.write import toml_value

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def check_routing_replay(config: RunConfig) -> None:
    """Refuses `algorithm.routing_replay` where it has no effect, or there is nothing to use again.

    Raises:
        ValueError: it is set.
    """
    chosen = config.algorithm.routing_replay
    if chosen == "off":
        return
    option = f'algorithm.routing_replay = "{chosen}"'
    if config.demonstrations is not None:
        raise ValueError(
            f'{option} would have no effect: method "{config.algorithm.method}" learns from texts that are '
            "given, without old log-probs; remove it"
        )
    if chosen == "engine":
        _check_engines(option, config)
    if chosen == "old" and config.algorithm.old_log_probs == "engine":
        raise ValueError(
            f'{option} does not go with algorithm.old_log_probs = "engine", by which no pass computes old '
            "log-probs, nor chooses experts; remove one of them"
        )
    if chosen == "old" and config.updates_per_step == 1:
        raise ValueError(
            f"{option} would have no effect: a step's only update starts from the policy of the old "
            "log-probs, whose routers choose the same; lower algorithm.minibatch_prompts below "
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step}, or remove it"
        )


def _check_engines(option: str, config: RunConfig) -> None:
    """Refuses what the choices of engines do not go with."""
    replay = config.rollout.replay
    reasons = {
        "rollout.replay": (replay and str(replay), "recorded samples have no choices of experts"),
        "rollout.max_staleness": (
            config.rollout.max_staleness,
            "batches that a checkpoint keeps have no choices of experts",
        ),
        "algorithm.share_prompts": (
            config.algorithm.share_prompts,
            "a prompt that is computed once would have the choices of one of its responses",
        ),
        "rollout.engine.router": (
            getattr(config.rollout.engine, "router", None),
            "through the router engines are not asked for their choices of experts",
        ),
    }
    for name, (value, reason) in reasons.items():
        if value:
            raise ValueError(f"{option} does not go with {name} = {toml_value(value)}: {reason}; remove one")
