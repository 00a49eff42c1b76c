"""From an engine's answer to a `Response`: nothing unchecked goes into training."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.response import Response


def to_response(
    answer: dict[str, Any], *, weight_version: int, vocab_size: int, max_tokens: int, source: str
) -> Response:
    """Checks one answer of `/generate` and takes from it what training needs.

    Args:
        answer: `{output_ids, meta_info{finish_reason, weight_version, output_token_logprobs, …}, …}`.
        weight_version: of the weights that must have sampled every token.
        vocab_size: token ids are below it.
        max_tokens: that were asked for.
        source: the server's address, for errors.

    Raises:
        EngineLost: the response is none, was aborted, or sampled by other weights: the engine may be used
            again once it has these.
        RapoError: it is not what was asked for.
    """
    try:
        meta = answer["meta_info"]
        token_ids = np.array(answer["output_ids"], dtype=np.int64)
        reported = meta["output_token_logprobs"]
        log_probs = np.array([entry[0] for entry in reported], dtype=np.float32)
        log_prob_ids = np.array([entry[1] for entry in reported], dtype=np.int64)
        finish = meta["finish_reason"]["type"]
        versions = [meta["weight_version"]]
        versions += [span["version"] for span in meta.get("weight_versions") or []]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineLost(
            f"{source} sent a response that lacks what SGLang sends ({error!r}): {str(answer)[:500]}; "
            "is this an SGLang server, 0.5.14 or later?"
        ) from error
    _check_versions(versions, weight_version, source)
    if finish not in ("stop", "length"):
        raise EngineLost(
            f"{source} ended a response with finish_reason {meta['finish_reason']}, neither stop nor length; "
            "look into the server's log for why it was cut off"
        )
    if not np.array_equal(token_ids, log_prob_ids):
        raise RapoError(
            f"{source} sent {len(token_ids)} tokens and {len(log_probs)} log-probs, which are not of the "
            "same tokens; this server's responses cannot be trained on"
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
    return Response(token_ids.astype(np.int32), log_probs, weight_version, finish)


def _check_versions(versions: list[Any], expected: int, source: str) -> None:
    for version in versions:
        if str(version) != str(expected):
            raise EngineLost(
                f"{source} sampled with weights version {version!r} in place of {expected}: it missed the "
                "last update, was started anew, or another run updates it; give every run its own servers"
            )
