"""A rank's place in the job, as the launcher (`run_local`, torchrun or srun) tells it in the environment."""

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
        """This process's place, or None where no launcher started it.

        Torchrun's variables are read where RANK or WORLD_SIZE is set, else srun's in a step of several tasks;
        MASTER_ADDR and MASTER_PORT, which srun does not set, must then be in the environment. A batch script
        and a step of one task (an interactive shell) are no ranks.

        Raises:
            RapoError: some variables are missing, are no numbers, or contradict each other.
        """
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls._read_srun(environ)
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

    @classmethod
    def _read_srun(cls, environ: Mapping[str, str]) -> RankEnvironment | None:
        tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if "SLURM_STEP_ID" not in environ or tasks == "1":
            return None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise RapoError(
                f"srun started {tasks} tasks, but the environment lacks {', '.join(missing)}; export the "
                "first node's address and a free port of it, or start with `megatron-rapo train --slurm`"
            )
        return cls.read(
            {
                "RANK": environ["SLURM_PROCID"],
                "LOCAL_RANK": environ["SLURM_LOCALID"],
                "WORLD_SIZE": tasks,
                "LOCAL_WORLD_SIZE": _tasks_of_node(environ),
                "MASTER_ADDR": environ["MASTER_ADDR"],
                "MASTER_PORT": environ["MASTER_PORT"],
            }
        )

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


def _tasks_of_node(environ: Mapping[str, str]) -> str:
    """Tasks of this node, from srun's `2(x3),1`: three nodes of two tasks, one of one."""
    counts: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, repeated = part.partition("(x")
        counts += [count] * int(repeated.rstrip(")") or 1)
    return counts[int(environ["SLURM_NODEID"])]
