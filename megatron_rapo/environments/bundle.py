"""What the episodes of a few prompts ask of the engines, sent together where that helps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_rapo.environments.times import Times
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.requests import Ask, Request, Sampling
from megatron_rapo.rollout.response import Response
from megatron_rapo.rollout.round import Round


@dataclass(frozen=True)
class Window:
    """A time in which engines sample with one version of the weights.

    Attributes:
        round: where requests go.
        sampling: of all of them.
        times: count them.
    """

    round: Round
    sampling: Sampling
    times: Times


@dataclass(eq=False)
class _Waiting:
    """A turn, or what is left of it, that is not sampled yet."""

    episode: int
    ask: Ask
    answer: asyncio.Future[Response]
    most: int = 0  # tokens of it that were asked for at once


class Bundle:
    """The episodes whose turns share requests.

    First turns go out as one request, so that an engine runs a prompt once for all its responses. Of engines
    that serve one request at a time, so do later ones: once every episode waits for a turn or has ended. Thus
    what shares a batch does not depend on time, and a run repeats bit for bit. Other engines batch what
    comes, when it comes; later turns go where first ones went, whose contexts that engine's prefix cache has.

    A bundle that goes on over several windows is at rest at the end of each: its episodes have ended, or have
    had as many tokens as they may have of that version. What goes on in the next window is a first turn
    there, since engines empty their caches in between.
    """

    def __init__(self, *, gather_all: bool, goes_on: bool = False) -> None:
        """
        Args:
            gather_all: whether later turns are sent together as well.
            goes_on: whether a turn waits for the next window where too few engines are left; default: it
                fails.
        """
        self._gather_all = gather_all
        self._goes_on = goes_on
        self._window: Window | None = None
        self._admitted = 0
        self._running: set[int] = set()
        self._left: dict[int, int] = {}  # tokens that an episode may have in this window; absent: any number
        self._waiting: list[_Waiting] = []
        self._under_way = 0
        self._first = True
        self._lost = False
        self._at_rest = asyncio.Event()

    def admit(self, episodes: int) -> range:
        """So many more are about to run; their numbers."""
        numbers = range(self._admitted, self._admitted + episodes)
        self._admitted = numbers.stop
        self._running.update(numbers)
        return numbers

    def open(self, window: Window, limits: Mapping[int, int] | None = None) -> None:
        """Has the window sample what is asked, and what waits.

        Args:
            window: that begins.
            limits: most tokens of an episode in it; absent: any number. None: what the last one left.
        """
        self._window, self._first, self._lost = window, True, False
        if limits is not None:
            self._left = dict(limits)
        self._at_rest.clear()
        self._look()

    async def until_at_rest(self) -> bool:
        """Ends the window once nothing of it is under way; whether it lost too many engines before."""
        await self._at_rest.wait()
        self._window = None
        return self._lost

    async def ask(self, episode: int, ask: Ask, pieces: list[Response]) -> None:
        """Has the turn that an episode asked for sampled.

        Args:
            episode: its number.
            ask: the whole turn.
            pieces: what there is of it, to which the rest is appended: a piece of each window.

        Raises:
            RapoError: as `Round.ask`.
        """
        for piece in pieces:
            ask = ask.after(piece)
        whole = bool(pieces) and (pieces[-1].finish_reason == "stop" or not ask.max_tokens)
        while not whole:
            piece, most = await self._piece(episode, ask)
            pieces.append(piece)
            # One of fewer tokens than were asked for has ended, for whatever reason.
            whole = piece.finish_reason == "stop" or len(piece.token_ids) < most or most == ask.max_tokens
            ask = ask.after(piece)

    def end(self, episode: int) -> None:
        """The episode asks no more."""
        self._running.discard(episode)
        self._look()

    async def _piece(self, episode: int, ask: Ask) -> tuple[Response, int]:
        """As much of a turn as its window may sample, and the tokens that were asked for."""
        waiting = _Waiting(episode, ask, asyncio.get_running_loop().create_future())
        sent: asyncio.Task[list[Response]] | None = None
        if not self._first and not self._gather_all and self._may_have_more(episode):
            sent = self._send([waiting])
        else:
            self._waiting.append(waiting)
            self._look()
        try:
            return await waiting.answer, waiting.most
        finally:  # whoever asked may have given up
            if sent is not None:
                sent.cancel()
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _may_have_more(self, episode: int) -> bool:
        return self._window is not None and not self._lost and self._left.get(episode, 1) > 0

    def _look(self) -> None:
        """Once every episode waits or has ended: sends what this window may sample, or is at rest."""
        if self._window is None or self._running - {waiting.episode for waiting in self._waiting}:
            return
        together = [waiting for waiting in self._waiting if self._may_have_more(waiting.episode)]
        if together:
            self._waiting = [waiting for waiting in self._waiting if waiting not in together]
            self._first = False
            together.sort(key=lambda waiting: waiting.episode)  # stable: an episode's own in the order asked
            self._send(together)
        elif not self._under_way:
            self._at_rest.set()

    def _send(self, together: Sequence[_Waiting]) -> asyncio.Task[list[Response]]:
        assert self._window is not None
        for one in together:
            one.most = min(one.ask.max_tokens, self._left.get(one.episode, one.ask.max_tokens))
        asks = [replace(one.ask, max_tokens=one.most) for one in together]
        self._under_way += 1
        answers = asyncio.ensure_future(self._answers(self._window, asks))
        answers.add_done_callback(lambda done: self._hand_out(done, together))
        return answers

    async def _answers(self, window: Window, asks: Iterable[Ask]) -> list[Response]:
        with window.times.asking.one_more():
            request = Request(tuple(asks), window.sampling)
            return await asyncio.wrap_future(window.round.ask(request, None if self._gather_all else self))

    def _hand_out(self, answers: asyncio.Task[list[Response]], together: Sequence[_Waiting]) -> None:
        """Gives each what is its own; all of them the error, where there is one."""
        self._under_way -= 1
        error = asyncio.CancelledError() if answers.cancelled() else answers.exception()
        still = [(number, one) for number, one in enumerate(together) if not one.answer.done()]
        if self._goes_on and isinstance(error, TooFewEngines):
            self._lost = True
            self._waiting += [one for _, one in still]
        else:
            for number, one in still:
                if isinstance(error, asyncio.CancelledError):
                    one.answer.cancel()
                elif error is not None:
                    one.answer.set_exception(error)
                else:
                    response = answers.result()[number]
                    if one.episode in self._left:
                        self._left[one.episode] -= len(response.token_ids)
                    one.answer.set_result(response)
        self._look()
