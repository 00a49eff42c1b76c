"""Each rank's watch over its own progress, and over what other ranks' watches have found."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rapo.hangs.bounds import Bounds
from megatron_rapo.hangs.collectives import Entered, entered, from_json, to_json
from megatron_rapo.hangs.report import Hang, describe
from megatron_rapo.hangs.stacks import ask_for_stacks, read_stack, stacks_to

COLLECT_S = 6.0  # in which all ranks say where they are; those that do not are told as such
POLL_S = 0.5
FOUND = "found.json"


class Watch:
    """Finds a rank that makes no progress, within a bound that follows from how long its phases took.

    A thread looks at this rank's own phase. The first rank of the job that is over its bound says so in the
    folder; all then write there which collectives they are in, and their stacks; that rank reports.

    It counts the time in which this process runs: a job that is stopped as a whole, and goes on, hangs not.

    Args:
        folder: of this start of the job, the same for all ranks, on storage that all see; made here.
        rank: this one.
        world_size: ranks of the job.
        bounds: of phases.
        told: gets the report, in the watch's thread, on the rank that found the hang.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, bounds: Bounds, told: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._bounds = bounds
        self._told = told
        self._lock = threading.Lock()
        self._step, self._phase = 0, ""
        self._age = 0.0  # seconds in this phase
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self._opened = ExitStack()

    def beat(self, step: int, phase: str) -> None:
        """This rank enters `phase` of `step`; a listener of phases."""
        with self._lock:
            if self._phase:
                self._bounds.note(self._phase, self._age)
            self._step, self._phase, self._age = step, phase, 0.0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._opened.enter_context(stacks_to(self._folder, self._rank))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._opened.close()
        with suppress(OSError):  # other ranks' files are there, or one of them was quicker
            self._folder.rmdir()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            # A longer gap is one in which this process did not run.
            hang = self._after(min(now - before, 2 * POLL_S))
            before = now
            if hang is not None and self._claim(hang):
                self._say()
                self._told(self._report(hang))
                return
            if (self._folder / FOUND).exists():
                self._say()
                return

    def _after(self, passed: float) -> Hang | None:
        """What is over its bound, `passed` seconds later."""
        with self._lock:
            self._age += passed
            bound = self._bounds.of(self._phase)
            if not self._phase or self._age <= bound:
                return None
            why = self._bounds.why(self._phase)
            return Hang(self._rank, self._step, self._phase, self._age, bound, why)

    def _claim(self, hang: Hang) -> bool:
        """Whether this rank is the first to find it."""
        try:
            with (self._folder / FOUND).open("x", encoding="utf-8") as file:
                file.write(json.dumps(vars(hang)))
        except FileExistsError:
            return False
        return True

    def _say(self) -> None:
        """Where this rank is, for the one that reports."""
        path = self._path(self._rank)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(to_json(entered())), encoding="utf-8")
        partial.replace(path)
        self._stacks.write()

    def _report(self, hang: Hang) -> str:
        ranks = range(self._world_size)
        deadline, asked = time.monotonic() + COLLECT_S, False
        while time.monotonic() < deadline and (missing := self._silent(ranks)):
            if not asked and time.monotonic() > deadline - COLLECT_S / 2:
                # Their watches do not run: something holds the interpreter's lock, or they are stopped.
                ask_for_stacks(self._folder, missing)
                asked = True
            time.sleep(POLL_S / 5)
        heard = {rank: self._heard(rank) for rank in ranks if self._path(rank).exists()}
        places = [read_stack(self._folder, rank) for rank in ranks]
        return describe(hang, heard, places, self._folder.parent.parent)

    def _silent(self, ranks: Sequence[int]) -> set[int]:
        def here(rank: int) -> bool:
            where = read_stack(self._folder, rank)
            return self._path(rank).exists() and where is not None and bool(where.stack)

        return {rank for rank in ranks if not here(rank)}

    def _heard(self, rank: int) -> list[Entered]:
        return from_json(json.loads(self._path(rank).read_text(encoding="utf-8")))

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def new_start() -> str:
    """A name for this start of the job, which sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
