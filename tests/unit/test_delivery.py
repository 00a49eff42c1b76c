"""Tokens of a step: on the ranks that train on them, and on no other; and what all ranks have instead."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.certify.measure import _shared
from megatron_rapo.config import Parallel
from megatron_rapo.data.batching import Plan, Sample
from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.delivery import with_tokens
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.parallel.placement import Placement, replica_ranks
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from tests.methods import OF_REWARDS
from tests.ranks import Ranks
from tests.unit.test_batch import GROUPS as SCORED
from tests.unit.test_batch import VOCABULARY, config

TYPES = {"token_ids": np.int32, "sampled": np.bool_, "log_probs": np.float32, "versions": np.int32}
GROUPS = 7
# Of each pipeline stage, by PP and VPP; chunks take turns over the stages.
LAYERS = {
    (1, 1): [[0, 1, 2, 3, 4, 5, 6, 7]],
    (2, 1): [[0, 1, 2, 3], [4, 5, 6, 7]],
    (2, 2): [[0, 1, 4, 5], [2, 3, 6, 7]],
}
SHAPE = ChoiceShape(layers=8, experts=200, chosen=2)
# Of each token, layer and choice another number.
PLACES = np.arange(40 * 16).reshape(40, 8, 2)


def sequence(number: int, *, sampled: bool = True) -> Sequence:
    """Of `number + 2` tokens, with two sampled spans where it is long enough; its first token tells it.

    Some have other types, as an environment of the user's own may give them.
    """
    tokens = number + 2
    mask = np.array([place > 0 and place != 3 and sampled for place in range(tokens)])
    integers, floats = (np.int64, np.float64) if number % 3 == 1 else (np.int32, np.float32)
    return Sequence(
        token_ids=(100 * number + np.arange(tokens)).astype(integers),
        sampled=mask,
        log_probs=np.where(mask, -0.5 - number, np.nan).astype(floats),
        versions=np.where(mask, number, -1).astype(integers),
        experts=None if number % 4 == 1 else ((7 * number + PLACES[:tokens]) % 200).astype(SHAPE.dtype),
    )


def groups() -> list[Group]:
    """Of two episodes: of no sequence, or of several."""
    numbers = iter(range(100))
    verification = Verification(Outcome.CORRECT)
    return [
        Group(
            Problem(str(g), "?"),
            tuple(
                ScoredEpisode(
                    Episode(tuple(sequence(next(numbers)) for _ in range((g + e) % 3)), f"{g} {e}"),
                    verification,
                )
                for e in range(2)
            ),
        )
        for g in range(GROUPS)
    ]


def sequences(found: list[Group]) -> list[Any]:
    return [one for group in found for scored in group.episodes for one in scored.episode.sequences]


def equal(one: Any, other: Any) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in TYPES]
    types = [getattr(one, name).dtype for name in TYPES]
    return types == list(TYPES.values()) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs
    )


def of_layers(one: Sequence, layers: list[int]) -> np.ndarray[Any, Any]:
    """A sequence's choices in these layers; unknown ones where it has none."""
    told = SHAPE.untold(len(one)) if one.experts is None else one.experts
    return told[:, layers]


def plans(count: int, replicas: int, seed: int) -> tuple[list[int], list[Plan], list[int]]:
    """How many samples three minibatches have, one of them none; their plans; the replica of each sample."""
    random = np.random.default_rng(seed)
    first = int(random.integers(1, count))
    sizes = [first, 0, count - first]
    found, trains = [], []
    for size in sizes:
        plan: Plan = [[[], []] for _ in range(replicas)]
        for number in range(size):
            replica = int(random.integers(replicas))
            plan[replica][random.integers(2)].insert(0, number)
            trains.append(replica)
        found.append(plan)
    return sizes, found, trains


@pytest.mark.parametrize(
    "layout",
    [
        {"data_parallel": 1},
        {"data_parallel": 4},
        {"data_parallel": 3, "tensor_parallel": 2},
        {"data_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2},
        {"data_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline_parallel": 2, "tensor_parallel": 2},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_replica_has_the_tokens_that_it_trains_on(
    layout: dict[str, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ranks = groups(), Ranks(Parallel(**layout), monkeypatch)
    # What dynamic sampling chose: not all, so that what is left out shifts the others.
    chosen = [place for place in range(GROUPS) if place not in (1, 5)]
    expected = sequences([whole[place] for place in chosen])
    replicas = layout["data_parallel"]
    sizes, plan, trains = plans(len(expected), replicas, seed)

    def step(placement: Placement) -> list[Any]:
        sampled = Shared()
        for round_ in (range(4), range(4, GROUPS)):
            mine = round_[placement.data_rank :: replicas] if placement.is_head else []
            problems = [whole[place].problem for place in round_]
            sampled.extend(share(problems, [whole[place] for place in mine], placement, whole=False))
        batch = Batch([sampled.groups[place] for place in chosen], sampled, 0)
        samples = iter([Sample(one, 1.0, 0.0, 1.0) for one in sequences(batch.groups)])
        minibatches = [[next(samples) for _ in range(size)] for size in sizes]
        found = with_tokens(minibatches, plan, batch, placement, SHAPE)
        assert list(map(len, found)) == sizes
        return [sample.sequence for minibatch in found for sample in minibatch]

    for rank, found in enumerate(ranks.run(step)):
        mine = next(replica for replica in range(replicas) if rank in replica_ranks(ranks.layout, replica))
        for one, other, replica in zip(found, expected, trains, strict=True):
            if replica == mine:
                assert equal(one, other)
                assert one.experts.dtype == SHAPE.dtype
                layers = LAYERS[
                    layout.get("pipeline_parallel", 1), layout.get("virtual_pipeline_parallel", 1)
                ]
                stage = rank // (ranks.layout.world_size // len(layers))
                assert np.array_equal(one.experts, of_layers(other, layers[stage]))
            else:
                assert one == other.brief()


@pytest.mark.parametrize("method", OF_REWARDS)
def test_microbatches_are_those_of_whole_groups(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: planning needs nothing that brief groups have not."""
    run = config({"data_parallel": 2, "context_parallel": 2, "pipeline_parallel": 2}, method=method)

    def samples_of(groups: list[Group]) -> list[list[Sample]]:
        return make_samples(groups, run.new_method(), VOCABULARY, run.minibatch_prompts)

    def step(placement: Placement) -> tuple[Any, Any]:
        mine = SCORED[placement.data_rank :: 2] if placement.is_head else []
        sampled = share([group.problem for group in SCORED], mine, placement, whole=False)
        samples = samples_of(sampled.groups)
        plans = plan_minibatches(samples, run)
        delivered = with_tokens(samples, plans, Batch(sampled.groups, sampled, 0), placement)
        expected = build_minibatches(samples_of(SCORED), plans, run, placement)
        return build_minibatches(delivered, plans, run, placement), expected

    for found, expected in Ranks(run.parallel, monkeypatch).run(step):
        assert [len(one) for one in found] == [len(one) for one in expected]
        for one, other in zip(chain(*found), chain(*expected), strict=True):
            assert one.lengths == other.lengths
            for name, tensor in vars(other).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(getattr(one, name), tensor), name


def test_what_a_method_asks_for_in_further_rounds_is_delivered_as_if_asked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of some groups, a given response after those that were sampled."""
    run = config({"data_parallel": 2, "context_parallel": 2, "pipeline_parallel": 2}, method="icpo")
    taught = Sequence.of_text((7, 8), (3, 4, 5))
    given = ScoredEpisode(Episode((taught,), "t"), Verification(Outcome.CORRECT), Guide(response="t"))
    whole = [replace(g, episodes=(*g.episodes, *[given] * (n % 3))) for n, g in enumerate(SCORED)]
    sizes = [len(group.episodes) for group in SCORED]

    def samples_of(groups: list[Group]) -> list[list[Sample]]:
        return make_samples(groups, run.new_method(), VOCABULARY, run.minibatch_prompts)

    def step(placement: Placement) -> tuple[Any, Any]:
        own = list(zip(whole, sizes, strict=True))[placement.data_rank :: 2] if placement.is_head else []
        problems = [group.problem for group in whole]

        def of_round(first: bool) -> Shared:
            mine = [replace(g, episodes=g.episodes[:n] if first else g.episodes[n:]) for g, n in own]
            plain = [replace(g, episodes=tuple(replace(e, guide=PLAIN) for e in g.episodes)) for g in mine]
            guides = [
                [e.guide for e in (g.episodes[:n] if first else g.episodes[n:])]
                for g, n in zip(whole, sizes, strict=True)
            ]
            return share(problems, plain, placement, whole=False).guided(guides)

        sampled = of_round(first=True)
        sampled.join(of_round(first=False))
        assert sampled.groups == [group.brief() for group in whole]
        samples = samples_of(sampled.groups)
        plans = plan_minibatches(samples, run)
        delivered = with_tokens(samples, plans, Batch(sampled.groups, sampled, 0), placement)
        expected = build_minibatches(samples_of(whole), plans, run, placement)
        return build_minibatches(delivered, plans, run, placement), expected

    learnt = 0
    for found, expected in Ranks(run.parallel, monkeypatch).run(step):
        for one, other in zip(chain(*found), chain(*expected), strict=True):
            learnt += int(one.off_policy.sum())
            for name, tensor in vars(other).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(getattr(one, name), tensor), name
    assert learnt == 3 * sum(n % 3 for n in range(len(whole))) * 2, "of two pipeline stages each"


def test_ranks_of_a_replica_begin_with_its_head() -> None:
    layout = Parallel(tensor_parallel=2, context_parallel=2, data_parallel=2, pipeline_parallel=2)
    assert replica_ranks(layout, 0) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert replica_ranks(layout, 1) == [4, 5, 6, 7, 12, 13, 14, 15]


# What planning has


@pytest.mark.parametrize("reads", [False, True])
def test_the_certificate_shows_a_method_what_a_run_shows_it(reads: bool) -> None:
    place: Any = SimpleNamespace(
        is_head=True, data_rank=0, layout=Parallel(), share_from_heads=lambda mine: [mine]
    )
    method: Any = SimpleNamespace(reads_responses=reads)
    kinds = {type(one) for one in sequences(_shared(groups(), method, place).groups)}
    assert kinds == {Sequence if reads else BriefSequence}


def test_a_brief_sequence_has_lengths_and_says_where_its_tokens_are() -> None:
    brief = pickle.loads(pickle.dumps(sequence(4).brief()))
    assert (len(brief), brief.sampled_tokens, brief.oldest_version) == (6, 4, 4)
    assert [brief.leaves(vocabulary) for vocabulary in (405, 406)] == [True, False]

    def read(name: str) -> Any:
        return getattr(brief, name)

    line = read.__code__.co_firstlineno + 1
    for name in TYPES:
        with pytest.raises(
            RapoError, match=rf"{__file__}, line {line}, reads `{name}` .*reads_responses = T"
        ):
            read(name)
    with pytest.raises(AttributeError):
        print(brief.no_such_thing)


def test_what_was_not_sampled_leaves_no_vocabulary_and_has_no_version() -> None:
    brief = sequence(4, sampled=False).brief()
    assert (len(brief), brief.sampled_tokens, brief.oldest_version, brief.leaves(0)) == (6, 0, None, False)


def test_the_highest_of_all_sampled_tokens_and_the_oldest_of_all_versions_count() -> None:
    versions = np.array([-1, 7, 3, -1, 5], np.int32)
    mask = versions >= 0
    log_probs = np.where(mask, -1.0, np.nan).astype(np.float32)
    brief = Sequence(np.array([90, 8, 9, 91, 2], np.int32), mask, log_probs, versions).brief()
    assert (brief.oldest_version, brief.leaves(9), brief.leaves(10)) == (3, True, False)


def test_a_brief_episode_has_all_but_tokens_and_text() -> None:
    episode = Episode((sequence(1), sequence(4)), "text", truncated=True, facts={"calls": 2.0})
    brief = pickle.loads(pickle.dumps(ScoredEpisode(episode, Verification(Outcome.WRONG)).brief([(), ()])))
    assert (brief.reward, brief.episode.truncated, brief.episode.facts) == (0.0, True, {"calls": 2.0})
    assert (brief.episode.tokens, brief.episode.sampled_tokens) == (9, 6)
    assert [brief.episode.leaves(vocabulary) for vocabulary in (405, 406)] == [True, False]
    assert brief.brief([(), ()]) == brief
    with pytest.raises(RapoError, match="reads `answer` of a response"):
        print(brief.episode.answer)
