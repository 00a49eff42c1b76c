"""How a batch comes about: what it wants sampled, round after round, each given what came of those before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.running import Tries
from megatron_rapo.experience.sharing import Shared

T = TypeVar("T")

Phase = Callable[[str], AbstractContextManager[None]]
"""Times what happens within it (`Observer.phase`)."""


@dataclass(frozen=True)
class Wanted:
    """One round.

    Attributes:
        prompts: the same on all ranks.
        tries: of each prompt, the episodes that are wanted; None: as many plain ones as are sampled of each.
    """

    prompts: Sequence[Prompt]
    tries: Sequence[Tries] | None = None


Course: TypeAlias = Generator[Wanted, Shared, T]
"""Yields what it wants, is sent what was sampled, and returns what comes of it."""


class Sampled(Protocol):
    """A round that has begun.

    Attributes:
        weight_version: of the weights that sample what is still missing.
    """

    @property
    def weight_version(self) -> int: ...

    def finish(self, phase: Phase, now: int) -> Shared:
        """Waits for it; all ranks call it.

        Args:
            phase: times sampling (`rollout`), and what verifying takes after it (`reward`).
            now: the version of the policy's weights, with which is sampled what lost engines leave open.
        """

    def give_up(self) -> None:
        """Ends what is under way here."""


@dataclass(frozen=True)
class Known:
    """A round that nobody samples (`Sampled`): `read` has its groups."""

    weight_version: int
    read: Callable[[Phase], Shared]

    def finish(self, phase: Phase, now: int) -> Shared:
        """Its groups, at once."""
        return self.read(phase)

    def give_up(self) -> None:
        """Nothing is under way."""


def follow(course: Course[T], sample: Callable[[Wanted], Shared], found: Shared | None = None) -> T:
    """Takes a course to its end.

    Args:
        course: not begun; or, with `found`, at its first round.
        sample: a round.
        found: what came of the first.
    """
    while True:
        try:
            wanted = next(course) if found is None else course.send(found)
        except StopIteration as ended:
            result: T = ended.value
            return result
        found = sample(wanted)
