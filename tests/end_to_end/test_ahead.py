"""Responses that go on over several versions of the weights, on real ranks and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.convert.to_hf import convert_to_hf
from megatron_rapo.samples.store import read_step, steps_of
from megatron_rapo.wire.access import API_KEY_VARIABLE
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
from tests.end_to_end.wide_heads import with_wide_heads
from tests.engines.servers import KEY, SGLANG_CPU, VLLM_CPU, running, why_not

STEPS, AHEAD, TOKENS = 5, 2, 6
OPTIONS: dict[str, Any] = {
    "run": {"steps": STEPS},
    "rollout": {"max_staleness": AHEAD, "partial_tokens": TOKENS},
    "parallel": {"data_parallel": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two replicas in one go."""
    base = tmp_path_factory.mktemp("partial")
    finished = run(write_config(base / "run.toml", base / "run", **OPTIONS))
    assert finished.process.returncode == 0, finished.stderr
    return base / "run"


def sequences(directory: Path, step: int) -> list[dict[str, npt.NDArray[Any]]]:
    """What a step trained on."""
    return [
        {name: np.array(values) for name, values in sequence.items()}
        for row in read_step(steps_of(directory)[step])
        for sequence in row["sequences"]
    ]


def check_tokens(directory: Path, model: Path, folder: Path) -> set[tuple[int, ...]]:
    """Each token is of its version, and has the log-prob that this version's weights give it after all tokens
    before, whoever sampled those. Which versions sequences had.
    """
    policies = {0: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)}
    for version in range(1, STEPS - 1):
        convert_to_hf(directory / f"checkpoints/step_{version:06d}", folder / str(version))
        policies[version] = AutoModelForCausalLM.from_pretrained(folder / str(version), dtype=torch.float32)
    met = set()
    for step in range(1, STEPS + 1):
        oldest, newest = max(0, step - 1 - AHEAD), max(0, step - 2)
        for sequence in sequences(directory, step):
            places = np.flatnonzero(sequence["sampled"])
            versions = sequence["versions"][places].tolist()
            assert versions == [min(oldest + n // TOKENS, newest) for n in range(len(places))]
            met.add(tuple(sorted(set(versions))))
            ids = torch.tensor(sequence["token_ids"])[None]
            for version in set(versions):
                with torch.no_grad():
                    every = policies[version](ids).logits[0, :-1].log_softmax(-1)
                own = places[sequence["versions"][places] == version]
                np.testing.assert_allclose(
                    every[own - 1, ids[0, own]].numpy(), sequence["log_probs"][own], atol=1e-4
                )
    return met


def test_each_version_sampled_its_tokens(whole: Path, tmp_path: Path) -> None:
    assert {(0,), (0, 1), (1, 2), (2, 3)} <= check_tokens(whole, MODEL, tmp_path)
    last = metrics(whole)[-1]
    assert 0 < last["rollout/carried_over"] <= 1
    assert last["rollout/staleness/2"] + last["rollout/staleness/1"] == pytest.approx(1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [SGLANG_CPU, VLLM_CPU])
def test_so_they_do_in_other_kinds_of_engines(kind: str, tmp_path: Path) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    model = with_wide_heads(tmp_path / "model")
    computing = ["--dtype=float32", *(["--max-model-len=256"] if kind == VLLM_CPU else [])]
    with running(kind, model, tmp_path / "log", *computing) as url:
        engine = {"engine.kind": kind.partition("-")[0], "engine.urls": [url]}
        options = {**OPTIONS, "rollout": OPTIONS["rollout"] | engine, "model": {"path": str(model)}}
        config = write_config(tmp_path / "run.toml", tmp_path / "run", **options)
        finished = run(config, environment={API_KEY_VARIABLE: KEY})
    assert finished.process.returncode == 0, finished.stderr
    assert {(0,), (0, 1), (1, 2), (2, 3)} <= check_tokens(tmp_path / "run", model, tmp_path)


def test_a_run_with_open_responses_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Killed while responses are open that older weights began."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "run.toml", directory, **OPTIONS)

    def in_step_3() -> bool:
        beats = heartbeats(directory)
        return bool(beats) and beats[0]["step"] == 3 and beats[0]["phase"] == "update"

    with started(config) as command:
        command.wait_until(in_step_3)
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000002"
    assert (directory / "checkpoints/step_000002/ahead/unfinished.json").is_file()

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert list(map(without_times, metrics(directory))) == list(map(without_times, metrics(whole)))
    for step in range(1, STEPS + 1):
        assert repr(read_step(steps_of(directory)[step])) == repr(read_step(steps_of(whole)[step]))
    for written in (whole / "model").iterdir():
        assert (directory / "model" / written.name).read_bytes() == written.read_bytes(), written.name
