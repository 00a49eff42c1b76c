"""Options of the processes in which an environment's functions run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rapo.section import PositiveFloat, PositiveInt, Seconds, Section
from megatron_rapo.tools.plan import Limits


class ProcessOptions(Section):
    """What functions may take and touch."""

    call_time_limit_s: Seconds = Field(10.0, description="Seconds that a call may take.")
    cpu_limit_s: PositiveInt = Field(
        60, description="Seconds of CPU that a function which keeps its state may take in an episode."
    )
    memory_limit_gib: PositiveFloat = Field(1.0, description="Address space of a process.")
    output_characters: PositiveInt = Field(4000, description="Of a result; the rest is cut off.")
    file_limit_mib: PositiveInt = Field(64, description="Of a file, and of all that a process keeps on disk.")
    workers: PositiveInt = Field(4, description="Processes of each head for functions without state.")
    allow: list[Literal["network", "processes", "files"]] = Field(
        [], description="What your own functions may do besides: by default none of it."
    )

    @property
    def limits(self) -> Limits:
        """As processes are told."""
        return Limits(
            call_s=self.call_time_limit_s,
            cpu_s=self.cpu_limit_s,
            memory_gib=self.memory_limit_gib,
            output_characters=self.output_characters,
            file_mib=self.file_limit_mib,
            network="network" in self.allow,
            processes="processes" in self.allow,
            files="files" in self.allow,
        )
