"""Engines as the ranks of a run share them: three replicas of two ranks each, one of which is the head."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.config import Parallel
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.running import Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.experience.sharing import share
from megatron_rapo.methods.sampling import Sampling as Chosen
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.rollout.requests import Sampling
from tests import rounds
from tests.episodes import scored_response
from tests.ranks import Ranks

WORLD, STRIDE, HEADS = 6, 2, 3
LAYOUT = Parallel(tensor_parallel=STRIDE, data_parallel=HEADS)
ONE, TWO, THREE = "http://a:1", "http://b:1", "http://c:1"


class Pool:
    """Notes what it is asked; each head's has lost what a table says."""

    def __init__(self, head: int, failures: dict[str, str] | None = None) -> None:
        self.failures = failures or {}
        self.urls = [url for url in (ONE, TWO, THREE) if url not in self.failures]
        self.resent = 10**head
        self.asked: list[Any] = []

    def software(self) -> str:
        return "engine 1.0"

    def release_memory(self) -> None:
        self.asked.append("release")

    def resume_memory(self) -> None:
        self.asked.append("resume")

    def revive(self, lost: dict[str, str]) -> None:
        self.asked.append(lost)

    def use(self, urls: list[str]) -> None:
        self.asked.append(urls)


def on_ranks(work: Callable[[Placement], Any]) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        return Ranks(LAYOUT, patch).run(work)


def on_each(work: Any, lost: tuple[dict[str, str], ...] = ({}, {}, {}), **options: Any) -> list[Any]:
    """What `work(engines)` makes on each rank, and what its pool was asked."""

    def run(rank: Any) -> Any:
        pool = cast(Any, Pool(rank.data_rank, lost[rank.data_rank]) if rank.is_head else None)
        reviver: Any = SimpleNamespace(returned=7) if rank.is_main else None
        found = work(SharedEngines(rank, pool, reviver, **options))
        return found, pool and pool.asked

    return on_ranks(run)


@pytest.mark.parametrize("options", [{}, {"colocated": False}, {"colocated": True}])
def test_colocated_engines_are_offloaded_by_the_main_rank_alone(options: dict[str, bool]) -> None:
    def work(engines: SharedEngines) -> None:
        with engines.offloaded():
            assert engines.pool is None or "resume" not in cast(Any, engines.pool).asked

    asked = [asked for _, asked in on_each(work, **options)]
    assert asked[0] == (["release", "resume"] if options.get("colocated") else [])
    assert asked[1:] == [None, [], None, [], None]


def test_an_engine_that_is_lost_while_it_is_onloaded_is_left_to_the_publication() -> None:
    pool: Any = Pool(0)

    def lose() -> None:
        pool.asked.append("resume")
        raise EngineLost("gone")

    pool.resume_memory = lose
    place: Any = SimpleNamespace(is_main=True)
    engines = SharedEngines(place, pool, None, colocated=True)
    with engines.offloaded():
        assert pool.asked == ["release"]
    assert pool.asked == ["release", "resume"]
    with pytest.raises(EngineLost):
        engines.onload()


def test_after_an_error_engines_are_left_as_they_are() -> None:
    pool: Any = Pool(0)
    place: Any = SimpleNamespace(is_main=True)
    with pytest.raises(ZeroDivisionError), SharedEngines(place, pool, None, colocated=True).offloaded():
        raise ZeroDivisionError
    assert pool.asked == ["release"]


def test_heads_name_their_engines_software() -> None:
    assert [found for found, _ in on_each(lambda engines: engines.software())] == ["engine 1.0", ""] * HEADS


def test_the_main_rank_brings_back_what_any_head_lost_and_the_first_heads_reason_stands() -> None:
    lost = ({TWO: "late"}, {TWO: "gone", ONE: "killed"}, {ONE: "closed"})
    asked = [asked for _, asked in on_each(lambda engines: engines.revive(), lost)]
    assert asked[0] == [{TWO: "late", ONE: "killed"}]
    assert asked[1:] == [None, [], None, [], None]


def test_all_heads_take_the_engines_that_the_main_rank_has() -> None:
    lost = ({TWO: "late"}, {}, {ONE: "closed"})
    asked = [asked for _, asked in on_each(lambda engines: engines.agree(), lost)]
    assert asked == [[], None, [[ONE, THREE]], None, [[ONE, THREE]], None]


@pytest.mark.parametrize(("missing", "any_"), [((0, 0, 0), False), ((0, 0, 2), True), ((1, 0, 0), True)])
def test_groups_that_one_head_misses_are_known_to_all(missing: tuple[int, ...], any_: bool) -> None:
    def ask(rank: Any) -> bool:
        return SharedEngines(rank, None, None).any_missing(missing[rank.data_rank] if rank.is_head else 9)

    assert on_ranks(ask) == [any_] * WORLD


def test_the_error_is_the_same_on_all_ranks() -> None:
    lost = ({TWO: "late"}, {TWO: "gone", ONE: "killed"}, {})
    found = {str(found) for found, _ in on_each(lambda engines: engines.too_few(), lost)}
    assert found == {
        f"too few engines are left to sample from; mend what ended them:\n  {TWO}: late\n  {ONE}: killed"
    }


def test_requests_sent_again_are_those_of_all_heads() -> None:
    found = [dict(found) for found, _ in on_each(lambda engines: engines.metrics(), ({TWO: "late"}, {}, {}))]
    assert found[0] == {"engines/live": 2, "engines/returned": 7, "engines/requests_resent": 111}
    assert found[2] == {"engines/live": 3, "engines/returned": 0, "engines/requests_resent": 111}
    for of_another in found[1::2]:
        assert of_another == {"engines/live": 0, "engines/returned": 0, "engines/requests_resent": 111}


# Episodes


CHOSEN = Chosen(0.75, 5, 13)
PROMPTS = [Prompt(10 + i, "", (i, 7), "", draw=i) for i in range(8)]
IDS = [prompt.id for prompt in PROMPTS]
TIMED = threading.local()  # phases that this rank is in


class Episodes:
    """A head's runner: notes what it is asked for, and in which phase."""

    def __init__(self, fails: int = 0) -> None:
        self.fails = fails  # prompts that engines leave open at its first question
        self.asked: list[tuple[list[str], Sampling, Any]] = []
        self.did: list[Any] = []

    @contextmanager
    def begin(
        self, prompts: list[Prompt], sampling: Sampling, judge: Any, tries: Any, answers: Any
    ) -> Iterator[Any]:
        assert tries == [Tries(0, (PLAIN,) * sampling.responses_per_prompt)] * len(prompts)
        assert answers is None
        self.asked.append(([prompt.id for prompt in prompts], sampling, judge))
        self._note("begun")
        open_, self.fails = self.fails, 0
        groups = [*[None] * open_, *[Group(prompt.problem, ()) for prompt in prompts[open_:]]]

        def judged() -> list[Group | None]:
            self._note("judged")
            return groups

        yield SimpleNamespace(wait_until_sampled=lambda: self._note("sampled"), groups=judged, times=Times())
        self._note("left")

    def _note(self, what: str) -> None:
        self.did.append((what, *TIMED.phases))


@contextmanager
def phase(name: str) -> Iterator[None]:
    TIMED.phases.append(name)
    yield
    TIMED.phases.remove(name)


def collector_of(rank: Any, pool: Any, runner: Any = None, recover: Any = None) -> Collector:
    TIMED.phases = []
    judge: Any = f"judge {rank.data_rank}" if runner is not None else None
    return Collector(rank, SharedEngines(rank, pool, None), runner, judge, recover)


def collect(collector: Collector) -> list[str]:
    sampled = rounds.collect(collector, PROMPTS, chosen=CHOSEN, weight_version=4, seed=99, phase=phase)
    return [group.problem.id for group in sampled.groups]


@pytest.mark.parametrize("fails", [(0, 0, 0), (0, 2, 0), (3, 0, 1)])
def test_each_head_runs_its_share_and_asks_again_for_what_is_missing_alone(fails: tuple[int, ...]) -> None:
    def sample(rank: Any) -> Any:
        runner = Episodes(fails[rank.data_rank]) if rank.is_head else None
        recovered: list[int] = []
        pool = Pool(rank.data_rank) if rank.is_head else None
        collector = collector_of(rank, pool, runner, recovered.append)
        return collect(collector), runner.asked if runner else [], runner and runner.did, recovered

    found = on_ranks(sample)
    for rank, (groups, asked, did, recovered) in enumerate(found):
        assert groups == IDS, "all ranks get all groups, in the prompts' order"
        assert recovered == [4] * any(fails), "all ranks bring engines back together"
        head = rank // STRIDE
        if rank % STRIDE:
            assert asked == []
            continue
        share = IDS[head::HEADS]
        assert [prompts for prompts, _, _ in asked] == [share, share[: fails[head]]][: 1 + any(fails)]
        for _, sampling, judge in asked:
            assert sampling == Sampling(5, 13, temperature=0.75, weight_version=4, seed=99)
            assert judge == f"judge {head}"
        assert did == [("begun",), ("sampled", "rollout"), ("judged", "reward"), ("left",)] * len(asked)


def test_without_a_way_back_every_rank_fails_alike() -> None:
    def sample(rank: Any) -> str:
        pool = Pool(rank.data_rank, {TWO: "late"}) if rank.is_head else None
        runner = Episodes(fails=int(rank.data_rank == 2)) if rank.is_head else None
        with pytest.raises(RapoError, match=f"too few engines are left.*\n  {TWO}: late") as failed:
            collect(collector_of(rank, pool, runner))
        return str(failed.value)

    assert len(set(on_ranks(sample))) == 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [8, 7, 2, 0])
def test_what_heads_sampled_is_shared_in_the_prompts_order(count: int, whole: bool) -> None:
    problems = [prompt.problem for prompt in PROMPTS[:count]]
    groups = []
    for n, problem in enumerate(problems):
        scored = scored_response(Outcome.CORRECT, [n] * (n + 1))
        groups.append(Group(problem, (replace(scored, episode=replace(scored.episode, answer=f"text {n}")),)))

    def of_rank(rank: Any) -> Any:
        mine = groups[rank.data_rank :: HEADS] if rank.is_head else []
        found = share(problems, mine, rank, whole=whole)
        return found, [found.answer(n, 0, rank) for n in range(count)]

    for rank, (found, texts) in enumerate(on_ranks(of_rank)):
        assert texts == [f"text {n}" for n in range(count)]
        assert found.heads == [place % HEADS for place in range(count)]
        head = rank // STRIDE
        assert found.whole == ({} if rank % STRIDE else {n: groups[n] for n in range(head, count, HEADS)})
        assert [group.brief() for group in found.groups] == [group.brief() for group in groups]
        for n, group in enumerate(found.groups):
            [sequence] = group.episodes[0].episode.sequences
            if whole:
                assert sequence.token_ids.tolist() == [7, 8, *[n] * (n + 1)]
            else:
                with pytest.raises(RapoError, match="token_ids"):
                    print(sequence.token_ids)
