"""Stored evaluations of made-up models, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.manifest import DataRecord, Manifest, ModelRecord, SettingRecord
from megatron_rapo.evaluation.store import Evaluation, Problem, SampleStore, StoredSample, write_problems
from megatron_rapo.fingerprint import fingerprint

VERSIONS = {"python": "3.11.2", "megatron_rapo": "0.1.0", "torch": "2.13.0"}


def store_evaluation(
    directory: Path, correct: Sequence[int], *, data: str = "toy", **options: Any
) -> Evaluation:
    """Writes a finished evaluation of one data set at one setting.

    Args:
        directory: of the evaluation.
        correct: `[problems]`, how many of each problem's samples are correct; which ones, the seed decides.
        data: name of the data set.
        options: of `store_benchmarks`.
    """
    return store_benchmarks(directory, {data: {"t1.0": correct}}, **options)


def store_benchmarks(
    directory: Path,
    correct: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    samples: int = 8,
    step: int | None = None,
    run: str | None = None,
    model: str = "/models/not-here",
    seed: int = 0,
    text: str = "the answer is {answer}",
    question: str = "question {place}: what comes after {place}?",
) -> Evaluation:
    """Writes a finished evaluation of several data sets, each at the same settings.

    Args:
        directory: of the evaluation.
        correct: by data set and setting, as in `store_evaluation`; a setting is called t and its temperature.
        samples: N.
        step: of the training run; None for a model that is of none.
        run: that run's directory.
        model: path of the model.
        seed: of the samples.
        text: of a response; `{answer}` is the right one or another.
        question: of a problem; problem i asks for i + 1.
    """
    generator = np.random.default_rng(seed)
    settings = list(next(iter(correct.values())))
    problems = {
        data: [
            Problem(str(place), question.format(place=place), str(place + 1), (1, 2, 3))
            for place in range(len(counts[settings[0]]))
        ]
        for data, counts in correct.items()
    }
    manifest = Manifest(
        model=ModelRecord(path=model, run=run, step=step),
        data=tuple(
            DataRecord(name=data, source=f"{data}.jsonl", problems=len(rows), fingerprint=fingerprint(rows))
            for data, rows in problems.items()
        ),
        settings=tuple(
            SettingRecord(name=name, temperature=float(name.removeprefix("t")), max_response_tokens=64)
            for name in settings
        ),
        samples=samples,
        seed=seed,
        verifier=dict.fromkeys(correct, "integer"),
        prompts={
            data: fingerprint(problem.prompt_ids for problem in rows) for data, rows in problems.items()
        },
        versions=VERSIONS,
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T00:01:00Z",
    )
    for data, by_setting in correct.items():
        write_problems(directory / data, problems[data])
        for setting, counts in by_setting.items():
            rows = _samples(counts, samples, seed, text, generator)
            SampleStore(directory / data / setting, problems[data]).write(rows)
    manifest.write(directory)
    return Evaluation.open(directory)


def _samples(
    correct: Sequence[int], samples: int, seed: int, text: str, generator: np.random.Generator
) -> list[StoredSample]:
    rows = []
    for place, count in enumerate(correct):
        right = set(generator.permutation(samples)[:count].tolist())
        for number in range(samples):
            answer = str(place + 1) if number in right else "0"
            said = text.format(answer=answer)
            length = len(said)
            rows.append(
                StoredSample(
                    problem=str(place),
                    sample=number,
                    outcome=Outcome.CORRECT if number in right else Outcome.WRONG,
                    extracted=answer,
                    truncated=False,
                    seed=seed + number,
                    text=said,
                    token_ids=np.arange(length, dtype=np.int32),
                    log_probs=-generator.exponential(size=length).astype(np.float32),
                )
            )
    return rows
