"""A rank's place in the job, as the launcher (`run_local` or torchrun) tells it through the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rapo.errors import RapoError

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_NAMES = (*_NUMBERS, "MASTER_ADDR")


@dataclass(frozen=True)
class RankEnvironment:
    """Torchrun's variables, typed.

    Attributes:
        rank: 0 to world_size − 1 over all machines.
        local_rank: 0 to local_world_size − 1 on this machine; the GPU to use.
        world_size: ranks of the whole job.
        local_world_size: ranks on this machine.
        master_address: host of the rendezvous store.
        master_port: its port.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
        """This process's place, or None where no launcher started it (neither RANK nor WORLD_SIZE is set).

        Raises:
            RapoError: some variables are missing, are no numbers, or contradict each other.
        """
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return None
        missing = [name for name in _NAMES if not environ.get(name)]
        if missing:
            raise RapoError(
                f"the environment has RANK or WORLD_SIZE but lacks {', '.join(missing)}; start with "
                "torchrun, or unset RANK and WORLD_SIZE"
            )
        for name in _NUMBERS:
            if not environ[name].isdecimal():
                raise RapoError(
                    f"the environment's {name}={environ[name]!r} is no number; start with torchrun"
                )
        place = cls(
            rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
            master_address=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
        )
        for index, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
            if int(environ[index]) >= int(environ[size]):
                raise RapoError(
                    f"the environment's {index}={environ[index]} is not below {size}={environ[size]}; "
                    "start with torchrun"
                )
        return place

    def variables(self) -> dict[str, str]:
        """The environment that `read` understands."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }

    def check_world_size(self, expected: int) -> None:
        """Refuses a job that has more or fewer ranks than the configured layout.

        Raises:
            RapoError: `world_size` is not `expected`.
        """
        if self.world_size != expected:
            raise RapoError(
                f"WORLD_SIZE={self.world_size} ranks were started, but [parallel] lays out {expected} "
                f"(TP × PP × CP × DP); start {expected}, or change [parallel]"
            )
