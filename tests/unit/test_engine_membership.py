"""Who takes part, who is asked what, and what becomes of it: members, rounds of requests, their loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.background import BackgroundLoop, all_of
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout import revival
from megatron_rapo.rollout.dispatch import Dispatch, TooFewEngines
from megatron_rapo.rollout.member import Member
from megatron_rapo.rollout.membership import Membership
from megatron_rapo.rollout.revival import Reviver

WAIT_S = 30.0
ONE, TWO, THREE = "http://a:1", "http://b:1", "http://c:1"


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), WAIT_S))  # type: ignore[arg-type]


async def turns(count: int = 10) -> None:
    """Lets others run until they wait."""
    for _ in range(count):
        await asyncio.sleep(0)


# A member


def member_of(lost: list[Member]) -> Member:
    return Member(SimpleNamespace(url=ONE), lost.append)  # type: ignore[arg-type]


async def answer() -> str:
    return "answer"


async def raises(error: Exception) -> None:
    raise error


def test_a_member_answers_until_it_is_lost() -> None:
    async def work() -> None:
        lost: list[Member] = []
        member = member_of(lost)
        assert await member.ask(answer()) == "answer"
        with pytest.raises(RapoError, match="refused"):
            await member.ask(raises(RapoError("refused")))
        assert (member.url, member.live, member.failure, lost) == (ONE, True, None, [])
        with pytest.raises(EngineLost, match="it hangs"):
            await member.ask(raises(EngineLost("it hangs")))
        assert (member.live, member.failure, lost) == (False, "it hangs", [member])
        unasked = answer()
        with pytest.raises(EngineLost, match="it hangs"):
            await member.ask(unasked)
        assert inspect.getcoroutinestate(unasked) == inspect.CORO_CLOSED
        member.lose("another reason")
        assert (member.failure, lost) == ("it hangs", [member])
        assert not member._asked

    run(work)


def test_what_a_member_was_asked_ends_when_it_is_lost() -> None:
    async def work() -> None:
        member = member_of([])
        asked = [asyncio.ensure_future(member.ask(asyncio.sleep(WAIT_S))) for _ in range(2)]
        await turns()
        member.lose("another head lost it")
        for request in asked:
            with pytest.raises(EngineLost, match="another head lost it"):
                await request

    run(work)


@pytest.mark.parametrize("lost_too", [False, True])
def test_whoever_no_longer_wants_an_answer_is_not_told_of_a_lost_engine(lost_too: bool) -> None:
    async def work() -> None:
        member, ended = member_of([]), asyncio.Event()

        async def request() -> None:
            try:
                await asyncio.sleep(WAIT_S)
            finally:
                ended.set()

        asked = asyncio.ensure_future(member.ask(request()))
        await turns()
        asked.cancel()
        if lost_too:
            member.lose("gone")
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.wait_for(ended.wait(), WAIT_S)
        assert member.live != lost_too

    run(work)


def test_a_request_that_ends_itself_is_no_lost_engine() -> None:
    async def work() -> None:
        member = member_of([])
        with pytest.raises(asyncio.CancelledError):
            await member.ask(raises(asyncio.CancelledError()))  # type: ignore[arg-type]
        assert member.live

    run(work)


# A round of requests


class Engine:
    def __init__(self, number: int) -> None:
        self.number, self.live = number, True


class Round:
    """Requests of the given sizes, asked at once, of engines that answer when a test says so."""

    def __init__(self, sizes: list[int], engines: int = 2, **options: int) -> None:
        self.members = [Engine(number) for number in range(engines)]
        self.asked: list[tuple[int, int]] = []  # engine, size
        self.answers: list[asyncio.Future[Any]] = []
        defaults = {"per_engine": 9, "minimum": 1}
        self.sizes = sizes
        self.dispatch: Dispatch[Any, Any] = Dispatch(
            self.members,  # type: ignore[arg-type]
            self._send,
            **{**defaults, **options},
        )

    async def _send(self, member: Any, request: list[int]) -> Any:
        self.asked.append((member.number, len(request)))
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    def lose(self, engine: int) -> None:
        self.members[engine].live = False
        for (asked, _), pending in zip(list(self.asked), list(self.answers), strict=True):
            if asked == engine and not pending.done():
                pending.set_exception(EngineLost("gone"))

    def begin(self) -> list[asyncio.Task[Any]]:
        """Asks for each, in order."""
        return [asyncio.create_task(self.dispatch.ask([0] * size)) for size in self.sizes]

    async def finish(self, work: list[asyncio.Task[Any]]) -> list[Any]:
        """What each came to: its answer, or its error."""
        while not all(task.done() for task in work):
            for number, pending in enumerate(self.answers):
                if not pending.done():
                    pending.set_result(number)
            await asyncio.sleep(0)
        return await asyncio.gather(*work, return_exceptions=True)


def test_each_request_goes_to_the_engine_with_the_fewest_responses_to_make() -> None:
    async def work() -> None:
        a_round = Round([5, 1, 1, 2, 1, 4], engines=3)
        running = a_round.begin()
        await turns()
        # Loads after each: 5 0 0, 5 1 0, 5 1 1, 5 3 1, 5 3 2, 5 3 6: of equal ones the first.
        assert a_round.asked == [(0, 5), (1, 1), (2, 1), (1, 2), (2, 1), (2, 4)]
        assert await a_round.finish(running) == [0, 1, 2, 3, 4, 5]
        assert a_round.dispatch.resent == 0

    run(work)


def test_what_goes_on_from_a_request_finds_its_engine_where_that_has_room() -> None:
    async def work() -> None:
        a_round = Round([5, 1, 1], engines=3, per_engine=3)
        running = a_round.begin()
        for size, after in ((7, "a"), (1, "b"), (1, "a"), (1, "a"), (1, None)):
            running.append(asyncio.create_task(a_round.dispatch.ask([0] * size, after)))
        await turns()
        # Loads: 5 1 1; the first of "a" makes them 5 8 1, "b" 5 8 2, the second 5 9 2. Engine 1 is full now.
        assert a_round.asked[3:] == [(1, 7), (2, 1), (1, 1), (2, 1), (0, 1)]
        assert await a_round.finish(running) == list(range(8))
        for gone, engine in (([], 1), ([1], 0), ([], 0)):
            for number in gone:
                a_round.lose(number)
            running = [asyncio.create_task(a_round.dispatch.ask([0], "a"))]
            await turns()
            assert a_round.asked[-1] == (engine, 1)
            await a_round.finish(running)

    run(work)


def test_no_engine_has_more_requests_than_it_may() -> None:
    async def work() -> None:
        a_round = Round([9, 1, 1, 1, 1, 1], per_engine=2)
        running = a_round.begin()
        await turns()
        assert a_round.asked == [(0, 9), (1, 1), (1, 1), (0, 1)]
        a_round.answers[2].set_result("third")
        await turns()
        assert a_round.asked[4:] == [(1, 1)]
        assert await a_round.finish(running) == [0, 1, "third", 3, 4, 5]

    run(work)


def test_what_a_lost_engine_had_goes_to_the_others_first_and_is_counted() -> None:
    async def work() -> None:
        a_round = Round([1, 2, 3, 4, 5], per_engine=1)
        running = a_round.begin()
        await turns()
        assert a_round.asked == [(0, 1), (1, 2)]
        a_round.lose(0)
        await turns()
        assert len(a_round.asked) == 2
        a_round.answers[1].set_result("second")
        await turns()
        assert a_round.asked[2:] == [(1, 1)]
        assert await a_round.finish(running) == [2, "second", 3, 4, 5]
        assert a_round.dispatch.resent == 1

    run(work)


@pytest.mark.parametrize(("minimum", "sent"), [(1, 4), (2, 2), (3, 0)])
def test_with_too_few_engines_nothing_more_is_sent_and_what_is_under_way_counts(
    minimum: int, sent: int
) -> None:
    async def work() -> None:
        a_round = Round([1] * 4, per_engine=1, minimum=minimum)
        running = a_round.begin()
        await turns()
        if minimum < 3:
            a_round.lose(0)
            await turns()
        found = await a_round.finish(running)
        given = [not isinstance(one, TooFewEngines) for one in found]
        assert all(isinstance(one, int) for one, is_given in zip(found, given, strict=True) if is_given)
        # One engine alone makes all four; where there must be two, what the second had still counts.
        assert given == {1: [True] * 4, 2: [False, True, False, False], 3: [False] * 4}[minimum]
        assert len(a_round.asked) == sent + (minimum == 1)
        assert a_round.dispatch.resent == (minimum == 1)

    run(work)


def test_a_refusal_is_for_whoever_asked_and_the_round_goes_on() -> None:
    async def work() -> None:
        a_round = Round([1] * 4, per_engine=1)
        running = a_round.begin()
        await turns()
        a_round.answers[1].set_exception(RapoError("refused"))
        with pytest.raises(RapoError, match="refused") as refused:
            await running[1]
        assert not isinstance(refused.value, TooFewEngines)
        assert await a_round.finish(running) == [0, refused.value, 2, 3]
        assert len(a_round.asked) == 4 and a_round.dispatch.resent == 0

    run(work)


@pytest.mark.parametrize("refused", [False, True])
def test_a_round_that_is_closed_gives_up_what_is_under_way_and_sends_no_more(refused: bool) -> None:
    async def work() -> None:
        a_round = Round([1] * 4, per_engine=1)
        running = a_round.begin()
        await turns()
        if refused:
            a_round.answers[1].set_exception(RapoError("refused"))
            await turns()
        await a_round.dispatch.close()
        found = await asyncio.gather(*running, a_round.dispatch.ask([0]), return_exceptions=True)
        kinds = [RapoError if refused and place == 1 else asyncio.CancelledError for place in range(5)]
        assert [type(one) for one in found] == kinds
        assert a_round.answers[0].cancelled()
        assert len(a_round.asked) == 2 + refused, "what waited is not sent, nor what is asked afterwards"

    run(work)


def test_a_request_ends_with_whoever_asked_and_makes_room_for_the_next() -> None:
    async def work() -> None:
        a_round = Round([1, 2, 3, 4], engines=1, per_engine=1)
        running = a_round.begin()
        await turns()
        running[0].cancel()  # under way
        running[1].cancel()  # waits
        await turns()
        assert a_round.answers[0].cancelled()
        assert a_round.asked == [(0, 1), (0, 3)]
        running[2].cancel()
        a_round.lose(0)  # the engine that has it
        await turns()
        assert [task.cancelled() for task in running[:3]] == [True] * 3
        assert isinstance((await a_round.finish(running))[3], TooFewEngines)
        assert a_round.asked == [(0, 1), (0, 3)] and a_round.dispatch.resent == 0

    run(work)


def test_a_round_takes_requests_while_others_are_under_way() -> None:
    async def work() -> None:
        a_round = Round([1, 1])
        running = a_round.begin()
        await turns()
        a_round.lose(0)
        await turns()
        running += a_round.begin()
        await turns()
        assert a_round.asked == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
        assert await a_round.finish(running) == [2, 1, 3, 4]
        a_round.lose(1)
        with pytest.raises(TooFewEngines):
            await a_round.dispatch.ask([0])

    run(work)


# Who takes part


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self.waited: list[float] = []
        self.problem: RapoError | None = None

    async def until_healthy(self, timeout: float) -> None:
        self.waited.append(timeout)
        if self.problem is not None:
            raise self.problem


class Returns:
    """A reviver whose engines come back when a test says so, at other addresses."""

    def __init__(self, *may_not: int) -> None:
        self.may_not = set(may_not)
        self.checked: list[str] = []
        self.begun: list[tuple[int, str]] = []
        self.back: dict[int, asyncio.Future[str]] = {}

    def may_return(self, number: int) -> bool:
        return number not in self.may_not

    async def bring_back(self, number: int, url: str, client_of: Any) -> str:
        assert isinstance(client_of(url), Client)
        self.begun.append((number, url))
        self.back[number] = asyncio.get_running_loop().create_future()
        return await self.back[number]

    async def check(self, client: Client) -> None:
        self.checked.append(client.url)


def engines(reviver: Returns | None, minimum: int = 1) -> tuple[Membership, list[str]]:
    lost: list[str] = []
    membership = Membership(
        [ONE, TWO, THREE],
        Client,  # type: ignore[arg-type]
        minimum=minimum,
        reviver=reviver,  # type: ignore[arg-type]
        on_lost=lambda member: lost.append(member.url),
    )
    return membership, lost


def urls(membership: Membership) -> list[str]:
    return [member.url for member in membership.live]


@pytest.mark.parametrize("reviver", [None, Returns()])
def test_all_are_waited_for_and_their_models_checked_where_they_can_come_back(
    reviver: Returns | None,
) -> None:
    async def work() -> None:
        membership, _ = engines(reviver)
        await membership.until_healthy(7.0)
        clients: list[Any] = [member.client for member in membership.live]
        assert [client.waited for client in clients] == [[7.0]] * 3
        if reviver is not None:
            assert sorted(reviver.checked) == [ONE, TWO, THREE]
        clients[1].problem = RapoError("not ready")
        with pytest.raises(RapoError, match="not ready"):
            await membership.until_healthy(7.0)

    run(work)


def test_a_pool_goes_on_with_the_engines_that_it_is_told() -> None:
    async def work() -> None:
        membership, lost = engines(None)
        first, second, _ = membership.live
        second.lose("gone")
        await membership.use([THREE, "http://new:1", ONE, TWO])
        assert urls(membership) == [THREE, "http://new:1", ONE, TWO]
        assert membership.live[2] is first, "one that is known keeps what it is asked"
        assert membership.live[3] is not second
        assert (membership.failures, lost) == ({}, [TWO])

    run(work)


def test_where_engines_can_come_back_their_places_stay() -> None:
    async def work() -> None:
        reviver = Returns()
        membership, lost = engines(reviver)
        await membership.use([THREE, ONE])
        assert urls(membership) == [ONE, THREE]
        assert membership.failures == {TWO: "it did not get the current weights"}
        assert lost == [TWO]
        assert (membership.size, membership.changes) == (3, 1)

    run(work)


def test_lost_engines_come_back_in_the_background_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        reviver = Returns()
        membership, lost = engines(reviver)
        first, second, third = membership.live
        third.lose("it hangs")
        await membership.revive({TWO: "late"})
        assert membership.failures == {TWO: "another head lost it: late", THREE: "it hangs"}
        assert lost == [THREE, TWO]
        await turns()
        assert reviver.begun == [(1, TWO), (2, THREE)]
        await membership.revive({})
        await turns()
        assert reviver.begun == [(1, TWO), (2, THREE)], "it is under way"
        reviver.back[1].set_result("http://new:1")
        reviver.back[2].set_exception(RapoError("it was started anew 3 times"))
        await turns()
        assert urls(membership) == [ONE], "they take part from the next weights on"
        assert membership.changes == 2
        reviver.may_not = {2}
        await membership.revive({})
        assert urls(membership) == [ONE, "http://new:1"]
        assert membership.live[0] is first and membership.live[1] is not second
        assert membership.failures == {THREE: "it was started anew 3 times"}
        assert membership.changes == 3
        await turns()
        assert len(reviver.begun) == 2

    run(work)
    assert capsys.readouterr().out.splitlines() == [
        f"engine {THREE} is out (2 of 3 are left): it hangs",
        f"engine {TWO} is out (1 of 3 are left): another head lost it: late",
        "engine http://new:1 is back, and gets the current weights",
        f"engine {THREE} stays out: it was started anew 3 times",
    ]


@pytest.mark.parametrize(("minimum", "waits"), [(1, False), (2, True), (3, True)])
def test_a_pool_waits_for_as_many_as_it_needs(minimum: int, waits: bool) -> None:
    async def work() -> None:
        reviver = Returns()
        membership, _ = engines(reviver, minimum)
        for member in membership.live[1:]:
            member.lose("gone")
        reviving = asyncio.ensure_future(membership.revive({}))
        await turns()
        assert reviving.done() != waits
        for number in range(1, minimum):
            assert not reviving.done()
            reviver.back[number].set_result(f"http://new:{number}")
            await turns()
        await reviving
        assert len(urls(membership)) == minimum

    run(work)


@pytest.mark.parametrize("reviver", [None, Returns(0, 1, 2)])
def test_where_too_few_are_left_and_none_comes_back_that_is_the_error(reviver: Returns | None) -> None:
    async def work() -> None:
        membership, _ = engines(reviver, minimum=2)
        await membership.revive({THREE: "late"})  # two are enough
        with pytest.raises(RapoError) as failed:
            await membership.revive({ONE: "killed"})
        assert "1 of 3 engines are left, where rollout.minimum_engines = 2 are needed" in str(failed.value)
        reasons = f"\n  {ONE}: another head lost it: killed\n  {THREE}: another head lost it: late"
        assert str(failed.value).endswith(reasons)

    run(work)


def test_engines_that_fail_to_return_leave_too_few() -> None:
    async def work() -> None:
        reviver = Returns()
        membership, _ = engines(reviver, minimum=3)
        reviving = asyncio.ensure_future(membership.revive({TWO: "late"}))
        await turns()
        reviver.back[1].set_exception(RapoError("no model"))
        with pytest.raises(RapoError, match=f"2 of 3 engines are left(.|\n)*{TWO}: no model"):
            await reviving

    run(work)


# How they come back


def reviver_of(servers: Any, restarts: int) -> Reviver:
    return Reviver(servers, SimpleNamespace(), restarts=restarts, startup_timeout=11.0)  # type: ignore[arg-type]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines' models are compared with; an engine at `http://other…` serves another."""
    seen: list[Any] = []

    def check(url: str, served: Any, architecture: Any) -> None:
        seen.append((url, str(served), architecture))
        if "other" in url:
            raise RapoError("another model")

    monkeypatch.setattr(revival, "check_model", check)
    return seen


def telling(url: str, context_length: int | None = None) -> Any:
    client: Any = Client(url)

    async def info() -> Any:
        return SimpleNamespace(model_path="models/m", context_length=context_length)

    client.info = info
    return client


def test_a_given_engine_is_waited_for_and_checked(checked: list[Any]) -> None:
    async def work() -> None:
        reviver, clients = reviver_of(None, restarts=2), []

        def client_of(url: str) -> Any:
            clients.append(telling(url))
            return clients[-1]

        for count in (1, 2):
            assert reviver.may_return(5)
            assert await reviver.bring_back(5, ONE, client_of) == ONE
            assert (reviver.returned, clients[-1].waited) == (count, [11.0])
        assert not reviver.may_return(5) and reviver.may_return(4)
        assert checked == [(ONE, "models/m", reviver._architecture)] * 2
        for number in range(3):  # one that does not come back has used nothing up
            with pytest.raises(RapoError, match="another model"):
                await reviver.bring_back(4, "http://other:1", client_of)
            assert reviver.may_return(4) and reviver.returned == 2, number

    run(work)


def test_an_engine_that_takes_too_few_tokens_is_refused(checked: list[Any]) -> None:
    async def work() -> None:
        reviver = Reviver(None, SimpleNamespace(), restarts=1, startup_timeout=1.0, longest=96)  # type: ignore[arg-type]
        for takes in (None, 96, 2048):
            await reviver.check(telling(ONE, takes))
        with pytest.raises(RapoError, match=f"{ONE} takes 95 tokens .* are 96: .*--max-model-len 96"):
            await reviver.check(telling(ONE, 95))

    run(work)


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        (["http://new:1"], "http://new:1"),
        ([RapoError("it ended"), "http://new:1"], "http://new:1"),
        (["http://other:1", RapoError("it ended"), "http://new:1"], "http://new:1"),
        ([RapoError("it ended")] * 3, r"it was started anew 3 times \(rollout.restarts\); it ended"),
        (["http://other:1"] * 3, r"it was started anew 3 times \(rollout.restarts\); another model"),
    ],
)
def test_an_own_engine_is_started_anew_as_often_as_it_may(
    starts: list[Any], ends: str, checked: list[Any]
) -> None:
    async def work() -> None:
        left, numbers = list(starts), []

        async def restart(number: int) -> str:
            numbers.append(number)
            found = left.pop(0)
            if isinstance(found, RapoError):
                raise found
            return str(found)

        reviver = reviver_of(SimpleNamespace(restart=restart), restarts=3)
        if ends.startswith("http"):
            assert await reviver.bring_back(5, ONE, telling) == ends
        else:
            with pytest.raises(RapoError, match=ends):
                await reviver.bring_back(5, ONE, telling)
        assert numbers == [5] * len(starts)
        assert reviver.returned == ends.startswith("http")
        assert reviver.may_return(5) == (len(starts) < 3)
        assert reviver.may_return(6)

    run(work)


# The loop below


def test_the_loop_works_while_nobody_waits_and_ends_all_of_it() -> None:
    before, ended = set(threading.enumerate()), []

    async def long(name: str) -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            ended.append(name)
            if name == "stubborn":
                raise ValueError("also this one")

    loop = BackgroundLoop("test")
    waiting = [loop.start(long(name)) for name in ("stubborn", "other")]
    assert loop.run(answer()) == "answer"
    assert loop.run(asyncio.to_thread(lambda: 5)) == 5
    with pytest.raises(RapoError, match="refused"):
        loop.run(raises(RapoError("refused")))
    assert ended == []
    loop.close()
    assert sorted(ended) == ["other", "stubborn"]
    assert all(future.done() for future in waiting)
    assert loop._loop.is_closed()
    assert set(threading.enumerate()) <= before


def test_an_interrupted_wait_ends_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            cancelled.set()

    loop = BackgroundLoop("test")
    start = loop.start

    def interrupted(work: Any) -> Any:
        future = start(work)

        def result() -> None:
            start(answer()).result(WAIT_S)  # it has begun by then
            raise KeyboardInterrupt

        monkeypatch.setattr(future, "result", result)
        return future

    monkeypatch.setattr(loop, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(long())
    assert cancelled.wait(WAIT_S)
    monkeypatch.undo()
    loop.close()


def test_of_several_the_first_failure_ends_the_rest_and_stands() -> None:
    async def work() -> None:
        assert await all_of(asyncio.sleep(0, number) for number in range(3)) == [0, 1, 2]
        ended = []

        async def long() -> None:
            try:
                await asyncio.sleep(WAIT_S)
            finally:
                ended.append("long")
                raise ValueError("while it was ended")

        with pytest.raises(RapoError, match="the first"):
            await all_of([long(), raises(RapoError("the first")), long()])  # type: ignore[list-item]
        assert ended == ["long"] * 2

    run(work)
