"""From an engine's answer to a `Response`: nothing unchecked goes into training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_rapo.engines.engine import Generated
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.response import Response


def to_response(
    answer: Generated, *, weight_version: int, vocab_size: int, max_tokens: int, source: str
) -> Response:
    """Checks what an engine generated.

    Args:
        answer: of one continuation.
        weight_version: of the weights that must have sampled every token.
        vocab_size: token ids are below it.
        max_tokens: that were asked for.
        source: the server's address, for errors.

    Raises:
        EngineLost: the response was aborted, or sampled by other weights: the engine may be used again once
            it has these.
        RapoError: it is not what was asked for.
    """
    token_ids, log_probs = answer.token_ids, answer.log_probs
    _check_versions(answer.versions, weight_version, source)
    if answer.finish not in ("stop", "length"):
        raise EngineLost(
            f"{source} ended a response with finish_reason {answer.finish}, neither stop nor length; "
            "look into the server's log for why it was cut off"
        )
    if not 1 <= len(token_ids) <= max_tokens:
        raise RapoError(f"{source} sent {len(token_ids)} tokens where 1 to {max_tokens} were asked for")
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise RapoError(
            f"{source} sent token ids from {token_ids.min()} to {token_ids.max()}, but the policy's "
            f"vocabulary has {vocab_size}; serve the model that is trained"
        )
    if not np.isfinite(log_probs).all():
        raise RapoError(f"{source} sent log-probs that are not finite: the engine's weights may be broken")
    finish: Literal["stop", "length"] = "stop" if answer.finish == "stop" else "length"
    return Response(token_ids.astype(np.int32), log_probs, weight_version, finish)


def _check_versions(versions: Sequence[str], expected: int, source: str) -> None:
    for version in versions:
        if version != str(expected):
            raise EngineLost(
                f"{source} sampled with weights version {version!r} in place of {expected}: it missed the "
                "last update, was started anew, or another run updates it; give every run its own servers"
            )
