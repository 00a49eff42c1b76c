"""Plants single-line faults, one at a time, and tells which of them the unit tests let pass.

    python tools/mutate.py                                   # 320 faults over all rooms
    python tools/mutate.py --room loss --count 60 --seed 3
    python tools/mutate.py --only megatron_rapo/methods/advantages.py --count 1000
    python tools/mutate.py --tests tests/unit tests/distributed   # what only several ranks run, too

Each fault is run against the tests that run its line, quick ones first, to the first failure. How to read the
result, and what to do about a fault that passes: docs/testing.md.

The tool is our own, since those that exist start Python anew for each fault (cosmic-ray) or import the
package once for all of them (mutmut): importing torch, transformers and Megatron takes longer than most of
our tests, and a configuration's defaults and bounds are made when they are imported. Here a child is forked
from a process that has the libraries but not the package, so that a fault costs a second or two. Faults are
planted in copies of the repository: the working tree is never touched.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before numpy and torch read them: no thread may be there at a fork
os.environ["HF_HUB_OFFLINE"] = "1"

from mutation.coverage import Coverage, Store, read_trace, trace  # noqa: E402
from mutation.equivalent import read_equivalents  # noqa: E402
from mutation.faults import Fault, find_faults, shuffled  # noqa: E402
from mutation.trial import Copy, Job, preload, run_jobs, run_tests  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    *("loss", "policy", "experience", "evaluation", "weights", "checkpoint", "megatron_repairs"),
    *("config", "methods", "environments", "reward", "data", "rollout", "publish"),
    *("engines", "embedded_server", "wire", "tools", "model"),
]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_rapo" / "mutation"
TRACE_S = 900.0


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: caught, timeout, survived, untested (no test runs its line) or equivalent."""

    fault: Fault
    outcome: str
    tests: int = 0


def main() -> None:
    """Draws, plants, reports."""
    arguments, began = _parse_arguments(), time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it in the background
    faults = draw(arguments)
    equivalents = read_equivalents(ROOT)
    known = [Verdict(f, "equivalent") for f in faults if any(known.is_it(f) for known in equivalents)]
    judged = {verdict.fault for verdict in known}
    planted = [fault for fault in faults if fault not in judged]
    print(f"{len(faults)} faults in {len({fault.file for fault in faults})} files", flush=True)
    preload()
    with slots(arguments.processes) as copies:
        coverage = cover(copies, arguments.tests)
        report([*known, *judge(copies, coverage, planted)], time.monotonic() - began)


def draw(arguments: argparse.Namespace) -> list[Fault]:
    """The faults that are asked for."""
    files = arguments.only or [
        str(path.relative_to(ROOT))
        for room in arguments.room or ROOMS
        for path in sorted((ROOT / "megatron_rapo" / room).rglob("*.py"))
    ]
    faults = [fault for file in files for fault in find_faults(file, source(file))]
    valid = (fault for fault in shuffled(faults, arguments.seed) if fault.plant(source(fault.file)))
    return list(islice(valid, arguments.count))


@cache
def source(file: str) -> bytes:
    """A file as it was when the run began."""
    return (ROOT / file).read_bytes()


@contextmanager
def slots(processes: int) -> Iterator[list[Copy]]:
    """As many copies of the repository as there are trials at a time."""
    with ExitStack() as stack:
        folders = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="mutate-")) for _ in range(processes)
        ]
        yield [Copy(ROOT, Path(folder) / "repository") for folder in folders]


def cover(copies: Sequence[Copy], places: Sequence[str]) -> Coverage:
    """Which tests run which lines; traces what is not known."""
    store = Store(CACHE, ROOT)
    coverage = Coverage(ROOT)
    missing = []
    for place in places:
        for path in sorted((ROOT / place).rglob("test_*.py")) if (ROOT / place).is_dir() else [ROOT / place]:
            name = str(path.relative_to(ROOT))
            traced = store.load(name)
            if traced is None:
                missing.append(name)
            else:
                coverage.traced[name] = traced

    def done(copy: Copy, name: str, status: int | None) -> None:
        if status not in (0, 1):
            print(f"{name}: left out, as it cannot be run (status {status})", flush=True)
            return
        traced = coverage.traced[name] = read_trace(copy)
        print(f"traced {name}: {len(traced.seconds)} tests", flush=True)
        if traced.failing:
            print(f"  left out, as they fail without a fault: {', '.join(traced.failing)}", flush=True)
        store.save(name, traced, copy.directory)

    jobs = [Job(name, partial(trace, name), TRACE_S) for name in missing]
    run_jobs(copies, jobs, lambda copy, name: None, done)
    return coverage


def judge(copies: Sequence[Copy], coverage: Coverage, faults: Sequence[Fault]) -> list[Verdict]:
    """Each fault against its tests; tells of those that pass at once."""
    verdicts: list[Verdict] = []
    jobs = []
    for fault in faults:
        tests = coverage.tests(fault)
        if tests:
            longest = max(coverage.seconds([test]) for test in tests)
            work = partial(attempt, tests, 20.0 + 5 * longest)
            jobs.append(Job((fault, tests), work, 60.0 + 5 * coverage.seconds(tests)))
        else:
            verdicts.append(Verdict(fault, "untested"))

    def plant(copy: Copy, subject: tuple[Fault, list[str]]) -> None:
        fault = subject[0]
        copy.write(fault.file, fault.plant(source(fault.file)) or b"")

    def done(copy: Copy, subject: tuple[Fault, list[str]], status: int | None) -> None:
        fault, tests = subject
        copy.write(fault.file, source(fault.file))
        outcome = "timeout" if status is None else "caught" if status else "survived"
        verdicts.append(Verdict(fault, outcome, len(tests)))
        if outcome == "survived":
            print(f"[{len(verdicts)} of {len(faults)}] {describe(verdicts[-1])}", flush=True)

    with suppress(KeyboardInterrupt):  # what has been judged by then is reported
        run_jobs(copies, jobs, plant, done)
    return verdicts


def attempt(tests: list[str], limit_s: float, copy: Copy) -> int:
    """In a child: the status of a fault's tests, none of which may take longer than the limit."""
    del copy
    status = run_tests(tests, limit_s=limit_s)
    if status not in (4, 5):
        return status
    # Parameters of a test may come from the package: under the fault it has another name.
    return run_tests(list(dict.fromkeys(test.split("::")[0] for test in tests)), limit_s=limit_s)


def describe(verdict: Verdict) -> str:
    """A fault in three lines, for people."""
    fault = verdict.fault
    told = f"{verdict.tests} tests pass" if verdict.tests else "no test runs this line"
    return f"{fault.file}:{fault.line}: {told}\n    {fault.text}\n    {fault.before}  →  {fault.after}"


def report(verdicts: Sequence[Verdict], seconds: float) -> None:
    """Survivors in the order of files, then the counts of each room."""
    left = [verdict for verdict in verdicts if verdict.outcome in ("survived", "untested")]
    print(f"\n{len(left)} faults pass:")
    for verdict in sorted(left, key=lambda verdict: (verdict.fault.file, verdict.fault.line)):
        print(describe(verdict))
    print(f"\n{'room':<12}{'faults':>8}{'caught':>8}{'equivalent':>12}{'pass':>6}")
    rooms = [verdict.fault.file.split("/")[1] for verdict in verdicts]
    for room in [*dict.fromkeys(sorted(rooms)), "all"]:
        counts = Counter(
            verdict.outcome for verdict, of in zip(verdicts, rooms, strict=True) if room in (of, "all")
        )
        caught, passing = counts["caught"] + counts["timeout"], counts["survived"] + counts["untested"]
        print(f"{room:<12}{counts.total():>8}{caught:>8}{counts['equivalent']:>12}{passing:>6}")
    share = 1 - len(left) / max(len(verdicts), 1)
    print(f"\n{share:.1%} caught or equivalent, in {seconds / 60:.0f} minutes")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", action="append", choices=ROOMS, help="where faults are planted; may be repeated"
    )
    parser.add_argument("--only", nargs="+", metavar="FILE", help="the files where they are planted, instead")
    parser.add_argument("--count", type=int, default=320, help="number of faults (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--tests", nargs="+", default=["tests/unit"], metavar="PLACE", help="tests that are to notice"
    )
    parser.add_argument("--processes", type=int, default=2, help="trials at a time (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
