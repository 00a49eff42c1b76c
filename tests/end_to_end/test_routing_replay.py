"""A run whose updates send tokens to the experts that its engine chose, over two pipeline stages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tests.end_to_end.command import MODEL, metrics, run, write_config

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from tiny_model.experts import upcycle


def make_mixture(folder: Path) -> Path:
    """The tiny model with experts that differ."""
    torch.manual_seed(0)
    mixture = upcycle(Qwen2ForCausalLM.from_pretrained(MODEL, dtype=torch.float32), experts=4)
    with torch.no_grad():
        for name, values in mixture.named_parameters():
            if ".experts." in name:
                values += 0.3 * values.std() * torch.randn_like(values)
    mixture.save_pretrained(folder)
    for file in MODEL.glob("token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_tokens_go_where_the_engine_sent_them(tmp_path: Path) -> None:
    """Engine and trainer compute the same, so hardly a choice would be another one: only by rounding.

    With those of another token, or of another layer's or stage's, most would be.
    """
    config = write_config(
        tmp_path / "run.toml",
        tmp_path / "run",
        run={"steps": 2},
        model={"path": str(make_mixture(tmp_path / "mixture"))},
        parallel={"pipeline_parallel": 2},
        algorithm={"minibatch_prompts": 4, "routing_replay": "engine"},
        checkpoint={"every": None, "keep": None},
    )
    finished = run(config)
    assert finished.process.returncode == 0, finished.stderr
    lines = metrics(tmp_path / "run")[1:]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["router/replay_changed"] == pytest.approx(0.0, abs=2e-3)
        assert line["mismatch/log_prob_max"] < 1e-3
