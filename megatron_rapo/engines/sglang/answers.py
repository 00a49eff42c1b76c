"""SGLang's words for what is asked for and answered: `sampling_params`, and entries of `/generate`."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rapo.engines.engine import Generated, Generation, numbers
from megatron_rapo.errors import EngineLost, RapoError


def generate_body(wanted: Sequence[Generation]) -> dict[str, Any]:
    """What `/generate` is asked, with a list in answer."""
    return {
        "input_ids": [one.token_ids for one in wanted],
        "sampling_params": [sampling_params(one) for one in wanted],
        "return_logprob": True,
        **({"return_routed_experts": True} if any(one.experts for one in wanted) else {}),
    }


def sampling_params(wanted: Generation) -> dict[str, Any]:
    """How one continuation is sampled."""
    params: dict[str, Any] = {
        "max_new_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
    }
    if wanted.seed is not None:
        params["sampling_seed"] = wanted.seed
    if wanted.stop:
        params["stop_token_ids"] = list(wanted.stop)
    if wanted.ignore_eos:
        params["ignore_eos"] = True
    return params


def to_generated(answer: Any, source: str) -> Generated:
    """What an entry of the answer holds.

    Args:
        answer: `{output_ids, meta_info{finish_reason, weight_version, output_token_logprobs, …}, …}`.
        source: whose it is, for errors.

    Raises:
        EngineLost: it is none.
        RapoError: its log-probs are not of its tokens.
    """
    try:
        meta = answer["meta_info"]
        token_ids = numbers(answer["output_ids"], np.int64)
        reported = meta["output_token_logprobs"]
        log_probs = numbers([entry[0] for entry in reported], np.float32)
        log_prob_ids = numbers([entry[1] for entry in reported], np.int64)
        reason = meta["finish_reason"]
        finish = reason["type"] if reason["type"] in ("stop", "length") else str(reason)
        versions = [meta["weight_version"]]
        versions += [span["version"] for span in meta.get("weight_versions") or []]
        told = meta.get("routed_experts")
        experts = None if told is None else np.frombuffer(b64decode(told, validate=True), np.int32)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise EngineLost(
            f"{source} sent a response that lacks what SGLang sends ({error!r}): {str(answer)[:500]}; "
            "is this an SGLang server, 0.5.14 or later?"
        ) from error
    # What was cut off may lack some, and is of no use in any case.
    if finish in ("stop", "length") and not np.array_equal(token_ids, log_prob_ids):
        raise RapoError(
            f"{source} sent {len(token_ids)} tokens and {len(log_probs)} log-probs, which are not of the "
            "same tokens; this server's responses cannot be trained on"
        )
    return Generated(token_ids, log_probs, tuple(map(str, versions)), finish, experts)


def prompt_log_probs(
    answers: Sequence[Any], sequences: Sequence[Sequence[int]]
) -> list[np.ndarray[Any, np.dtype[np.float64]]] | None:
    """`[tokens - 1]` of each sequence; None where the answers do not tell them."""
    told = [answer["meta_info"].get("input_token_logprobs") for answer in answers]
    if not all(told):
        return None
    return [
        np.array([entry[0] for entry in entries[1 - len(sequence) :]], np.float64)
        for entries, sequence in zip(told, sequences, strict=True)
    ]
