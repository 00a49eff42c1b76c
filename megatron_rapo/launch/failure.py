"""How ranks fail, and which failure of several is the root cause.

One rank's failure makes its peers fail too: their collectives break a moment later, often before the first
rank's own report is out. So the kind of a failure counts before its time.
"""

from __future__ import annotations

import enum
import json
import re
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError


class Kind(enum.IntEnum):
    """Kinds of failures, the likeliest root cause first."""

    USER = 0  # RapoError: meant for the user
    KILLED = 1  # a signal that no collective raises
    HUNG = 2  # no progress for too long
    ERROR = 3  # any other exception, or exit status
    COLLECTIVE = 4  # a peer was lost or late
    ABORTED = 5  # native code gave up: mostly a collective's watchdog


@dataclass(frozen=True)
class Failure:
    """One rank's failure, at Unix time `time_s`; `text` is for people."""

    rank: int
    kind: Kind
    time_s: float
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What a rank reports of an exception: a RapoError's message, another's traceback."""
        if isinstance(error, RapoError):
            return cls(rank, Kind.USER, time.time(), str(error))
        kind = Kind.COLLECTIVE if _from_collective(error) else Kind.ERROR
        trace = "".join(traceback.format_exception(error)).rstrip()
        return cls(rank, kind, time.time(), f"rank {rank} failed:\n{trace}")

    @classmethod
    def of_exit(cls, rank: int, exit_code: int) -> Failure:
        """What a rank's exit tells where it left no report; negative codes are signals."""
        if exit_code > 0:
            text = f"rank {rank} exited with status {exit_code}; what it wrote stands above"
            return cls(rank, Kind.ERROR, time.time(), text)
        number = -exit_code
        kind = Kind.ABORTED if number == signal.SIGABRT else Kind.KILLED
        meaning = _SIGNALS.get(number, "it came from outside the job")
        return cls(rank, kind, time.time(), f"rank {rank} was killed by {_signal_name(number)}: {meaning}")

    def write(self, path: Path) -> None:
        """Writes the report at once or not at all, since its reader may look at any time."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(vars(self)), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Failure | None:
        """The report at `path`, or None where none is."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return cls(**{**fields, "kind": Kind(fields["kind"])})


class WorkerFailed(RapoError):
    """A rank failed; the message is the root cause's, the attribute `failure` tells the rest."""

    def __init__(self, failure: Failure, diagnosis: str = "") -> None:
        # Where the ranks were when it happened helps with every failure but one that explains itself.
        explained = failure.kind in (Kind.USER, Kind.HUNG)
        parts = [failure.text] if explained else [failure.text, diagnosis]
        super().__init__("\n".join(part for part in parts if part))
        self.failure = failure


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The likeliest cause of the others: by kind, then the earliest."""
    return min(failures, key=lambda failure: (failure.kind, failure.time_s, failure.rank))


_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "usually out of memory (the kernel's log, `dmesg`, says so); use fewer tokens a "
    "microbatch, more ranks a replica, or a machine with more memory",
    signal.SIGSEGV: "a crash in native code; the Python stack it was called from stands above",
    signal.SIGBUS: "usually /dev/shm or the disk is full; make room there",
    signal.SIGABRT: "native code gave up, often in a collective; its message stands above",
    signal.SIGTERM: "someone or the scheduler ended it",
}

_COLLECTIVE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|timed out waiting|TCPStore", re.IGNORECASE
)


def _from_collective(error: BaseException) -> bool:
    # torch raises RuntimeError and its subclasses for these; the text alone tells them from others.
    return isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(str(error)))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
