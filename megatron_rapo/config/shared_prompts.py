"""Where what sequences begin with can be computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def check_shared_prompts(config: RunConfig) -> None:
    """Refuses `algorithm.share_prompts` where it cannot be, or has no effect.

    Raises:
        ValueError: it is set.
    """
    if not config.algorithm.share_prompts:
        return
    if config.parallel.context_parallel > 1:
        raise ValueError(
            "algorithm.share_prompts = true does not go with parallel.context_parallel = "
            f"{config.parallel.context_parallel}, which cuts each sequence into chunks of one length: "
            "sequences that share some of their tokens cannot be; remove one of them"
        )
    if config.demonstrations is not None:
        raise ValueError(
            f'algorithm.share_prompts = true would have no effect: method "{config.algorithm.method}" learns '
            "from texts that are given, each with a prompt of its own; remove it"
        )
