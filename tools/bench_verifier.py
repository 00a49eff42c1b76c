"""How fast answers are verified, and how well verifiers agree with the gold answers of data sets.

    python tools/bench_verifier.py DATA_FOLDER [--workers 2]
    python tools/bench_verifier.py --adversarial 10000 --time-limit 1
    python tools/bench_verifier.py --spellings tests/spellings.jsonl

Each .jsonl file of the folder with the fields `question` and `answer` is one data set: every gold answer is
put into a box and graded against itself; where rows have a `solution`, that is graded, too. What is not
graded as correct is listed. Speed is that of ordinary answers in responses with text around them, eight a
problem, half of them right.

With --adversarial, texts that are to harm a verifier (`adversarial_answers.py`) are graded instead, and right
answers among them: no text may be correct or crash a process, and what is right must stay so.

With --spellings, each row of a JSONL file with `gold`, `response` and `right` (and maybe `kind`) is graded:
how many right responses are accepted, and how many wrong ones rejected. The others are listed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.config.verifiers import built_in
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.episode.problem import Problem
from megatron_rapo.reward.verifier import Verifier

GROUP = 8  # responses a problem
RESPONSE = "We compute step by step. First, $a = 3$, so $a^2 + 1 = 10$. " * 20
ANSWER = "1234567"
HARM = (Outcome.CORRECT, Outcome.CRASH)
HEADER = "| data set | golds against themselves | solutions |\n|---|---|---|"


@dataclass(frozen=True)
class Agreement:
    """(correct, all) of a data set's golds and solutions, and (kind, answer, outcome) of the others."""

    name: str
    golds: tuple[int, int]
    solutions: tuple[int, int]
    disagreements: list[tuple[str, str, Outcome]]


def main() -> int:
    """Prints agreement and speed; 1 where the folder has no data, or a hostile text did harm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, nargs="?", help="with .jsonl files")
    what.add_argument("--adversarial", type=int, metavar="TEXTS", help="grade so many hostile texts")
    what.add_argument("--spellings", type=Path, metavar="FILE", help="grade a .jsonl file of verdicts")
    parser.add_argument("--workers", type=int, default=2, help="verifier processes")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for one verification")
    parser.add_argument("--answers", type=int, default=5000, help="that the speed is measured with")
    arguments = parser.parse_args()
    if arguments.adversarial is not None:
        return _withstand(arguments.adversarial, arguments.workers, arguments.time_limit)
    if arguments.spellings is not None:
        return _spellings(arguments.spellings, arguments.workers, arguments.time_limit)
    data_sets = dict(_data_sets(arguments.folder))
    if not data_sets:
        print(f"{arguments.folder} has no .jsonl file with questions and answers", file=sys.stderr)
        return 1
    with Verifier(built_in("math"), workers=arguments.workers, time_limit_s=arguments.time_limit) as verifier:
        found = [_agreement(name, rows, verifier) for name, rows in data_sets.items()]
        print(HEADER)
        for one in found:
            print(f"| {one.name} | {_share(one.golds)} | {_share(one.solutions)} |")
        for one in found:
            for kind, answer, outcome in one.disagreements:
                print(f"- {one.name}, {kind} `{answer}`: {outcome}")
        golds = [row["answer"] for rows in data_sets.values() for row in rows]
        speed = _speed(golds, arguments.answers, verifier)
    print(f"\n{speed:,.0f} verifications/s, {arguments.workers} workers")
    return 0


def _outcomes(verifier: Verifier, items: Sequence[tuple[str, str]]) -> list[Outcome]:
    """Of (response, gold answer) pairs."""
    return [one.outcome for one in verifier.verify([(text, Problem("", "", gold)) for text, gold in items])]


def _spellings(file: Path, workers: int, time_limit_s: float) -> int:
    """Grades responses whose verdicts are known; 1 where one is graded otherwise."""
    rows = [json.loads(line) for line in file.open(encoding="utf-8") if line.strip()]
    with Verifier(built_in("math"), workers=workers, time_limit_s=time_limit_s) as verifier:
        outcomes = _outcomes(verifier, [(row["response"], row["gold"]) for row in rows])
    wanted = [Outcome.CORRECT if row["right"] else Outcome.WRONG for row in rows]
    counts = Counter(
        (row.get("kind", "all"), bool(row["right"]), outcome is want)
        for row, outcome, want in zip(rows, outcomes, wanted, strict=True)
    )
    print("| kind | right and accepted | wrong and rejected |\n|---|---|---|")
    for kind in dict.fromkeys(kind for kind, _, _ in counts):
        shares = [
            f"{counts[kind, right, True]:,} of {counts[kind, right, True] + counts[kind, right, False]:,}"
            for right in (True, False)
        ]
        print(f"| {kind} | {' | '.join(shares)} |")
    failed = [one for one in zip(rows, outcomes, wanted, strict=True) if one[1] is not one[2]]
    for row, outcome, _ in failed:
        print(f"- gold `{row['gold']}`, response `{row['response'][-200:]}`: {outcome}")
    return 1 if failed else 0


def _withstand(count: int, workers: int, time_limit_s: float) -> int:
    """Grades hostile texts against one answer, a right answer after every hundred."""
    from adversarial_answers import adversarial_answers  # hypothesis is there for development only

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # why a verification crashed
    texts = adversarial_answers(count)
    hostile = [(text, ANSWER) for text in texts]
    right = (rf"{RESPONSE} So \boxed{{{ANSWER}}}.", ANSWER)
    outcomes: list[Outcome] = []
    controls: list[Outcome] = []
    start = time.perf_counter()
    with Verifier(built_in("math"), workers=workers, time_limit_s=time_limit_s) as verifier:
        for first in range(0, count, 100):
            *graded, control = _outcomes(verifier, [*hostile[first : first + 100], right])
            outcomes += graded
            controls.append(control)
            print(f"\r{len(outcomes):,} of {count:,}", end="", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{count:,} texts of {sum(map(len, texts)):,} characters in {seconds:,.0f} s, {workers} workers")
    for what, counted in (("hostile texts", Counter(outcomes)), ("right answers", Counter(controls))):
        print(f"{what}: {', '.join(f'{counted[outcome]:,} {outcome}' for outcome in Outcome)}")
    failed = Outcome.WRONG in controls or Outcome.CRASH in controls  # a busy machine may be too slow for one
    harmful = [(text, outcome) for text, outcome in zip(texts, outcomes, strict=True) if outcome in HARM]
    for text, outcome in harmful[:20]:
        print(f"- {outcome}: {text[:200]!r}")
    return 1 if failed or harmful else 0


def _data_sets(folder: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        usable = [row for row in rows if row.get("question") and row.get("answer")]
        if usable:
            yield file.stem, usable


def _agreement(name: str, rows: Sequence[dict[str, str]], verifier: Verifier) -> Agreement:
    golds = [("gold", rf"The answer is \boxed{{{row['answer']}}}.", row["answer"]) for row in rows]
    # Only where the solution states its answer in a box can it be graded like a response.
    solved = [
        ("solution", row["solution"], row["answer"]) for row in rows if r"\boxed" in row.get("solution", "")
    ]
    disagreements: list[tuple[str, str, Outcome]] = []
    scores: list[tuple[int, int]] = []
    for items in (golds, solved):
        outcomes = _outcomes(verifier, [(text, answer) for _, text, answer in items])
        scores.append((sum(outcome is Outcome.CORRECT for outcome in outcomes), len(items)))
        disagreements += [
            (kind, answer, outcome)
            for (kind, _, answer), outcome in zip(items, outcomes, strict=True)
            if outcome is not Outcome.CORRECT
        ]
    return Agreement(name, scores[0], scores[1], disagreements)


def _share(score: tuple[int, int]) -> str:
    return f"{score[0]:,} of {score[1]:,}" if score[1] else "no boxed solutions"


def _speed(golds: Sequence[str], count: int, verifier: Verifier) -> float:
    """Verifications a second, of groups as a training step has: half right, half other problems' answers."""
    chosen = list(golds[:: max(1, len(golds) * GROUP // count)][: count // GROUP])
    items = [
        (rf"{RESPONSE} So \boxed{{{gold if number % 2 else chosen[place - number - 1]}}}.", gold)
        for place, gold in enumerate(chosen)
        for number in range(GROUP)
    ]
    start = time.perf_counter()
    _outcomes(verifier, items)
    return len(items) / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
