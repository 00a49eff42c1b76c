"""The process of a program that is not ours: `PYTHON worker.py FD`, by the interpreter that has its packages.

Lines of JSON go both ways over the socket FD. The first one says what to load; then it is given episodes, any
number at a time, and answers each once its program has played it. It ends when the socket is closed. Nothing
but Python's own library is imported here, of any version from 3.9 on.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import socket
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_LINE = 2**28  # bytes
_MOST_THREADS = 4096
_LONGEST_TRACE = 4000  # characters


@dataclass(frozen=True)
class Episode:
    """What a program is told of the episode that it plays.

    Attributes:
        url: where vLLM's routes begin: `{url}/inference/v1/generate`.
        base_url: for clients in OpenAI's manner, which want `/v1` behind it.
        model: what requests may call the policy by.
        model_path: the policy's folder, with its tokenizer.
        problem: `id`, `question`, `answer`, `source`, `token_ids` (the templated prompt), and all `columns`
            of the row.
        seed: for what the program itself draws: the same in a repeated run.
        max_turns: turns that it may ask for.
        max_tokens: tokens that a sequence may have, given or sampled.
    """

    url: str
    base_url: str
    model: str
    model_path: str
    problem: dict[str, Any]
    seed: int
    max_turns: int
    max_tokens: int


def main() -> None:
    """Serves until the socket is closed."""
    os.dup2(2, 1)  # what programs print is for people
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends this process
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))
    sys.stderr.flush()
    os._exit(0)  # threads of plain functions may still be at work


async def _serve(connection: socket.socket) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MOST_THREADS))
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LONGEST_LINE)

    own = os.getpid()

    def say(**told: Any) -> None:
        if os.getpid() != own:  # a copy that the program forked and let return
            os._exit(0)
        writer.write(json.dumps(told).encode() + b"\n")

    try:
        program = Program(**json.loads(await reader.readline()))
    except BaseException as error:
        say(failed=_trace(error))
        await writer.drain()
        return
    say(ready=True)
    playing: dict[int, asyncio.Task[None]] = {}
    try:
        while line := await reader.readline():
            _take(json.loads(line), program, playing, say)
    except ConnectionError:
        pass  # the trainer is gone, or no longer listens
    for task in (left := list(playing.values())):
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await program.aclose()


def _take(
    told: dict[str, Any],
    program: Program,
    playing: dict[int, asyncio.Task[None]],
    say: Callable[..., None],
) -> None:
    """Begins an episode, or gives one up."""
    number = told["number"]
    if "episode" in told:
        playing[number] = asyncio.ensure_future(_play(program, number, Episode(**told["episode"]), say))
        playing[number].add_done_callback(partial(_forget, playing, number))
    elif number in playing:
        playing[number].cancel()


def _forget(playing: dict[int, asyncio.Task[None]], number: int, _: object) -> None:
    del playing[number]


async def _play(program: Program, number: int, episode: Episode, say: Callable[..., None]) -> None:
    try:
        result = await program.play(episode)
        say(number=number, result=result)
    except asyncio.CancelledError:
        say(number=number, cancelled=True)
    except BaseException as error:  # SystemExit as well: it ends the episode, not the process
        say(number=number, raised=_told(error)[:500], trace=_trace(error))


class Program:
    """A function that plays episodes, async or plain; or a class with `play`, and perhaps `aclose`."""

    def __init__(self, address: str, code: list[str], arguments: dict[str, Any]) -> None:
        sys.path[:0] = code
        module, _, name = address.partition(":")
        found = getattr(importlib.import_module(module), name)
        self._object: Any = None
        self._function: Any = partial(found, **arguments)
        if inspect.isclass(found):
            self._object = found(**arguments)
            self._function = self._object.play

    async def play(self, episode: Episode) -> Any:
        """What the program says came of the episode."""
        if inspect.iscoroutinefunction(self._function):
            return await self._function(episode)
        return await asyncio.get_running_loop().run_in_executor(None, self._function, episode)

    async def aclose(self) -> None:
        """Closes what it opened."""
        aclose: Callable[[], Any] | None = getattr(self._object, "aclose", None)
        if aclose is not None:
            await aclose()


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, whose message fails"


def _trace(error: BaseException) -> str:
    """The traceback, from the program's own frames on."""
    told = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in told.stack if not frame.filename.startswith("<frozen importlib")]
    while frames and frames[0].filename in (__file__, importlib.__file__):
        del frames[0]
    told.stack = traceback.StackSummary.from_list(frames)
    text = "".join(told.format()).rstrip()
    return text if len(text) <= _LONGEST_TRACE else text[:1000] + "\n  […]\n" + text[-3000:]


if __name__ == "__main__":
    main()
