"""The alarm on steps that teach nothing, as rank 0's observer sounds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.observer import Observer

TEACHES: dict[str, Any] = {
    "loss/tokens": 40.0, "optimizer/gradient_norm": 0.3, "reward/mean": 0.5, "reward/unknown": 0.0,
    "reward/groups_without_variance": 0.0, "rollout/truncated": 0.0, "rollout/outside_vocabulary": 0.0,
}  # fmt: skip
NO_GRADIENT = {**TEACHES, "optimizer/gradient_norm": 0.0, "reward/groups_without_variance": 1.0}
NO_TOKENS = {**TEACHES, "loss/tokens": 0.0, "optimizer/gradient_norm": 0.0}


def config(directory: Path, algorithm: dict[str, Any] | None = None, **observe: Any) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(directory), "steps": 20},
            "model": {"path": "model"},
            "data": {"source": "arithmetic"},
            "rollout": {"prompts_per_step": 2, "max_response_tokens": 8},
            "algorithm": algorithm or {},
            "observe": observe,
        },
        source="test",
    )


def observe(run: RunConfig, *steps: dict[str, Any]) -> None:
    with Observer(run, rank=0, world_size=1) as observer:
        observer.open_logs(None)
        observer.finish_step({})  # before the first step nothing is taught
        for step, metrics in enumerate(steps, 1):
            observer.begin_step(step)
            observer.finish_step(metrics)


def test_chance_is_warned_of_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three in a row, twice: each first one is told."""
    observe(config(tmp_path, idle_steps=3), *[NO_GRADIENT, NO_GRADIENT, TEACHES] * 2, NO_GRADIENT)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(" teaches nothing")[0] for line in warnings] == [
        f"warning: step {step}" for step in (1, 4, 7)
    ]
    assert "100% of the groups earned the same reward throughout (mean 0.500)" in warnings[0]


def test_what_only_divergence_and_entropy_move_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However small its gradient is; once a stretch, and the run goes on."""
    alike = {**TEACHES, "reward/groups_without_variance": 1.0, "reward/mean": 0.0}
    rounding = {**alike, "optimizer/gradient_norm": 4e-7}
    steps = [alike, alike, TEACHES, rounding, alike, rounding, alike, alike, TEACHES]
    observe(config(tmp_path, idle_steps=3), *steps)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step 6 is number 3 in a row in which every group earned the same reward throughout" in warning
    assert "(mean 0.000)" in warning and "megatron-rapo samples" in warning


def test_groups_of_one_response_compare_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, idle_steps=3)
    alone = run.model_copy(update={"rollout": run.rollout.model_copy(update={"responses_per_prompt": 1})})
    observe(alone, *[{**TEACHES, "reward/groups_without_variance": 1.0}] * 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("idle", [NO_GRADIENT, NO_TOKENS, {**NO_GRADIENT, "loss/tokens": 0.0}])
def test_some_in_a_row_end_the_run_once_the_step_is_written(tmp_path: Path, idle: dict[str, Any]) -> None:
    with pytest.raises(RapoError, match=r"step 4 is number 3 in a row that teaches nothing \(observe\.idle_"):
        observe(config(tmp_path, idle_steps=3), TEACHES, idle, idle, idle, TEACHES)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 5


def test_five_by_default(tmp_path: Path) -> None:
    observe(config(tmp_path / "four"), *[NO_TOKENS] * 4)
    with pytest.raises(RapoError, match="step 5 is number 5 in a row"):
        observe(config(tmp_path / "five"), *[NO_TOKENS] * 5)


@pytest.mark.parametrize(
    ("algorithm", "name", "told"),
    [
        ({}, "rollout/outside_vocabulary", "have tokens that the tokenizer lacks"),
        ({}, "reward/unknown", "have no reward, since the verifier timed out or crashed"),
        ({"mask_truncated": True}, "rollout/truncated", "were truncated (raise rollout.max_response_tokens"),
        (
            {"groups_without_variance": "drop"},
            "reward/groups_without_variance",
            "of the groups earned the same reward throughout",
        ),
    ],
)
def test_the_cause_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: dict[str, Any], name: str, told: str
) -> None:
    others = {"rollout/truncated": 0.25} if name != "rollout/truncated" else {}
    observe(config(tmp_path, algorithm), {**NO_TOKENS, **others, name: 0.75})
    (warning,) = capsys.readouterr().err.splitlines()
    assert told in warning
    assert "75%" in warning
    assert "25%" not in warning, "what is truncated and not masked is no cause"
