"""Recorded samples that are trained on again are those that were sampled, and of a run like this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.record.replaying import check_recorded, check_recorded_identity
from megatron_rapo.samples.replay import Replay
from megatron_rapo.samples.store import Recorded, write_part
from tests import rounds
from tests.episodes import scored_response
from tests.unit.test_record import PROMPTS, config, identity, run_until
from tests.unit.test_samples import C, T, placement, tool_episode

DRAWN = [replace(prompt, draw=place) for place, prompt in enumerate(PROMPTS[:2])]


def group(prompt: Prompt) -> Group:
    return Group(prompt.problem, (tool_episode(), scored_response(T, [3]), scored_response(C, [4, 5])))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run of two steps, each of the same groups, of two heads."""
    directory = tmp_path / "recorded"
    run_until(config(directory), 2)
    for step in (1, 2):
        for head, prompt in enumerate(DRAWN):
            episodes = enumerate(group(prompt).episodes)
            rows = [Recorded(prompt.draw, n, 1.0, prompt.problem, one, True) for n, one in episodes]
            write_part(directory, step, head, rows)
    return directory


def alone() -> Any:
    """The placement of a run's only rank."""
    place = placement()
    place.share_from_heads = lambda mine: [mine]
    return place


def replaying(recorded: Path, steps: int = 2, **changes: dict[str, Any]) -> RunConfig:
    rollout = {"replay": str(recorded), **changes.pop("rollout", {})}
    run = {"directory": str(recorded.parent / "again"), "steps": steps, **changes.pop("run", {})}
    return config(recorded.parent / "again", run=run, rollout=rollout, **changes)


def collect(recorded: Path, prompts: list[Prompt], responses: int = 3, step: int = 1) -> list[Group]:
    replay = Replay(recorded, alone())
    sampled = rounds.collect(
        replay,
        prompts,
        chosen=Sampling(1.0, responses, 32),
        weight_version=step - 1,
        seed=0,
    )
    assert sampled.groups == [group.brief() for _, group in sorted(sampled.whole.items())]
    return [group for _, group in sorted(sampled.whole.items())]


def test_groups_come_back_as_they_were(recorded: Path) -> None:
    found = collect(recorded, DRAWN)
    for one, other in zip(found, map(group, DRAWN), strict=True):
        assert one.problem == other.problem
        for a, b in zip(one.episodes, other.episodes, strict=True):
            assert a.verification == b.verification
            assert replace(a.episode, sequences=()) == replace(b.episode, sequences=())
            for mine, its in zip(a.episode.sequences, b.episode.sequences, strict=True):
                for name in ("token_ids", "sampled", "log_probs", "versions"):
                    np.testing.assert_array_equal(getattr(mine, name), getattr(its, name), strict=True)


def test_prompts_may_be_asked_for_in_several_rounds(recorded: Path) -> None:
    replay = Replay(recorded, alone())
    for prompt in DRAWN[::-1]:
        sampled = rounds.collect(replay, [prompt], chosen=Sampling(1.0, 3, 32), weight_version=1, seed=0)
        [found] = sampled.groups
        assert found.problem == prompt.problem


@pytest.mark.parametrize(
    ("prompts", "responses", "said"),
    [
        ([replace(PROMPTS[4], draw=1)], 3, r"has 3 responses to problem 1 as draw 1 .* needs 3 to problem 4"),
        (DRAWN, 4, r"has 3 responses to problem 0 as draw 0 of step 1, where this run needs 4"),
        ([replace(PROMPTS[0], draw=7)], 3, r"has nothing as draw 7 of step 1"),
    ],
)
def test_other_prompts_are_refused(recorded: Path, prompts: list[Prompt], responses: int, said: str) -> None:
    with pytest.raises(RapoError, match=said):
        collect(recorded, prompts, responses)


def test_another_temperature_of_the_method_is_refused(recorded: Path) -> None:
    said = "samples of step 1 at temperature 1, where this run needs 0.5"
    with pytest.raises(RapoError, match=said):
        replay = Replay(recorded, alone())
        rounds.collect(replay, DRAWN, chosen=Sampling(0.5, 3, 32), weight_version=0, seed=0)


def test_a_run_like_the_recorded_one_is_accepted(recorded: Path) -> None:
    run = replaying(recorded, algorithm={"method": "grpo"}, optimizer={"learning_rate": 1e-5})
    check_recorded(run)
    check_recorded_identity(run, identity(run))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, "has no samples of step 3; run.steps = 4 needs those of each step: set 2, or record"),
        ({"run": {"seed": 5}}, "was recorded with run.seed = 1234, now 5; give the same"),
        ({"rollout": {"temperature": 0.5}}, "was recorded with rollout.temperature = 1.0, now 0.5"),
        ({"rollout": {"responses_per_prompt": 4}}, "with rollout.responses_per_prompt = 8, now 4"),
        ({"rollout": {"dynamic_sampling": {"max_rounds": 3}}}, "with rollout.dynamic_sampling"),
    ],
)
def test_what_was_sampled_otherwise_is_refused(recorded: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RapoError, match=said):
        check_recorded(replaying(recorded, **changes))


def test_other_data_are_refused(recorded: Path) -> None:
    run = replaying(recorded)
    other = [*PROMPTS[:3], replace(PROMPTS[3], answer="5"), *PROMPTS[4:]]
    with pytest.raises(
        RapoError, match=r"was recorded with other training prompts .*another answer in row 3"
    ):
        check_recorded_identity(run, identity(run, other))


def test_another_tokenizer_is_refused_and_other_weights_are_not(recorded: Path) -> None:
    run = replaying(recorded)
    now = identity(run)
    weights = "weights of model.path"
    check_recorded_identity(run, replace(now, contents={**now.contents, weights: "others"}))
    tokenizer = "tokenizer or chat template of model.path"
    with pytest.raises(RapoError, match="was recorded with other tokenizer or chat template"):
        check_recorded_identity(run, replace(now, contents={**now.contents, tokenizer: "another"}))


def test_what_is_no_recorded_run_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"nowhere is no run .*; give the directory of one"):
        check_recorded(replaying(tmp_path / "nowhere"))
    with pytest.raises(RapoError, match=r"is run.directory itself; choose another"):
        check_recorded(replaying(recorded, run={"directory": str(recorded)}))
    for file in (recorded / "samples").iterdir():
        file.unlink()
    with pytest.raises(RapoError, match="has no samples of step 1; record them"):
        check_recorded(replaying(recorded))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"engine": {"servers": 2}}}, r"engine = .* would have no effect: replay takes recorded"),
        ({"rollout": {"minimum_engines": 1}}, r"minimum_engines = 1 would have no effect"),
        ({"evaluate": {"problems": 4}}, r"\[evaluate\] would have no effect: rollout.replay"),
        ({"weights": {"transport": "disk"}}, r"\[weights\] would have no effect"),
        ({"environment": {"use": "mine:Mine"}}, r"\[environment\] would have no effect"),
        (
            {
                "optimizer": {"in_host_memory_during_rollouts": True},
                "model": {"dtype": "bfloat16"},
            },
            r"in_host_memory_during_rollouts = true would have no effect: rollout.replay",
        ),
        ({"rollout": {"max_staleness": 1}}, r"max_staleness = 1 would have no effect: replay takes recorded"),
    ],
)
def test_options_of_engines_are_refused(recorded: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RapoError, match=said):
        replaying(recorded, **changes)
