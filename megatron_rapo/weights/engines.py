"""What a transport needs of the engines; the rollout pool is it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_rapo.engines.engine import Engine

P = TypeVar("P")
T = TypeVar("T")


class Engines(Protocol):
    """The live engines, as one. A call that fails names the engine that failed it.

    Raises, from every call:
        EngineLost: an engine is gone, and has been taken out; the others can be served anew.
        RapoError: an engine refuses, or too few are left; there is no way on.
    """

    @property
    def urls(self) -> list[str]:
        """Addresses of the live engines."""

    @property
    def membership(self) -> int:
        """Another number once an engine has left or come: one that came back knows nothing of a group."""

    def tensor_parallel(self) -> list[int]:
        """Tensor-parallel size of each."""

    def take_slices(self) -> bool:
        """Whether each takes slices of tensors from several trainer ranks."""

    def begin_update(self) -> None:
        """Pauses generation and empties the cache of each, and opens its update."""

    def each(self, ask: Callable[[Engine, P], Coroutine[Any, Any, T]], parts: Sequence[P]) -> Future[list[T]]:
        """Asks each engine, all at once; the future has their answers.

        Args:
            ask: what is asked of one, given its part. It bounds its time: the future needs no limit of its
                own.
            parts: one for each of `urls`, in that order.
        """

    def end_update(self, weight_version: int) -> None:
        """Closes the update of each, lets it generate, and reads the version back."""

    def abandon_update(self) -> None:
        """After a failure: lets the live ones generate again, as far as they can."""

    def update_weights(self, model_path: Path, weight_version: int) -> None:
        """Has each load a HF model directory, a whole update of its own."""
