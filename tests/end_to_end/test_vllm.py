"""A training run on a vLLM that it starts itself: the engine killed, the run resumed."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.cli import main
from megatron_rapo.engines.vllm.flags import MODULE
from tests.end_to_end.command import Command, metrics, run, started, write_config
from tests.end_to_end.wide_heads import with_wide_heads
from tests.engines.servers import VLLM_CPU, VLLM_ON_CPU, VLLM_PYTHON, why_not
from tests.leftovers import nothing_left

pytestmark = pytest.mark.skipif(why_not(VLLM_CPU) is not None, reason=str(why_not(VLLM_CPU)))

START_S = 280.0  # of a server on a machine that is busy


def samples(directory: Path, step: int) -> list[dict[str, Any]]:
    [file] = (directory / "samples").glob(f"step_{step:06d}-*.parquet")
    return pyarrow.parquet.read_table(file).to_pylist()


def largest_gap(model: Path, rows: list[dict[str, Any]]) -> float:
    """Of the sampled tokens' log-probs from those that transformers gives them, in nats."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    worst = 0.0
    for row in rows:
        [sequence] = row["sequences"]
        tokens = torch.tensor([sequence["token_ids"]])
        with torch.inference_mode():
            found = hf(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        sampled = np.array(sequence["sampled"])[1:]
        told = np.array(sequence["log_probs"])[1:]
        worst = max(worst, float(np.abs(found.numpy() - told)[sampled].max()))
    return worst


def is_right(row: dict[str, Any]) -> bool:
    """Whether a response reaches the target with the given numbers, by Python's own arithmetic."""
    gold = json.loads(row["gold"])
    expression = row["text"].strip().splitlines()[-1] if row["text"].strip() else ""
    if not re.fullmatch(r"[\d+\-*/() ]+", expression) or len(expression) > 100:
        return False
    if sorted(map(int, re.findall(r"\d+", expression))) != gold["numbers"]:
        return False
    try:
        return abs(eval(expression) - gold["target"]) < 1e-9
    except (SyntaxError, ZeroDivisionError, TypeError):
        return False


def servers(command: Command) -> list[psutil.Process]:
    """The engine's processes; not the tether, whose own command line has that of the engine in it."""
    found = [(process, process.cmdline()) for process in command.processes()]
    return [
        process
        for process, words in found
        if MODULE in words[:4] or any(word.startswith("VLLM::") for word in words)
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("restarts", "tensor_parallel"), [(0, 1), pytest.param(1, 2, marks=pytest.mark.exhaustive)]
)
def test_a_run_on_vllm_whose_engine_is_killed_goes_on(
    tmp_path: Path, restarts: int, tensor_parallel: int
) -> None:
    """With a restart the run goes on by itself, until it is ended; without, it ends. Either is resumed."""
    model, directory = with_wide_heads(tmp_path / "model"), tmp_path / "run"
    rollout = {
        "engine.kind": "vllm",
        "engine.python": str(VLLM_PYTHON),
        "engine.tensor_parallel": tensor_parallel,
        "engine.arguments": ["--max-model-len", "64", "--max-num-seqs", "16", "--enforce-eager"],
        "startup_timeout_s": START_S,
        "restarts": restarts,
    }

    # A core for each of its ranks, by number, as it wants them where there are several.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel)))}
    environment = VLLM_ON_CPU if tensor_parallel == 1 else {**VLLM_ON_CPU, **cores}

    def config(steps: int) -> Path:
        options = {"model": {"path": str(model)}, "rollout": rollout, "run": {"steps": steps}}
        return write_config(tmp_path / "run.toml", directory, **options)

    with nothing_left():
        with started(config(1000), environment=environment) as command:
            command.wait_until((directory / "checkpoints/step_000001/run.json").exists, START_S)
            for server in servers(command):
                server.send_signal(signal.SIGKILL)
            if restarts:
                command.wait_until(lambda: metrics(directory)[-1].get("engines/returned", 0) >= 1, START_S)
                command.process.send_signal(signal.SIGTERM)
            command.wait(60)
            assert "it goes on from its newest checkpoint" in command.stderr or restarts
        assert re.search(r"engine http://\S+ is out \(0 of 1 are left\): ", command.stdout), command.stdout
        assert command.left_processes() == []
        last = metrics(directory)[-1]["step"]
        resumed = run(config(last + 1), environment=environment)
        assert resumed.process.returncode == 0, resumed.stderr
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(last + 2))
    for line in lines[1:]:
        step, rows = line["step"], samples(directory, line["step"])
        assert line["mismatch/log_prob_mean"] < 1e-5, step
        assert line["publish/probe_difference"] < 1e-5, step
        assert line["reward/correct"] == pytest.approx(np.mean([is_right(row) for row in rows])), step
        versions = {version for row in rows for version in row["sequences"][0]["versions"]} - {-1}
        assert versions == {step - 1}, "each token is of the weights that were published before its step"
    assert sum(line["reward/correct"] for line in lines[1:]) > 0
    assert largest_gap(model, samples(directory, 1)) < 1e-4
    exported = tmp_path / "exported"
    checkpoint = directory / f"checkpoints/step_{last:06d}"
    assert main(["convert", "to-hf", str(checkpoint), str(exported)]) == 0
    assert largest_gap(exported, samples(directory, last + 1)) < 1e-4
    assert largest_gap(model, samples(directory, last + 1)) > 1e-3
