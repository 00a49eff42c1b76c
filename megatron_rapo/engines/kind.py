"""What a kind of engines is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.errors import RapoError

if TYPE_CHECKING:  # a wrong option is refused before any of it is loaded
    from megatron_rapo.engines.engine import Connect, ConnectRouter
    from megatron_rapo.engines.launching import Launcher


@dataclass(frozen=True)
class Served:
    """What servers of the run's own serve.

    Attributes:
        model_path: HF folder.
        dtype: of the weights.
        colocated: whether they give memory back while the trainer works.
    """

    model_path: Path
    dtype: str
    colocated: bool


class EngineKind(ABC):
    """How engines of a kind are started and spoken to.

    Attributes:
        Options: its section `[rollout.engine]`.
        bash: how a SLURM job starts a server (`launch/slurm.sh`): an array `command`, made of MODEL,
            ENGINE_PYTHON, GPUS_PER_ENGINE (0 where GPUS_PER_NODE is) and RAPO_ENGINE_API_KEY, without
            `--host` and `--port`. None: it starts none.
        takes_experts: whether it takes new weights of a mixture of experts.
        hides_experts: why it does not tell which experts its routers choose; None: it does.
        windows: families whose windows of attention it computes; None: all.
        options: this run's.
    """

    Options: ClassVar[type[EngineOptions]] = EngineOptions
    bash: ClassVar[str | None] = None
    takes_experts: ClassVar[bool] = True
    hides_experts: ClassVar[str | None] = "does not tell them"
    windows: ClassVar[frozenset[str] | None] = None

    def __init__(self, options: EngineOptions) -> None:
        self.options = options

    @property
    @abstractmethod
    def connect(self) -> Connect:
        """Makes what speaks to one engine."""

    @property
    def router(self) -> ConnectRouter | None:
        """Makes what speaks to the router through which prompts go; None where there is none."""
        return None

    def launcher(self, served: Served) -> Launcher:
        """How a server of the run's own is started.

        Raises:
            RapoError: this kind starts none.
        """
        raise RapoError(
            f'rollout.engine.kind = "{self.options.kind}" starts no servers; name running ones in '
            "rollout.engine.urls"
        )

    @classmethod
    def command(cls, python: str) -> list[str]:
        """What starts a server by hand, bar its model and address.

        Args:
            python: interpreter of the environment that it is installed in.

        Raises:
            RapoError: this kind does not say.
        """
        raise RapoError(f"{cls.__name__} does not say how its servers are started by hand")

    def problems(self) -> Iterator[str]:
        """Why this machine cannot start them, each as an error tells it."""
        yield from ()
