"""A rollout batch as metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_rapo.config.reward import TAKEN
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import count_tokens, staleness, summarise
from tests.episodes import group_of, scored_response

VOCABULARY, VERSION = 61, 7
C, W, T, X = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT, Outcome.CRASH


def group(prompt_tokens: int, *shapes: tuple[int, Outcome], truncated: int = 0) -> Group:
    """Responses of the given lengths and outcomes; the first `truncated` were cut."""
    return group_of(
        *(
            scored_response(
                outcome, [0] * length, prompt=range(prompt_tokens), version=VERSION, truncated=n < truncated
            )
            for n, (length, outcome) in enumerate(shapes)
        )
    )


GROUPS = [
    group(3, (4, C), (6, W)),
    group(2, (1, C), (9, C), truncated=1),
    group(5, (2, W), (2, T)),
    group(1, (8, X), (8, W), truncated=2),
]


def test_rewards_and_outcomes_are_shares_of_all_responses() -> None:
    found = summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)
    assert found["reward/correct"] == found["reward/wrong"] == 3 / 8
    assert found["reward/timeout"] == found["reward/crash"] == 1 / 8


def test_facts_are_means_over_those_that_they_were_told_of() -> None:
    facts = [{"form": 1.0, "length": 4.0}, {"form": 0.0}, {}]
    found = group_of(
        *(replace(scored_response(C, [0]), verification=Verification(C, facts=f)) for f in facts)
    )
    metrics = summarise(Batch([found, GROUPS[0]], Shared(), 0), VOCABULARY)
    assert (metrics["reward/form"], metrics["reward/length"]) == (0.5, 4.0)


def test_rewards_that_are_no_verdicts_have_their_own_mean() -> None:
    rewards = [0.25, -1.0, 2.0]
    found = group_of(
        *(replace(scored_response(W, [0]), verification=Verification(W, reward=r)) for r in rewards)
    )
    assert summarise(Batch([found], Shared(), 0), VOCABULARY)["reward/mean"] == pytest.approx(1.25 / 3)
    assert found.rewards == rewards


def test_sources_of_a_mixture_have_their_own_means() -> None:
    """One that none of the step's problems is of has a count alone."""
    of_sources = [
        replace(group, problem=replace(group.problem, source=source))
        for group, source in zip(GROUPS, ("sums", "words", "words", "sums"), strict=True)
    ]
    batch = Batch(of_sources, Shared(of_sources), 0)
    found = summarise(batch, VOCABULARY, ["sums", "words", "rare"])
    assert {name: value for name, value in found.items() if name.count("/") == 2} == {
        "reward/sums/responses": 4,
        "reward/sums/mean": pytest.approx(1 / 3),
        "reward/sums/unknown": pytest.approx(1 / 4),
        "reward/words/responses": 4,
        "reward/words/mean": pytest.approx(2 / 3),
        "reward/words/unknown": pytest.approx(1 / 4),
        "reward/rare/responses": 0,
    }
    assert found["reward/mean"] == 3 / 6
    assert summarise(batch, VOCABULARY, ["sums"]) == summarise(batch, VOCABULARY)


def test_no_fact_can_take_the_name_of_another_metric() -> None:
    metrics = summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)
    assert {f"reward/{name}" for name in TAKEN} == {name for name in metrics if name.startswith("reward/")}


def test_the_oldest_weights_of_a_batch_are_told() -> None:
    groups = [GROUPS[0], group_of(scored_response(C, [0], version=VERSION + 1))]
    assert summarise(Batch(groups, Shared(groups), 0), VOCABULARY)["rollout/weight_version"] == VERSION


def test_unknown_rewards_are_counted_and_in_no_mean() -> None:
    found = summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)
    assert found["reward/unknown"] == 2 / 8
    assert found["reward/mean"] == 3 / 6
    unknown = [group(1, (1, T), (1, X))]
    found = summarise(Batch(unknown, Shared(unknown), 0), VOCABULARY)
    assert math.isnan(found["reward/mean"])
    assert found["reward/groups_all_fail"] == 0


def test_groups_that_teach_nothing_are_counted() -> None:
    found = summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)
    assert found["reward/groups_all_fail"] == 2 / 4
    assert found["reward/groups_without_variance"] == 3 / 4


def test_lengths_and_cut_responses() -> None:
    found = summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)
    assert found["rollout/response_tokens_mean"] == pytest.approx(40 / 8)
    assert found["rollout/response_tokens_max"] == 9
    assert found["rollout/truncated"] == 3 / 8


def test_the_version_that_sampled_is_told() -> None:
    assert summarise(Batch(GROUPS, Shared(GROUPS), 0), VOCABULARY)["rollout/weight_version"] == VERSION


def test_of_several_versions_the_oldest_is_told() -> None:
    newer = scored_response(C, [0], version=VERSION + 1)
    mixed = [group_of(newer, *GROUPS[0].episodes)]
    assert summarise(Batch(mixed, Shared(mixed), 0), VOCABULARY)["rollout/weight_version"] == VERSION


def test_the_trainer_sees_each_response_with_its_prompt() -> None:
    assert count_tokens(GROUPS) == (40, 40 + 2 * (3 + 2 + 5 + 1))


def test_responses_with_tokens_that_do_not_exist_are_counted() -> None:
    strange = group_of(*(scored_response(outcome, [3, VOCABULARY]) for outcome in (C, W)))
    assert (
        summarise(Batch([*GROUPS, strange], Shared(GROUPS), 0), VOCABULARY)["rollout/outside_vocabulary"]
        == 2 / 10
    )


def test_what_environments_tell_is_a_mean_over_the_episodes_that_told_it() -> None:
    def telling(pages: float) -> ScoredEpisode:
        one = scored_response(C, [0])
        return replace(one, episode=replace(one.episode, facts={"pages": pages}))

    groups = [group_of(telling(3.0), telling(3.0)), group_of(telling(6.0), scored_response(W, [0]))]
    assert summarise(Batch(groups, Shared(groups), 0), VOCABULARY)["environment/pages"] == 4.0


def test_a_step_without_any_sequence_is_told() -> None:
    """As where an environment raised in every episode."""
    nothing = ScoredEpisode(Episode((), ""), Verification(X))
    groups = [group_of(nothing, nothing)]
    found = summarise(Batch(groups, Shared(groups), 0), VOCABULARY)
    assert math.isnan(found["rollout/weight_version"])
    assert (found["reward/crash"], found["rollout/response_tokens_max"]) == (1.0, 0.0)


def test_staleness_counts_every_sampled_token_once():
    def of(*versions: int) -> ScoredEpisode:
        array = np.array(versions, np.int32)
        mask = array >= 0
        log_probs = np.where(mask, -1.0, np.nan).astype(np.float32)
        sequence = Sequence(np.arange(len(array), dtype=np.int32), mask, log_probs, array)
        return ScoredEpisode(Episode((sequence,), ""), Verification(Outcome.WRONG))

    group = Group(GROUPS[0].problem, (of(-1, 3, 3, 4), of(-1, 5), of(-1, -1)))
    for one in (group, group.brief()):
        found = staleness(Batch([one], Shared([one]), 0), now=5)
        assert found == {"rollout/staleness_mean": (2 + 2 + 1 + 0) / 4, "rollout/staleness_max": 2}
    nothing = Group(GROUPS[0].problem, (of(-1, -1),))
    assert staleness(Batch([nothing], Shared([nothing]), 0), now=5) == {}
