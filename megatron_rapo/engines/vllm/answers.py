"""vLLM's words for what is asked for and answered: `/inference/v1/generate`, a prompt a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rapo.engines.engine import Generated, Generation, numbers
from megatron_rapo.errors import EngineLost, RapoError


def generate_body(wanted: Generation) -> dict[str, Any]:
    """What it is asked. vLLM ignores parameters that it does not know."""
    params: dict[str, Any] = {
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    if wanted.seed is not None:
        params["seed"] = wanted.seed
    if wanted.stop:
        params["stop_token_ids"] = list(wanted.stop)
    if wanted.ignore_eos:
        params["ignore_eos"] = True
    return {"token_ids": list(wanted.token_ids), "sampling_params": params}


def to_generated(answer: Any, source: str) -> Generated:
    """What the answer to one request holds.

    Args:
        answer: `{choices: [{token_ids, finish_reason, weight_versions, logprobs: {content}, …}], …}`.
        source: whose it is, for errors.

    Raises:
        EngineLost: it is none.
        RapoError: its log-probs are not of its tokens.
    """
    try:
        [choice] = answer["choices"]
        token_ids = numbers(choice["token_ids"], np.int64)
        reported = choice["logprobs"]["content"]
        log_probs = numbers([entry["logprob"] for entry in reported], np.float32)
        log_prob_ids = numbers([entry["token_id"] for entry in reported], np.int64)
        versions = tuple(str(span["version"]) for span in choice["weight_versions"])
        finish = str(choice["finish_reason"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise EngineLost(
            f"{source} sent a response that lacks what vLLM 0.32 sends ({error!r}): {str(answer)[:500]}"
        ) from error
    # What was cut off may lack some, and is of no use in any case.
    if finish in ("stop", "length") and not np.array_equal(token_ids, log_prob_ids):
        raise RapoError(
            f"{source} sent {len(token_ids)} tokens and {len(log_probs)} log-probs, which are not of the "
            "same tokens; this server's responses cannot be trained on"
        )
    return Generated(token_ids, log_probs, versions, finish)


def prompt_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """What is asked for the log-probs of a prompt."""
    params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
    return {"token_ids": list(token_ids), "sampling_params": params}


def prompt_log_probs(answer: Any, token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """`[tokens - 1]`, of all tokens but the first.

    Raises:
        KeyError, TypeError, IndexError: the answer does not tell them.
    """
    told = answer["prompt_logprobs"]
    return np.array(
        [told[place][str(token)]["logprob"] for place, token in enumerate(token_ids) if place], np.float64
    )
