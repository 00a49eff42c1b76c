"""The verifier process: `python -m megatron_rapo.reward.worker FD PLAN TIME_LIMIT_S MEMORY_LIMIT_GIB`.

PLAN is the JSON of what `Functions` takes. Over the inherited socket FD it sends `(READY, "")` or `(FAILED,
why)` once, then receives (response, problem) and sends `(VERIFIED, verification)`, `(LAST, verification)` or
`(REFUSED, why)` for each, until the other end is closed. Without a response it judges the problem's gold
answer. It holds no state that a SIGKILL could damage. It enforces no limits of its own but those that keep it
from outliving or starving the trainer.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Connection

from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.processes.limits import die_in, leave_if_forked, protect_parent
from megatron_rapo.reward.functions import Functions

READY = "ready"
FAILED = "failed"
VERIFIED = "verified"
LAST = "last"  # verified, but the process is not to be used again
REFUSED = "refused"

STARTUP_LIMIT_S = 300.0
"""Seconds in which a worker must have imported its functions; generous, for cold network file systems."""

_ORPHAN_GRACE_S = 2.0  # the trainer kills at the limit; past this much more there is no trainer


def main(arguments: list[str]) -> None:
    """Serves one trainer until it closes the connection or dies."""
    descriptor, plan, time_limit_s, memory_limit_gib = arguments
    protect_parent(int(float(memory_limit_gib) * 2**30))
    try:
        with Connection(int(descriptor)) as connection:
            die_in(STARTUP_LIMIT_S)
            functions, own = _start(connection, plan), os.getpid()
            while functions is not None:
                die_in(0)
                response, problem = connection.recv()
                die_in(float(time_limit_s) + _ORPHAN_GRACE_S)
                try:
                    verified = _verify(functions, response, problem)
                    leave_if_forked(own)
                    connection.send(verified)
                except MemoryError:  # a process that ran out of memory once is not used again
                    why = f"out of memory (reward.memory_limit_gib = {float(memory_limit_gib):g})"
                    connection.send((LAST, Verification(Outcome.CRASH, why=why)))
                    return
    except (EOFError, ConnectionError):
        pass  # the trainer is done, or dead: so is this process


def _start(connection: Connection, plan: str) -> Functions | None:
    try:
        functions = Functions(**json.loads(plan))
    except RapoError as error:
        connection.send((FAILED, str(error)))
        return None
    connection.send((READY, ""))
    return functions


def _verify(functions: Functions, response: str | None, problem: Problem) -> tuple[str, Verification | str]:
    try:
        if response is None:
            return VERIFIED, functions.judge(problem.answer)
        return VERIFIED, functions.verify(response, problem)
    except RapoError as error:
        return REFUSED, str(error)


if __name__ == "__main__":
    main(sys.argv[1:])
