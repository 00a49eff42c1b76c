"""The options of a SLURM job: which nodes do what."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from megatron_rapo.engines.kinds import KINDS
from megatron_rapo.section import PositiveInt, Section

# Options of sbatch that other options of the section say.
_OF_SBATCH = {
    **dict.fromkeys(["--time", "-t"], "time_limit"),
    **dict.fromkeys(["--partition", "-p"], "partition"),
    **dict.fromkeys(["--account", "-A"], "account"),
    **dict.fromkeys(["--nodes", "-N"], "trainer_nodes + engine_nodes"),
    "--gpus-per-node": "gpus_per_node",
    "--signal": "requeue_before_s",
}


KINDS_OF_JOBS = [name for name, kind in KINDS.items() if kind.bash is not None]


def seconds_of(time_limit: str) -> int:
    """The seconds of a time limit as sbatch takes it (its page: `--time`).

    Raises:
        ValueError: it is none, or has more minutes, seconds, or hours of a day than there are.
    """
    days, of_days, clock = time_limit.rpartition("-")
    words = clock.split(":")
    if len(words) > 3 or not all(
        word.isascii() and word.isdecimal() for word in [*words, days if of_days else "0"]
    ):
        raise ValueError("write minutes (90), HOURS:MINUTES:SECONDS (24:00:00) or DAYS-HOURS (2-12)")
    given = [int(word) for word in words]
    missing = 3 - len(given)
    if of_days:
        hours, minutes, seconds = [*given, *[0] * missing]
    else:
        hours, minutes, seconds = {2: [0, *given, 0], 1: [0, *given], 0: given}[missing]
    if seconds > 59 or (minutes > 59 and (of_days or missing == 0)) or (of_days and hours > 23):
        raise ValueError("has more than 59 seconds, 59 minutes of an hour, or 23 hours of a day")
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _as_text(value: Any) -> Any:
    """A number is a count of minutes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


TimeLimit = Annotated[str, BeforeValidator(_as_text)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Slurm(Section):
    """The job that `megatron-rapo train --slurm` submits; it sets `rollout.engine` to its engines."""

    partition: str | None = Field(None, description="Partition. Default: the cluster's.")
    account: str | None = Field(None, description="Account. Default: the user's.")
    time_limit: TimeLimit = Field(
        "24:00:00",
        description="Wall time of one allocation, as SLURM writes it: a number of minutes (`90`), "
        "`MINUTES:SECONDS`, `HOURS:MINUTES:SECONDS`, `DAYS-HOURS`, `DAYS-HOURS:MINUTES` or "
        "`DAYS-HOURS:MINUTES:SECONDS`. Before its end the job requeues itself, to go on from its newest "
        "checkpoint.",
    )
    requeue_before_s: PositiveInt = Field(
        120, description="Seconds before that end at which the job requeues itself."
    )
    trainer_nodes: PositiveInt = Field(1, description="Nodes of trainer ranks, the first of the allocation.")
    ranks_per_node: PositiveInt = Field(8, description="Trainer ranks of each of them, a GPU each.")
    gpus_per_node: int = Field(8, ge=0, description="GPUs of each node; 0: all compute on CPUs.")
    engine_nodes: int = Field(
        1,
        ge=0,
        description="Nodes for engines alone. 0: they run on the trainer's nodes, on GPUs after the ranks'.",
    )
    engine_ports: list[Port] = Field(
        [30000], min_length=1, description="Ports of each node with engines: one engine a port."
    )
    gpus_per_engine: PositiveInt = Field(8, description="GPUs of an engine, over which it shards its model.")
    master_port: Port = Field(29500, description="Port of the trainer's rendezvous, on its first node.")
    engine: str = Field("sglang", description=f"The engines' kind: {', '.join(KINDS_OF_JOBS)}.")
    engine_python: str | None = Field(
        None, description="Interpreter of the environment that engines run in. Default: this package's own."
    )
    engine_arguments: list[str] = Field([], description="Further arguments of each engine.")
    sbatch_arguments: list[str] = Field(
        [], description='Further options of the job, such as `"--qos=high"` or `"--constraint=h100"`.'
    )
    srun_arguments: list[str] = Field(
        [], description="Further options of each step, such as Pyxis' `--container-image=…`."
    )

    @property
    def ranks(self) -> int:
        """Trainer ranks of the job."""
        return self.trainer_nodes * self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.trainer_nodes + self.engine_nodes

    @property
    def engines(self) -> int:
        """Engines of the job."""
        return (self.engine_nodes or self.trainer_nodes) * len(self.engine_ports)

    def without_effect(self) -> dict[str, str]:
        return {"gpus_per_engine": "gpus_per_node is 0"} if self.gpus_per_node == 0 else {}

    @model_validator(mode="after")
    def _check(self) -> Slurm:
        if self.engine not in KINDS_OF_JOBS:
            raise ValueError(
                f"engine = {self.engine!r} is no kind that jobs start; choose one of "
                f"{', '.join(KINDS_OF_JOBS)}, or start engines yourself (docs/slurm.md)"
            )
        self._check_time()
        self._check_arguments()
        self._check_ports()
        if self.gpus_per_node > 0:
            self._check_gpus()
        return self

    def _check_time(self) -> None:
        try:
            limit = seconds_of(self.time_limit)
        except ValueError as error:
            raise ValueError(f"time_limit = {self.time_limit!r}: {error}") from None
        if limit <= self.requeue_before_s:
            raise ValueError(
                f"time_limit = {self.time_limit!r} is {limit} s, no more than requeue_before_s = "
                f"{self.requeue_before_s}: the job would requeue itself at once; raise it, or lower that"
            )

    def _check_arguments(self) -> None:
        for argument in self.sbatch_arguments:
            name = argument.partition("=")[0]
            if name in _OF_SBATCH:
                raise ValueError(
                    f"sbatch_arguments = {self.sbatch_arguments}: {name} is set by "
                    f"{_OF_SBATCH[name]}; set that"
                )

    def _check_ports(self) -> None:
        twice = {port for port in self.engine_ports if self.engine_ports.count(port) > 1}
        if twice:
            raise ValueError(
                f"engine_ports = {self.engine_ports} gives two engines of a node one port, {min(twice)}; "
                "give each its own"
            )
        if self.engine_nodes == 0 and self.master_port in self.engine_ports:
            raise ValueError(
                f"master_port = {self.master_port} is an engine's on the same node (engine_nodes = 0); "
                "choose another"
            )

    def _check_gpus(self) -> None:
        engines = len(self.engine_ports) * self.gpus_per_engine
        both = self.ranks_per_node + engines
        wanted = max(self.ranks_per_node, engines) if self.engine_nodes else both
        if wanted > self.gpus_per_node:
            raise ValueError(
                f"gpus_per_node = {self.gpus_per_node} cannot hold ranks_per_node = {self.ranks_per_node} "
                f"and {len(self.engine_ports)} engines of gpus_per_engine = {self.gpus_per_engine}"
                f"{'' if self.engine_nodes else ' beside them (engine_nodes = 0)'}; {wanted} are needed"
            )
