"""A run that was stopped and resumed is the run that was not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rapo.samples.store import read_step, steps_of
from tests.end_to_end.command import (
    MODEL,
    Command,
    checkpoints,
    heartbeats,
    metrics,
    run,
    started,
    without_times,
    write_config,
)
from tests.end_to_end.conftest import EVALUATE, LAYOUT

Finished = tuple[Path, Command]


def stopped_after(step: int, finished: Path, directory: Path) -> None:
    """A copy of the finished run as it stood after `step`, with a later step begun and logged."""
    shutil.copytree(finished, directory)
    shutil.rmtree(directory / "model")
    for later in range(step + 1, 5):
        shutil.rmtree(directory / f"checkpoints/step_{later:06d}")


def test_a_killed_run_goes_on_bit_for_bit(finished: Finished, tmp_path: Path) -> None:
    """Killed in step 3, all at once; its first two steps also show that one seed makes one run."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "run.toml", directory, parallel=LAYOUT, evaluate=EVALUATE)

    def in_step_3() -> bool:
        beats = heartbeats(directory)
        return bool(beats) and beats[0]["step"] == 3 and beats[0]["phase"] == "update"

    with started(config) as command:
        command.wait_until(in_step_3)
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000002"

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert list(map(without_times, metrics(directory))) == list(map(without_times, metrics(finished[0])))
    for written in (finished[0] / "model").iterdir():
        assert (directory / "model" / written.name).read_bytes() == written.read_bytes(), written.name


AHEAD = {"max_staleness": 1}


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two replicas, sampled ahead, in one go."""
    base = tmp_path_factory.mktemp("ahead")
    config = write_config(base / "run.toml", base / "run", rollout=AHEAD, parallel={"data_parallel": 2})
    finished = run(config)
    assert finished.process.returncode == 0, finished.stderr
    return base / "run"


@pytest.mark.exhaustive  # test_ahead.py has one with partial responses
def test_a_run_that_samples_ahead_goes_on_bit_for_bit(ahead: Path, tmp_path: Path) -> None:
    """Killed while a batch is being sampled, and another one waits for its step."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "run.toml", directory, rollout=AHEAD, parallel={"data_parallel": 2})

    def in_step_3() -> bool:
        beats = heartbeats(directory)
        return bool(beats) and beats[0]["step"] == 3 and beats[0]["phase"] == "update"

    with started(config) as command:
        command.wait_until(in_step_3)
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000002"

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert list(map(without_times, metrics(directory))) == list(map(without_times, metrics(ahead)))
    for step in range(1, 5):
        assert repr(read_step(steps_of(directory)[step])) == repr(read_step(steps_of(ahead)[step]))
    for written in (ahead / "model").iterdir():
        assert (directory / "model" / written.name).read_bytes() == written.read_bytes(), written.name


@pytest.mark.exhaustive
def test_each_step_trains_on_what_older_weights_sampled(ahead: Path) -> None:
    for step in range(1, 5):
        versions = {
            version
            for row in read_step(steps_of(ahead)[step])
            for sequence in row["sequences"]
            for version, sampled in zip(sequence["versions"], sequence["sampled"], strict=True)
            if sampled
        }
        assert versions == {max(0, step - 2)}


ROLL = """
import random
import time


def roll(expression: str) -> str:
    \"\"\"Rolls a die that no two calls have alike.

    Args:
        expression: is not looked at.
    \"\"\"
    time.sleep(0.2)
    return str(random.SystemRandom().randrange(10**9, 10**10))
"""


def test_a_step_that_was_killed_among_its_tools_hears_the_same_answers(tmp_path: Path) -> None:
    """The policy's calls are those before an `=`; what it was told of them stands in its episodes."""
    (tmp_path / "my_dice.py").write_text(ROLL)
    directory = tmp_path / "run"
    config = write_config(
        tmp_path / "run.toml",
        directory,
        run={"steps": 2},
        rollout={"prompts_per_step": 8, "responses_per_prompt": 8, "max_response_tokens": 64},
        environment={"use": "tool_use", "tools": ["my_dice:roll"], "max_turns": 3},
        **{
            "environment.options": {"renderer": "plain", "workers": 1, "call_time_limit_s": 60},
            "environment.options.renderer_options": {"call": ["", "="], "answer": ["", "\n"]},
        },
    )
    answers = directory / "answers/step_000002-000.jsonl"

    def kept() -> list[str]:
        whole = answers.read_bytes().rpartition(b"\n")[0] if answers.exists() else b""
        return [json.loads(line)[1]["text"] for line in whole.splitlines()[1:]]

    with started(config) as command:
        command.wait_until(lambda: len(kept()) >= 2)  # of few: what dice say decides how many there are
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000001"
    before = kept()

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert not answers.exists(), "a checkpoint has the step"
    rows = read_step(steps_of(directory)[2])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    said = tokenizer.batch_decode([one["sequences"][0]["token_ids"] for one in rows])
    heard = [text for one in said for text in re.findall(r"\d{10}", one)]
    assert set(before) <= set(heard)
    assert len(heard) == len(set(heard)) > len(before)


def test_another_layout_goes_on_with_the_same_losses(finished: Finished, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    stopped_after(2, finished[0], directory)
    config = write_config(
        tmp_path / "run.toml",
        directory,
        run={"steps": 3},
        parallel={"pipeline_parallel": 2, "data_parallel": 2},
        evaluate=EVALUATE,
    )
    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    before, after = metrics(finished[0]), metrics(directory)
    assert [line["step"] for line in after] == [0, 1, 2, 3]
    assert after[:3] == before[:3], "what was logged before stays as it is"
    expected, found = before[3], after[3]
    assert found["mismatch/log_prob_mean"] < 1e-5
    for name in ("loss/total", "loss/entropy", "loss/divergence", "optimizer/gradient_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert found["reward/mean"] == expected["reward/mean"]


def test_a_run_that_must_not_go_on_is_refused(finished: Finished, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.toml", finished[0], checkpoint={"resume": False})
    before = metrics(finished[0])
    command = run(config)
    assert command.process.returncode == 1
    assert "choose another directory, or set checkpoint.resume = true" in command.stderr
    assert metrics(finished[0]) == before
