"""Engines as the ranks of a run share them: three replicas of two ranks each, one of which is the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_rapo.config import Rollout
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.rollout.groups import Response, RolloutGroup
from tests.ranks import on_ranks

WORLD, STRIDE, HEADS = 6, 2, 3
ONE, TWO, THREE = "http://a:1", "http://b:1", "http://c:1"


class Pool:
    """Notes what it is asked; each head's has lost what a table says."""

    def __init__(self, head: int, failures: dict[str, str] | None = None) -> None:
        self.failures = failures or {}
        self.urls = [url for url in (ONE, TWO, THREE) if url not in self.failures]
        self.resent = 10**head
        self.asked: list[Any] = []
        self.fails = 0  # prompts that it leaves open at its first question

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

    def generate(self, prompts: list[Prompt], **options: Any) -> list[RolloutGroup | None]:
        self.asked.append((prompts, options))
        open_, self.fails = self.fails, 0
        groups: list[RolloutGroup | None] = [RolloutGroup(prompt, ()) for prompt in prompts]
        return [*[None] * open_, *groups[open_:]]


def on_each(work: Any, lost: tuple[dict[str, str], ...] = ({}, {}, {}), **options: Any) -> list[Any]:
    """What `work(engines)` makes on each rank, and what its pool was asked."""

    def run(rank: Any) -> Any:
        pool = cast(Any, Pool(rank.data_rank, lost[rank.data_rank]) if rank.is_head else None)
        reviver: Any = SimpleNamespace(returned=7) if rank.is_main else None
        found = work(SharedEngines(rank, pool, reviver, **options))
        return found, pool and pool.asked

    return list(on_ranks(WORLD, run, stride=STRIDE))


@pytest.mark.parametrize("options", [{}, {"colocated": False}, {"colocated": True}])
def test_colocated_engines_rest_and_wake_by_the_main_rank_alone(options: dict[str, bool]) -> None:
    def work(engines: SharedEngines) -> None:
        engines.rest()
        engines.wake()

    asked = [asked for _, asked in on_each(work, **options)]
    assert asked[0] == (["release", "resume"] if options.get("colocated") else [])
    assert asked[1:] == [None, [], None, [], None]


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

    assert on_ranks(WORLD, ask, stride=STRIDE) == [any_] * WORLD


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


# Sampling


SAMPLING = Sampling(0.75, 5, 13)
PROMPTS = [Prompt(10 + i, "", (i, 7), "", draw=i) for i in range(8)]


def collector_of(rank: Any, pool: Any, verifier: Any = None) -> Collector:
    rollout = Rollout(prompts_per_step=8, max_response_tokens=13, temperature=0.75)
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids[0]))
    return Collector(
        rollout, rank, tokenizer, SharedEngines(rank, pool, None), {"": verifier} if verifier else {}
    )


@pytest.mark.parametrize("fails", [(0, 0, 0), (0, 2, 0), (3, 0, 1)])
def test_each_head_samples_its_share_and_asks_again_for_what_is_missing_alone(fails: tuple[int, ...]) -> None:
    def sample(rank: Any) -> Any:
        pool = Pool(rank.data_rank) if rank.is_head else None
        collector = collector_of(rank, pool)
        recovered: list[int] = []
        collector.recover = recovered.append
        if pool is not None:
            pool.fails = fails[rank.data_rank]
        groups = collector.sample(PROMPTS, sampling=SAMPLING, weight_version=4, seed=99)
        asked = [[prompt.index for prompt in prompts] for prompts, _ in pool.asked] if pool else []
        options = [options for _, options in pool.asked] if pool else []
        return [group.prompt.index for group in groups], asked, options, recovered

    found = on_ranks(WORLD, sample, stride=STRIDE)
    for rank, (groups, asked, options, recovered) in enumerate(found):
        head = rank // STRIDE
        share = [prompt.index for prompt in PROMPTS[head::HEADS]] if rank % STRIDE == 0 else []
        assert groups == share
        assert recovered == [4] * any(fails), "all ranks bring engines back together"
        if share:
            assert asked == [share, share[: fails[head]]][: 1 + any(fails)]
            wanted = {"responses_per_prompt": 5, "max_response_tokens": 13, "temperature": 0.75}
            wanted |= {"weight_version": 4, "seed": 99}
            assert options == [wanted] * len(asked)


def test_without_a_way_back_every_rank_fails_alike() -> None:
    def sample(rank: Any) -> str:
        pool = Pool(rank.data_rank, {TWO: "late"}) if rank.is_head else None
        if pool is not None and rank.data_rank == 2:
            pool.fails = 1
        with pytest.raises(RapoError, match=f"too few engines are left.*\n  {TWO}: late") as failed:
            collector_of(rank, pool).sample(PROMPTS, sampling=SAMPLING, weight_version=4, seed=99)
        return str(failed.value)

    assert len(set(on_ranks(WORLD, sample, stride=STRIDE))) == 1


@pytest.mark.parametrize("count", [8, 7, 2, 0])
def test_what_heads_made_is_shared_in_the_prompts_order(count: int) -> None:
    def share(rank: Any) -> Any:
        mine = [f"made of {n}" for n in range(count)][rank.data_rank :: HEADS] if rank.is_head else ["no"]
        return collector_of(rank, None).share(mine)

    found = on_ranks(WORLD, share, stride=STRIDE)
    assert found == [[f"made of {n}" for n in range(count)]] * WORLD


def test_heads_verify_their_groups_and_other_ranks_none() -> None:
    responses = tuple(Response(np.full(1, n, np.int32), np.zeros(1, np.float32), 0, "stop") for n in (3, 4))
    groups = [RolloutGroup(prompt, responses) for prompt in PROMPTS[:2]]
    of = {"3": Verification(Outcome.CORRECT), "4": Verification(Outcome.WRONG)}
    verifier: Any = SimpleNamespace(verify=lambda pairs: [of[text] for text, _ in pairs])
    rank: Any = SimpleNamespace()
    scored = collector_of(rank, None, verifier).score(groups)
    assert [group.rewards for group in scored] == [[1.0, 0.0]] * 2
    assert collector_of(rank, None).score(groups) == []
