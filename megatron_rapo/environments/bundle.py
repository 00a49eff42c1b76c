"""What the episodes of a few prompts ask of the engines, sent together where that helps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rapo.environments.times import Times
from megatron_rapo.rollout.requests import Ask, Request, Sampling
from megatron_rapo.rollout.response import Response
from megatron_rapo.rollout.round import Round


@dataclass(eq=False)
class _Waiting:
    """A turn that is not sampled yet."""

    episode: int
    ask: Ask
    answer: asyncio.Future[Response]


class Bundle:
    """The episodes whose turns share requests.

    First turns go out as one request, so that an engine runs a prompt once for all its responses. Of engines
    that serve one request at a time, so do later ones: once every episode waits for a turn or has ended. Thus
    what shares a batch does not depend on time, and a run repeats bit for bit. Other engines batch what
    comes, when it comes; later turns go where first ones went, whose contexts that engine's prefix cache has.
    """

    def __init__(
        self, round_: Round, sampling: Sampling, episodes: int, *, gather_all: bool, times: Times
    ) -> None:
        """
        Args:
            round_: where requests go.
            sampling: of all turns.
            episodes: that are about to run, numbered from 0.
            gather_all: whether later turns are sent together as well.
            times: count the requests.
        """
        self._round = round_
        self._sampling = sampling
        self._running = set(range(episodes))
        self._waiting: list[_Waiting] = []
        self._gather_all = gather_all
        self._times = times
        self._first = True

    async def ask(self, episode: int, ask: Ask) -> Response:
        """The turn that an episode asked for.

        Raises:
            RapoError: as `Round.ask`.
        """
        if not self._first and not self._gather_all:
            [response] = await self._send([ask])
            return response
        waiting = _Waiting(episode, ask, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._send_if_all_wait()
        try:
            return await waiting.answer
        finally:
            if waiting in self._waiting:  # whoever asked gave up
                self._waiting.remove(waiting)

    def end(self, episode: int) -> None:
        """The episode asks no more."""
        self._running.discard(episode)
        self._send_if_all_wait()

    def _send_if_all_wait(self) -> None:
        if not self._waiting or self._running - {waiting.episode for waiting in self._waiting}:
            return
        together, self._waiting, self._first = self._waiting, [], False
        together.sort(key=lambda waiting: waiting.episode)  # stable: an episode's own in the order asked
        answers = asyncio.ensure_future(self._send([waiting.ask for waiting in together]))
        answers.add_done_callback(lambda done: _hand_out(done, together))

    async def _send(self, asks: Sequence[Ask]) -> list[Response]:
        with self._times.asking.one_more():
            request = Request(tuple(asks), self._sampling)
            return await asyncio.wrap_future(self._round.ask(request, None if self._gather_all else self))


def _hand_out(answers: asyncio.Future[list[Response]], together: Sequence[_Waiting]) -> None:
    """Gives each what is its own; all of them the error, where there is one."""
    error = asyncio.CancelledError() if answers.cancelled() else answers.exception()
    for number, waiting in enumerate(together):
        if waiting.answer.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            waiting.answer.cancel()
        elif error is not None:
            waiting.answer.set_exception(error)
        else:
            waiting.answer.set_result(answers.result()[number])
