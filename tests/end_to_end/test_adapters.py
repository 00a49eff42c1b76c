"""Runs that train adapters: they go on bit for bit, leave what PEFT loads, and learn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.command import (
    MODEL,
    checkpoints,
    heartbeats,
    metrics,
    run,
    started,
    without_times,
    write_config,
)

ROOT = Path(__file__).parents[2]
ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 16.0}
SECTIONS: dict[str, Any] = {
    "adapter": ADAPTER,
    "parallel": {"tensor_parallel": 2},
    "weights": {"transport": "shard"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go."""
    base = tmp_path_factory.mktemp("adapters")
    command = run(write_config(base / "run.toml", base / "run", **SECTIONS))
    assert command.process.returncode == 0, command.stderr
    return base / "run"


@pytest.mark.exhaustive  # tests/distributed/test_checkpoint.py resumes policies with adapters bit for bit
def test_a_killed_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """And under no other adapter; killed in step 3."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "run.toml", directory, **SECTIONS)

    def in_step_3() -> bool:
        beats = heartbeats(directory)
        return bool(beats) and beats[0]["step"] == 3 and beats[0]["phase"] == "update"

    with started(config) as command:
        command.wait_until(in_step_3)
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000002"

    other = write_config(
        tmp_path / "other.toml", directory, **{**SECTIONS, "adapter": {**ADAPTER, "rank": 8}}
    )
    refused = run(other)
    assert refused.process.returncode != 0
    assert "same options alone: adapter.rank = 4, now 8; restore them" in refused.stderr
    none = run(write_config(tmp_path / "none.toml", directory, parallel={"tensor_parallel": 2}))
    assert re.search(r"same options alone: adapter\.rank = 4, now none", none.stderr), none.stderr

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert list(map(without_times, metrics(directory))) == list(map(without_times, metrics(finished)))
    for folder in ("model", "adapter"):
        for written in (finished / folder).iterdir():
            assert (directory / folder / written.name).read_bytes() == written.read_bytes(), written.name


def test_engines_sample_with_the_adapters_that_were_trained(finished: Path) -> None:
    """The probe of each publication, of which the last ones are of moved weights."""
    told = [
        line["publish/probe_difference"] for line in metrics(finished) if "publish/probe_difference" in line
    ]
    assert len(told) >= 4 and max(told) < 1e-4
    digests = [json.loads(line)["digest"] for line in (finished / "published.jsonl").read_text().splitlines()]
    assert len(set(digests)) == len(digests)


def test_what_a_run_leaves_is_one_model_in_two_forms(finished: Path) -> None:
    """Merged for engines, and A and B for PEFT: of equal logits, and other than the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.randint(5, 30, (1, 24), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits

    def hf(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    base, merged = logits(hf(MODEL)), logits(hf(finished / "model"))
    of_peft = logits(PeftModel.from_pretrained(hf(MODEL), finished / "adapter"))
    assert float((of_peft - merged).abs().max()) <= 1e-5 * float(merged.abs().max())
    assert float((base - merged).abs().max()) > 1e-2


def test_frozen_weights_are_the_bases_bit_for_bit(finished: Path) -> None:
    own, base = load_weights(finished / "model"), load_weights(MODEL)
    frozen = [name for name in base if not re.search(r"(self_attn\.[qkvo]|mlp\.\w+)_proj\.weight", name)]
    assert frozen and all(torch.equal(own[name], base[name]) for name in frozen)


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.exhaustive  # it takes minutes, and that gradients are right is told by parity with PEFT
@pytest.mark.timeout(1200)
def test_reward_rises_clearly(tmp_path: Path) -> None:
    """Of the example, over the same 64 problems at first and at last."""
    text = (ROOT / "examples/adapters/lora.toml").read_text()
    config, directory = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(text.replace("examples/models", str(ROOT / "examples/models")))
    few = ("evaluate.problems=4", "evaluate.samples=2", "evaluate.k=[1]")
    with started(config, f"run.directory={directory}", "run.steps=16", "data.problems=64", *few) as command:
        assert command.wait(timeout=1000) == 0, command.stderr
    rewards = [line["reward/mean"] for line in metrics(directory) if line["step"] > 0]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1
