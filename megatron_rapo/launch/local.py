"""Starts the trainer's ranks on this machine and watches them: when one fails, all end, with its reason."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.failure import Failure, Kind, WorkerFailed, root_cause
from megatron_rapo.launch.fork import ForkedRanks, Work
from megatron_rapo.launch.stop import ASKING, AT_ONCE, ONE_REQUEST_S

POLL_S = 0.1
# How long peers may take to end by themselves, and to tell their own reasons, before they are asked to.
SETTLE_S = 2.0
# How long a rank that was asked to end may take to close what it opened, before it is killed.
GRACE_S = 5.0


def run_local(
    function: Callable[..., object],
    args: tuple[Any, ...],
    world_size: int,
    diagnose: Callable[[], str] | None = None,
    *,
    defers_stops: bool = False,
    imports: Sequence[str] = (),
) -> None:
    """Runs `function(*args)` in `world_size` new processes, with torchrun's environment, until all return.

    Args:
        function: a top-level function, which a new process can import; its arguments are pickled.
        args: its arguments, the same for each rank.
        world_size: how many ranks to start.
        diagnose: says where the ranks are (`observe.describe`); asked before failed ranks are ended.
        defers_stops: the function ends by itself when it is asked to (`StopRequests.deferring`), which may
            take its time; a second signal ends all ranks soon, a third at once.
        imports: modules that the function imports late; the ranks share them, and that of the function.

    Raises:
        WorkerFailed: a rank failed; the others, and all that ranks left running, have been ended.
        KeyboardInterrupt, SystemExit: SIGINT, or another stop signal, came; all ranks have ended.
    """
    hidden = nullcontext() if function.__module__ == "__main__" else _without_main()
    # Where there is CUDA, each rank imports by itself: an import may call the driver, which no fork survives.
    shared = () if torch.cuda.is_available() else (function.__module__, *imports)
    with (
        _rendezvous(world_size) as port,
        tempfile.TemporaryDirectory(prefix="megatron-rapo-") as folder,
        _stop_signals() as received,
    ):
        places = [
            RankEnvironment(index, index, world_size, world_size, "127.0.0.1", port)
            for index in range(world_size)
        ]
        reports = [Path(folder) / f"rank_{index:05d}.json" for index in range(world_size)]
        with _environment(_defaults()), hidden:
            ranks = ForkedRanks(Work(function, args, shared), places, reports)
        try:
            failures = _watch(ranks, reports, received, defers_stops)
            diagnosis = diagnose() if failures and diagnose else ""
        finally:
            _end(ranks, received)
    if failures:
        raise WorkerFailed(root_cause(failures), diagnosis)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])


def _watch(
    ranks: ForkedRanks, reports: Sequence[Path], received: list[int], defers_stops: bool
) -> list[Failure]:
    """Waits until all ranks ended, one failed, or they are to end at once; the failures, one a rank.

    Where stops are deferred, the first signal is handed on, and their end is waited for.
    """
    failures: dict[int, Failure] = {}
    deadline, asked = float("inf"), False
    while len(received) < (2 if defers_stops else 1) and time.monotonic() < deadline:
        running = ranks.running()
        if received and not asked:
            if len(ranks.pids) < len(reports):  # nothing has begun
                break
            asked = True
            print("stopping once the step is done and saved; a second signal stops at once", flush=True)
            ranks.send(received[0])
        for rank, report in enumerate(reports):
            failure = failures.get(rank) or _failure(rank, report, ranks.exit_codes.get(rank), asked)
            if failure is not None and asked and failure.kind is Kind.COLLECTIVE:
                continue  # its peers ended sooner
            if failure is not None:
                failures[rank] = failure
                deadline = min(deadline, time.monotonic() + SETTLE_S)
        if not running:
            break
        time.sleep(POLL_S)
    return [] if len(received) > asked else list(failures.values())


def _failure(rank: int, report: Path, exit_code: int | None, asked: bool) -> Failure | None:
    """Why a rank failed, or None. A report counts before the exit: a thread may hold that up for ever.

    `asked`: it was asked to end, and fails no more by ending for that.
    """
    reported = Failure.read(report)
    if reported is None and exit_code and not (asked and exit_code in _STOPPED):
        return Failure.of_exit(rank, _signed(exit_code))
    return reported


def _end(ranks: ForkedRanks, received: list[int]) -> None:
    """Ends all ranks, within GRACE_S or, where one more signal asks for it, at once."""
    ranks.send(AT_ONCE)
    deadline, before = time.monotonic() + GRACE_S, len(received)
    while ranks.pids and ranks.running() and time.monotonic() < deadline and len(received) == before:
        time.sleep(POLL_S)
    ranks.close()


@contextmanager
def _rendezvous(world_size: int) -> Iterator[int]:
    """The port of the ranks' store, which this process serves on loopback meanwhile.

    The port is taken from the start: one that is picked for rank 0 to serve on could be lost in between.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    yield port
    del store  # It served as long as it was referenced.


def _defaults() -> dict[str, str]:
    """What ranks find in the environment beside their place; what the user set stands."""
    defaults = {
        "OMP_NUM_THREADS": "1",  # More threads than cores cost an order of magnitude.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron orders communication before compute by it.
    }
    if not torch.cuda.is_available():
        # Nothing on CPU gains from torch.compile, and the imports that its decorators cause take seconds.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    kept = {name: os.environ.get(name, value) for name, value in defaults.items()}
    # Ranks then join this process's store, where rank 0 would otherwise serve one. As torchrun does.
    return {**kept, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a process that is started meanwhile: they must stand before it imports anything."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The stop signals that came meanwhile: noted, so that none is lost or comes between two statements."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Only there can handlers be set.
        yield received
        return
    # `nohup` has SIGHUP ignored.
    stop = [n for n in ASKING if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    last = -ONE_REQUEST_S

    def note(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() - last >= ONE_REQUEST_S:
            received.append(number)
            last = time.monotonic()

    before = {number: signal.signal(number, note) for number in stop}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not import the script that started this one.

    They would run it again where it is no more than a few lines that train (`megatron_rapo.train`).
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# What ranks end with that heeded a stop signal.
_STOPPED = {128 + number for number in ASKING}


def _signed(exit_code: int) -> int:
    """A rank that ended itself on SIGTERM exits with 128 + the number, as shells write it."""
    return 128 - exit_code if exit_code == 128 + signal.SIGTERM else exit_code
