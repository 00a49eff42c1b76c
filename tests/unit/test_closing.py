"""The closing summary of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.checkpoint import files
from megatron_rapo.observe.closing import closing_summary


def summary(folder: Path, *lines: dict[str, Any]) -> list[str]:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return closing_summary(folder).splitlines()


def test_rewards_are_averaged_over_both_ends(tmp_path: Path) -> None:
    steps = [{"step": 0}] + [{"step": n, "reward/mean": n / 100} for n in range(1, 21)]
    assert summary(tmp_path, *steps)[0] == "mean reward: 0.030 over the first 5 steps, 0.180 over the last 5"


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        ([0.25, None], "0.250 in the only step"),
        ([0.25, 0.5, 0.75], "0.250 in the first step, 0.750 in the last"),
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "0.000 over the first 3 steps, 1.000 over the last 3"),
        ([0.0] * 5 + [0.5] + [1.0] * 5, "0.000 over the first 5 steps, 1.000 over the last 5"),
    ],
)
def test_the_two_ends_of_a_short_run_share_no_step(
    tmp_path: Path, rewards: list[float | None], line: str
) -> None:
    steps = [{"step": n, "reward/mean": reward} for n, reward in enumerate(rewards, 1)]
    assert summary(tmp_path, *steps)[0] == f"mean reward: {line}"


def test_sources_of_a_mixture_stand_below_their_mean(tmp_path: Path) -> None:
    """One has no response at the second step, another no known reward at the third."""
    steps: list[dict[str, Any]] = [
        {
            "step": 1,
            "reward/mean": 0.2,
            "reward/a/mean": 0.1,
            "reward/b-1/mean": 0.3,
            "reward/b-1/unknown": 0.0,
        },
        {"step": 2, "reward/mean": 0.3, "reward/b-1/mean": 0.5},
        {"step": 3, "reward/mean": 0.4, "reward/a/mean": 0.6, "reward/b-1/mean": None},
    ]
    assert summary(tmp_path, *steps)[:3] == [
        "mean reward: 0.200 in the first step, 0.400 in the last",
        "  a: 0.100 in the first step, 0.600 in the last",
        "  b-1: 0.300 in the first step, 0.500 in the last",
    ]


def test_pass_at_k_stands_in_a_row_for_each_evaluation(tmp_path: Path) -> None:
    def evaluated(step: int, value: float) -> dict[str, Any]:
        estimates = {
            f"evaluate/pass@{k}{suffix}": value + shift
            for k in (1, 16)
            for suffix, shift in (("", 0), ("_low", -0.1), ("_high", 0.1))
        }
        return {"step": step, **estimates}

    lines = summary(tmp_path, evaluated(0, 0.2), {"step": 1, "reward/mean": 0.5}, evaluated(2, 0.6))
    assert lines[1].split() == ["held-out", "problems", "pass@1", "pass@16"]
    assert lines[2].split("  ")[0] == "base"
    assert lines[2].count("0.200 [0.100, 0.300]") == 2
    assert lines[3].startswith("step 2")
    assert lines[3].count("0.600 [0.500, 0.700]") == 2
    assert lines[1].index("pass@16") == lines[3].rindex("0.600"), "columns stand below each other"


def test_a_mean_reward_that_is_measured_is_a_column(tmp_path: Path) -> None:
    values = {"reward": 0.7, "pass@1": 0.2}
    line = {f"evaluate/{name}{end}": value for name, value in values.items() for end in ("", "_low", "_high")}
    found = summary(tmp_path, {"step": 0, **line})
    assert found[0].split() == ["held-out", "problems", "reward", "pass@1"]
    assert found[1].split() == ["base", "0.700", "[0.700,", "0.700]", "0.200", "[0.200,", "0.200]"]


def test_it_names_what_the_run_left(tmp_path: Path) -> None:
    text = "\n".join(summary(tmp_path, {"step": 0}))
    assert "mean reward" not in text
    assert "held-out" not in text
    for name in ("model", "metrics.jsonl", "checkpoints", "config.toml"):
        assert f"{tmp_path / name}  " in text


def test_it_names_adapters_where_there_are_some(tmp_path: Path) -> None:
    told = f"{tmp_path / 'adapter'}  its adapters alone, as PEFT loads them"
    assert told not in summary(tmp_path, {"step": 1})
    (tmp_path / "adapter").mkdir()
    assert told in summary(tmp_path, {"step": 1})


def test_each_data_set_and_setting_has_a_table(tmp_path: Path) -> None:
    values = {"aime24/t1.0": 0.1, "math/t0.6": 0.7}
    line = {
        f"evaluate/{benchmark}/pass@1{suffix}": value
        for benchmark, value in values.items()
        for suffix in ("", "_low", "_high")
    }
    found = [row.split() for row in summary(tmp_path, {"step": 0, **line})[:4]]
    assert found == [
        ["aime24,", "t1.0", "pass@1"],
        ["base", "0.100", "[0.100,", "0.100]"],
        ["math,", "t0.6", "pass@1"],
        ["base", "0.700", "[0.700,", "0.700]"],
    ]


def test_a_copy_of_a_checkpoint_is_none_of_the_runs(tmp_path: Path) -> None:
    """Checkpoints are in the order of their steps."""
    for name in (
        "step_999999",
        "step_1000000",
        "step_000002 (copy)",
        "step_000003.bak",
        ".partial_step_000004",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "run.json").write_text("{}")
    found = files.complete(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step_999999", "step_1000000"]
    assert files.newest(tmp_path) == found[-1]


def step_of(sampling: float, trainer: float, publish: float, **more: float) -> dict[str, Any]:
    """A step whose engines and trainer wait for each other."""
    times = {"sampling": sampling, "rollout": sampling, "publish": publish}
    times |= {"update": trainer, "step": sampling + trainer + publish}
    return {"step": 1, **{f"time/{name}_s": seconds for name, seconds in times.items()}, **more}


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([step_of(5, 4, 1)], "50% of a step; rollout.max_staleness = 1 would have saved about 40% of it"),
        ([step_of(2, 7, 1)] * 3, "20% of a step; rollout.max_staleness = 1 would have saved about 20% of it"),
        ([step_of(8, 1, 1)], "80% of a step; rollout.max_staleness = 1 would have saved about 10% of it"),
        ([step_of(0.4, 9, 0.6)], "4% of a step"),
        ([step_of(5, 4, 1), step_of(5, 4, 1), step_of(1, 9, 90)], "50% of a step; rollout.max_st"),
        ([step_of(5, 4, 1, **{"rollout/staleness_max": 1})], "50% of a step"),
        ([step_of(5, 4, 1), step_of(5, 94, 1, **{"time/evaluate_s": 90.0})], "50% of a step; rollout.max_st"),
    ],
)
def test_how_long_engines_waited_is_told(tmp_path: Path, steps: list[dict[str, Any]], line: str) -> None:
    [told] = [one for one in summary(tmp_path, *steps) if one.startswith("engines sampled")]
    assert told.startswith(f"engines sampled for {line}")
    assert ("saved" in told) == ("rollout.max" in line)


def test_a_run_without_engines_tells_nothing_of_them(tmp_path: Path) -> None:
    assert not [
        line for line in summary(tmp_path, {"step": 1, "time/step_s": 2.0}) if line.startswith("engines")
    ]


def test_what_was_computed_again_is_told_where_it_is_much(tmp_path: Path) -> None:
    def told(*shares: float) -> list[str]:
        steps = [{"step": 1, "time/step_s": 1.0, "compute/repeated_tokens": share} for share in shares]
        return [line for line in summary(tmp_path, *steps) if "share_prompts" in line]

    assert told(0.0, 0.24, 0.9) == told(0.0) == []
    [line] = told(0.1, 0.625, 0.9)
    assert line.startswith("62% of the tokens that were trained on were computed again for each response")


def test_how_fast_a_run_was_is_told(tmp_path: Path) -> None:
    def step(tokens: float, rate: float, memory: float, **more: float) -> dict[str, Any]:
        names = ("throughput/tokens_per_s", "throughput/update_tflop_per_s", "memory/peak_gib")
        return {
            "step": 1,
            "time/step_s": 1.0,
            **dict(zip(names, (tokens, rate, memory), strict=True)),
            **more,
        }

    steps = [step(1000.4, 0.5, 1.0), step(2000, 1.25, 3.0), step(9000, 9.0, 2.0)]
    assert "speed: 2,000 tokens/s, updates at 1.25 TFLOP/s a rank, at most 3.00 GiB a rank" in summary(
        tmp_path, *steps
    )
    [slow] = [line for line in summary(tmp_path, step(5, 0.00824, 0.0)) if line.startswith("speed")]
    assert slow == "speed: 5 tokens/s, updates at 8.24 GFLOP/s a rank"
    evaluated = step(1, 0.1, 9.0, **{"time/evaluate_s": 50.0})
    known = [{**one, "throughput/mfu": 0.375, "throughput/hfu": 0.375} for one in steps]
    assert [line for line in summary(tmp_path, evaluated, *known) if line.startswith("speed")] == [
        "speed: 2,000 tokens/s, updates at 1.25 TFLOP/s a rank (38% of the device's peak), "
        "at most 3.00 GiB a rank"
    ]
    phases = {"memory/rollout_gib": 0.5, "memory/update_gib": 3.0}
    [told] = [
        line
        for line in summary(tmp_path, *({**one, **phases, "throughput/hfu": 0.5} for one in known))
        if line.startswith("speed")
    ]
    assert "(38% of the device's peak, 50% with what is computed again)" in told
    assert told.endswith("at most 3.00 GiB a rank (rollout 0.50, update 3.00)")
