"""Kills and disturbs runs at every phase, starts them again, and compares them with one that was left alone.

    python tools/crash_test.py OUT                       # all cells of CELLS: an hour or two on two cores
    python tools/crash_test.py OUT --cells 8 --seed 3    # a selection
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
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("megatron-rapo")
MARK = "RAPO_CRASH_TEST"
RUN_LIMIT_S = 900.0  # of one start
END_LIMIT_S = 90.0  # from a deadly signal until no process is left
EVERY_RUN = 6  # disturbances
SMALL_FILES = 200_000  # bytes: less than a checkpoint's shard

CONFIG = """
[run]
directory = "{directory}"
steps = 6
[model]
path = "{model}"
dtype = "float32"
[parallel]
pipeline_parallel = 2
timeout_s = 120.0
[data]
source = "countdown"
numbers = 3
problems = 200
[rollout]
prompts_per_step = 4
responses_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 32
startup_timeout_s = 240.0
request_timeout_s = 40.0
[reward]
workers = 1
[algorithm]
minibatch_prompts = 2
max_tokens_per_microbatch = 128
[optimizer]
learning_rate = 1e-3
[checkpoint]
every = 1
stop_grace_s = 60.0
[observe]
hang_least_s = 45.0
[evaluate]
problems = 4
samples = 2
k = [1, 2]
every = 2
"""

PHASES = ("start engines", "build models", "rollout", "reward", "annotate", "update", "publish", "evaluate",
          "checkpoint", "export", "any")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is done, to whom, and in which phase of rank 0; "any": whenever it may be."""

    does: str
    victim: str
    phase: str


CELLS = (
    *(Cell("SIGKILL", victim, phase) for phase in PHASES for victim in ("a rank", "all ranks", "launcher")),
    *(
        Cell("SIGKILL", "everything", phase)
        for phase in ("rollout", "publish", "evaluate", "checkpoint", "any")
    ),
    *(Cell("SIGKILL", "engine", phase) for phase in ("rollout", "update", "publish", "evaluate", "any")),
    *(Cell("SIGKILL", "verifier", phase) for phase in ("rollout", "evaluate", "any", "any")),
    *(Cell("SIGTERM", "launcher", phase) for phase in ("rollout", "update", "evaluate", "checkpoint")),
    *(Cell("SIGINT twice", "launcher", phase) for phase in ("rollout", "update")),
    *(Cell("SIGSTOP", "engine", phase) for phase in ("rollout", "publish", "evaluate")),
    *(Cell("SIGSTOP", "a rank", phase) for phase in ("rollout", "update")),
    *(Cell("full disk", "launcher", phase) for phase in ("checkpoint", "any")),
    *(Cell("clock +1 h", "everything", phase) for phase in ("rollout", "update")),
    *(Cell("clock -2 h", "everything", phase) for phase in ("publish", "any")),
)

CLOCK = r"""
/* Preloaded: the clock of dates is as far off as the file RAPO_CLOCK says, in seconds; durations are not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long *offset;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("RAPO_CLOCK"), O_RDONLY);
    offset = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    real = dlsym(RTLD_NEXT, "clock_gettime");
}
int clock_gettime(clockid_t clock, struct timespec *found) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, found);
    int of_dates = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
    if (!failed && offset && offset != MAP_FAILED && of_dates)
        found->tv_sec += *offset;
    return failed;
}
int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec, found->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


class Run:
    """One run's folder, and the command that works in it."""

    def __init__(self, folder: Path, clock: Path | None) -> None:
        folder.mkdir(parents=True)
        self.directory = folder / "run"
        self._config = folder / "run.toml"
        model = ROOT / "examples/models/tiny-countdown"
        self._config.write_text(CONFIG.format(directory=self.directory, model=model))
        self._log = folder / "output.txt"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._offset = folder / "clock"
        self._offset.write_bytes(bytes(8))
        if clock is not None:
            self._environment |= {"LD_PRELOAD": str(clock), "RAPO_CLOCK": str(self._offset)}
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def start(self, *, small_files: bool = False) -> None:
        """The command, in the background; with `small_files` no file may grow beyond SMALL_FILES."""
        self.mark = uuid.uuid4().hex
        self.began = time.monotonic()
        self._heard: dict[Path, float] = {path: _mtime(path) for path in self._beats()}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(COMMAND), "train", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, MARK: self.mark},
                preexec_fn=partial(_limit_files, SMALL_FILES) if small_files else None,
            )

    def phase(self) -> tuple[int, str]:
        """Where rank 0 is in this start."""
        path = self.directory / "heartbeat/rank_00000.json"
        if _mtime(path) == self._heard.get(path, 0.0):
            return -1, ""
        try:
            beat = json.loads(path.read_text())
        except (OSError, ValueError):
            return -1, ""
        return beat["step"], beat["phase"]

    def ended(self) -> bool:
        """Whether the command has ended."""
        assert self.process is not None
        return self.process.poll() is not None

    def members(self, who: str) -> list[psutil.Process]:
        """Processes of the run that are alive: "a rank" and "all ranks" are both all ranks."""
        assert self.process is not None
        ranks = {json.loads(path.read_text())["pid"] for path in self._beats() if path.exists()}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) != self.mark or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = " ".join(process.cmdline())
                belongs = {
                    "engine": "embedded_server" in words,
                    "verifier": "megatron_rapo.reward.worker" in words,
                    "launcher": process.pid == self.process.pid,
                    "a rank": process.pid in ranks,
                    "all ranks": process.pid in ranks,
                    "everything": True,
                }
                if belongs[who]:
                    found.append(process)
        return found

    def jump(self, seconds: int) -> None:
        """Sets the clock of dates off by so much, in all processes of the run."""
        with self._offset.open("r+b") as file:
            file.write(ctypes.c_long(seconds))

    def kill_all(self) -> None:
        """Whatever is left."""
        for process in self.members("everything"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait()

    def last_words(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-3000:]

    def _beats(self) -> list[Path]:
        return sorted((self.directory / "heartbeat").glob("rank_*.json"))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0.0


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _wait(condition: Callable[[], bool], limit: float, pause: float = 0.005) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def disturb(run: Run, cell: Cell, draw: random.Random, usual: float) -> dict[str, Any]:
    """Starts the run if need be, waits for the cell's phase, and does what it says; what came of it.

    `usual`: seconds that this phase takes when nothing disturbs it.
    """
    if cell.does == "full disk" and not run.ended():
        run.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        run.process.wait(END_LIMIT_S * 2)  # type: ignore[union-attr]
    if run.process is None or run.ended():
        run.start(small_files=cell.does == "full disk")
    part = draw.random()
    told: dict[str, Any] = {}
    if cell.does == "full disk":
        return {**told, **_after_end(run, RUN_LIMIT_S)}
    if cell.phase == "any":
        _wait(lambda: run.ended() or run.phase()[1] != "", RUN_LIMIT_S)
        _wait(run.ended, part * 20.0)
    else:
        _wait(lambda: run.ended() or run.phase()[1].split("/")[0] == cell.phase, RUN_LIMIT_S)
        _wait(run.ended, part * usual)
    told["step"], told["in"] = run.phase()
    members = run.members(cell.victim)
    if not members or run.ended():
        return {**told, "missed": True}
    if cell.victim in ("a rank", "engine", "verifier"):
        members = [draw.choice(members)]
    if cell.does.startswith("clock"):
        run.jump({"clock +1 h": 3600, "clock -2 h": -7200}[cell.does])
        return told
    number = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGTERM": signal.SIGTERM}.get(cell.does)
    for process in members:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number or signal.SIGINT)
    if cell.does == "SIGINT twice":
        time.sleep(1.5)
        with suppress(psutil.NoSuchProcess):
            members[0].send_signal(signal.SIGINT)
    if cell.victim in ("engine", "verifier"):
        return told  # the run goes on by itself
    return {**told, **_after_end(run, END_LIMIT_S if cell.does != "SIGSTOP" else 300.0)}


def _after_end(run: Run, limit: float) -> dict[str, Any]:
    """Waits until no process of the run is left."""
    began = time.monotonic()
    over = _wait(lambda: run.ended() and not run.members("everything"), limit, pause=0.2)
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
        if not _wait(run.ended, RUN_LIMIT_S, pause=0.2):
            run.kill_all()
            return -1
    return run.process.returncode if run.process is not None else -1


# What must be the same


def contents(directory: Path) -> dict[str, Any]:
    """What a run computed, by name: comparable with `==`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {f"metrics of step {line['step']}": _lasting(line) for line in lines}
    for path in sorted((directory / "model").iterdir()):
        found[f"model/{path.name}"] = path.read_bytes()
    for folder in ("samples", "evaluations"):
        for path in sorted((directory / folder).rglob("*.parquet")):
            found[str(path.relative_to(directory))] = pyarrow.parquet.read_table(path).to_pylist()
    *_, last = sorted((directory / "checkpoints").glob("step_*"))
    found["last checkpoint"] = json.loads((last / "run.json").read_text())["state"]
    for path in sorted(last.glob("*.distcp")):
        found[f"{last.name}/{path.name}"] = path.read_bytes()
    return found


def _lasting(line: dict[str, Any]) -> dict[str, Any]:
    """Without what is of time, of memory, and of engines that were lost and came back."""
    passing = ("time", "throughput/", "memory/", "engines/", "publish/send_s", "compute/update_tflop_per_s")
    return {name: value for name, value in line.items() if not name.startswith(passing)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    return sorted(
        name for name in one.keys() | other.keys() if _text(one.get(name)) != _text(other.get(name))
    )


def _text(value: Any) -> Any:
    return value if isinstance(value, bytes) else json.dumps(value, default=str, sort_keys=True)


# The whole


def undisturbed(out: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The run that is left alone: what it computed, and how long its phases took."""
    folder = out / "undisturbed"
    if not (folder / "run/finished.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(folder, None)
        if finish(run) != 0:
            raise SystemExit(f"the undisturbed run failed:\n{run.last_words()}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    usual: defaultdict[str, float] = defaultdict(lambda: 1.0)
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


def disturbed(out: Path, number: int, cells: Sequence[Cell], seed: int, clock: Path | None) -> dict[str, Any]:
    """One run with its disturbances, from its start to its end, compared with the undisturbed one."""
    expected, usual = undisturbed(out)
    folder = out / f"run_{number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    run, draw = Run(folder, clock), random.Random(f"{seed}/{number}")
    told = []
    for cell in cells:
        what = {"run": number, **asdict(cell), **disturb(run, cell, draw, usual[cell.phase])}
        told.append(what)
        print(json.dumps(what), flush=True)
    status = finish(run)
    found = differences(expected, contents(run.directory)) if status == 0 else [f"status {status}"]
    if found:
        print(run.last_words(), flush=True)
    else:
        shutil.rmtree(folder)
    with (out / "disturbances.jsonl").open("a") as file:
        file.write("".join(json.dumps({**what, "differences": len(found)}) + "\n" for what in told))
    result = {"run": number, "seed": seed, "differences": found}
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def table(out: Path) -> str:
    """Disturbances by what was done and phase: survived of tried."""
    lines = [json.loads(line) for line in (out / "disturbances.jsonl").read_text().splitlines()]
    lines = [line for line in lines if not line.get("missed")]
    whom = list(dict.fromkeys(f"{line['does']}, {line['victim']}" for line in lines))
    tried, survived = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for line in lines:
        key = f"{line['does']}, {line['victim']}", line["phase"]
        tried[key] += 1
        survived[key] += line["differences"] == 0
    rows = [["", *PHASES, "all"]]
    for who in sorted(whom):
        cells = [(survived[who, phase], tried[who, phase]) for phase in PHASES]
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


def _build_clock(out: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = out / "clock.c", out / "clock.so"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def main() -> None:
    """Disturbs runs until all cells are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs and results")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many of them, drawn by the seed")
    parser.add_argument("--table", action="store_true", help="only print what stands there")
    options = parser.parse_args()
    if not options.table:
        options.out = options.out.absolute()
        options.out.mkdir(parents=True, exist_ok=True)
        clock = _build_clock(options.out)
        cells = [cell for cell in CELLS if clock or not cell.does.startswith("clock")]
        random.Random(options.seed).shuffle(cells)
        done_file = options.out / "runs.jsonl"
        done = (
            {json.loads(line)["run"] for line in done_file.read_text().splitlines()}
            if done_file.exists()
            else set()
        )
        for number, chosen in enumerate(runs_of(cells[: options.cells], options.seed)):
            if number not in done:
                preloads = any(cell.does.startswith("clock") for cell in chosen)
                print(
                    json.dumps(
                        disturbed(options.out, number, chosen, options.seed, clock if preloads else None)
                    )
                )
    print(table(options.out))
    if any(json.loads(line)["differences"] for line in (options.out / "runs.jsonl").read_text().splitlines()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
