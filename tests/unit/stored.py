"""Stored evaluations for tests, made of outcomes alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.manifest import DataRecord, Manifest, ModelRecord, SettingRecord
from megatron_rapo.evaluation.store import Evaluation, Problem, StoredSample, begin


def store(
    directory: Path,
    correct: npt.NDArray[np.bool_],
    *,
    fingerprint: str = "f",
    there: npt.NDArray[np.bool_] | None = None,
    rewards: npt.NDArray[np.float64] | None = None,
    **changes: object,
) -> Evaluation:
    """An evaluation whose sample n of problem p is correct where `correct` `[problems, samples]` is.

    Args:
        fingerprint: of its data set `sums`.
        there: `[problems, samples]`, which samples were drawn; None: all.
        rewards: `[problems, samples]`, NaN where unknown; None: all are.
        changes: to the manifest.
    """
    problems, samples = correct.shape
    values: dict[str, object] = {
        "model": ModelRecord(path=str(directory), fingerprint="w"),
        "data": (DataRecord(name="sums", source="s.jsonl", problems=problems, fingerprint=fingerprint),),
        "settings": (SettingRecord(name="t1", temperature=1.0, max_response_tokens=8),),
        "samples": samples,
        "seed": 1,
        "verifier": {"sums": "math"},
        "prompts": {"sums": "p"},
        "versions": {},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        **changes,
    }
    evaluation = begin(
        directory,
        Manifest.model_validate(values),
        {"sums": [Problem(f"p{i}", "?", "1", (1,)) for i in range(problems)]},
    )
    evaluation.samples("sums", "t1").write(
        [
            StoredSample(
                problem=f"p{i}",
                sample=n,
                outcome=Outcome.CORRECT if correct[i, n] else Outcome.WRONG,
                extracted="1" if correct[i, n] else "2",
                truncated=False,
                seed=n,
                text="",
                token_ids=np.array([1], dtype=np.int32),
                log_probs=np.array([-0.5], dtype=np.float32),
                reward=None if rewards is None or np.isnan(rewards[i, n]) else float(rewards[i, n]),
            )
            for i in range(problems)
            for n in range(samples)
            if there is None or there[i, n]
        ]
    )
    return evaluation
