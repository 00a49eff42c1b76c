"""Runs for long, kills engines and verifiers meanwhile, and tells whether anything grows.

    python tools/soak.py OUT                 # two hours; the same command goes on where it was ended
    python tools/soak.py OUT --minutes 20 --settle 5
    python tools/soak.py OUT --set evaluate.every=1000000   # without one part: is it that which grows?
    python tools/soak.py OUT --table         # what stands in OUT so far

One small run (crashes/run.py): two pipeline stages, two engines, two verifiers, evaluations, and checkpoints
in the background. Every --kill seconds one of the engines and verifiers is killed, in turn; the first of each
is spared, so that one lives as long as the run. Every --every seconds OUT/samples.jsonl gets a line: memory,
open files and threads of each process, the files in /dev/shm, and those of the run but for records of steps,
which are to grow. Slopes are Theil–Sen's, with 95% intervals, of what was noted from --settle minutes after a
start on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from crash_test import ending
from crashes.run import Run, wait

SETTINGS = (
    "run.steps=1000000",
    "parallel.timeout_s=600",
    "rollout.startup_timeout_s=600",
    "rollout.engine.servers=2",
    "rollout.restarts=1000000",
    "reward.workers=2",
    "optimizer.learning_rate=1e-5",
    "evaluate.every=5",
    "checkpoint.every=5",
    "checkpoint.keep=2",
    "checkpoint.in_background=true",
)
RECORDS = ("samples", "evaluations", "timeline", "metrics.jsonl", "published.jsonl", "tensorboard")
SHARED_MEMORY = Path("/dev/shm")
MIB = 1 << 20


class Noted:
    """What is noted of a run, by name; processes that are spared keep their names."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._spared: dict[str, int] = {}

    def spared(self, kind: str) -> int:
        """The process of this kind that is not killed: the first that was seen."""
        return self._spared.setdefault(kind, min(process.pid for process in self._run.members(kind)))

    def now(self) -> dict[str, float]:
        """Each figure, at this moment."""
        found: dict[str, float] = {}
        kinds = {kind: {p.pid for p in self._run.members(kind)} for kind in ("engine", "verifier")}
        ranks = {pid: f"rank {number}" for number, pid in self._run.ranks().items()}
        seen = Counter[str]()
        for process in self._run.members("everything"):
            kind = next((kind for kind, pids in kinds.items() if process.pid in pids), None)
            if kind is not None:
                name = f"the spared {kind}" if process.pid == self.spared(kind) else f"killed {kind}s"
            elif process.pid == self._run.process.pid:  # type: ignore[union-attr]
                name = "launcher"
            else:
                name = ranks.get(process.pid, "other processes")
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                seen[name] += 1
                for what, value in (
                    ("memory MiB", process.memory_info().rss / MIB),
                    ("open files", process.num_fds()),
                    ("threads", process.num_threads()),
                ):
                    found[f"{name}: {what}"] = found.get(f"{name}: {what}", 0) + value
        found |= {f"{name}: processes": count for name, count in seen.items()}
        found |= {f"/dev/shm: {what}": value for what, value in _sizes(SHARED_MEMORY).items()}
        return found | {f"run's folder: {what}": value for what, value in _sizes(self._run.directory).items()}


def _sizes(folder: Path) -> dict[str, float]:
    """Files below the folder and their MiB, but for records of steps."""
    files = size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.relative_to(folder).parts[0] not in RECORDS and path.is_file():
                files, size = files + 1, size + path.stat().st_blocks * 512
    return {"files": files, "MiB": size / MIB}


def soak(out: Path, seconds: float, every: float, kill: float, settings: Sequence[str]) -> None:
    """Goes on with the run for so long; nothing is killed where `kill` is 0."""
    run = Run(out, None, [*SETTINGS, *settings])
    with ending(run), (out / "samples.jsonl").open("a") as file:
        run.start()
        if not wait(lambda: run.ended() or run.phase()[1] == "update", 900.0):
            raise SystemExit(f"the run did not come to its first update:\n{run.said()[-3000:]}")
        noted, victims = Noted(run), itertools.cycle(("engine", "verifier"))
        spared = {kind: noted.spared(kind) for kind in ("engine", "verifier")}
        began = time.monotonic()
        next_kill = began + (kill or math.inf)
        while (now := time.monotonic()) < began + seconds and not run.ended():
            if now > next_kill:
                next_kill, kind = now + kill, next(victims)
                for process in run.members(kind):
                    if process.pid != spared[kind]:
                        process.kill()
                file.write(json.dumps({"killed": kind, "time": time.time()}) + "\n")
            line = {"age_s": now - began, "time": time.time(), "step": run.phase()[0], **noted.now()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            wait(run.ended, every, pause=0.5)
        if run.ended():
            raise SystemExit(f"the run ended by itself:\n{run.said()[-3000:]}")
        run.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        wait(run.ended, 120.0, pause=0.5)


def table(out: Path, settle: float) -> str:
    """The slope of each figure, an hour."""
    from scipy.stats import theilslopes  # late: it takes a second

    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    kills = Counter(line["killed"] for line in lines if "killed" in line)
    noted = [line for line in lines if "killed" not in line]
    late = [line for line in noted if line["age_s"] > settle]
    points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in late:
        for name, value in line.items():
            if ": " in name:
                points[name].append((line["time"], value))
    steps = [json.loads(line)["time/step_s"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    timed = zip(itertools.accumulate(steps), steps, strict=True)
    points["steps: seconds"] = [(time, seconds) for time, seconds in timed if time > settle]
    rows = [["", "median", "slope an hour", "95% interval"], ["---"] * 4]
    for name, own in points.items():
        if name.startswith("killed") or len(own) < 3:
            continue  # these start again and again
        own = own[:: max(1, len(own) // 1000)]  # each pair of them has a slope
        times, values = [time / 3600 for time, _ in own], [value for _, value in own]
        slope, _, low, high = theilslopes(values, times)
        middle = sorted(values)[len(values) // 2]
        rows.append([name, f"{middle:.4g}", f"{slope:+.3g}", f"{low:+.3g} to {high:+.3g}"])
    guards = out / "run/guards.jsonl"
    findings = (
        [json.loads(line)["guard"] for line in guards.read_text().splitlines()] if guards.exists() else []
    )
    minutes = sum(b["time"] - a["time"] for a, b in itertools.pairwise(noted) if b["age_s"] > a["age_s"]) / 60
    told = (
        f"{minutes:.0f} minutes, {len(steps)} steps; killed: {dict(kills)}; slopes over {len(late)} notes "
        f"after {settle / 60:g} minutes; guards: {dict(Counter(findings)) or 'no finding'}"
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{told}"


def main() -> None:
    """Goes on until the time is over, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run and what is noted")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--settle", type=float, default=10.0, help="minutes before slopes begin")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two notes")
    parser.add_argument("--kill", type=float, default=120.0, help="seconds between two kills; 0: none")
    parser.add_argument("--set", nargs="*", default=[], help="options of the run, as for `train --set`")
    parser.add_argument("--table", action="store_true", help="only print what stands there")
    options = parser.parse_args()
    out = options.out.absolute()
    if not options.table:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "samples.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        ages = [line["age_s"] for line in lines if "age_s" in line]
        done = sum(b - a for a, b in itertools.pairwise(ages) if b > a)
        if (left := 60 * options.minutes - done) > 0:
            soak(out, left, options.every, options.kill, options.set)
    print(table(out, 60 * options.settle))


if __name__ == "__main__":
    main()
