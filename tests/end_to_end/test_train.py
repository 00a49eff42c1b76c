"""A whole run by the console command, on four ranks, and what it leaves."""

from __future__ import annotations

import json
import math
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rapo.config import load_config
from megatron_rapo.embedded_server.decode import Sample
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe import catalogue
from megatron_rapo.observe.catalogue import recorded
from megatron_rapo.record.versions import read_versions
from megatron_rapo.samples.store import read_step, steps_of
from megatron_rapo.scaling.flops import training_flops
from tests.end_to_end.command import MODEL, Command, checkpoints, heartbeats, metrics, run, write_config
from tests.end_to_end.conftest import EVALUATE, LAYOUT, PEAK_TFLOPS
from tests.written_metrics import of_environments, of_evaluations, of_rollouts, of_updates, of_users_own

Finished = tuple[Path, Command]


def test_it_succeeds_and_sums_up(finished: Finished) -> None:
    directory, command = finished
    assert command.process.returncode == 0, command.stderr
    assert "mean reward: " in command.stdout
    assert "held-out problems" in command.stdout
    assert str(directory / "model") in command.stdout


def test_every_step_has_one_line_of_finite_metrics(finished: Finished) -> None:
    lines = metrics(finished[0])
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values()), line
        assert line["log/non_finite"] == 0
    phases = ("rollout", "reward", "annotate", "update", "publish", "checkpoint")
    for line in lines[1:]:
        assert line.keys() >= {f"time/{phase}_s" for phase in phases}
        assert line.keys() >= {
            "loss/total",
            "reward/mean",
            "optimizer/gradient_norm",
            "throughput/tokens_per_s",
        }
        assert line["optimizer/gradient_norm"] > 0
        outcomes = sum(line[f"reward/{outcome}"] for outcome in ("correct", "wrong", "timeout", "crash"))
        assert outcomes == 1
    assert len({line["loss/total"] for line in lines[1:]}) == 4


def test_computing_is_counted_by_the_tokens_that_are_trained_on(finished: Finished) -> None:
    """Within the bounds that sequences of one token, and of the longest, would have."""
    architecture = read_architecture(MODEL)
    for line in metrics(finished[0])[1:]:
        tokens = round(line["throughput/update_tokens_per_s"] * line["time/update_s"])
        least, most = (training_flops(architecture, [n] * tokens) / n / 1e12 for n in (1, 64))
        assert least < line["compute/update_tflop"] < most
        assert 0 < line["compute/repeated_tokens"] < 1
        rate = line["compute/update_tflop"] / line["time/update_s"] / 4
        assert line["throughput/update_tflop_per_s"] == pytest.approx(rate)
        assert line["throughput/mfu"] == line["throughput/hfu"] == pytest.approx(rate / PEAK_TFLOPS)
        assert line["compute/recomputed_tflop"] == 0


def test_each_phase_tells_its_memory(finished: Finished) -> None:
    phases = {f"memory/{phase}_gib" for phase in ("rollout", "annotate", "update", "publish", "checkpoint")}
    for line in metrics(finished[0])[1:]:
        assert phases <= line.keys()
        assert 0 < max(line[name] for name in phases) <= line["memory/peak_gib"]


def test_what_is_written_is_recorded_and_what_is_recorded_is_written(
    finished: Finished, tmp_path: Path
) -> None:
    """This run tells nothing of a user's own, so each of its metrics has an entry of its own."""
    written = {name for line in metrics(finished[0]) for name in line} - {"step", "time_s"}
    assert [name for name in written if all(entry.own for entry in recorded(name))] == []
    written |= of_rollouts() | of_environments() | of_users_own() | of_updates()
    written |= set(of_evaluations(tmp_path))
    assert set(catalogue.metrics()) == {recorded(name)[0] for name in written}


def test_rewards_differ_within_groups(finished: Finished) -> None:
    """Else the policy gradient was zero, and this run shows little."""
    assert min(line["reward/groups_without_variance"] for line in metrics(finished[0])[1:]) < 1


def test_engines_sample_from_the_trained_weights(finished: Finished) -> None:
    """The engine's log-probs are the trainer's at each step: the weights that each update made arrived."""
    assert all(line["mismatch/log_prob_mean"] < 1e-5 for line in metrics(finished[0])[1:])


def test_the_base_and_the_trained_policy_are_evaluated(finished: Finished) -> None:
    evaluated = {line["step"]: line for line in metrics(finished[0]) if "evaluate/pass@1" in line}
    assert sorted(evaluated) == [0, 4]
    for line in evaluated.values():
        assert line["evaluate/pass@1"] * EVALUATE["problems"] * EVALUATE["samples"] % 1 == 0
        assert line["evaluate/pass@2_low"] <= line["evaluate/pass@2"] <= line["evaluate/pass@2_high"]


def test_every_evaluated_sample_is_kept_with_the_run(finished: Finished) -> None:
    directory, _ = finished
    for line in metrics(directory):
        if "evaluate/pass@1" in line:
            evaluation = Evaluation.open(directory / "evaluations" / f"step_{line['step']:06d}")
            assert (evaluation.manifest.model.step, evaluation.manifest.finished is None) == (
                line["step"],
                False,
            )
            counts = evaluation.samples("countdown", "t1").counts()
            assert counts.samples.tolist() == [EVALUATE["samples"]] * EVALUATE["problems"]
            assert line["evaluate/pass@1"] == pytest.approx((counts.correct / counts.samples).mean())
    best = json.loads((directory / "checkpoints" / "best.json").read_text())
    assert best == {"step": 4, "metric": "pass@1", "value": metrics(directory)[-1]["evaluate/pass@1"]}


def test_every_step_keeps_its_samples(finished: Finished) -> None:
    """Each token by the weights of the step before, with rewards whose mean the metrics tell."""
    directory, _ = finished
    files = steps_of(directory)
    assert list(files) == [1, 2, 3, 4]
    for line in metrics(directory)[1:]:
        rows = read_step(files[line["step"]])
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(line["reward/mean"])
        sequences = [sequence for row in rows for sequence in row["sequences"]]
        assert {v for s in sequences for v in s["versions"]} == {-1, line["step"] - 1}
        assert sum(map(sum, (s["sampled"] for s in sequences))) / len(rows) == pytest.approx(
            line["rollout/response_tokens_mean"]
        )


def test_a_replay_of_its_samples_has_the_same_weights_bit_for_bit(finished: Finished, tmp_path: Path) -> None:
    """And it opens no engine."""
    recorded, _ = finished
    of_engines = dict.fromkeys(("startup_timeout_s", "request_timeout_s"))
    rollout = {"replay": str(recorded), **of_engines}
    replay = write_config(tmp_path / "run.toml", tmp_path / "run", parallel=LAYOUT, rollout=rollout)
    done = run(replay)
    assert done.process.returncode == 0, done.stderr
    for name in ("reward/mean", "loss/total", "mismatch/log_prob_mean", "optimizer/gradient_norm"):
        steps = [[line[name] for line in metrics(folder)[1:]] for folder in (recorded, tmp_path / "run")]
        assert steps[0] == steps[1], name
    for written in (recorded / "model").iterdir():
        assert (tmp_path / "run/model" / written.name).read_bytes() == written.read_bytes(), written.name
    assert not (tmp_path / "run/engines").exists()


def test_tensorboard_has_the_steps(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4]


def test_the_written_configuration_is_the_runs(finished: Finished) -> None:
    directory = finished[0]
    written = load_config([directory / "config.toml"])
    assert written == load_config([directory.with_name("run.toml")])
    assert written.parallel.model_dump(include=set(LAYOUT)) == LAYOUT


def test_it_tells_the_software_that_it_was_made_with(finished: Finished) -> None:
    directory, _ = finished
    [start] = read_versions(directory)
    assert start.step == 0
    assert start.versions["engines"] == f"megatron_rapo.embedded_server {version('megatron_rapo')}"
    assert start.versions["megatron-core"] == version("megatron-core")


def test_the_final_model_is_one_for_transformers_and_for_engines(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = finished[0] / "model"
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    moved = [
        not torch.equal(old, new) for old, new in zip(base.parameters(), model.parameters(), strict=True)
    ]
    assert all(moved), "every parameter was trained"

    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("3 5 7=", add_special_tokens=False)["input_ids"]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )[0, len(prompt) :].tolist()
    engine = Engine(path, "cpu", "float32")
    greedy = Sample(tuple(prompt), 12, 0.0, engine.eos_ids, 0)
    (completion,) = engine.generate([greedy], threading.Event())
    assert list(completion.token_ids) == expected


def test_nothing_unfinished_is_left(finished: Finished) -> None:
    directory, command = finished
    assert command.left_processes() == []
    assert checkpoints(directory) == ["best.json", *(f"step_00000{step}" for step in range(1, 5))]
    assert not (directory / "weights").exists(), "weights were broadcast"
    assert not [path for path in directory.rglob("*") if "partial" in path.name]
    pids = [str(beat["pid"]) for beat in heartbeats(directory)]
    assert len(pids) == 4
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        assert not [path for path in shared_memory.iterdir() if any(pid in path.name for pid in pids)]
