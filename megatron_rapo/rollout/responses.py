"""From an engine's answer to a `Response`: nothing unchecked goes into training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_rapo.engines.engine import Generated
from megatron_rapo.episode.choices import Choices, ChoiceShape
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.response import Response


def to_response(
    answer: Generated,
    *,
    weight_version: int,
    vocab_size: int,
    max_tokens: int,
    source: str,
    given: int = 0,
    experts: ChoiceShape | None = None,
) -> Response:
    """Checks what an engine generated.

    Args:
        answer: of one continuation.
        weight_version: of the weights that must have sampled every token.
        vocab_size: token ids are below it.
        max_tokens: that were asked for.
        source: the server's address, for errors.
        given: tokens that it continues.
        experts: of the choices that it is to have; None: none are needed.

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
    choices = None if experts is None else _choices(answer, given + len(token_ids) - 1, experts, source)
    return Response(token_ids.astype(np.int32), log_probs, weight_version, finish, choices)


def _choices(answer: Generated, tokens: int, shape: ChoiceShape, source: str) -> Choices:
    """`[tokens, layers, chosen]`, each token's experts in a layer different ones."""
    told = answer.experts
    if told is None:
        raise RapoError(
            f"{source} does not tell the experts that its routers chose, which algorithm.routing_replay = "
            '"engine" needs; serve the mixture that is trained, or set "old"'
        )
    if told.size != tokens * shape.layers * shape.chosen:
        raise RapoError(
            f"{source} told {told.size} experts of {tokens} tokens, where {shape.chosen} in each of "
            f"{shape.layers} layers were expected; serve the model that is trained"
        )
    found = told.reshape(tokens, shape.layers, shape.chosen)
    ordered = np.sort(found, axis=-1)
    if ordered.size and (
        ordered[..., 0].min() < 0
        or ordered[..., -1].max() >= shape.experts
        or (ordered[..., 1:] == ordered[..., :-1]).any()
    ):
        raise RapoError(
            f"{source} told choices that are none: each is of {shape.chosen} different experts from 0 to "
            f"{shape.experts - 1}; serve the model that is trained"
        )
    return found.astype(shape.dtype)


def _check_versions(versions: Sequence[str], expected: int, source: str) -> None:
    for version in versions:
        if version != str(expected):
            raise EngineLost(
                f"{source} sampled with weights version {version!r} in place of {expected}: it missed the "
                "last update, was started anew, or another run updates it; give every run its own servers"
            )
