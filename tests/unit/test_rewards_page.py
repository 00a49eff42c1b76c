"""docs/rewards.md and examples/own_reward do what they say: every block of code is run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo import Problem, Score
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.load import validate
from megatron_rapo.reward.verifier import Verifier

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
PROBLEM = Problem(
    "0", "3 4=7:", '{"numbers":[3,4],"target":7}', "countdown", columns={"numbers": [3, 4], "target": 7}
)
FIRST, USERS_TEST, CHECKED, WITH_FACTS, WEIGHED = range(5)


def namespace(block: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(PYTHON[block], found)
    return found


def configured(block: int, folder: Path) -> RunConfig:
    options = {
        "run": {"directory": "runs/x", "steps": 3, "code": [str(folder)]},
        "model": {"path": "model"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
        **tomllib.loads(TOML[block]),
    }
    return validate(options, source="page")


def test_every_block_of_the_page_is_tested_here() -> None:
    assert (len(PYTHON), len(TOML)) == (5, 3)


def test_the_first_function_and_its_users_tests(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(PYTHON[FIRST])
    (tmp_path / "test_it.py").write_text(PYTHON[USERS_TEST] + PYTHON[CHECKED])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout


def test_the_option_finds_it(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(PYTHON[FIRST])
    config = configured(0, tmp_path)
    with Verifier.configured(config.verifier_of(config.data), config.reward) as verifier:
        [found] = verifier.verify([("3+3", PROBLEM)])
        [half] = verifier.verify([(" 4=4", PROBLEM)])
    assert (found.reward, half.reward) == (0.0, 0.5)


def test_a_score_with_facts() -> None:
    score = namespace(WITH_FACTS)["score"]
    assert score("It is 7", PROBLEM) == Score(1.0, {"words": 3}, "7")
    assert score("", PROBLEM) == Score(0.0, {"words": 0}, None)


def test_several_with_weights(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(PYTHON[WEIGHED])
    config = configured(1, tmp_path)
    with Verifier.configured(config.verifier_of(config.data), config.reward) as verifier:
        found = verifier.verify([("3+4=7", PROBLEM), ("3+4", PROBLEM), ("3+5=7", PROBLEM)])
    assert [one.reward for one in found] == [1.0, 0.8, 0.2]
    assert [one.outcome for one in found] == ["correct", "correct", "wrong"]
    assert found[0].facts == {"countdown": 1.0, "format": 1.0, "brevity": 0.75}


def test_a_data_sets_own_reward(tmp_path: Path) -> None:
    config = configured(2, tmp_path)
    assert str(config.verifier_of(config.data)) == "my_rewards:score"
    assert [str(config.verifier_of(data)) for data in config.evaluation_data] == ["countdown"]


def test_the_examples_own_test_passes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/own_reward"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_examples_configuration_finds_its_reward() -> None:
    config = load_config([ROOT / "examples/own_reward/run.toml"])
    assert config.run.code == [ROOT / "examples/own_reward"]
    problem = Problem("0", "", columns={"numbers": [3, 4], "target": 7})
    with Verifier.configured(config.verifier_of(config.data), config.reward) as verifier:
        found = verifier.verify([("3+4", problem), ("3*4", problem)])
    assert [one.reward for one in found] == [1.0, pytest.approx(0.3 + 0.2 / 6)]
