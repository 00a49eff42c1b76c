"""Whether a server is a vLLM that a run can use; which flag it lacks otherwise."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from megatron_rapo.engines.exchange import Exchange, NoSuchRoute
from megatron_rapo.engines.vllm.flags import (
    BACKEND,
    DEV_MODE,
    EXTENSION,
    GUARD,
    LOGPROBS,
    PATH,
    SCALE_OUT,
    TRANSFER,
    VERSION,
    written,
)
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.access import API_KEY_VARIABLE, is_loopback

GENERATE = "/inference/v1/generate"
CONTACT_TIMEOUT_S = 60.0


async def describe(exchange: Exchange) -> dict[str, Any]:
    """What the server is (`Extension.rapo_describe`), and its version.

    Raises:
        RapoError: it is no vLLM, of another version, or lacks a flag.
        EngineLost: it does not answer.
    """
    version = await _version(exchange)
    await _check_routes(exchange)
    found = await _ask_extension(exchange)
    wanted = {"logprobs_mode": LOGPROBS, "backend": TRANSFER}
    expected = {"logprobs_mode": LOGPROBS[1], "backend": BACKEND}
    for name, flags in wanted.items():
        if found[name] != expected[name]:
            raise _lacks(exchange, f"it runs with {name} {found[name]!r}", written(flags))
    return {**found, "version": version}


async def _version(exchange: Exchange) -> str:
    try:
        version = str((await exchange.json("GET", "/version", timeout=CONTACT_TIMEOUT_S))["version"])
    except (NoSuchRoute, KeyError, TypeError):
        raise RapoError(
            f'{exchange.url} is no vLLM server, but rollout.engine.kind = "vllm"; set the kind to what it is'
        ) from None
    if not f"{version}.".startswith(f"{VERSION}."):
        raise RapoError(
            f"{exchange.url} is vLLM {version}, whose routes for weights may be others: this package knows "
            f"those of {VERSION}; install vllm=={VERSION}.0 there"
        )
    return version


async def _check_routes(exchange: Exchange) -> None:
    status = await exchange.status("GET", "/weight_info", timeout=CONTACT_TIMEOUT_S)
    if status == 404:
        raise _lacks(exchange, "it has no routes for weights", f"{DEV_MODE}=1 in its environment")
    if not is_loopback(urlsplit(exchange.url).hostname or ""):
        stranger = await exchange.status("GET", "/weight_info", timeout=CONTACT_TIMEOUT_S, key="stranger")
        if stranger != 401:
            flags = f"{written(GUARD)}, and {API_KEY_VARIABLE} in its environment"
            raise _lacks(exchange, "whoever reaches it can replace its weights", flags)
    try:
        await exchange.request("POST", GENERATE, {}, timeout=CONTACT_TIMEOUT_S)
    except RapoError as refusal:  # as it should: there is nothing to continue
        if "status 403" in str(refusal) or isinstance(refusal, NoSuchRoute):
            raise _lacks(exchange, f"{GENERATE} is closed", SCALE_OUT) from None
        if "status 4" not in str(refusal):
            raise


async def _ask_extension(exchange: Exchange) -> dict[str, Any]:
    try:
        body = {"method": "rapo_describe"}
        answer = await exchange.json("POST", "/collective_rpc", body, timeout=CONTACT_TIMEOUT_S)
        found: dict[str, Any] = answer["results"][0]
        return found
    except EngineLost as failure:
        if "status 5" not in str(failure):
            raise
        flags = f"{written(EXTENSION)}, with PYTHONPATH={PATH}"
        raise _lacks(exchange, "its workers do not know this package's extension", flags) from None
    except (KeyError, TypeError, IndexError):
        raise exchange.malformed("/collective_rpc", "no description", answer) from None


def _lacks(exchange: Exchange, what: str, flag: str) -> RapoError:
    return RapoError(
        f"{exchange.url} is a vLLM server that a run cannot use: {what}; start it with {flag} "
        "(`megatron-rapo engine vllm` prints all that it needs)"
    )
