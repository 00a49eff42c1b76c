"""Ranks as forks of one process, which has imported what all of them need.

So libraries are imported once and not once for each rank, and lie in memory once. That process must have
started no thread and touched no accelerator until it forks; what it imports is chosen accordingly.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.rank import HEEDED, die_with, run_rank

_END_S = 5.0  # for what was killed to be gone


@dataclass(frozen=True)
class Work:
    """What ranks are to do.

    Attributes:
        function: a top-level function, which a rank can import.
        args: its arguments, which are pickled.
        imports: modules to import before the fork.
    """

    function: Callable[..., object]
    args: tuple[Any, ...]
    imports: Sequence[str] = ()


class ForkedRanks:
    """The processes of ranks, for the one that starts them. They get its environment, and their place in it.

    Attributes:
        pids: by rank; empty until the ranks are forked.
        exit_codes: of the ranks that have ended, negative for signals. What such a rank left running in its
            process group has been killed.
    """

    def __init__(self, work: Work, places: Sequence[RankEnvironment], reports: Sequence[Path]) -> None:
        self.pids: dict[int, int] = {}
        self.exit_codes: dict[int, int] = {}
        self._ranks = [place.rank for place in places]
        spawn = multiprocessing.get_context("spawn")
        self._told, telling = spawn.Pipe(duplex=False)
        call = pickle.dumps((work.function, work.args))
        # Not daemonic: ranks start processes of their own.
        self._process = spawn.Process(
            target=_fork_ranks,
            args=(telling, list(work.imports), call, list(zip(places, reports, strict=True)), os.getpid()),
        )
        self._process.start()
        telling.close()

    def running(self) -> list[int]:
        """Brings the attributes up to date; the ranks that have not ended, whether or not they have begun."""
        with suppress(EOFError):
            while self._told.poll():
                rank, number = self._told.recv()
                (self.exit_codes if rank in self.pids else self.pids)[rank] = number
        running = [rank for rank in self._ranks if rank not in self.exit_codes]
        if self._process.is_alive():
            return running
        for rank in running:  # what forked them waits to be ended here, so something killed it, and them
            self._kill_group(rank)
            self.exit_codes[rank] = -signal.SIGKILL
        return []

    def send(self, number: int) -> None:
        """A signal to each rank that runs, and to nothing that it started."""
        for rank in self.running():
            if rank in self.pids:
                with suppress(ProcessLookupError):  # it has ended in between
                    os.kill(self.pids[rank], number)

    def close(self) -> None:
        """Kills the ranks that run and all that they started, and waits for their end."""
        self.send(signal.SIGKILL)
        for rank in self.running():
            self._kill_group(rank)
        self._process.kill()
        self._process.join(_END_S)
        self._told.close()

    def _kill_group(self, rank: int) -> None:
        if rank in self.pids:
            with suppress(ProcessLookupError):  # it left nothing running
                os.killpg(self.pids[rank], signal.SIGKILL)


def _fork_ranks(
    telling: Connection,
    imports: Sequence[str],
    call: bytes,
    places: Sequence[tuple[RankEnvironment, Path]],
    parent: int,
) -> None:
    """In the process that forks: tells each rank's process id, then its exit code, until it is killed."""
    die_with(parent)
    # They are meant for ranks; one that comes before a rank can heed it waits until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    for name in imports:
        with suppress(Exception):  # which the ranks meet as well, and report
            import_module(name)
    gc.freeze()  # else a collection in a rank would write to all of the memory that it shares
    context = multiprocessing.get_context("fork")
    ranks = {}
    for place, report in places:
        rank = context.Process(
            target=run_rank, args=(call, place, report, os.getpid()), name=f"rank {place.rank}"
        )
        rank.start()
        assert rank.pid is not None
        ranks[rank.pid] = place.rank, rank
        telling.send((place.rank, rank.pid))
    while ranks:
        for pid in [pid for pid, (_, rank) in ranks.items() if rank.exitcode is not None]:
            number, rank = ranks.pop(pid)
            with suppress(ProcessLookupError):  # it left nothing running
                os.killpg(pid, signal.SIGKILL)  # at once: later the group's number may be another's
            telling.send((number, rank.exitcode))
        if ranks:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    signal.pause()
