"""examples/sft and examples/distill: texts are learnt without an engine, and their model then teaches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, metrics, running, without_times

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "models/tiny-countdown"


def train(directory: Path, *configs: Path, **settings: object) -> Command:
    """A run without an evaluation."""
    overlay = directory.with_suffix(".toml")
    overlay.write_text('evaluate = "@default"\n')
    given = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    given.append(f"run.directory={directory}")
    with running("train", *map(str, configs), str(overlay), "--set", *given) as command:
        assert command.wait() == 0, command.stderr
        return command


def cold_start(directory: Path) -> Command:
    stages = (EXAMPLES / "sft/base.toml", EXAMPLES / "sft/sft.toml")
    return train(
        directory,
        *stages,
        run__steps=2,
        model__path=MODEL,
        data__count=100,
        algorithm__held_out=8,
        algorithm__minibatch_prompts=16,
        checkpoint__every=1,
    )


def test_texts_are_learnt_gone_on_with_bit_for_bit_and_taught(tmp_path: Path) -> None:
    whole, resumed, taught = tmp_path / "whole", tmp_path / "resumed", tmp_path / "taught"
    command = cold_start(whole)
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[2]["evaluate/loss"] < lines[0]["evaluate/loss"], "nothing was learnt"
    assert lines[2]["data/epochs"] == 2 * 32 / 92
    groups = {name.partition("/")[0] for line in lines for name in line}
    assert not groups & {"reward", "rollout", "mismatch", "importance"}
    assert not (whole / "engines").exists()
    assert not (whole / "samples").exists()
    assert "held-out loss: " in command.stdout

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints/step_000002")
    cold_start(resumed)
    assert list(map(without_times, metrics(resumed))) == list(map(without_times, lines))
    for written in (whole / "model").iterdir():
        assert (resumed / "model" / written.name).read_bytes() == written.read_bytes(), written.name

    train(
        taught,
        EXAMPLES / "distill/run.toml",
        run__steps=1,
        model__path=MODEL,
        teacher__path=whole / "model",
        parallel__pipeline_parallel=2,
        rollout__prompts_per_step=4,
    )
    line = metrics(taught)[1]
    assert line["loss/distillation"] > 0.0
    assert line["loss/total"] == pytest.approx(line["loss/distillation"], rel=1e-5)
    assert line["optimizer/gradient_norm"] > 0.0
    contents = json.loads((taught / "identity.json").read_text())["contents"]
    assert "weights of the teacher" in contents
