"""What vLLM is asked, request by request; what makes of a vLLM one that a run can use; what it may answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rapo.engines.engine import EngineInfo, Generation
from megatron_rapo.engines.exchange import Exchange, NoSuchRoute, http_client
from megatron_rapo.engines.vllm import updates
from megatron_rapo.engines.vllm.answers import generate_body, prompt_log_probs, to_generated
from megatron_rapo.engines.vllm.client import VLLMClient
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.bucket import lay_out
from megatron_rapo.wire.group import Meeting

URL = "http://127.0.0.1:7001"
TIMEOUT, CONTROL = 77.0, 60.0
DESCRIPTION = {
    "model_path": "models/m",
    "dtype": "bfloat16",
    "ranks": 2,
    "context_length": 2048,
    "logprobs_mode": "processed_logprobs",
    "sleep_mode": True,
    "backend": "rapo",
}
USABLE: dict[str, Any] = {
    "/version": {"version": "0.32.0"},
    "/weight_info": {"weight_version": 3},
    "/collective_rpc": {"results": [DESCRIPTION, DESCRIPTION]},
    "/inference/v1/generate": RapoError("answered status 400: token_ids: field required"),
}


class Asked(Exchange):
    """Notes each request, and answers from a table; a list is answered one after the other."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.url = answers.get("url", URL)
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []
        self._diagnose = None

    def _next(self, path: str) -> Any:
        found = self.answers.get(path, {"success": True, "results": [{"whole": True}]})
        if isinstance(found, list):
            found = found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def json(
        self, method: str, path: str, body: Any = None, *, timeout: float, when_late: str = ""
    ) -> Any:
        self.asked.append((method, path, body, timeout))
        return self._next(path)

    request = json

    async def status(self, method: str, path: str, *, timeout: float, key: str | None = None) -> int:
        self.asked.append((method, path, None, timeout))
        if key is not None:
            return int(self.answers.get("to a stranger", 200))
        return 404 if isinstance(self.answers.get(path), NoSuchRoute) else 200


def asked(
    work: Callable[[VLLMClient], Coroutine[Any, Any, Any]], answers: dict[str, Any] | None = None
) -> tuple[Any, list[Any]]:
    """What `work(client)` makes, and the requests of it; its error in place of that where it fails."""

    async def scenario() -> Any:
        async with http_client() as http:
            client = VLLMClient(http, URL, timeout=TIMEOUT)
            client._exchange = exchange = Asked(answers or {})
            try:
                return await work(client), exchange.asked
            except RapoError as error:
                return error, exchange.asked

    return asyncio.run(scenario())


PAUSE = ("POST", "/pause?mode=keep", None, CONTROL)
ABANDON = ("POST", "/collective_rpc", {"method": "rapo_abandon"}, CONTROL)
START = ("POST", "/start_weight_update", {}, CONTROL)
FINISH = ("POST", "/finish_weight_update", {"weight_version": "8"}, TIMEOUT)
RESET = ("POST", "/reset_prefix_cache?reset_running_requests=true", None, CONTROL)
RESUME = ("POST", "/resume", None, CONTROL)
LAYOUT = lay_out(["a", "b"], [torch.float32, torch.bfloat16], [(2, 3), (4,)])
BUCKET = {"layout": [["a", "float32", [2, 3]], ["b", "bfloat16", [4]]], "group": "group"}
MEETING = Meeting("10.0.0.1", 7000, "group", "gloo", 1, (3, 2))
INVITATION = {
    "address": "10.0.0.1",
    "port": 7000,
    "name": "group",
    "backend": "gloo",
    "first_rank": 4,
    "size": 6,
    "timeout_s": 9.0,
}


def piece(update_info: dict[str, Any], timeout: float = 9.0) -> tuple[Any, ...]:
    return ("POST", "/update_weights", {"update_info": update_info}, timeout)


async def whole_update(client: VLLMClient) -> None:
    await client.begin_update()
    await client.receive_bucket(LAYOUT, "group", None, timeout=9.0)
    await client.receive_bucket(LAYOUT, "group", 8, timeout=9.0)
    await client.end_update(8)


async def handles(client: VLLMClient) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "share", lambda named: [f"handle of {name}" for name, _ in named])
        await client.receive_handles([("a", torch.zeros(1))], 2, None, timeout=9.0)


async def abandoned(client: VLLMClient) -> None:
    await client.receive_bucket(LAYOUT, "group", None, timeout=9.0)
    await client.abandon_update()


async def begun_and_abandoned(client: VLLMClient) -> None:
    await client.begin_update()
    await client.abandon_update()


async def abandoned_twice(client: VLLMClient) -> None:
    await abandoned(client)
    client._exchange.answers["/collective_rpc"] = {"results": [{"whole": False}]}  # type: ignore[attr-defined]
    await client.begin_update()
    await client.abandon_update()
    await whole_update(client)


@pytest.mark.parametrize(
    ("work", "requests"),
    [
        (lambda c: c.silence(30.0), [("GET", "/version", None, 5.0)]),
        (lambda c: c.silence(3.0), [("GET", "/version", None, 3.0)]),
        (lambda c: c.begin_update(), [PAUSE, ABANDON]),
        (whole_update, [PAUSE, ABANDON, START, piece(BUCKET), piece(BUCKET), FINISH, RESET, RESUME]),
        (lambda c: c.abandon_update(), [RESUME]),
        (begun_and_abandoned, [PAUSE, ABANDON, RESUME]),
        (abandoned, [START, piece(BUCKET)]),  # a token now would end the server: it stays paused
        (
            abandoned_twice,
            [
                *(START, piece(BUCKET), PAUSE, ABANDON),
                *(PAUSE, ABANDON, START, piece(BUCKET), piece(BUCKET), FINISH, RESET, RESUME),
            ],
        ),
        (handles, [START, piece({"shared": ["handle of a"]})]),
        (
            lambda c: c.load_checkpoint(Path("/w"), 8),
            [PAUSE, ABANDON, START, piece({"folder": "/w"}, TIMEOUT), FINISH, RESET, RESUME],
        ),
        (
            lambda c: c.join_group(MEETING, 4, timeout=9.0),
            [("POST", "/init_weight_transfer_engine", {"init_info": INVITATION}, 9.0)],
        ),
        (lambda c: c.flush_cache(), [("POST", "/reset_prefix_cache", None, CONTROL)]),
        (
            lambda c: c.resume_memory(),
            [("POST", "/wake_up", None, CONTROL), PAUSE],
        ),
    ],
)
def test_each_request_has_its_route_its_body_and_its_seconds(work: Any, requests: list[Any]) -> None:
    found, made = asked(work)
    assert not isinstance(found, RapoError)
    assert made == requests


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_failed_update_is_never_followed_by_a_token(path: str) -> None:
    async def work(client: VLLMClient) -> None:
        try:
            await whole_update(client)
        finally:
            await client.abandon_update()

    found, made = asked(work, {path: EngineLost("lost")})
    assert isinstance(found, EngineLost)
    assert RESUME not in made


@pytest.mark.parametrize("path", ["/pause?mode=keep", "/collective_rpc"])
def test_a_lost_engine_is_asked_nothing_more(path: str) -> None:
    """Each further request to one that is silent would take its whole time."""
    found, made = asked(lambda client: client.begin_update(), {path: EngineLost("it was not answered")})
    assert isinstance(found, EngineLost)
    assert made[-1][1] == path


@pytest.mark.parametrize("results", [["False"], [{"whole": "True"}], [None], [{}]])
def test_a_worker_that_does_not_say_whether_its_model_is_whole_is_refused(results: list[Any]) -> None:
    """vLLM's route makes texts of what is neither a dictionary nor a list."""
    found, _ = asked(lambda client: client.begin_update(), {"/collective_rpc": {"results": results}})
    assert isinstance(found, EngineLost)
    assert "/collective_rpc answered" in str(found)


def test_an_update_without_weights_is_none() -> None:
    found, made = asked(lambda client: client.end_update(8))
    assert "got no weights" in str(found)
    assert made == []


def test_a_cache_that_is_held_is_asked_for_again() -> None:
    held = RapoError("refused")
    found, made = asked(lambda client: client.flush_cache(), {"/reset_prefix_cache": [held, held, {}]})
    assert found is None
    assert len(made) == 3


# Generation


def test_a_continuation_is_asked_for_in_vllms_words() -> None:
    wanted = Generation((1, 2), 8, 0.5, seed=7, top_p=0.9, top_k=3, stop=(9,), ignore_eos=True)
    always = {"logprobs": 0, "detokenize": False}
    assert generate_body(wanted) == {
        "token_ids": [1, 2],
        "sampling_params": {
            "max_tokens": 8,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 7,
            "stop_token_ids": [9],
            "ignore_eos": True,
            **always,
        },
    }
    plain = generate_body(Generation((3,), 4, 1.0))["sampling_params"]
    assert plain == {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, **always}


def choice(**changes: Any) -> dict[str, Any]:
    usual = {
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "logprobs": {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -0.25}]},
    }
    return {"choices": [{**usual, **changes}]}


def test_an_answer_is_read() -> None:
    found = to_generated(choice(), URL)
    assert found.token_ids.tolist() == [5, 6]
    assert found.log_probs.tolist() == [-0.5, -0.25]
    assert (found.versions, found.finish) == (("3", "4"), "stop")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        choice(logprobs=None),
        choice(weight_versions=None),
        choice(token_ids=None),
        {"choices": [{}, {}]},
    ],
)
def test_an_answer_that_is_none_takes_the_engine_out(answer: Any) -> None:
    with pytest.raises(EngineLost, match="lacks what vLLM"):
        to_generated(answer, URL)


def test_log_probs_of_other_tokens_are_refused() -> None:
    with pytest.raises(RapoError, match="not of the same tokens"):
        to_generated(choice(token_ids=[5, 7]), URL)
    assert to_generated(choice(token_ids=[5], finish_reason="abort"), URL).finish == "abort"


def test_all_continuations_are_under_way_together_and_answered_in_order() -> None:
    answers = [choice(token_ids=[5, 6]), choice(finish_reason="length")]
    wanted = [Generation((1,), 2, 0.0), Generation((2,), 2, 0.0)]
    found, made = asked(lambda c: c.generate(wanted, timeout=5.0), {"/inference/v1/generate": answers})
    assert [one.finish for one in found] == ["stop", "length"]
    assert [request[2]["token_ids"] for request in made] == [[1], [2]]
    assert {request[3] for request in made} == {5.0}


def test_log_probs_of_a_prompt_are_found_by_its_tokens() -> None:
    told = [None, {"8": {"logprob": -1.0}, "3": {"logprob": -9.0}}, {"9": {"logprob": -2.0}}]
    assert prompt_log_probs({"prompt_logprobs": told}, [7, 8, 9]).tolist() == [-1.0, -2.0]


# First contact


def test_a_vllm_says_what_it_is_and_is_looked_at_once() -> None:
    async def twice(client: VLLMClient) -> EngineInfo:
        await client.info()
        return await client.info()

    found, made = asked(twice, dict(USABLE))
    assert found == EngineInfo("models/m", "3", 2, "bfloat16", "vllm 0.32.0", 2048)
    assert [request[1] for request in made].count("/collective_rpc") == 1


NOT_FOUND, CLOSED = NoSuchRoute("answered status 404"), RapoError("answered status 403: not enabled")
INSIDE = EngineLost("answered status 500: no attribute rapo_describe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"/version": NOT_FOUND}, 'is no vLLM server, but rollout.engine.kind = "vllm"'),
        ({"/version": {"version": "0.31.2"}}, "is vLLM 0.31.2, .* install vllm==0.32.0 there"),
        ({"/version": {"version": "0.320.1"}}, "is vLLM 0.320.1, "),
        ({"/weight_info": NOT_FOUND}, "start it with VLLM_SERVER_DEV_MODE=1 in its environment"),
        ({"/inference/v1/generate": CLOSED}, "is closed; start it with --enable-scale-out"),
        ({"/inference/v1/generate": NOT_FOUND}, "is closed; start it with --enable-scale-out"),
        ({"/collective_rpc": INSIDE}, "--worker-extension-cls rapo_vllm.Extension, with PYTHONPATH=/"),
        (
            {"/collective_rpc": {"results": [{**DESCRIPTION, "logprobs_mode": "raw_logprobs"}]}},
            "logprobs_mode 'raw_logprobs'; start it with --logprobs-mode processed_logprobs",
        ),
        (
            {"/collective_rpc": {"results": [{**DESCRIPTION, "backend": "nccl"}]}},
            """backend 'nccl'; start it with --weight-transfer-config '{"backend":"rapo"}'""",
        ),
    ],
)
def test_a_vllm_that_lacks_something_is_refused_with_the_flag(changes: dict[str, Any], message: str) -> None:
    found, _ = asked(lambda client: client.info(), {**USABLE, **changes})
    assert isinstance(found, RapoError) and not isinstance(found, EngineLost)
    assert URL in str(found)
    with pytest.raises(RapoError, match=message):
        raise found


def test_a_vllm_on_the_network_whose_weights_anyone_may_replace_is_refused() -> None:
    away = {**USABLE, "url": "http://10.0.0.2:7001"}
    found, _ = asked(lambda client: client.info(), away)
    assert "start it with --middleware rapo_vllm.Guard, and RAPO_ENGINE_API_KEY in its" in str(found)
    found, _ = asked(lambda client: client.info(), {**away, "to a stranger": 401})
    assert isinstance(found, EngineInfo)


@pytest.mark.parametrize("path", ["/version", "/collective_rpc", "/inference/v1/generate"])
def test_a_vllm_that_does_not_answer_is_lost(path: str) -> None:
    found, _ = asked(lambda client: client.info(), {**USABLE, path: EngineLost("the connection was lost")})
    assert isinstance(found, EngineLost)


def test_memory_is_given_back_by_servers_with_sleep_mode_alone() -> None:
    _, made = asked(lambda client: client.release_memory(), dict(USABLE))
    assert made[-1] == ("POST", "/sleep?level=2", None, CONTROL)
    without = {**USABLE, "/collective_rpc": {"results": [{**DESCRIPTION, "sleep_mode": False}]}}
    found, _ = asked(lambda client: client.release_memory(), without)
    assert "start it with --enable-sleep-mode" in str(found)
