"""The embedded server around an engine that does as it is told: the order of work, pauses, aborts, routes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megatron_rapo import __version__
from megatron_rapo.embedded_server.app import create_app
from megatron_rapo.embedded_server.decode import Completion, Sample
from megatron_rapo.embedded_server.service import Service
from megatron_rapo.errors import RapoError

WAIT_S = 30.0
SAMPLE = Sample((5, 6), 4, 0.0, frozenset(), 0)


class Engine:
    """Makes each response token by token, as long as a test wants; notes what it is asked."""

    def __init__(self) -> None:
        self.weight_version = "1"
        self.vocab_size, self.context_length = 50, 64
        self.eos_ids: frozenset[int] = frozenset()
        self.tokenizer = None
        self.model_path = Path("models/m")
        self.go_on = threading.Event()  # a response ends once it is set
        self.go_on.set()
        self.begun = threading.Event()
        self.asked: list[list[Sample]] = []
        self.finished_first = False  # the first response of a batch ends at once

    def generate(self, samples: Sequence[Sample], aborted: threading.Event) -> list[Completion]:
        self.asked.append(list(samples))
        self.begun.set()
        deadline = time.monotonic() + WAIT_S
        while not (self.go_on.is_set() or aborted.is_set()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        finish: Any = "abort" if aborted.is_set() else "length"
        made = [Completion([7], [-0.5], finish) for _ in samples]
        if self.finished_first:
            made[0] = Completion([7], [-0.5], "length")
        return made

    def computing(self) -> dict[str, Any]:
        return {"device": "cpu", "dtype": "float32"}


def run(work: Callable[[Service, Engine], Awaitable[Any]]) -> Any:
    """What `work(service, engine)` makes, in time, of a service that has its engine."""

    async def in_time() -> Any:
        service, engine = Service(), Engine()
        loading: Any = lambda: engine  # noqa: E731
        service.load(loading).result(WAIT_S)
        try:
            async with asyncio.timeout(WAIT_S):
                return await work(service, engine)
        finally:
            engine.go_on.set()
            service.close()

    return asyncio.run(in_time())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_service_without_its_engine_does_nothing_yet() -> None:
    service = Service()
    with pytest.raises(RuntimeError, match="not loaded"):
        service.loaded_engine()
    engine: Any = Engine()
    assert service.load(lambda: engine).result(WAIT_S) is None
    assert service.loaded_engine() is service.engine is engine
    service.close()


def test_jobs_are_done_one_after_the_other_in_order() -> None:
    async def work(service: Service, engine: Engine) -> None:
        at_work, order = [0], []

        def job(number: int) -> int:
            at_work[0] += 1
            time.sleep(0.01)
            assert at_work[0] == 1
            at_work[0] -= 1
            order.append(number)
            return 10 * number

        done = await asyncio.gather(*(service.work(partial(job, number)) for number in range(5)))
        assert (done, order) == ([0, 10, 20, 30, 40], [0, 1, 2, 3, 4])
        requests = [asyncio.ensure_future(service.generate([SAMPLE] * n, None)) for n in range(1, 6)]
        for n, request in enumerate(requests, start=1):
            completions, version = await request
            assert (len(completions), version) == (n, "1")
        assert [len(samples) for samples in engine.asked] == [1, 2, 3, 4, 5]
        assert not service._requests and not service._jobs

    run(work)


def test_an_id_is_one_requests_while_it_is_under_way() -> None:
    async def work(service: Service, engine: Engine) -> None:
        engine.go_on.clear()
        first = asyncio.ensure_future(service.generate([SAMPLE], "mine"))
        await until(engine.begun.is_set)
        with pytest.raises(RapoError, match="'mine' is that of a request under way"):
            await service.generate([SAMPLE], "mine")
        without = [asyncio.ensure_future(service.generate([SAMPLE], None)) for _ in range(2)]
        engine.go_on.set()
        await asyncio.gather(first, *without)
        await service.generate([SAMPLE], "mine")

    run(work)


@pytest.mark.parametrize(
    ("rid", "ended"),
    [
        (None, {"a", "a_1", "b"}),
        ("a", {"a"}),
        ("a_0", {"a"}),
        ("a_1", {"a", "a_1"}),  # of a batch `a` the second prompt, or the request of this name
        ("a_1_0", {"a_1"}),
        ("c", set()),
        ("", set()),
    ],
)
def test_an_abort_ends_the_requests_that_it_names(rid: str | None, ended: set[str]) -> None:
    async def work(service: Service, engine: Engine) -> None:
        service.pause("in_place")  # they wait, and an abort ends them in their turn
        requests = {key: asyncio.ensure_future(service.generate([SAMPLE], key)) for key in ("a", "a_1", "b")}
        await until(lambda: len(service._requests) == 3)
        service.abort(rid)
        for key in ended:
            [completion], _ = await requests[key]
            assert completion.finish == "abort"
        assert {key for key, request in requests.items() if request.done()} == ended
        service.resume()
        for key in requests.keys() - ended:
            [completion], _ = await requests[key]
            assert completion.finish == "length"

    run(work)


@pytest.mark.parametrize("finished_first", [False, True])
@pytest.mark.parametrize(
    ("mode", "finishes", "batches"),
    [("abort", "abort", 1), ("retract", "length", 2), ("in_place", "length", 1)],
)
def test_a_pause_ends_a_batch_makes_it_anew_or_lets_it_end(
    mode: Any, finishes: str, batches: int, finished_first: bool
) -> None:
    """A batch of which one response was complete is made anew as a whole: one version makes all of it."""

    async def work(service: Service, engine: Engine) -> None:
        engine.go_on.clear()
        engine.finished_first = finished_first
        running = asyncio.ensure_future(service.generate([SAMPLE] * 2, None))
        await until(engine.begun.is_set)
        service.pause(mode)
        if mode == "in_place":
            engine.go_on.set()
        assert await service.idle(WAIT_S)
        held = asyncio.ensure_future(service.generate([SAMPLE] * 3, None))
        await asyncio.sleep(0.02)
        assert len(engine.asked) == 1 and not held.done()
        assert running.done() == (mode != "retract")
        engine.go_on.set()
        engine.weight_version = "2"
        service.resume()
        completions, version = await running
        assert completions[-1].finish == finishes
        assert version == ("2" if mode == "retract" else "1")
        _, version = await held
        assert version == "2"
        assert len(engine.asked) == batches + 1

    run(work)


def test_whoever_waits_to_be_let_through_leaves_nothing_behind() -> None:
    async def work(service: Service, engine: Engine) -> None:
        before = asyncio.all_tasks()
        await service.generate([SAMPLE], None)
        service.pause("retract")
        held = asyncio.ensure_future(service.generate([SAMPLE], "held"))
        await until(lambda: bool(service._requests))
        service.abort("held")
        await held
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    run(work)


def test_it_is_idle_once_nothing_is_under_way() -> None:
    async def work(service: Service, engine: Engine) -> None:
        assert await service.idle(0.0)
        engine.go_on.clear()
        running = asyncio.ensure_future(service.generate([SAMPLE], None))
        await until(engine.begun.is_set)
        began = time.monotonic()
        assert not await service.idle(0.2)
        assert 0.2 <= time.monotonic() - began < 10
        threading.Timer(0.1, engine.go_on.set).start()
        assert await service.idle(WAIT_S)
        assert time.monotonic() - began < 10
        await running

    run(work)


def test_the_end_does_not_wait_and_begins_nothing_more() -> None:
    async def work(service: Service, engine: Engine) -> None:
        hold, done = threading.Event(), []
        stuck = asyncio.ensure_future(service.work(lambda: hold.wait(WAIT_S)))
        await asyncio.sleep(0.02)
        queued = asyncio.ensure_future(service.work(lambda: done.append(1)))
        request = asyncio.ensure_future(service.generate([SAMPLE], "r"))
        await until(lambda: len(service._jobs) == 3)
        began = time.monotonic()
        service.close()
        assert time.monotonic() - began < 10
        assert service._requests["r"].aborted.is_set()
        hold.set()
        assert await stuck
        with pytest.raises(asyncio.CancelledError):
            await queued
        with pytest.raises(asyncio.CancelledError):
            await request
        assert done == [] and engine.asked == []

    run(work)


# Over HTTP


def over_http(
    work: Callable[[httpx.AsyncClient, Service, Engine], Awaitable[Any]],
    *,
    peer: tuple[str, int] | None = ("127.0.0.1", 1),
    api_key: str | None = None,
) -> Any:
    async def connected(service: Service, engine: Engine) -> Any:
        app = create_app(service, api_key)
        transport = httpx.ASGITransport(app, client=peer, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=WAIT_S) as http:
            return await work(http, service, engine)

    return run(connected)


def test_it_says_what_it_is() -> None:
    async def work(http: httpx.AsyncClient, service: Service, engine: Engine) -> None:
        assert (await http.get("/model_info")).json() == {
            "model_path": "models/m",
            "is_generation": True,
            "weight_version": "1",
            "vocab_size": 50,
            "context_length": 64,
        }
        assert (await http.get("/server_info")).json() == {
            "server": "megatron_rapo.embedded_server",
            "version": __version__,
            "tp_size": 1,
            "device": "cpu",
            "dtype": "float32",
        }

    over_http(work)


def test_its_health_is_one_greedy_token_that_is_made() -> None:
    async def work(http: httpx.AsyncClient, service: Service, engine: Engine) -> None:
        assert (await http.get("/health")).status_code == 200
        assert engine.asked == []
        assert (await http.get("/health_generate")).status_code == 200
        [[sample]] = engine.asked
        assert (sample.prompt, sample.max_new_tokens, sample.temperature) == ((0,), 1, 0)

    over_http(work)


def test_to_flush_it_must_be_idle_at_once_unless_it_is_given_time() -> None:
    async def work(http: httpx.AsyncClient, service: Service, engine: Engine) -> None:
        assert (await http.post("/flush_cache")).status_code == 200
        engine.go_on.clear()
        running = asyncio.ensure_future(service.generate([SAMPLE], None))
        await until(engine.begun.is_set)
        threading.Timer(0.3, engine.go_on.set).start()
        busy = await http.post("/flush_cache")
        assert busy.status_code == 400
        assert "requests are still running after 0.0 s" in busy.json()["error"]["message"]
        assert (await http.get("/flush_cache?timeout=20")).status_code == 200
        await running

    over_http(work)


def test_pauses_and_aborts_reach_the_service() -> None:
    async def work(http: httpx.AsyncClient, service: Any, engine: Engine) -> None:
        told: list[Any] = []
        service.pause = lambda mode: told.append(("pause", mode))
        service.resume = lambda: told.append("resume")
        service.abort = lambda rid=None: told.append(("abort", rid))
        for path, body, status, expected in [
            ("/pause_generation", None, 200, [("pause", "abort")]),
            ("/pause_generation", {"mode": "retract"}, 200, [("pause", "retract")]),
            ("/continue_generation", None, 200, ["resume"]),
            ("/continue_generation", {"torch_empty_cache": False}, 200, ["resume"]),
            ("/abort_request", {"rid": "r"}, 200, [("abort", "r")]),
            ("/abort_request", {"abort_all": True}, 200, [("abort", None)]),
            ("/abort_request", {"rid": "r", "abort_all": True}, 200, [("abort", None)]),
            ("/abort_request", {}, 400, []),
        ]:
            answer = await http.post(path, json=body)
            assert (answer.status_code, told) == (status, expected)
            if path.endswith("_generation"):
                assert answer.json()["status"] == "ok"
            told.clear()

    over_http(work)


UPDATES = {
    "/update_weights_from_disk": {"model_path": "/nowhere"},
    "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
    "/update_weights_from_shards": {"dtype": "float32", "messages": []},
    "/update_weights_from_tensor": {"serialized_named_tensors": [""]},
    "/update_weight_version": {"new_version": "2"},
}


@pytest.mark.parametrize("path", UPDATES)
def test_updates_abort_what_is_under_way_where_they_say_so(path: str) -> None:
    async def work(http: httpx.AsyncClient, service: Any, engine: Any) -> None:
        told: list[Any] = []

        def refuse(*_: Any) -> None:
            raise RapoError("not this one")

        engine.load_checkpoint = refuse
        engine.weights = SimpleNamespace(check=refuse, rename=refuse)
        engine.device = None
        service.abort = lambda rid=None: told.append(rid)
        for said in ({}, {"abort_all_requests": False}, {"abort_all_requests": True}):
            answer = await http.post(path, json={**UPDATES[path], **said})
            assert answer.status_code == 400
            assert answer.json()["success"] is False
            assert answer.json()["message"]
            by_itself = path == "/update_weight_version"  # as in SGLang
            assert told == [None] * said.get("abort_all_requests", by_itself)
            told.clear()

    over_http(work)


def test_refusals_and_failures_have_their_statuses() -> None:
    async def work(http: httpx.AsyncClient, service: Any, engine: Engine) -> None:
        answer = await http.post("/generate", json={"input_ids": [1], **{f"no{n}": n for n in range(7)}})
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400
        assert [f"body.no{n} = {n}: " in message for n in range(7)] == [True] * 5 + [False] * 2
        assert (await http.post("/generate", json={})).status_code == 400
        assert (await http.get("/nothing")).status_code == 404

        def fail(*_: Any) -> None:
            raise ValueError("what it was")

        engine.generate = fail  # type: ignore[method-assign, assignment]
        answer = await http.post(
            "/generate", json={"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        )
        assert answer.status_code == 500
        assert answer.json() == {"error": {"message": "ValueError: what it was"}}
        service.engine = None
        answer = await http.get("/health")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503,
            "the model is being loaded; ask again",
        )

    over_http(work)


@pytest.mark.parametrize(
    ("peer", "api_key", "status"),
    [
        (("127.0.0.1", 1), None, 400),
        (("::1", 1), None, 400),
        (("192.0.2.9", 1), None, 403),
        (None, None, 403),
        (("192.0.2.9", 1), "secret", 400),
        (("127.0.0.1", 1), "secret", 400),
        (None, "secret", 400),
    ],
)
def test_weights_are_taken_from_this_machine_or_with_the_key(
    peer: tuple[str, int] | None, api_key: str | None, status: int
) -> None:
    async def work(http: httpx.AsyncClient, service: Service, engine: Any) -> None:
        engine.weights = SimpleNamespace(check=lambda shapes: None)
        headers = {"Authorization": f"Bearer {api_key}"}
        answer = await http.post(
            "/update_weights_from_tensor", json={"serialized_named_tensors": ["!"]}, headers=headers
        )
        assert answer.status_code == status, answer.text
        if status == 403:
            who = peer[0] if peer else "an unknown peer"
            assert answer.json()["error"]["message"].startswith(f"{who} is not this machine")

    over_http(work, peer=peer, api_key=api_key)


def test_when_the_application_ends_so_does_its_service() -> None:
    async def work(service: Any, engine: Engine) -> None:
        closed: list[bool] = []
        close, service.close = service.close, lambda: closed.append(True)
        app = create_app(service, None)
        async with app.router.lifespan_context(app):
            assert closed == []
        assert closed == [True]
        service.close = close

    run(work)
