"""In which order a run meets its prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_rapo.data.prompts import Prompt, PromptSet


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
