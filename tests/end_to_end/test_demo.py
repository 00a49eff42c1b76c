"""The demo, shortened: the console command trains the tiny model at TP 2 × PP 2, and it learns.

Two steps are one pass over 64 problems, so the first and the last two steps are asked the very same ones:
what differs is the policy, and the noise of its samples.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 16
PASS = 2  # steps
LIMIT_S = 300

SETTINGS = (
    f"run.steps={STEPS}",
    "run.seed=7",
    "data.problems=64",
    "evaluate.problems=16",
    "evaluate.samples=16",
    "evaluate.k=[1, 16]",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The run's directory and what the command printed."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    command = [str(Path(sys.executable).with_name("megatron-rapo")), "train", "examples/configs/demo.toml"]
    command += ["--set", f"run.directory={directory}", *SETTINGS]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException:
            process.terminate()  # it ends its ranks and servers
            raise
    assert process.returncode == 0, output
    yield directory, output


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_clearly(demo: tuple[Path, str]) -> None:
    rewards = [line["reward/mean"] for line in metrics(demo[0]) if line["step"] > 0]
    assert len(rewards) == STEPS
    first, last = sum(rewards[:PASS]) / PASS, sum(rewards[-PASS:]) / PASS
    assert last > first + 0.1, f"mean reward over the same problems: {first:.3f} at first, {last:.3f} at last"


def test_engines_serve_the_trainers_weights(demo: tuple[Path, str]) -> None:
    """Trainer and engine agree on the log-probs of what was sampled, after every update."""
    mismatches = [line["mismatch/log_prob_mean"] for line in metrics(demo[0]) if line["step"] > 0]
    assert max(mismatches) < 1e-4


def test_the_summary_tells_rewards_pass_at_k_and_files(demo: tuple[Path, str]) -> None:
    directory, output = demo
    assert re.search(
        r"^mean reward: 0\.\d{3} over the first 5 steps, 0\.\d{3} over the last 5$", output, re.M
    )
    for name in ("base", f"step {STEPS}"):
        row = re.search(
            rf"^{name} +(0\.\d+) \[0\.\d+, \d\.\d+\]  (\d\.\d+) \[\d\.\d+, \d\.\d+\]$", output, re.M
        )
        assert row is not None, output
        assert float(row[1]) <= float(row[2]), "pass@16 below pass@1"
    for name in ("model", "metrics.jsonl", "checkpoints", "config.toml"):
        assert f"{directory / name}  " in output
        assert (directory / name).exists()


def test_the_trained_model_loads_in_transformers(demo: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ROOT / "examples/models/tiny-countdown", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(demo[0] / "model", dtype=torch.float32)
    ours, theirs = trained.state_dict(), base.state_dict()
    assert ours.keys() == theirs.keys()
    unmoved = [name for name in ours if torch.equal(ours[name], theirs[name])]
    assert not unmoved, "these parameters were never trained"
