"""One engine: requests that wait, responses that decode together, and how far they are."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import simpy


@dataclass(eq=False)
class Request:
    """Responses that are asked for, and answered, together.

    Attributes:
        tokens: to be sampled, of each response.
        contexts: tokens that each begins with.
        prefilled: different contexts among them: a prompt is computed once for all its responses.
        number: for whoever asked.
        ends: when each response was sampled, in that order.
    """

    tokens: Sequence[int]
    contexts: Sequence[int]
    prefilled: int
    number: int = 0
    ends: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


class Rates(Protocol):
    """How fast an engine is."""

    def decode_s(self, batch: int, context: float) -> float:
        """Of a token of each of so many responses, which attend to so many in the mean."""

    def prefill_s(self, contexts: int, tokens: float) -> float:
        """Of so many contexts of so many tokens."""


@dataclass
class _State:
    """What an engine is at. `clock` counts the tokens that each running response got since it began."""

    clock: float = 0.0
    running: list[tuple[float, int, float, Request]] = field(default_factory=list)
    """A heap: the clock at the end, a serial number, the context less the clock at the beginning."""
    waiting: deque[tuple[int, int, int, Request]] = field(default_factory=deque)
    """Tokens, context, and place in the request."""
    contexts: float = 0.0
    """Sum over what is running, each less the clock at its beginning."""
    left: dict[Request, int] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(self.clock, list(self.running), self.waiting.copy(), self.contexts, dict(self.left))


class Engine:
    """Serves requests; those that come while it decodes join at the next token, where there is room.

    Attributes:
        name: as in a timeline.
        live: False from a failure to its return.
        requests: that it has, with when they came.
        slowness: how many times as long everything takes.
    """

    def __init__(
        self,
        world: simpy.Environment,
        name: str,
        rates: Rates,
        room: int,
        answered: Callable[[Engine, Request, float], None],
        *,
        one_at_a_time: bool,
    ) -> None:
        """
        Args:
            world: whose time it is.
            name: as in a timeline.
            rates: how fast it is.
            room: most responses that decode together.
            answered: is told of each request that is answered, and when it came.
            one_at_a_time: whether a request is served alone, as the embedded server does.
        """
        self.name, self.live, self.slowness = name, True, 1.0
        self.requests: dict[Request, float] = {}
        self._world, self._rates, self._room, self._answered = world, rates, room, answered
        self._one_at_a_time = one_at_a_time
        self._state = _State()
        self._arrived: list[Request] = []
        self._serial = 0
        self._wake = world.event()
        self._decoding = self._disturbed = False
        self._process = world.process(self._serve())

    def take(self, request: Request) -> None:
        """One more request."""
        self.requests[request] = self._world.now
        self._arrived.append(request)
        self._look()

    def fail(self) -> dict[Request, float]:
        """It is lost, with all that it had: these requests, and when they came."""
        lost = dict(self.requests)
        for request in lost:
            request.ends.clear()
        self.live = False
        self.requests.clear()
        self._arrived.clear()
        self._state = _State()
        self._look()
        return lost

    def _look(self) -> None:
        """Something has changed."""
        if self._decoding and not self._disturbed:
            self._disturbed = True
            self._process.interrupt()
        elif not self._decoding and not self._wake.triggered:
            self._wake.succeed()

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._admit_arrived()
            if not self._state.left:
                yield self._wake
                self._wake = self._world.event()
                continue
            before, began = self._state.copy(), self._world.now
            spent, answered = self._advance(math.inf, began)
            assert answered is not None
            self._decoding = True
            try:
                yield self._world.timeout(spent)
            except simpy.Interrupt:
                answered = self._undo(before, began) if self.requests else None  # None: it was lost
            self._decoding = self._disturbed = False
            if answered is not None:
                self._answer(answered)

    def _undo(self, before: _State, began: float) -> Request | None:
        """Goes back to `before`, and on to now; the request that is answered at this very moment."""
        for request in before.left:
            request.ends[:] = [end for end in request.ends if end <= began]
        self._state = before
        return self._advance(self._world.now - began, began)[1]

    def _answer(self, request: Request) -> None:
        begun = self.requests.pop(request)
        self._answered(self, request, begun)

    def _admit_arrived(self) -> None:
        for request in self._arrived:
            self._state.left[request] = len(request)
            each = enumerate(zip(request.tokens, request.contexts, strict=True))
            self._state.waiting.extend((*one, place, request) for place, one in each)
        self._arrived.clear()

    def _advance(self, limit: float, now: float) -> tuple[float, Request | None]:
        """Until a request is answered, or for `limit` seconds; the seconds, and that request."""
        state, spent = self._state, 0.0
        while True:
            if state.waiting:
                spent += self._begin_waiting()
            end, _, offset, request = state.running[0]
            batch, tokens = len(state.running), end - state.clock
            each = self.slowness * self._rates.decode_s(
                batch, state.contexts / batch + state.clock + tokens / 2
            )
            if spent + tokens * each > limit:
                state.clock += max(0.0, limit - spent) / each
                return limit, None
            spent += tokens * each
            heapq.heappop(state.running)
            state.clock = end
            state.contexts -= offset
            request.ends.append(now + spent)
            state.left[request] -= 1
            if not state.left[request]:
                del state.left[request]
                return spent, request

    def _begin_waiting(self) -> float:
        """What there is room for begins; the seconds that its contexts take."""
        state, spent = self._state, 0.0
        alone = self._one_at_a_time and bool(state.running)
        while state.waiting and not alone and len(state.running) < self._room:
            tokens, context, place, request = state.waiting.popleft()
            if place == 0:
                mean = sum(request.contexts) / len(request)
                spent += self.slowness * self._rates.prefill_s(request.prefilled, mean)
            self._serial += 1
            offset = context - state.clock
            heapq.heappush(state.running, (state.clock + tokens, self._serial, offset, request))
            state.contexts += offset
            alone = self._one_at_a_time and place == len(request) - 1
        return spent
