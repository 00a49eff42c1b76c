"""Stored evaluations of made-up models, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rapo.evaluate.manifest import DataRecord, Manifest, ModelRecord, SettingRecord, fingerprint
from megatron_rapo.evaluate.store import Evaluation, Problem, SampleStore, StoredSample, write_problems
from megatron_rapo.reward.outcome import Outcome

VERSIONS = {"python": "3.11.2", "megatron_rapo": "0.1.0", "torch": "2.13.0"}


def store_evaluation(
    directory: Path,
    correct: Sequence[int],
    *,
    samples: int = 8,
    step: int | None = None,
    run: str | None = None,
    model: str = "/models/not-here",
    data: str = "toy",
    seed: int = 0,
    text: str = "the answer is {answer}",
    question: str = "question {place}: what comes after {place}?",
) -> Evaluation:
    """Writes a finished evaluation.

    Args:
        directory: of the evaluation.
        correct: `[problems]`, how many of each problem's samples are correct; which ones, the seed decides.
        samples: N.
        step: of the training run; None for a model that is of none.
        run: that run's directory.
        model: path of the model.
        data: name of the data set; problem i asks for i + 1.
        seed: of the samples.
        text: of a response; `{answer}` is the right one or another.
        question: of a problem.
    """
    generator = np.random.default_rng(seed)
    problems = [
        Problem(str(place), question.format(place=place), str(place + 1), (1, 2, 3))
        for place in range(len(correct))
    ]
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
    manifest = Manifest(
        model=ModelRecord(path=model, run=run, step=step),
        data=(
            DataRecord(
                name=data, source=f"{data}.jsonl", problems=len(problems), fingerprint=fingerprint(problems)
            ),
        ),
        settings=(SettingRecord(name="t1.0", temperature=1.0, max_response_tokens=64),),
        samples=samples,
        seed=seed,
        verifier={data: "integer"},
        prompts={data: fingerprint(problem.prompt_ids for problem in problems)},
        versions=VERSIONS,
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T00:01:00Z",
    )
    write_problems(directory / data, problems)
    SampleStore(directory / data / "t1.0", problems).write(rows)
    manifest.write(directory)
    return Evaluation.open(directory)
