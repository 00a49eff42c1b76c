"""Times the report of large made-up evaluations, and measures its peak memory.

    python tools/bench_report.py       # base and trained, 500 problems × 1,024 samples of 200 tokens
    python tools/bench_report.py --problems 100 --samples 64 --tokens 50

The evaluations are written first, which is not counted; the report runs as a command of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.manifest import (
    DataRecord,
    Manifest,
    ModelRecord,
    SettingRecord,
)
from megatron_rapo.evaluation.store import Problem, SampleStore, StoredSample, write_problems
from megatron_rapo.observe.versions import software_versions

MODEL = Path(__file__).parents[1] / "examples/models/tiny-countdown"
POOL = 2000  # different responses
LIMIT_S, LIMIT_GIB = 60.0, 2.0


def write_evaluation(directory: Path, *, step: int, problems: int, samples: int, tokens: int) -> None:
    """A made-up evaluation: of a base that seldom solves much (step 0), or of a model that does better."""
    generator = np.random.default_rng(step)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = [
        Problem(f"p{place}", f"Problem {place}: {' '.join(['of words'] * 20)}?", str(place), (1, 2, 3))
        for place in range(problems)
    ]
    pool = []
    for length in np.clip(generator.poisson(tokens, POOL), 1, None):
        ids = generator.integers(3, len(tokenizer), length, dtype=np.int32)
        pool.append(
            (ids, tokenizer.decode(ids.tolist()), -generator.exponential(0.5, length).astype(np.float32))
        )
    chance = generator.beta(0.3 + 0.2 * (step > 0), 1.5, problems)
    write_problems(directory / "made-up", asked)
    store = SampleStore(directory / "made-up" / "t1.0", asked)
    for problem, success in zip(asked, chance, strict=True):
        correct, chosen = generator.random(samples) < success, generator.integers(0, POOL, samples)
        store.write(
            [
                StoredSample(
                    problem=problem.id,
                    sample=number,
                    outcome=Outcome.CORRECT if correct[number] else Outcome.WRONG,
                    extracted=problem.answer if correct[number] else str(-chosen[number] % 10),
                    truncated=False,
                    seed=number,
                    text=pool[chosen[number]][1],
                    token_ids=pool[chosen[number]][0],
                    log_probs=pool[chosen[number]][2],
                )
                for number in range(samples)
            ]
        )
    Manifest(
        model=ModelRecord(path=str(MODEL), run="runs/made-up", step=step),
        data=(
            DataRecord(name="made-up", source="made-up.jsonl", problems=problems, fingerprint=str(problems)),
        ),
        settings=(SettingRecord(name="t1.0", temperature=1.0, max_response_tokens=4 * tokens),),
        samples=samples,
        seed=step,
        verifier={"made-up": "integer"},
        prompts={"made-up": "1"},
        versions=software_versions(),
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T01:00:00Z",
    ).write(directory)


def run_measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command.

    Raises:
        SystemExit: the command failed.
    """
    began = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    """Writes the evaluations, reports them, and prints the measurement; status 1 past the limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=200, help="mean length of a response")
    parser.add_argument("--keep", type=Path, help="write evaluations and report there, and keep them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        evaluations = []
        for step, name in ((0, "base"), (40, "trained")):
            evaluations.append(folder / name)
            write_evaluation(
                folder / name,
                step=step,
                problems=options.problems,
                samples=options.samples,
                tokens=options.tokens,
            )
        command = [
            sys.executable,
            "-c",
            "from megatron_rapo.cli import main; raise SystemExit(main())",
            "report",
        ]
        seconds, memory = run_measured([*command, *map(str, evaluations), "--out", str(folder / "report")])
        page = (folder / "report/report.html").stat().st_size
    print(
        f"2 evaluations × {options.problems} problems × {options.samples:,} samples of {options.tokens} "
        f"tokens: {seconds:.1f} s, peak {memory / 2**30:.2f} GiB, page {page / 1e6:.1f} MB"
    )
    raise SystemExit(seconds > LIMIT_S or memory > LIMIT_GIB * 2**30)


if __name__ == "__main__":
    main()
