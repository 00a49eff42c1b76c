"""What runs sampled in training, as the response browser reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rapo.data.token_texts import find_token_texts
from megatron_rapo.evaluation.store import Problem
from megatron_rapo.report.responses import OUTCOMES, Sampled
from megatron_rapo.report.selection import Integers, Samples
from megatron_rapo.samples.store import read_step, steps_of

_NARROW = ["draw", "number", "problem", "source", "question", "gold", "outcome", "length", "given"]


def trained_samples(runs: Sequence[Path]) -> list[Sampled]:
    """The first and the newest step of each run that keeps samples, by data set."""
    found = []
    for run in runs:
        files = steps_of(run)
        token_texts = find_token_texts([run]) if files else None
        for step in sorted({min(files), max(files)}) if files else []:
            paths, model = tuple(files[step]), f"{run.resolve().name}, step {step}"
            for source in dict.fromkeys(row["source"] for row in read_step(paths, _NARROW)):
                samples = TrainedSamples(paths, source)
                found.append(Sampled(model, f"training: {source}", samples, token_texts))
    return found


@dataclass(frozen=True)
class TrainedSamples:
    """A step's samples of a data set, by its name; see `report.responses.Source`."""

    paths: tuple[Path, ...]
    source: str

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_step(self.paths, _NARROW) if row["source"] == self.source]

    @cached_property
    def problems(self) -> Sequence[Problem]:
        """In the order drawn."""
        by_id = {row["problem"]: row for row in self._rows}
        return tuple(Problem(name, row["question"], row["gold"], ()) for name, row in by_id.items())

    def narrow(self) -> Samples:
        """In the order drawn."""
        places = {problem.id: place for place, problem in enumerate(self.problems)}
        return Samples(
            problem=np.array([places[row["problem"]] for row in self._rows]),
            number=np.array([row["number"] for row in self._rows]),
            outcome=np.array([OUTCOMES[row["outcome"]] for row in self._rows]),
            length=np.array([row["length"] + (row.get("given") or 0) for row in self._rows]),
        )

    def read(self, rows: Integers) -> list[dict[str, Any]]:
        """See `Source`."""
        keys = {(self._rows[row]["draw"], self._rows[row]["number"]) for row in rows}
        return [
            row | {"sample": row["number"], "sequences": list(map(_shown, row["sequences"]))}
            for row in read_step(self.paths, only=keys)
        ]


def _shown(sequence: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(sequence["sampled"], sequence["log_probs"], strict=True)
    return {
        "token_ids": sequence["token_ids"],
        "log_probs": [value if sampled else None for sampled, value in pairs],
    }
