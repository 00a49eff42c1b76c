"""A tool's process: `python -m megatron_rapo.tools.worker FD PLAN`, in a folder of its own.

PLAN is the JSON of a `Plan`. It confines itself before it imports the functions, says that it is ready, and
then answers one call after another (`frames`) until the other end of the socket is closed.
"""

from __future__ import annotations

import inspect
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rapo.episode.facts import finite_number
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.processes.confine import confine
from megatron_rapo.processes.limits import die_in, leave_if_forked, protect_parent
from megatron_rapo.tools import frames
from megatron_rapo.tools.outcome import CallOutcome
from megatron_rapo.tools.plan import Plan
from megatron_rapo.user_code import load, message_of, own_traceback

STARTUP_LIMIT_S = 300.0
"""Seconds in which a process must have imported its functions; generous, for cold network file systems."""

_LONGEST_WHY = 500  # characters


def main(descriptor: str, plan_text: str) -> None:
    """Serves one client until it closes the connection or dies."""
    plan = Plan.from_json(plan_text)
    protect_parent(int(plan.limits.memory_gib * 2**30))
    die_in(STARTUP_LIMIT_S)
    with socket.socket(fileno=int(descriptor)) as connection, connection.makefile("rb") as requests:
        try:
            functions, own = _start(plan), os.getpid()
        except (RapoError, OSError) as error:
            connection.sendall(frames.reply(failed=str(error)))
            return
        connection.sendall(frames.reply(ready=True))
        die_in(0)
        try:
            while True:
                name, arguments = frames.read_request(requests)
                os.ftruncate(1, 0)  # what earlier calls printed
                answer = _answer(functions[name], arguments, plan.limits.output_characters)
                leave_if_forked(own)
                connection.sendall(answer)
        except (EOFError, ConnectionError):
            pass  # the client is done, or dead: so is this process


def _start(plan: Plan) -> dict[str, Callable[..., Any]]:
    confine(plan.confinement(Path.cwd()))
    return {name: load(address, plan.code, name) for name, address in plan.functions.items()}


def _answer(function: Callable[..., Any], arguments: dict[str, Any], longest: int) -> bytes:
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            import asyncio  # late, as few functions need it and each process would pay for it

            value = asyncio.run(_awaited(value))
    except MemoryError:
        return frames.reply(outcome=CallOutcome.OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit as well: it ends the call, not the process
        why = message_of(error)[:_LONGEST_WHY]
        return frames.reply(outcome=CallOutcome.RAISED, why=why, trace=own_traceback(error))
    if isinstance(value, Score):
        value = {"score": _in_json(value)}
    cut = isinstance(value, str) and len(value) > longest
    try:
        return frames.reply(outcome=CallOutcome.RESULT, value=value[:longest] if cut else value, cut=cut)
    except (TypeError, ValueError, RecursionError) as error:
        why = f"it returned {type(value).__name__}, which is no text and no JSON ({error})"
        return frames.reply(outcome=CallOutcome.BAD_RESULT, why=why[:_LONGEST_WHY])


def _in_json(score: Score) -> dict[str, Any]:
    """With NumPy's numbers as Python's; what is no number stays, for the trainer to refuse."""

    def number(value: object) -> object:
        found = finite_number(value)
        return value if found is None else found

    facts: Any = score.facts
    if isinstance(facts, Mapping):
        facts = {str(name): number(fact) for name, fact in facts.items()}
    return {"value": number(score.value), "facts": facts, "answer": score.answer}


async def _awaited(value: Any) -> Any:
    return await value


if __name__ == "__main__":
    main(*sys.argv[1:])
