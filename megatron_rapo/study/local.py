"""The runs of a study on this machine: as many at a time as its cores allow."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rapo.errors import RapoError
from megatron_rapo.study.attempts import read_attempts
from megatron_rapo.study.making import Stopper, make
from megatron_rapo.study.plan import PlannedRun

POLL_S = 0.5
SHOW_S = 5.0  # to see where runs stand is to read their metrics

Make = Callable[[PlannedRun, Path, Stopper], bool]


def check_cores(runs: Sequence[PlannedRun], cores: int) -> None:
    """Raises RapoError where a run takes more cores than there are."""
    for run in runs:
        if run.cores > cores:
            raise RapoError(
                f"{run.name} keeps {run.cores} cores busy ([parallel], or cores_per_run), and --cores is "
                f"{cores}; give more, or a smaller layout"
            )


def run_all(
    runs: Sequence[PlannedRun],
    folder: Path,
    cores: int,
    retries: int,
    show: Callable[[], None],
    *,
    make: Make = make,
) -> bool:
    """Makes all runs, in their order; one that fails is started again, and then left.

    Args:
        runs: those to do.
        folder: of the study.
        cores: that may be busy at a time.
        retries: how often a run is started again.
        show: called while they run.
        make: a run.

    Returns:
        Whether nobody asked to stop.

    Raises:
        RapoError: a run takes more cores, or its folder or result is not as it must be.
    """
    check_cores(runs, cores)
    waiting, free = list(runs), cores
    stopper = Stopper()
    running: dict[Future[None], PlannedRun] = {}
    shown = -SHOW_S
    threads = ThreadPoolExecutor(max_workers=max(cores, 1))
    with _stop_signals(stopper), threads:
        try:
            while running or (waiting and not stopper.asked):
                while (run := _next(waiting, free)) is not None and not stopper.asked:
                    waiting.remove(run)
                    free -= run.cores
                    running[threads.submit(_until_done, run, folder, retries, stopper, make)] = run
                if time.monotonic() - shown >= SHOW_S:
                    show()
                    shown = time.monotonic()
                time.sleep(POLL_S if running else 0)
                for future in [one for one in running if one.done()]:
                    free += running.pop(future).cores
                    future.result()
        except BaseException:
            stopper.ask()
            raise
    show()
    return not stopper.asked


def _next(waiting: Sequence[PlannedRun], free: int) -> PlannedRun | None:
    return next((run for run in waiting if run.cores <= free), None)


def _until_done(run: PlannedRun, folder: Path, retries: int, stopper: Stopper, make: Make) -> None:
    while not stopper.asked:
        if make(run, folder, stopper):
            return
        if sum(attempt.failed for attempt in read_attempts(folder, run.name)) > retries:
            return


@contextmanager
def _stop_signals(stopper: Stopper) -> Iterator[None]:
    """SIGINT and SIGTERM ask the commands that run to end; where handlers can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_: int, __: FrameType | None) -> None:
        print("stopping: runs save their step; the same command goes on", flush=True)
        stopper.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
