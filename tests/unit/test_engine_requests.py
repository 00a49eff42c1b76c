"""What the client of an engine asks, request by request: routes, bodies, seconds; and how long it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from megatron_rapo.engines import exchange as exchange_module
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.engine import EngineInfo, Generation
from megatron_rapo.engines.exchange import EXCERPT, Exchange, NoSuchRoute, http_client
from megatron_rapo.engines.sglang import updates
from megatron_rapo.engines.sglang.answers import sampling_params, to_generated
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.access import is_loopback
from megatron_rapo.wire.bucket import lay_out
from megatron_rapo.wire.group import Meeting
from megatron_rapo.wire.slices import SliceMessage

URL = "http://127.0.0.1:7001"
TIMEOUT = 77.0
MODEL = {"model_path": "models/m", "weight_version": 3}
SERVER = {"tp_size": "2", "dtype": "bfloat16", "version": "0.5.21"}


class Asked(Exchange):
    """Notes each request, and answers from a table; a list is answered one after the other."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.url = URL
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []
        self._diagnose = None

    def _next(self, path: str, otherwise: Any) -> Any:
        found = self.answers.get(path, otherwise)
        if isinstance(found, list):
            found = found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def json(
        self, method: str, path: str, body: Any = None, *, timeout: float, when_late: str = ""
    ) -> Any:
        self.asked.append((method, path, body, timeout))
        return self._next(path, {"success": True})

    async def request(
        self, method: str, path: str, body: Any = None, *, timeout: float, when_late: str = ""
    ) -> Any:
        self.asked.append((method, path, body, timeout))
        return self._next(path, None)

    async def status(self, method: str, path: str, *, timeout: float) -> int:
        self.asked.append((method, path, None, timeout))
        return int(self._next(path, 405))


def asked(
    work: Callable[[SGLangClient], Coroutine[Any, Any, Any]],
    answers: dict[str, Any] | None = None,
    kind: type[SGLangClient] = SGLangClient,
) -> tuple[Any, list[Any]]:
    """What `work(client)` makes, and the requests of it; its error in place of that where it fails."""

    async def scenario() -> Any:
        async with http_client() as http:
            client = kind(http, URL, timeout=TIMEOUT)
            client._exchange = exchange = Asked(answers or {})
            try:
                return await work(client), exchange.asked
            except RapoError as error:
                return error, exchange.asked

    return asyncio.run(scenario())


CONTROL = 60.0
SESSIONS = ("GET", "/begin_weight_update", None, CONTROL)
BEGIN = ("POST", "/begin_weight_update", {"selector": "all"}, TIMEOUT)
END = ("POST", "/end_weight_update", {}, TIMEOUT)
QUIET = [
    ("POST", "/pause_generation", {"mode": "retract"}, CONTROL),
    ("POST", "/flush_cache", {}, CONTROL),
]
GO_ON = ("POST", "/continue_generation", {}, CONTROL)
FROM_DISK = (
    "POST",
    "/update_weights_from_disk",
    {"model_path": "/w", "weight_version": "8", "flush_cache": False, "abort_all_requests": False},
    TIMEOUT,
)
REFUSED, LOST = RapoError("refused"), EngineLost("lost")

MEETING = Meeting("10.0.0.1", 7000, "group", "gloo", 1, (3, 2))
JOIN = {"master_address": "10.0.0.1", "master_port": 7000, "group_name": "group", "backend": "gloo"}
JOIN |= {"rank_offset": 4, "world_size": 6}
VERSIONS: list[tuple[int | None, dict[str, Any]]] = [(None, {}), (8, {"weight_version": "8"})]
BUCKET = {
    "names": ["a", "b"],
    "dtypes": ["float32", "bfloat16"],
    "shapes": [[2, 3], [4]],
    "group_name": "group",
    "load_format": "flattened_bucket",
    "flush_cache": False,
}
HANDLES = {"serialized_named_tensors": ["handles of ['a']"] * 2, "flush_cache": False}
WANTED = [Generation((1,), 8, 0.5, seed=7, top_p=0.9, top_k=3), Generation((2, 3), 4, 0.0, stop=(9,))]
GENERATE = {
    "input_ids": [(1,), (2, 3)],
    "sampling_params": [
        {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "sampling_seed": 7},
        {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": [9]},
    ],
    "return_logprob": True,
}


async def receive_bucket(client: SGLangClient, *, version: int | None) -> None:
    layout = lay_out(["a", "b"], [torch.float32, torch.bfloat16], [(2, 3), (4,)])
    await client.receive_bucket(layout, "group", version, timeout=9.0)


async def receive_handles(client: SGLangClient, *, version: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "handles", lambda named: f"handles of {[name for name, _ in named]}")
        await client.receive_handles([("a", torch.zeros(1))], 2, version, timeout=9.0)


@pytest.mark.parametrize(
    ("work", "requests"),
    [
        (lambda c: c.pause("in_place"), [("POST", "/pause_generation", {"mode": "in_place"}, CONTROL)]),
        (lambda c: c.continue_generation(), [GO_ON]),
        (lambda c: c.flush_cache(), QUIET[1:]),
        (
            lambda c: c.release_memory(),
            [("POST", "/release_memory_occupation", {"tags": ["weights", "kv_cache"]}, CONTROL)],
        ),
        (
            lambda c: c.resume_memory(),
            [("POST", "/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}, CONTROL)],
        ),
        (lambda c: c.post("/x", {"a": 1}), [("POST", "/x", {"a": 1}, TIMEOUT)]),
        (lambda c: c.post("/x", {"a": 1}, timeout=5.0), [("POST", "/x", {"a": 1}, 5.0)]),
        (lambda c: c.silence(3.0), [("GET", "/model_info", None, 3.0)]),
        (lambda c: c.silence(30.0), [("GET", "/model_info", None, 5.0)]),
        (lambda c: c.begin_update(), [*QUIET, SESSIONS, BEGIN]),
        (lambda c: c.end_update(8), [SESSIONS, END, GO_ON]),
        (lambda c: c.abandon_update(), [END, GO_ON]),
        (lambda c: c.load_checkpoint(Path("/w"), 8), [*QUIET, FROM_DISK, GO_ON]),
        (
            lambda c: c.join_group(MEETING, 4, timeout=9.0),
            [("POST", "/init_weights_update_group", JOIN, 9.0)],
        ),
        *[
            (
                partial(receive_bucket, version=version),
                [("POST", "/update_weights_from_distributed", {**BUCKET, **named}, 9.0)],
            )
            for version, named in VERSIONS
        ],
        *[
            (
                partial(receive_handles, version=version),
                [("POST", "/update_weights_from_tensor", {**HANDLES, **named}, 9.0)],
            )
            for version, named in VERSIONS
        ],
        (lambda c: c.generate(WANTED, timeout=9.0), [("POST", "/generate", GENERATE, 9.0)]),
    ],
)
def test_each_request_has_its_route_its_body_and_its_seconds(work: Any, requests: list[Any]) -> None:
    answers = {"/generate": [[ANSWER, ANSWER]]}
    found, made = asked(work, answers)
    assert made == requests
    assert not isinstance(found, RapoError)


ANSWER = {
    "output_ids": [3, 4],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 4},
        "weight_version": 6,
        "weight_versions": [{"version": "5", "start": 0, "end": 1}],
        "output_token_logprobs": [[-0.5, 3, None], [-1.5, 4, None]],
    },
}


def test_an_answer_is_read_as_it_is() -> None:
    found = to_generated(ANSWER, "http://a")
    assert (found.token_ids.tolist(), found.log_probs.tolist()) == ([3, 4], [-0.5, -1.5])
    assert (found.versions, found.finish) == (("6", "5"), "stop")
    assert sampling_params(Generation((1,), 2, 0.0, ignore_eos=True))["ignore_eos"] is True


@pytest.mark.parametrize(
    ("work", "answers", "requests"),
    [
        # An engine without sessions is asked once whether it has them.
        (lambda c: c.begin_update(), {SESSIONS[1]: 404}, [*QUIET, SESSIONS]),
        (lambda c: c.end_update(8), {SESSIONS[1]: 404}, [SESSIONS, GO_ON]),
        # What is refused is undone, as far as it goes; an engine that is lost is asked nothing more.
        (lambda c: c.begin_update(), {"/pause_generation": LOST}, [QUIET[0]]),
        (lambda c: c.begin_update(), {"/pause_generation": REFUSED}, [QUIET[0], END, GO_ON]),
        (lambda c: c.begin_update(), {SESSIONS[1]: [405, LOST]}, [*QUIET, SESSIONS, BEGIN]),
        (
            lambda c: c.begin_update(),
            {SESSIONS[1]: [405, REFUSED, {}], END[1]: REFUSED},
            [*QUIET, SESSIONS, BEGIN, END, BEGIN],
        ),
        (
            lambda c: c.begin_update(),
            {SESSIONS[1]: [405, REFUSED, REFUSED]},
            [*QUIET, SESSIONS, BEGIN, END, BEGIN, END, GO_ON],
        ),
        (lambda c: c.end_update(8), {END[1]: REFUSED, GO_ON[1]: LOST}, [SESSIONS, END, GO_ON]),
        (lambda c: c.abandon_update(), {END[1]: LOST, GO_ON[1]: LOST}, [END, GO_ON]),
        *[
            (
                lambda c: c.load_checkpoint(Path("/w"), 8),
                {FROM_DISK[1]: answer},
                [*QUIET, FROM_DISK, *then],
            )
            for answer, then in [
                (REFUSED, [GO_ON]),
                *[(lost, []) for lost in (LOST, {}, {"message": "done"}, ["success"], None)],
            ]
        ],
    ],
)
def test_a_step_that_fails_is_undone(work: Any, answers: dict[str, Any], requests: list[Any]) -> None:
    answers = {
        path: list(found) if isinstance(found, list) and path == SESSIONS[1] else [found] * 3
        for path, found in answers.items()
    }
    _, made = asked(work, answers)
    assert made == requests


@pytest.mark.parametrize("sessions", [404, 405, 200])
def test_an_abandoned_update_is_ended_where_there_may_be_one(sessions: int) -> None:
    async def work(client: SGLangClient) -> None:
        await client.begin_update()
        await client.abandon_update()

    _, made = asked(work, {SESSIONS[1]: [sessions, {}]})
    opened = [] if sessions == 404 else [BEGIN, END]
    assert made == [*QUIET, SESSIONS, *opened, GO_ON]


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({}, {"software": "sglang 0.5.21"}),
        ({"server": "own"}, {"software": "own 0.5.21"}),
        ({"version": None}, {"software": "sglang of unknown version"}),
    ],
)
def test_an_engine_says_what_it_is(server: dict[str, Any], expected: dict[str, Any]) -> None:
    said = {name: value for name, value in {**SERVER, **server}.items() if value is not None}
    found, made = asked(lambda c: c.info(), {"/model_info": MODEL, "/server_info": said})
    usual = {"model_path": "models/m", "weight_version": "3", "tensor_parallel": 2, "dtype": "bfloat16"}
    assert found == EngineInfo(**{**usual, "software": "sglang 0.5.21", **expected})
    assert made == [("GET", path, None, CONTROL) for path in ("/model_info", "/server_info")]


@pytest.mark.parametrize("lacks", ["model_path", "weight_version", "tp_size", "dtype"])
def test_what_an_engine_does_not_say_is_named(lacks: str) -> None:
    model, server = ({k: v for k, v in one.items() if k != lacks} for one in (MODEL, SERVER))
    found, _ = asked(lambda c: c.info(), {"/model_info": model, "/server_info": server})
    assert isinstance(found, EngineLost)
    assert f"lacks '{lacks}'" in str(found)


@pytest.mark.parametrize(("answer", "found"), [(MODEL, "3"), ({}, None), ([], None), (None, None)])
def test_the_version_of_its_weights_is_read(answer: Any, found: str | None) -> None:
    version, _ = asked(lambda c: c.weight_version(), {"/model_info": [answer]})
    assert version == found if found else isinstance(version, EngineLost)


@pytest.mark.parametrize(("version", "named"), VERSIONS)
def test_slices_are_told_with_who_sends_them(version: int | None, named: dict[str, Any]) -> None:
    messages = [SliceMessage(1, 0, (("a", None, 0, 1), ("b", 1, 2, 4))), SliceMessage(0, 0, ())]

    async def work(client: SGLangClient) -> None:
        assert client.takes_slices
        await client.receive_slices(messages, "group", torch.bfloat16, version, timeout=9.0)

    _, made = asked(work, kind=EmbeddedClient)
    told = [{"source": 1, "engine_rank": 0, "slices": [["a", None, 0, 1], ["b", 1, 2, 4]]}]
    told.append({"source": 0, "engine_rank": 0, "slices": []})
    body = {"flush_cache": False, "group_name": "group", "dtype": "bfloat16", "messages": told, **named}
    assert made == [("POST", "/update_weights_from_shards", body, 9.0)]
    refused, made = asked(lambda c: c.receive_slices(messages, "group", torch.float32, 1, timeout=9.0))
    assert "takes whole tensors only" in str(refused) and not made


def test_checksums_take_their_time_where_there_are_any() -> None:
    answer = {"/weights_checksum": {"weight_version": 3, "checksums": {"a": "5"}}}
    found, made = asked(lambda c: c.weights_checksum(), answer, kind=EmbeddedClient)
    assert found == ("3", {"a": 5})
    assert made == [("GET", "/weights_checksum", None, TIMEOUT)]
    assert asked(lambda c: c.weights_checksum(), answer) == (None, [])


def test_an_embedded_server_is_none_of_sglangs() -> None:
    said = {"/model_info": MODEL, "/server_info": SERVER}
    refused, _ = asked(lambda c: c.info(), said, kind=EmbeddedClient)
    assert 'is an SGLang server, but rollout.engine.kind = "embedded"; set it to "sglang"' in str(refused)
    said["/server_info"] = {**SERVER, "server": "own"}
    assert asked(lambda c: c.info(), said, kind=EmbeddedClient)[0].software == "own 0.5.21"


def test_log_probs_of_prompts_are_all_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [(5, 6, 7), (8, 9)]
    entries = [[[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]], [[None, 8, None], [-3.0, 9, None]]]
    answers = [{"meta_info": {"input_token_logprobs": one}} for one in entries]
    found, made = asked(lambda c: c.prompt_log_probs(sequences), {"/generate": [answers]})
    assert [one.tolist() for one in found] == [[-1.0, -2.0], [-3.0]]
    [(_, _, body, seconds)] = made
    assert (body["input_ids"], body["logprob_start_len"], seconds) == (sequences, 0, TIMEOUT)
    assert body["sampling_params"] == [{"max_new_tokens": 1, "temperature": 1.0}] * 2
    silent = [{"meta_info": {}}] * 2
    assert asked(lambda c: c.prompt_log_probs(sequences), {"/generate": [silent]})[0] is None
    assert asked(lambda c: c.prompt_log_probs(sequences), {"/generate": REFUSED})[0] is None
    assert asked(lambda c: c.prompt_log_probs(sequences), {"/generate": LOST})[0] is LOST


@pytest.mark.parametrize("answer", [["one"], ["one", "two", "three"], {"a": 1, "b": 2}, "ab", None])
def test_as_many_responses_as_prompts_are_wanted(answer: Any) -> None:
    found, _ = asked(lambda c: c.generate(WANTED), {"/generate": [answer]})
    assert isinstance(found, EngineLost)
    assert "not a list of 2 responses" in str(found)


# How long it waits


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on while someone sleeps."""
    clock = [1000.0]

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(exchange_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(exchange_module.asyncio, "sleep", sleep)
    return clock


def test_it_waits_for_an_engine_as_long_as_it_is_told(now: list[float]) -> None:
    patience: list[float] = []

    async def work(client: SGLangClient) -> None:
        async def health_problem(timeout: float) -> str:
            patience.append(timeout)
            now[0] += timeout
            return "no answer"

        client._exchange.health_problem = health_problem  # type: ignore[method-assign]
        await client.until_healthy(12.0)

    found, _ = asked(work)
    assert isinstance(found, EngineLost)
    assert "was not ready within 12 s (no answer)" in str(found)
    # Five seconds a question, the rest of the time, and at the least a moment.
    assert patience == pytest.approx([5.0, 5.0, 1.8, 0.1])
    assert now[0] == pytest.approx(1012.2)


@pytest.mark.parametrize(("reasons", "asks"), [([], 3), ([None, "it was killed"], 2)])
def test_it_waits_no_longer_for_an_engine_that_has_ended_or_is_ready(
    reasons: list[str | None], asks: int, now: list[float]
) -> None:
    problems = ["status 503", "status 503"]
    asks_made: list[float] = []

    async def work(client: SGLangClient) -> None:
        async def health_problem(timeout: float) -> str | None:
            asks_made.append(timeout)
            return problems.pop(0) if problems else None

        client._exchange.health_problem = health_problem  # type: ignore[method-assign]
        client._exchange.diagnosis = lambda: reasons.pop(0) if reasons else None  # type: ignore[method-assign]
        await client.until_healthy(600.0)

    ends = bool(reasons)
    found, _ = asked(work)
    assert len(asks_made) == asks
    assert now[0] == pytest.approx(1000.0 + 0.1 * (asks - 1))
    if ends:
        assert str(found) == f"{URL} did not become ready: it was killed"
    else:
        assert found is None


def test_a_busy_cache_is_asked_for_again_so_long(now: list[float]) -> None:
    found, made = asked(lambda c: c.flush_cache(), {"/flush_cache": [REFUSED] * 500})
    assert found is REFUSED
    assert len(made) in (101, 102)  # every tenth of a second, for ten seconds
    assert 1010.0 - 1e-6 <= now[0] <= 1010.2
    found, made = asked(lambda c: c.flush_cache(), {"/flush_cache": [LOST] * 500})
    assert (found, len(made)) == (LOST, 1)


# One exchange


def exchanged(answer: httpx.Response | Exception, url: str = URL, diagnose: Any = None) -> Any:
    """What `json` makes of an answer: the content, or the error."""

    def serve(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def scenario() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(serve)) as http:
            try:
                return await Exchange(http, url, diagnose).json(
                    "POST", "/x", {}, timeout=30.0, when_late="wait"
                )
            except RapoError as error:
                return error

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (httpx.Response(200, json={"a": 1}), dict, ""),
        (httpx.Response(202, json=[1]), list, ""),
        (httpx.Response(200, json={"success": True}), dict, ""),
        (httpx.Response(200, json={"success": False, "message": "no"}), RapoError, f"{URL}/x refused: no"),
        (httpx.Response(200, json={"success": None}), RapoError, "refused: {'success': None}"),
        (httpx.Response(200, json={"success": "yes"}), RapoError, "refused"),
        (httpx.Response(201, json={}), EngineLost, "answered status 201"),
        (httpx.Response(203, json={}), EngineLost, "answered status 203"),
        (httpx.Response(302, json={}), EngineLost, "answered status 302"),
        (httpx.Response(400, text="too long"), RapoError, "answered status 400: too long"),
        (httpx.Response(401), RapoError, "answered 401: the server demands an API key"),
        (httpx.Response(402), RapoError, "answered status 402"),
        (httpx.Response(404), NoSuchRoute, "answered status 404"),
        (httpx.Response(405), RapoError, "answered status 405"),
        (httpx.Response(499), RapoError, "answered status 499"),
        (httpx.Response(500, text="out of memory"), EngineLost, "answered status 500: out of memory"),
        (httpx.Response(200, text="<html>"), EngineLost, "answered not JSON: <html>"),
        (httpx.ConnectError("refused"), EngineLost, r"cannot connect (ConnectError: refused); check that"),
        (httpx.ConnectTimeout(""), EngineLost, "cannot connect (ConnectTimeout); check that"),
        (httpx.ReadError("reset"), EngineLost, "the connection was lost (ReadError: reset); look into"),
    ],
)
def test_each_answer_is_content_a_refusal_or_a_lost_engine(answer: Any, kind: type, message: str) -> None:
    found = exchanged(answer)
    assert type(found) is kind
    assert message in str(found)


def test_an_answer_that_is_late_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(exchanged(TimeoutError())) == f"POST {URL}/x was not answered within 30 s; wait"
    told = exchanged(TimeoutError(), diagnose=lambda url: f"{url} was killed")
    assert str(told) == f"POST {URL}/x was not answered within 30 s; {URL} was killed"
    assert str(exchanged(TimeoutError(), diagnose=lambda url: None)).endswith("; wait")
    assert exchanged(httpx.Response(200, json={}), url=URL + "/") == {}


@pytest.mark.parametrize(("length", "cut"), [(EXCERPT - 1, False), (EXCERPT, False), (EXCERPT + 1, True)])
def test_a_long_answer_is_shown_in_part(length: int, cut: bool) -> None:
    assert EXCERPT == 500
    shown = exchange_module._excerpt("x" * length)
    assert shown == ("x" * EXCERPT + f"… ({length} characters)" if cut else "x" * length)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("::", False),
        ("0.0.0.0", False),
        ("engine.example", False),
        ("", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, own: bool) -> None:
    assert is_loopback(host) == own


def test_connections_are_not_kept_and_the_environments_proxy_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:1")
    monkeypatch.delenv("RAPO_ENGINE_API_KEY", raising=False)
    http = http_client()
    assert http._mounts == {}, "no proxy"
    assert "authorization" not in http.headers
    pool: Any = http._transport
    assert pool._pool._max_keepalive_connections == 0
    asyncio.run(http.aclose())
