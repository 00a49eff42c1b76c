"""In which order a run meets its prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rapo.data.prompts import Prompt, PromptSet, TrainingPrompts


class PromptOrder:
    """An endless order of prompts that is a function of (seed, position) alone.

    Epoch after epoch holds every prompt exactly once: shuffled anew by (seed, epoch), or in the set's order.
    A draw that passes an epoch's end goes on in the next, so no prompt is ever left out.

    Attributes:
        position: prompts drawn so far. It is the whole state: a run that resumes with the same set, seed
            and position goes on as if it had never stopped.
    """

    def __init__(self, prompts: PromptSet, *, seed: int, shuffle: bool, position: int = 0) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self.position = position

    @property
    def size(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    @property
    def epoch(self) -> int:
        """Full passes over the set that lie behind `position`."""
        return self.position // len(self._prompts)

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, numbered as draws; advances `position`."""
        size = len(self._prompts)
        drawn: list[Prompt] = []
        while len(drawn) < count:
            start = self.position % size
            taken = self._epoch_order()[start : start + count - len(drawn)]
            drawn += [replace(self._prompts[place], draw=self.position + i) for i, place in enumerate(taken)]
            self.position += len(taken)
        return drawn

    def _epoch_order(self) -> list[int]:
        """The order `[len(prompts)]` of the epoch that `position` lies in."""
        size = len(self._prompts)
        if not self._shuffle:
            return list(range(size))
        # RandomState, not Generator: its streams are frozen, so that a run resumes under any NumPy.
        return np.random.RandomState([self._seed, self.epoch]).permutation(size).tolist()


class MixedOrder:
    """An endless order of prompts of several sources, each in an order of its own.

    It is a function of position alone. Any stretch has of each source what its share makes of the stretch's
    length, but for a prompt or two; no prompt comes again before all others of its source have come.

    Attributes:
        position: prompts drawn so far, as `PromptOrder` has it: the whole state.
    """

    def __init__(self, orders: Sequence[PromptOrder], shares: Sequence[float], position: int = 0) -> None:
        """
        Args:
            orders: of the sources.
            shares: of the prompts, which sum to 1.
            position: to begin at.
        """
        self._orders = orders
        self._shares = shares
        self.position = position

    @property
    def size(self) -> int:
        """Prompts that a stretch may have without one of them twice."""
        ends = (order.size / share for order, share in zip(self._orders, self._shares, strict=True))
        return max(1, math.floor(min(ends)))

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, numbered as draws; advances `position`."""
        sources, starts = mix(self._shares, self.position, count)
        for order, start in zip(self._orders, starts, strict=True):
            order.position = start
        drawn = [iter(order.draw(sources.count(place))) for place, order in enumerate(self._orders)]
        prompts = [replace(next(drawn[source]), draw=self.position + i) for i, source in enumerate(sources)]
        self.position += count
        return prompts


def order_of(prompts: TrainingPrompts, seed: int) -> PromptOrder | MixedOrder:
    """In which order a run of this seed meets its prompts."""
    orders = [
        PromptOrder(one, seed=seed, shuffle=shuffle)
        for one, shuffle in zip(prompts.sets, prompts.shuffled, strict=True)
    ]
    return orders[0] if len(orders) == 1 else MixedOrder(orders, prompts.shares)


def mix(shares: Sequence[float], start: int, count: int) -> tuple[list[int], list[int]]:
    """Which source each of the draws from `start` on is of, and how many draws of each lie before them.

    The j-th draw of a source with share s is due at the time (j + 1/2) / s, and draws come in the order of
    their times. At any time each source has had within half a draw of its share of that time.
    """
    sources = range(len(shares))
    # Of k sources, the draws before time t are t ± k/2 in all: so far off is a position from its time.
    margin = len(shares) / 2 + 1
    first = [max(0, math.floor(share * (start - margin) - 1)) for share in shares]
    last = [math.ceil(share * (start + count + margin) + 1) for share in shares]
    due = sorted(((j + 0.5) / shares[i], i) for i in sources for j in range(first[i], last[i]))
    before = [source for _, source in due[: start - sum(first)]]
    chosen = [source for _, source in due[len(before) : len(before) + count]]
    return chosen, [first[i] + before.count(i) for i in sources]
