"""Studies of made-up runs, for tests: their folders look as commands leave them, and no model is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.config.write import toml_value
from megatron_rapo.study.making import Stopper
from megatron_rapo.study.opened import Opened
from megatron_rapo.study.plan import PlannedRun
from megatron_rapo.study.results import collect
from tests.stored_evaluations import VERSIONS, store_evaluation

STEPS = 3
BASE: dict[str, Any] = {
    "run": {"directory": "run", "steps": STEPS},
    "model": {"path": "models/tiny"},
    "data": {"source": "countdown", "numbers": 3},
    "rollout": {"prompts_per_step": 2, "max_response_tokens": 8},
    "algorithm": {"max_tokens_per_microbatch": 64},
    "evaluate": {"samples": 8, "k": [1, 8]},
}
STUDY: dict[str, Any] = {
    "question": "Is b above a?",
    "outcome": "pass@4",
    "seeds": [1, 2, 3],
    "configs": ["base.toml"],
    "arms": [
        {"name": "a", "options": {"optimizer.learning_rate": 1e-3}},
        {"name": "b", "options": {"optimizer.learning_rate": 2e-3}},
    ],
    "contrasts": [{"arm": "b", "against": "a"}],
}
Counts = Callable[[PlannedRun], Sequence[int]]


def open_study(folder: Path, **changes: Any) -> Opened:
    """Writes STUDY with keys changed (None: left out), and opens it."""
    (folder / "base.toml").write_text(
        "".join(f"{key} = {toml_value(value)}\n" for key, value in BASE.items())
    )
    values = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    file = folder / "study.toml"
    file.write_text("".join(f"{key} = {toml_value(_quoted(value))}\n" for key, value in values.items()))
    return Opened.at(file)


def _quoted(value: Any) -> Any:
    """Dotted keys as TOML reads them quoted: one name."""
    if isinstance(value, Mapping):
        return {f'"{key}"' if "." in key else key: _quoted(inner) for key, inner in value.items()}
    return [_quoted(one) for one in value] if isinstance(value, list) else value


def leave_folder(run: PlannedRun, correct: Sequence[int], *, question: str = "question {place}") -> None:
    """What the commands of a run leave: metrics, versions, and its last evaluation."""
    directory = run.directory
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": 0, "time_s": 1.0, "evaluate/pass@8": 0.2, "evaluate/pass@8_low": 0.1},
        *(
            {
                "step": step,
                "time_s": 1.0 + step + 1000.0 * (step > 1),  # it was killed after the first step
                "time/step_s": 1.0,
                "reward/mean": 0.1 * step,
                "loss/entropy": 1.0 / step,
                "loss/divergence": 0.1 * step,
                "loss/tokens": 100.0,
                "compute/update_tflop": 0.5,
                "evaluate/pass@8": 0.2 * (1 + step) ** 0.5,
            }
            for step in range(1, STEPS + 1)
        ),
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    versions = {"step": 0, "started": "2026-01-01T00:00:00Z", "versions": VERSIONS}
    (directory / "versions.jsonl").write_text(json.dumps(versions) + "\n")
    place = run.judged or directory / "evaluations" / f"step_{run.config.run.steps:06d}"
    shutil.rmtree(place, ignore_errors=True)
    store_evaluation(place, correct, data="countdown", step=STEPS, run=str(directory), question=question)


def maker(correct: Counts) -> Callable[[PlannedRun, Path, Stopper], bool]:
    """A `make` that takes no time."""

    def make(run: PlannedRun, folder: Path, _: Stopper) -> bool:
        leave_folder(run, correct(run))
        collect(run, 36.0, commit="abc", finished="2026-01-01T00:01:00Z", versions=VERSIONS).write(folder)
        return True

    return make
