"""Where choices of experts can be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
