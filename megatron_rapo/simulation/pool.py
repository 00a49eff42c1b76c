"""The engines of a simulated run: who gets which request, who fails, and who comes back.

As `rollout/dispatch.py` and `rollout/pool.py` have it: a request goes to the live engine with the fewest
responses to make, that of a lost one to another, and lost ones come back where weights are published.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simpy

from megatron_rapo.errors import RapoError
from megatron_rapo.simulation.conditions import Conditions
from megatron_rapo.simulation.engine import Engine, Rates, Request

Note = Callable[[str, float, float, int], None]
"""As `rollout.pool.NoteRequest`."""


class Round:
    """Requests that were sent together.

    Attributes:
        begun: when.
        over: an event: all are answered, or so many engines were lost that the others will not be.
        missing: of the latter, once it is over.
        resent: those that were sent again, as their engine was lost.
    """

    def __init__(self, world: simpy.Environment, requests: Sequence[Request]) -> None:
        self.begun = world.now
        self.over = world.event()
        self.missing: list[Request] = []
        self.resent = 0
        self.waiting = deque(requests)
        self.under_way = 0

    def look(self) -> None:
        """Whether it is over."""
        if not self.under_way and not self.waiting and not self.over.triggered:
            self.over.succeed()


class Pool:
    """All engines. One round is under way at a time.

    Attributes:
        returned: engines that were lost and came back, so far.
        resent: requests that were sent again, so far.
    """

    def __init__(
        self,
        world: simpy.Environment,
        names: Sequence[str],
        rates: Rates,
        room: int,
        conditions: Conditions,
        note: Note,
        *,
        one_at_a_time: bool,
        most_requests: int,
        minimum: int,
        restarts: int,
    ) -> None:
        """
        Args:
            world: whose time it is.
            names: of the engines.
            rates: how fast they are.
            room: most responses that decode together in one.
            conditions: stragglers and failures.
            note: is told of each request that has ended.
            one_at_a_time: `Engine`.
            most_requests: under way at an engine.
            minimum: with fewer live engines nothing more is sent (`rollout.minimum_engines`).
            restarts: of each engine (`rollout.restarts`).
        """
        self.returned = self.resent = 0
        self._world, self._conditions, self._note = world, conditions, note
        self._most_requests, self._minimum = most_requests, minimum
        self._random = np.random.default_rng([conditions.seed, 1])
        self._engines = [
            Engine(world, name, rates, room, self._answered, one_at_a_time=one_at_a_time) for name in names
        ]
        self._restarts = dict.fromkeys(self._engines, restarts)
        self._ready: dict[Engine, float] = {}  # when each that restarts can take weights
        self._round: Round | None = None
        if conditions.engine_mtbf_s is not None:
            for engine in self._engines:
                world.process(self._failures(engine, conditions.engine_mtbf_s))

    @property
    def live(self) -> list[Engine]:
        """Those that take requests, and weights."""
        return [engine for engine in self._engines if engine.live]

    @property
    def size(self) -> int:
        """Engines of the start."""
        return len(self._engines)

    def begin(self, requests: Sequence[Request]) -> Round:
        """Sends requests; which is over at once where there are none."""
        self._draw_stragglers()
        self._round = Round(self._world, requests)
        self._send(self.live)
        return self._round

    def revive(self) -> None:
        """Where weights are published: lost engines restart, and those that have are back.

        Where too few are live, it waits for as many as are needed.

        Raises:
            RapoError: they cannot come back, as a run would end by.
        """
        for engine in self._engines:
            if not engine.live and engine not in self._ready and self._restarts[engine]:
                self._restarts[engine] -= 1
                self._ready[engine] = self._world.now + self._conditions.engine_restart_s
        needed = self._minimum - len(self.live)
        if needed > len(self._ready):
            raise RapoError(
                f"the simulated run ends after {self._world.now:,.0f} s, as too few engines are left: "
                f"{len(self.live)} of {self.size}, rollout.minimum_engines is {self._minimum}, and each came "
                "back as often as rollout.restarts allows; raise that, or --engine-mtbf"
            )
        if needed > 0 and (latest := sorted(self._ready.values())[needed - 1]) > self._world.now:
            self._world.run(until=latest)
        for engine in [one for one, ready in self._ready.items() if ready <= self._world.now]:
            del self._ready[engine]
            engine.live = True
            self.returned += 1

    def _draw_stragglers(self) -> None:
        share = self._conditions.stragglers
        if not share:
            return
        slow = self._random.random(len(self._engines)) < share
        for engine, is_slow in zip(self._engines, slow, strict=True):
            engine.slowness = self._conditions.straggler_factor if is_slow else 1.0

    def _failures(self, engine: Engine, mean_s: float) -> Generator[simpy.Event, Any, None]:
        while True:
            yield self._world.timeout(self._random.exponential(mean_s))
            if engine.live:
                self._lose(engine)

    def _lose(self, engine: Engine) -> None:
        lost = engine.fail()
        for request, begun in lost.items():
            self._note(engine.name, begun, self._world.now, len(request))
        if self._round is None:
            return
        self._round.under_way -= len(lost)
        self._round.waiting.extendleft(reversed(lost))
        self._round.resent += len(lost)
        self.resent += len(lost)
        self._send(self.live)

    def _answered(self, engine: Engine, request: Request, begun: float) -> None:
        self._note(engine.name, begun, self._world.now, len(request))
        assert self._round is not None
        self._round.under_way -= 1
        self._send([engine])

    def _send(self, engines: Sequence[Engine]) -> None:
        """Gives what waits to these of the live engines, as far as they may have more."""
        found = self._round
        assert found is not None
        if found.waiting and len(self.live) < self._minimum:
            found.missing += found.waiting
            found.waiting.clear()
        if found.waiting:
            places = {id(engine): place for place, engine in enumerate(engines)}
            load = [
                (sum(map(len, one.requests)), places[id(one)])
                for one in engines
                if len(one.requests) < self._most_requests
            ]
            heapq.heapify(load)
            while found.waiting and load:
                responses, place = heapq.heappop(load)
                request = found.waiting.popleft()
                engines[place].take(request)
                found.under_way += 1
                if len(engines[place].requests) < self._most_requests:
                    heapq.heappush(load, (responses + len(request), place))
        found.look()
