"""A run whose reward is a file of the user's own, beside the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_rapo.config import load_config
from tests.end_to_end.command import metrics, run, write_config

REWARD = """
import zlib
from megatron_rapo import Score

async def score(response, problem):
    if zlib.crc32(response.encode()) % 3 == 0:
        raise ValueError("unlucky")
    return Score(len(response) / 64, {"target": problem["target"]})
"""


def test_it_trains_on_what_the_function_says(tmp_path: Path) -> None:
    """A third of the responses fail: these are counted, told once, and not trained on."""
    (tmp_path / "my_rewards.py").write_text(REWARD)
    reward = {"function": "my_rewards:score", "correct_at": 0.25}
    evaluate = {"problems": 4, "samples": 2, "k": [1]}
    config = write_config(
        tmp_path / "run.toml", tmp_path / "run", run={"steps": 2}, reward=reward, evaluate=evaluate
    )
    command = run(config)
    assert command.process.returncode == 0, command.stderr
    assert load_config([tmp_path / "run/config.toml"]).run.code == [tmp_path]
    lines = metrics(tmp_path / "run")
    for line in lines[1:]:
        assert 0 < line["reward/unknown"] == line["reward/crash"] < 0.5
        assert 0 < line["reward/mean"] < 0.5
        assert line["reward/correct"] + line["reward/wrong"] == pytest.approx(1 - line["reward/crash"])
        assert line["reward/target"] > 1
        assert line["optimizer/gradient_norm"] > 0
    assert 0 < lines[0]["evaluate/unknown"] < 1
    told = re.findall(
        r"^warning: step (\d+): .* unknown, the first by crash: ValueError: unlucky; .*\n  problem .*\n"
        rf"  response: .*\n  Traceback .*\n.*{tmp_path}/my_rewards.py",
        command.stderr,
        re.M,
    )
    assert told == ["1"]
