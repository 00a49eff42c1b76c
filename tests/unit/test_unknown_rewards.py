"""Verifications that do not come to their end: told once with the reason, an error where they are many."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.config import Reward
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.unknown import UnknownRewards
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, sample_seed
from tests.episodes import group_of, scored_response
from tests.runners import single_turns
from tests.stand_in import VOCAB, stand_ins

C, W, T, X = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT, Outcome.CRASH


def group(outcomes: str, why: str | None = None) -> Group:
    of = {"c": C, "w": W, "t": T, "x": X}
    episodes = [scored_response(of[letter], [1]) for letter in outcomes]
    return group_of(*(replace(one, verification=replace(one.verification, why=why)) for one in episodes))


def sampled(*groups: Group) -> Shared:
    return Shared([one.brief() for one in groups], [0] * len(groups), dict(enumerate(groups)))


def placement(*, is_main: bool = True) -> Any:
    return SimpleNamespace(is_main=is_main, share_from_heads=lambda mine: [mine])


def test_the_first_is_told_with_its_reason_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    watch = UnknownRewards(0.5, placement())
    watch.check(1, sampled(group("cw"), group("wc")))
    watch.check(2, sampled(group("cw"), group("tc", "not done within 5 s")))
    watch.check(3, sampled(group("xw", "ValueError"), group("wc")))
    assert capsys.readouterr().err.splitlines() == [
        "warning: step 2: 1 of 4 rewards are unknown, the first by timeout: not done within 5 s; such "
        "responses are not trained on",
        "  problem 0: '?'",
        "  response: ''",
    ]


def test_the_first_is_told_so_that_it_can_be_seen_again(capsys: pytest.CaptureFixture[str]) -> None:
    verification = Verification(X, why="KeyError: 'a'", trace="Traceback …\n  File my_rewards.py")
    episode = replace(scored_response(C, [1]).episode, answer="x" * 400 + "the end of it" + "y" * 400)
    known = scored_response(C, [1])
    groups = [Group(Problem("p7", "What is it?"), (known, ScoredEpisode(episode, verification)))]
    UnknownRewards(0.5, placement()).check(3, sampled(*groups))
    warning, problem, response, *trace = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        "warning: step 3: 1 of 2 rewards are unknown, the first by crash: KeyError: 'a'"
    )
    assert problem == "  problem p7: 'What is it?'"
    assert re.fullmatch(r"  response: …'x{87}the end of ity{400}'", response)
    assert trace == ["  Traceback …", "    File my_rewards.py"]
    beyond = UnknownRewards(0.2, placement()).check(3, sampled(*groups))
    assert beyond is not None
    assert re.search(r"(?s)unknown_limit = 0.2: .*problem p7.*the end of it.*my_rewards.py", beyond)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    UnknownRewards(0.5, placement(is_main=False)).check(1, sampled(group("xc", "ValueError")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_main", [True, False])
def test_beyond_the_limit_every_rank_hears_of_it(is_main: bool) -> None:
    watch = UnknownRewards(Reward(unknown_limit=0.25).unknown_limit, placement(is_main=is_main))
    assert watch.check(1, sampled(group("ccwx", "KeyError: 'a'"))) is None
    expected = (
        r"step 2: 2 of 4 rewards are unknown, the first by crash: KeyError: 'a'; .*unknown_limit = 0\.25"
    )
    beyond = watch.check(2, sampled(group("cwxt", "KeyError: 'a'")))
    assert beyond is not None and re.search(expected, beyond)


def test_scored_groups_tell_what_happened_to_the_first() -> None:
    prompts = [Prompt(n, "?", (n + 1, 7), f"answer {n}") for n in range(2)]
    found = {
        "answer 0": [Verification(C), Verification(X, why="ValueError: no"), Verification(T, why="late")],
        "answer 1": [Verification(W), Verification(C), Verification(W)],
    }
    sampled = [
        [[n + 1, sample_seed(5, prompt, m) % VOCAB] for m in range(3)] for n, prompt in enumerate(prompts)
    ]
    asked: list[tuple[str, str]] = []

    async def judge(text: str, problem: Problem) -> Verification:
        asked.append((text, problem.answer))
        number = sampled[int(problem.id)].index([int(token) for token in text.split()])
        return found[problem.answer][number]

    with (
        stand_ins(1) as (_, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=2, request_timeout=60) as pool,
        single_turns(pool, lambda ids: " ".join(map(str, ids))) as runner,
    ):
        groups = runner.run(prompts, Sampling(3, 8, 1.0, weight_version=3, seed=5), judge)
    scored = [group for group in groups if group is not None]
    texts = [(" ".join(map(str, ids)), f"answer {n}") for n in range(2) for ids in sampled[n]]
    assert sorted(asked) == sorted(texts)
    assert [one.problem for one in scored] == [prompt.problem for prompt in prompts]
    sequences = [[one.episode.sequences[0].token_ids.tolist() for one in group.episodes] for group in scored]
    assert sequences == [[[n + 1, 7, *ids] for ids in sampled[n]] for n in range(2)]
    found_outcomes = [[one.verification.outcome for one in group.episodes] for group in scored]
    assert found_outcomes == [[C, X, T], [W, C, W]]
    whys = [[one.verification.why for one in group.episodes] for group in scored]
    assert whys == [[None, "ValueError: no", "late"], [None] * 3]
    assert scored[0].rewards == [1.0, None, None]
    rewards = known_rewards(scored)
    assert rewards.mask.tolist() == [[False, True, True], [False] * 3]
    assert rewards[1].tolist() == [0.0, 1.0, 0.0]
