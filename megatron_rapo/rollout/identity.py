"""Whether an engine serves the model that is trained, and is none that another address names as well."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rapo.engines.address import server_of
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.hf_config import read_architecture


def check_distinct(urls: Sequence[str]) -> None:
    """Refuses addresses that name one server by different names of its host: it would get weights twice.

    A name that cannot be resolved is left to whoever connects to it.

    Raises:
        RapoError: two addresses lead to the same host, port and path.
    """
    seen: dict[tuple[str, int, str], str] = {}
    for url in urls:
        host, port, path = server_of(url)
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError:
            continue
        for address in found:
            if (other := seen.setdefault((address, port, path), url)) != url:
                raise RapoError(
                    f"rollout.engine.urls: {other} and {url} are the same server ({address}); name each once"
                )


def check_model(url: str, served: Path, architecture: Architecture) -> None:
    """Refuses an engine of another model before weights are sent, which can kill it or be read as nonsense.

    Weights may differ, as the next update replaces them.

    Args:
        url: the engine's address.
        served: the model folder that the engine names. Where this machine does not have it, nothing is known:
            the folder of an earlier update is gone, say.
        architecture: the policy's.

    Raises:
        RapoError: it serves another model.
    """
    if not (served / "config.json").is_file():
        return
    try:
        found = asdict(read_architecture(served))
    except RapoError as error:
        raise RapoError(f"{url} serves another model than the one that is trained: {error}") from error
    wrong = {
        name: (found[name], value) for name, value in asdict(architecture).items() if found[name] != value
    }
    if wrong:
        shown = ", ".join(f"{name} {theirs} in place of {ours}" for name, (theirs, ours) in wrong.items())
        raise RapoError(
            f"{url} serves {served}, another model than the one that is trained ({shown}); serve the model "
            "of model.path there"
        )


def check_context(url: str, context_length: int | None, longest: int) -> None:
    """Refuses an engine that would cut, or refuse, the longest prompt and response.

    Args:
        url: the engine's address.
        context_length: tokens that it takes; None where it does not tell.
        longest: tokens of the longest prompt and response of the run.

    Raises:
        RapoError: it takes fewer.
    """
    if context_length is not None and context_length < longest:
        raise RapoError(
            f"{url} takes {context_length} tokens of prompt and response, and rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens are {longest}: start it with as many (vLLM: --max-model-len "
            f"{longest}), or lower those"
        )
