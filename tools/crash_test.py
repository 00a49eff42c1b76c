"""Kills and disturbs runs at every phase, starts them again, and compares them with one that was left alone.

    python tools/crash_test.py OUT                       # all cells of CELLS: an hour or two on two cores
    python tools/crash_test.py OUT --cells 8 --seed 3    # a selection
    python tools/crash_test.py OUT --only 9 10           # of the seed's runs, by their numbers
    python tools/crash_test.py OUT --set rollout.max_staleness=1    # other options: an OUT of their own
    python tools/crash_test.py OUT --table               # what stands in OUT so far

Each run is small (two pipeline stages, an engine and verifiers of its own, evaluations, a checkpoint each
step) and is disturbed several times: at the next occurrence of the wanted phase, after a random part of its
usual time. Where that ends it, the same command goes on. At its end weights, metrics, samples, evaluations
and the last checkpoint are compared, byte by byte or value by value, with those of the undisturbed run. The
seed says which run meets what and after which part; when exactly a signal arrives no seed can say.

What is done is kept in OUT/disturbances.jsonl, one line each, and OUT/runs.jsonl: a command that was ended
goes on with the run that it was in.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from crashes.cells import AT_START, CELLS, MET, PHASES, Cell
from crashes.clock import build_clock
from crashes.comparing import contents, differences
from crashes.run import Run, wait

RUN_LIMIT_S = 900.0  # of one start
END_LIMIT_S = 90.0  # from a deadly signal until no process is left
STOPPED_LIMIT_S = 300.0  # until a job with a stopped rank has ended: it is found by its bound
EVERY_RUN = 6  # disturbances
SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "SIGTERM": signal.SIGTERM,
    "SIGINT twice": signal.SIGINT,
}
JUMPS = {"clock +1 h": 3600, "clock -2 h": -7200}  # seconds


def disturb(run: Run, cell: Cell, draw: random.Random, usual: float) -> dict[str, Any]:
    """Starts the run if need be, waits for the cell's phase, and does what it says; what came of it.

    `usual`: seconds that this phase takes when nothing disturbs it.
    """
    if cell.does == "full disk":
        return _fill_disk(run)
    if cell.phase in AT_START:
        _stop(run)
    if run.process is None or run.ended():
        run.start()
    wait(lambda: run.ended() or _is_in(run, cell.phase), RUN_LIMIT_S)
    began, delay = time.monotonic(), draw.random() * usual
    members = run.members(cell.victim)  # before the rest of the wait: some phases are short
    wait(run.ended, delay - (time.monotonic() - began))
    if cell.phase == "any":
        members = run.members(cell.victim)
    step, phase = run.phase()
    told: dict[str, Any] = {"step": step, "in": phase}
    if not members or run.ended():
        return {**told, "missed": True}
    if cell.does in JUMPS:
        run.jump(JUMPS[cell.does])
        return told
    if cell.victim in ("a rank", "engine", "verifier"):
        members = [draw.choice(members)]
    for process in members:
        _send(process, SIGNALS[cell.does])
    if cell.does == "SIGINT twice":
        time.sleep(1.5)
        _send(members[0], signal.SIGINT)
    if cell.victim in ("engine", "verifier"):
        return told  # the run goes on by itself
    return {**told, **_after_end(run, END_LIMIT_S if cell.does != "SIGSTOP" else STOPPED_LIMIT_S)}


def _fill_disk(run: Run) -> dict[str, Any]:
    """Has the run go on where no file may become as large as a checkpoint's, until it ends by that."""
    _stop(run)
    run.start(small_files=True)
    told = _after_end(run, RUN_LIMIT_S)
    step, phase = run.phase()
    return {"step": step, "in": phase, **told}


def _is_in(run: Run, phase: str) -> bool:
    now = run.phase()[1]
    return now == phase or (phase == "any" and now != "")


def _stop(run: Run) -> None:
    """Has it save what it is at, and end."""
    if run.process is not None and not run.ended():
        _send(psutil.Process(run.process.pid), signal.SIGTERM)
        wait(run.ended, 2 * END_LIMIT_S)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _after_end(run: Run, limit: float) -> dict[str, Any]:
    """Waits until no process of the run is left."""
    began = time.monotonic()
    over = wait(lambda: run.ended() and not run.members("everything"), limit, pause=0.2)
    assert run.process is not None
    status = run.process.returncode if over else None
    told: dict[str, Any] = {"status": status, "gone_s": round(time.monotonic() - began, 1)}
    if not over:
        told["left"] = [process.name() for process in run.members("everything")]
        run.kill_all()
    return told


def finish(run: Run) -> int:
    """Starts the run until it has ended by itself with success, at most three times; its status."""
    for _ in range(3):
        if run.process is None or run.ended():
            if run.process is not None and run.process.returncode == 0:
                return 0
            run.start()
        if not wait(run.ended, RUN_LIMIT_S, pause=0.2):
            run.kill_all()
            return -1
    return run.process.returncode if run.process is not None else -1


@contextmanager
def ending(run: Run) -> Iterator[None]:
    """Leaves no process of the run behind, also where this command is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        if run.process is not None:
            run.kill_all()


def undisturbed(out: Path, settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """The run that is left alone: what it computed, and how long its phases took."""
    folder = out / "undisturbed"
    if not (folder / "run/finished.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(folder, None, settings)
        with ending(run):
            status = finish(run)
        if status != 0:
            raise SystemExit(f"the undisturbed run failed:\n{run.said()[-3000:]}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    usual: defaultdict[str, float] = defaultdict(lambda: 1.0)
    usual["any"] = sum(line.get("time/step_s", 0.0) for line in lines) / EVERY_RUN
    for phase in PHASES:
        if times := [line[key] for line in lines if (key := f"time/{phase}_s") in line]:
            usual[phase] = sum(times) / len(times)
    return contents(folder / "run"), usual


def runs_of(cells: Sequence[Cell], seed: int) -> Iterator[list[Cell]]:
    """The cells in random order, some for each run; what comes at the end of a run comes last in it."""
    shuffled = list(cells)
    random.Random(seed).shuffle(shuffled)
    for first in range(0, len(shuffled), EVERY_RUN):
        yield sorted(shuffled[first : first + EVERY_RUN], key=lambda cell: cell.phase == "export")


def disturbed(
    out: Path,
    number: int,
    cells: Sequence[Cell],
    seed: int,
    clock: Path | None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """One run with its disturbances, from its start to its end, compared with the undisturbed one."""
    expected, usual = undisturbed(out, settings)
    folder = out / f"seed_{seed}_run_{number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    run, draw = Run(folder, clock, settings), random.Random(f"{seed}/{number}")
    told = []
    with ending(run):
        for cell in cells:
            what = {
                "seed": seed,
                "run": number,
                **asdict(cell),
                **disturb(run, cell, draw, usual[cell.phase]),
            }
            told.append(what)
            print(json.dumps(what), flush=True)
        status = finish(run)
        wait(lambda: not run.left(), END_LIMIT_S, pause=0.2)  # Python's own resource tracker ends last
        left = run.kill_all()
    found = differences(expected, contents(run.directory)) if status == 0 else [f"status {status}"]
    if found:
        print(run.said()[-3000:], flush=True)
    else:
        shutil.rmtree(folder)
    with (out / "disturbances.jsonl").open("a") as file:
        file.write("".join(json.dumps({**what, "differences": len(found)}) + "\n" for what in told))
    result = {"seed": seed, "run": number, "differences": found, "left": left}
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def table(out: Path) -> str:
    """Disturbances by what was done and the phase in which it met rank 0: survived of tried."""
    path = out / "disturbances.jsonl"
    if not path.is_file():
        raise SystemExit(f"{out} has no disturbances; run tools/crash_test.py {out} first, without --table")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if not line.get("missed")]
    tried, survived = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for line in lines:
        key = f"{line['does']}, {line['victim']}", line["in"] or "before the first"
        tried[key] += 1
        survived[key] += line["differences"] == 0
    phases = sorted({phase for _, phase in tried}, key=MET.index)
    rows = [["", *phases, "all"]]
    for who in sorted({who for who, _ in tried}):
        cells = [(survived[who, phase], tried[who, phase]) for phase in phases]
        total = tuple(map(sum, zip(*cells, strict=True)))
        rows.append([who, *(f"{good} of {all_}" if all_ else "" for good, all_ in [*cells, total])])
    rows.insert(1, ["---"] * len(rows[0]))
    ends = [line["gone_s"] for line in lines if "gone_s" in line and line["does"] == "SIGKILL"]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    done = sum(survived.values())
    text += f"\n\n{done} of {len(lines)} disturbances ended in the same bytes"
    if ends:
        text += f"; after a SIGKILL no process was left within {sorted(ends)[len(ends) // 2]:g} s (median), "
        text += f"{max(ends):g} s (most)"
    return text + "."


def undone(
    out: Path, cells: Sequence[Cell], seed: int, only: Sequence[int] | None = None
) -> Iterator[tuple[int, list[Cell]]]:
    """Numbers and cells of the runs that are not in the folder yet; of those in `only`, if given."""
    path = out / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line["run"] for line in lines if line["seed"] == seed}
    runs = enumerate(runs_of(cells, seed))
    wanted = ((number, own) for number, own in runs if only is None or number in only)
    return ((number, own) for number, own in wanted if number not in done)


def main() -> None:
    """Disturbs runs until all cells are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs and results")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many of them, drawn by the seed")
    parser.add_argument(
        "--set", nargs="*", default=[], help="options of the runs, as `train --set` takes them"
    )
    parser.add_argument("--runs", type=int, help="end after so many; the same command goes on")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the runs to do, in place of all")
    parser.add_argument("--table", action="store_true", help="only print what stands there")
    options = parser.parse_args()
    if not options.table:
        out = options.out.absolute()
        out.mkdir(parents=True, exist_ok=True)
        clock = build_clock(out)
        cells = [cell for cell in CELLS if clock or cell.does not in JUMPS]
        random.Random(options.seed).shuffle(cells)
        for number, own in islice(
            undone(out, cells[: options.cells], options.seed, options.only), options.runs
        ):
            preloaded = clock if any(cell.does in JUMPS for cell in own) else None
            print(json.dumps(disturbed(out, number, own, options.seed, preloaded, options.set)))
    print(table(options.out))
    runs = map(json.loads, (options.out / "runs.jsonl").read_text().splitlines())
    if any(run["differences"] or run.get("left") for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
