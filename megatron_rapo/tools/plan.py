"""What a tool's process is told when it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_rapo.processes.confine import Confinement


@dataclass(frozen=True)
class Limits:
    """Of each process and call.

    Attributes:
        call_s: seconds of the wall clock that a call may take.
        cpu_s: seconds of CPU that a process which keeps its state may take in all.
        memory_gib: address space of a process.
        output_characters: of a result that is a text; the rest is cut off.
        file_mib: the size of a file that is written, and of all that a process keeps on disk.
        network: whether functions may open sockets.
        processes: whether they may start processes.
        files: whether they may read and write any file that the user may.
    """

    call_s: float = 10.0
    cpu_s: int = 60
    memory_gib: float = 1.0
    output_characters: int = 4000
    file_mib: int = 64
    network: bool = False
    processes: bool = False
    files: bool = False


@dataclass(frozen=True)
class Plan:
    """Which functions a process serves, and what it may do.

    Attributes:
        functions: addresses by the name that calls use.
        code: folders with the user's own modules.
        keeps_state: whether it is of one episode; its CPU time is limited then.
        runs_code: whether it runs what the policy writes: no limit is lifted for it, its environment is
            clean, and it reads Python and installed packages alone.
    """

    functions: Mapping[str, str]
    limits: Limits = field(default_factory=Limits)
    code: Sequence[Path] = ()
    keeps_state: bool = False
    runs_code: bool = False

    def confinement(self, folder: Path) -> Confinement:
        """What the process may touch, whose own folder this is."""
        limits, own = self.limits, not self.runs_code
        return Confinement(
            folder,
            readable=[*self.code, *map(Path, sys.path)] if own else (),
            network=limits.network and own,
            processes=limits.processes and own,
            files=limits.files and own,
            file_bytes=limits.file_mib * 2**20,
            cpu_s=limits.cpu_s if self.keeps_state else None,
        )

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote."""
        values = json.loads(text)
        values["limits"] = Limits(**values["limits"])
        values["code"] = [Path(folder) for folder in values["code"]]
        return cls(**values)
