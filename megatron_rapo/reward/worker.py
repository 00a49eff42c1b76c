"""The verifier process: `python -m megatron_rapo.reward.worker FD MODULE:FUNCTION TIME_LIMIT_S`.

Over the inherited socket FD it sends `(READY, "")` or `(FAILED, why)` once, then receives (response, answer)
and sends `(verification, "")` or `(REFUSED, why)` for each, until the other end is closed. Without a response
it verifies one that gives the answer. It holds no state that a SIGKILL could damage. It enforces no limits of
its own but those that keep it from outliving or starving the trainer.
"""

from __future__ import annotations

import importlib
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from megatron_rapo.episode.outcome import Outcome, Verification

READY = "ready"
FAILED = "failed"
REFUSED = "refused"

STARTUP_LIMIT_S = 300.0
"""Seconds in which a worker must have imported its verifier; generous, for cold network file systems."""

_ORPHAN_GRACE_S = 2.0  # the trainer kills at the limit; past this much more there is no trainer
_LONGEST_REASON = 500  # characters; SymPy's messages can hold whole expressions
_LONGEST_EXTRACTED = 200  # characters
_MEMORY_LIMIT = 4 * 2**30  # bytes of address space; SymPy itself needs 0.1 GiB


class Check(NamedTuple):
    """A verifier's functions (`config.verifiers`); `stating` is None where its module has none."""

    is_correct: Callable[[str, str], object]
    final_answer: Callable[[str], str | None]
    stating: Callable[[str], str] | None


def main(arguments: list[str]) -> None:
    """Serves one trainer until it closes the connection or dies."""
    descriptor, address, time_limit_s = arguments
    _protect_the_trainer()
    try:
        with Connection(int(descriptor)) as connection:
            _die_in(STARTUP_LIMIT_S)
            check = _start(connection, address)
            while check is not None:
                _die_in(0)
                response, answer = connection.recv()
                _die_in(float(time_limit_s) + _ORPHAN_GRACE_S)
                connection.send(_verify(check, response, answer))
    except (EOFError, ConnectionError):
        pass  # the trainer is done, or dead: so is this process


def _protect_the_trainer() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, ceiling = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_LIMIT if ceiling == resource.RLIM_INFINITY else min(_MEMORY_LIMIT, ceiling)
    resource.setrlimit(resource.RLIMIT_AS, (limit, ceiling))


def _die_in(seconds: float) -> None:
    """The kernel ends this process after so many seconds, whatever it is doing; 0: never."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _start(connection: Connection, address: str) -> Check | None:
    module, _, function = address.partition(":")
    try:
        imported = importlib.import_module(module)
        check = Check(
            getattr(imported, function),
            getattr(imported, "final_answer", lambda response: None),
            getattr(imported, "stating", None),
        )
    except Exception as error:  # whatever keeps it from starting is the trainer's to report
        connection.send((FAILED, repr(error)))
        return None
    connection.send((READY, ""))
    return check


def _verify(check: Check, response: str | None, answer: str) -> tuple[Verification | str, str]:
    if response is None and check.stating is None:
        return Verification(Outcome.CORRECT), ""
    try:
        if response is None:
            assert check.stating is not None
            response = check.stating(answer)
        correct = check.is_correct(response, answer)
        extracted = check.final_answer(response)
    except MemoryError:
        raise  # a process that ran out of memory once is not used again
    except Exception as error:
        return Verification(Outcome.CRASH, why=f"{type(error).__name__}: {error}"[:_LONGEST_REASON]), ""
    if not isinstance(correct, bool):  # 0.5, None or an array would all be read as something they do not say
        returned = f"{correct!r:.100}"
        return REFUSED, f"returned {returned}, not True or False; let it return bool(…) of what it means"
    outcome = Outcome.CORRECT if correct else Outcome.WRONG
    return Verification(outcome, extracted[:_LONGEST_EXTRACTED] if extracted else None), ""


if __name__ == "__main__":
    main(sys.argv[1:])
