"""`check_reward`: a table judged as in training, and each row that is not as expected told."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo import Problem, Score
from megatron_rapo.testing import check_reward

SOURCE = """
import time
from megatron_rapo import Score

async def score(response, problem, *, bonus=0.0):
    if response == "hang":
        time.sleep(60)
    if response == "fail":
        return 1 / 0
    if response == "unsure":
        return Score(None)
    right = response == problem.answer
    return Score(bonus + right, {"length": len(response), "target": problem["target"]}, answer=response)

def text(response, problem):
    return "good"
"""
PROBLEM = {"target": 7, "answer": "7"}


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("my_package.rewards")


def test_a_table_that_is_right_passes(rewards: Any) -> None:
    check_reward(
        rewards.score,
        [
            ("7", PROBLEM, 1.25),
            ("8", Problem("8", "?", "8", columns={"target": 0}), Score(1.25, {"target": 0}, answer="8")),
            ("no", PROBLEM, Score(0.25, {"length": 2})),
            ("unsure", PROBLEM, None),
            ("fail", PROBLEM, None),
            ("fail", PROBLEM, Score(None)),
        ],
        options={"bonus": 0.25},
    )


def test_each_deviation_is_told(rewards: Any) -> None:
    with pytest.raises(AssertionError) as failed:
        check_reward(
            rewards.score,
            [
                ("7", PROBLEM, 1.0),
                ("7", PROBLEM, 0.5),
                ("7", PROBLEM, Score(1.0, {"length": 2, "width": 1}, answer="8")),
                ("7", PROBLEM, None),
                ("unsure", PROBLEM, 0.0),
                ("fail", PROBLEM, 0.0),
                ("hang", PROBLEM, 0.0),
            ],
            time_limit_s=1.0,
        )
    head, *lines = str(failed.value).split("\n  row ")
    assert head == "my_package.rewards:score is not what 7 rows expect:"
    expected = [
        "2, '7' to {'target': 7, 'answer': '7'}: 1, expected 0.5",
        "3, '7' to {'target': 7, 'answer': '7'}: fact 'length' is 1, expected 2",
        "3, .*: no fact 'width', expected 1; it tells length, target",
        "3, .*: answer '7', expected '8'",
        "4, .*: 1, expected unknown",
        r"5, .*: unknown by crash \(.* returned Score\(None\)\), expected 0",
        r"(?s)6, .*: unknown by crash \(ZeroDivisionError.*rewards\.py.*\), expected 0",
        r"7, .*: unknown by timeout \(.*\), expected 0",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_what_is_no_reward_fails(rewards: Any) -> None:
    with pytest.raises(AssertionError, match=r"check_reward = .*rewards:text.* returned 'good'"):
        check_reward(rewards.text, [("7", PROBLEM, 1.0)])


@pytest.mark.parametrize("reward", [lambda response, problem: 1.0, len, "my_rewards:score"])
def test_what_processes_cannot_import_is_refused(reward: Any) -> None:
    with pytest.raises(TypeError, match="give a function of a module, by its own name"):
        check_reward(reward, [("7", PROBLEM, 1.0)])
