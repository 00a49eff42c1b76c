"""examples/sft and examples/distill: their configurations, and the texts that are learnt."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from megatron_rapo.config import load_config
from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.tasks.problem import split_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SFT = EXAMPLES / "sft"


def test_rl_goes_on_from_the_model_that_the_cold_start_leaves() -> None:
    first, second = (load_config([SFT / "base.toml", SFT / f"{stage}.toml"]) for stage in ("sft", "rl"))
    assert second.model.path == first.run.directory / "model"
    assert first.demonstrations is not None
    assert second.demonstrations is None
    assert first.evaluate == second.evaluate
    taught = load_config([EXAMPLES / "distill/run.toml"])
    assert taught.teacher is not None
    assert taught.teacher.path == first.run.directory / "model"
    assert taught.model.path == first.model.path


@pytest.mark.parametrize("seed", [1, 2])
def test_worked_solutions_are_right_and_of_the_training_split(seed: int) -> None:
    problems = runpy.run_path(str(SFT / "worked.py"))["problems"](200, seed)
    assert len({problem["question"] for problem in problems}) == 200
    for problem in problems:
        numbers, target = problem["question"].rstrip(":").split("=")
        posed = countdown.pose(list(map(int, numbers.split())), int(target))
        assert split_of(posed.answer) == "train"
        assert countdown.is_correct(problem["solution"], posed.answer)
