"""A pool's requests by way of a router: what is sent again, who is to blame, and what may hang."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.engine import Generated, Generation
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout import routing as module
from megatron_rapo.rollout.membership import Membership
from megatron_rapo.rollout.requests import Sampling, first_turns
from megatron_rapo.rollout.routing import Routing

WAIT_S = 30.0
ONE, TWO = "http://127.0.0.1:7001", "http://127.0.0.1:7002"
VERSION = 4
REQUEST = first_turns([Prompt(3, "", (5, 6), "")], Sampling(2, 8, 1.0, VERSION, seed=0))


class Router:
    """Answers requests by what a test queued: an error, or nothing; then as it should."""

    url = "http://router:1"

    def __init__(self) -> None:
        self.failures: list[RapoError] = []
        self.hangs = False
        self.asked: list[Any] = []
        self.served: list[tuple[list[str], set[str]]] = []
        self.known: list[set[str]] = []
        self.removed: list[str] = []
        self.may_remove = asyncio.Event()
        self.may_remove.set()
        self.problem: RapoError | None = None

    async def generate(self, wanted: Sequence[Generation]) -> list[Generated]:
        self.asked.append(list(wanted))
        if self.hangs:
            await asyncio.sleep(WAIT_S)
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        return [
            Generated(np.array([token]), np.array([-0.5], np.float32), (str(VERSION),), "stop")
            for token in range(7, 7 + len(wanted))
        ]

    async def check_workers(self, known: Collection[str]) -> None:
        self.known.append(set(known))
        if self.problem is not None:
            raise self.problem

    async def serve_with(self, urls: Sequence[str], known: Collection[str], timeout: float) -> None:
        self.served.append((list(urls), set(known)))
        if self.problem is not None:
            raise self.problem

    async def remove(self, url: str) -> None:
        await self.may_remove.wait()
        if self.problem is not None:
            raise self.problem
        self.removed.append(url)


class Client:
    versions: dict[str, str | EngineLost]

    def __init__(self, url: str) -> None:
        self.url = url

    async def weight_version(self) -> str:
        found = self.versions[self.url]
        if isinstance(found, EngineLost):
            raise found
        return found


def run(
    work: Callable[[Router, Routing, Membership], Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    dead: Collection[str] = (),
    **versions: str | EngineLost,
) -> Any:
    """What `work` makes of a router before two engines, which have the current weights unless told.

    Args:
        dead: addresses at which nothing listens.
        versions: of engines `one` and `two`, or why they do not answer.
    """
    given = {ONE: versions.get("one", str(VERSION)), TWO: versions.get("two", str(VERSION))}
    monkeypatch.setattr(Client, "versions", given, raising=False)
    monkeypatch.setattr(module, "_refuses_connections", lambda url: url in dead)

    async def scenario() -> Any:
        router: Any = Router()
        routing = Routing(router, vocab_size=50)
        client: Any = Client
        members = Membership([ONE, TWO], client, minimum=1, reviver=None, on_lost=routing.take_out)
        return await work(router, routing, members)

    return asyncio.run(asyncio.wait_for(scenario(), WAIT_S))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def tokens(responses: Any) -> Any:
    return [response.token_ids.tolist() for response in responses]


RESPONSES = [[7], [8]]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_request_that_fails_though_no_engine_is_to_blame_is_sent_again(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.failures = [EngineLost("the router was late")] * failures
        assert tokens(await routing.send(REQUEST, members)) == RESPONSES
        assert len(router.asked) == failures + 1
        assert router.asked == [REQUEST.wanted] * (failures + 1)
        assert members.changes == 0 and router.removed == []

    run(work, monkeypatch)


def test_after_three_failures_without_a_culprit_the_first_is_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.failures = [EngineLost(f"failure {number}") for number in range(9)]
        with pytest.raises(
            RapoError, match=r"failure 0\. So it was 3 times, though every engine .* version 4;"
        ) as e:
            await routing.send(REQUEST, members)
        assert not isinstance(e.value, EngineLost)
        assert len(router.asked) == 3
        router.failures = [RapoError("a prompt is too long")]
        with pytest.raises(RapoError, match="too long"):
            await routing.send(REQUEST, members)
        assert len(router.asked) == 4

    run(work, monkeypatch)


@pytest.mark.parametrize(
    ("two", "reason"),
    [("3", "weights version '3' in place of 4"), (EngineLost("it was killed"), "it was killed")],
)
def test_an_engine_that_is_to_blame_is_out_and_behind_the_router_no_more(
    two: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.failures = [EngineLost("a connection was lost")]
        router.may_remove.clear()
        sending = asyncio.ensure_future(routing.send(REQUEST, members))
        await until(lambda: bool(members.failures))
        await asyncio.sleep(0.02)
        assert not sending.done(), "the router may send it there again"
        router.may_remove.set()
        with pytest.raises(EngineLost, match="a connection was lost"):
            await sending
        assert [member.url for member in members.live] == [ONE]
        assert reason in members.failures[TWO]
        assert router.removed == [TWO]
        assert len(router.asked) == 1
        assert not routing._removals
        assert tokens(await routing.send(REQUEST, members)) == RESPONSES

    run(work, monkeypatch, two=two)


@pytest.mark.parametrize("dead", [False, True])
def test_requests_that_may_hang_at_a_lost_engine_are_sent_again(
    dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing listens any more there is none: the connections are broken, and the router tells."""

    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.hangs = True
        under_way = [asyncio.ensure_future(routing.send(REQUEST, members)) for _ in range(2)]
        await until(lambda: len(router.asked) == 2)
        members.live[1].lose("it was silent")
        await routing._settled()
        assert router.removed == [TWO]
        if dead:
            await asyncio.sleep(0.02)
            assert not any(request.done() for request in under_way)
            assert len(router.asked) == 2
            for request in under_way:
                request.cancel()
        else:
            for request in under_way:
                with pytest.raises(EngineLost, match=f"{TWO} may have it, and is out: it was silent"):
                    await request
        router.hangs = False
        assert tokens(await routing.send(REQUEST, members)) == RESPONSES, (
            "one that is sent afterwards cannot hang there"
        )
        members.live[0].lose("it was silent, too")
        await routing._settled()
        assert router.removed == [TWO, ONE]

    run(work, monkeypatch, dead=[TWO] if dead else [])


def test_a_lost_engine_that_no_request_can_be_at_is_removed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        members.live[0].lose("it was silent")
        await routing._settled()
        assert router.removed == [ONE]
        assert members.live[0].url == TWO

    run(work, monkeypatch)


def test_a_router_that_keeps_a_lost_engine_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.problem = RapoError("no answer")
        members.live[0].lose("it was silent")
        await routing._settled()

    run(work, monkeypatch)
    told = f"the router still has {ONE}, whose responses are not used: no answer\n"
    assert capsys.readouterr().out.endswith(told)


def test_engines_that_ever_were_the_runs_are_known_and_only_the_live_ones_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        await routing.check([ONE])
        assert router.known == [{ONE}]
        await routing.serve_with([TWO])
        assert router.served == [([TWO], {ONE, TWO})]
        await routing.check([TWO])
        assert router.known[1:] == [{ONE, TWO}]

    run(work, monkeypatch)


def test_the_new_weights_are_served_once_lost_engines_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.may_remove.clear()
        members.live[0].lose("it was silent")
        serving = asyncio.ensure_future(routing.serve_with([TWO]))
        await asyncio.sleep(0.02)
        assert router.served == []
        router.may_remove.set()
        await serving
        assert router.removed == [ONE] and len(router.served) == 1

    run(work, monkeypatch)


@pytest.mark.parametrize("what", ["check", "serve_with"])
def test_a_router_that_is_not_there_is_the_runs_error_and_no_engines(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(router: Router, routing: Routing, members: Membership) -> None:
        router.problem = EngineLost("cannot connect")
        with pytest.raises(
            RapoError, match=r"rollout\.engine\.router cannot be used: cannot connect\. It is started"
        ) as e:
            await getattr(routing, what)([ONE])
        assert not isinstance(e.value, EngineLost)
        router.problem = RapoError("workers that are no engines of this run")
        with pytest.raises(RapoError, match=r"^workers that"):
            await getattr(routing, what)([ONE])

    run(work, monkeypatch)


def test_only_a_port_without_a_listener_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not module._refuses_connections(f"http://127.0.0.1:{port}")
    assert module._refuses_connections(f"http://127.0.0.1:{port}")

    failures: list[OSError] = [TimeoutError(), OSError("no route to host")]

    def unreachable(address: Any, timeout: float) -> Any:
        assert (address, timeout) == (("127.0.0.1", port), module.CONNECT_TIMEOUT_S)
        raise failures.pop()

    monkeypatch.setattr(socket, "create_connection", unreachable)
    while failures:
        assert not module._refuses_connections(f"http://127.0.0.1:{port}")
    closed: list[bool] = []
    taken = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(socket, "create_connection", lambda *_: taken)
    assert not module._refuses_connections(f"http://127.0.0.1:{port}")
    assert closed == [True]
