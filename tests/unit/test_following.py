"""Episodes that begin as another one did, and those at a temperature of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.data.guided import Guided
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.episode.environment import Generate, Transcript
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.asking import ask
from megatron_rapo.experience.course import Wanted, follow
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.sampling import Sampling as Chosen
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, sample_seed
from tests.stand_in import VOCAB, StandIn, stand_ins

PROMPT = Prompt(10, "?", (3, 7), "", draw=0)
SAMPLING = Sampling(2, 64, 1.0, 3, 5)


class Kept:
    """Answers of a step."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}

    def find(self, key: str) -> tuple[bool, Any]:
        return key in self.answers, self.answers.get(key)

    def keep(self, key: str, answer: Any) -> None:
        self.answers[key] = answer


class ThreeTurns:
    """Between turns stand a number that it draws, and one that code outside tells, another one each time."""

    def __init__(self, *, honest: bool = True) -> None:
        self.honest = honest
        self.calls = 0

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        transcript = Transcript(problem.token_ids)
        for turn in range(3):

            async def outside() -> int:
                self.calls += 1
                return self.calls % VOCAB

            transcript.add_turn(await generate(transcript.token_ids, turn=turn))
            if turn < 2:
                told = await generate.recorded("what?", outside) if self.honest else await outside()
                transcript.add_given([told, seed % VOCAB])
        return Episode((transcript.sequence(),), answer="")


async def judge(answer: str, problem: Problem) -> Verification:
    return Verification(Outcome.CORRECT, reward=1.0)


def guided(prompt: Prompt, guide: Guide) -> Guided:
    return Guided(prompt.token_ids, (), (5, 6) if guide.response else None, prompt.token_ids)


@contextmanager
def played(environment: Any = None) -> Iterator[tuple[StandIn, Any]]:
    """An engine, and what samples further episodes of a group."""
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids))
    options = EnvironmentOptions(use="tests:ThreeTurns", max_turns=3)
    episodes = EpisodeRunner(environment or ThreeTurns(), options, tokenizer, 1.0, 2**31, guided)
    answers = Kept()
    with (
        stand_ins(1) as (servers, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60) as pool,
        Runner(episodes, pool) as runner,
    ):

        def more(wanted: Wanted) -> Shared:
            with runner.begin(wanted.prompts, SAMPLING, judge, wanted.tries, answers) as rollout:
                [group] = rollout.groups()
            assert group is not None
            return Shared([group], [0], {0: group})

        yield servers[0], more


def grown(more: Any, *rounds: Sequence[Guide]) -> Group:
    """The group after these have been asked for, round by round."""

    class Asks(GRPO):
        def ask(self, groups: Sequence[Group]) -> list[list[Guide]]:
            left = list(rounds)
            have = len(groups[0].episodes)
            while left and have >= len(left[0]):
                have -= len(left.pop(0))
            return [list(left[0]) if left else []]

    method = Asks(Asks.Options(), Chosen(1.0, 2, 64))
    return follow(ask(method, [PROMPT]), more).whole[0]


def tokens(group: Group, number: int) -> list[int]:
    episode = group.episodes[number].episode
    assert isinstance(episode, Episode)
    return episode.sequences[0].token_ids.tolist()


def starts(group: Group) -> list[int]:
    """Where the turns of the first episode begin, and its end."""
    episode = group.episodes[0].episode
    assert isinstance(episode, Episode)
    sampled = episode.sequences[0].sampled
    return [*np.flatnonzero(np.diff(sampled, prepend=False) & sampled).tolist(), len(sampled)]


def asked(server: StandIn) -> list[tuple[list[int], dict[str, Any]]]:
    return [
        pair
        for path, body in server.asked
        if path == "/generate"
        for pair in zip(body["input_ids"], body["sampling_params"], strict=True)
    ]


def test_an_episode_goes_on_from_anothers_turns() -> None:
    with played() as (server, more):
        group = grown(more, [PLAIN], [Guide(after=(0, 1)), Guide(after=(0, 2))], [Guide(after=(2, 2))])
        first, second, third, _ = starts(group)
        begins = [len(prompt) for prompt, _ in asked(server)]
    whole = tokens(group, 0)
    assert sorted(begins) == sorted([first, second, third, second, third, third, third])
    assert tokens(group, 1)[:second] == whole[:second]
    assert tokens(group, 2)[:third] == whole[:third], "code outside, or the environment, said otherwise"
    assert tokens(group, 3)[:third] == whole[:third]
    assert len({tuple(tokens(group, number)) for number in range(4)}) == 4, "all go on alike"
    seeds = [params["sampling_seed"] for prompt, params in asked(server) if len(prompt) == third]
    assert sorted(seeds) == sorted(sample_seed(5, PROMPT, number, 2) for number in range(4))
    for number in range(1, 4):
        assert not group.episodes[number].guide.is_off_policy
        episode = group.episodes[number].episode
        assert isinstance(episode, Episode)
        source = group.episodes[0].episode
        assert isinstance(source, Episode)
        np.testing.assert_array_equal(
            episode.sequences[0].log_probs[:second], source.sequences[0].log_probs[:second]
        )


def test_a_text_is_given_after_anothers_turns() -> None:
    with played() as (server, more):
        group = grown(
            more, [PLAIN], [Guide(after=(0, 0), response="gold"), Guide(after=(0, 2), response="gold")]
        )
        assert len(asked(server)) == 3, "an engine was asked for what is given"
        first, _, third, _ = starts(group)
    whole = tokens(group, 0)
    assert [tokens(group, number) for number in (1, 2)] == [[*whole[:first], 5, 6], [*whole[:third], 5, 6]]
    assert group.episodes[2].episode.trained_tokens == 2
    assert group.episodes[2].guide.is_off_policy


def test_an_environment_that_does_not_repeat_itself_is_told() -> None:
    with (
        played(ThreeTurns(honest=False)) as (_, more),
        pytest.raises(RapoError, match=r"turn 1 of an episode .* follows other tokens than there; draw by"),
    ):
        grown(more, [PLAIN], [Guide(after=(0, 2))])


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (
            Guide(after=(1, 1)),
            r"after = \(1, 1\) asks for 1 turns of episode 1, but there is no such episode",
        ),
        (Guide(after=(0, 3)), r"3 turns of episode 0, but there is 3 turns, of which one must be left"),
    ],
)
def test_turns_that_are_not_there_are_told(guide: Guide, said: str) -> None:
    with played() as (_, more), pytest.raises(RapoError, match=said):
        grown(more, [PLAIN], [guide])


def test_an_episode_has_a_temperature_of_its_own() -> None:
    with played() as (server, more):
        group = grown(more, [PLAIN, Guide(temperature=1.5)])
        found = sorted(params["temperature"] for _, params in asked(server))
    assert found == [1.0] * 3 + [1.5] * 3
    assert [one.guide.is_off_policy for one in group.episodes] == [False, True]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"after": (0, 1), "question": "?"}, "after: what goes on from an episode has its prompt"),
        ({"after": (0, 1), "begins": "1+"}, "after: what goes on from an episode has its prompt"),
        ({"temperature": 0.0}, r"temperature = 0\.0 is no positive number"),
        ({"temperature": float("inf")}, "temperature = inf is no positive number"),
    ],
)
def test_guides_that_cannot_be_are_told(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Guide(**fields)
