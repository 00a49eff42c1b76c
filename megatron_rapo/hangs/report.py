"""What is told of a hang: where all ranks are, who waits for whom, and the stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_rapo.hangs.collectives import Entered, holding_up, who_waits
from megatron_rapo.hangs.stacks import Where
from megatron_rapo.observe.heartbeat import describe as where_ranks_are
from megatron_rapo.observe.heartbeat import name_ranks


@dataclass(frozen=True)
class Hang:
    """What a rank found of itself: `seconds` in this phase, over `bound`."""

    rank: int
    step: int
    phase: str
    seconds: float
    bound: float
    why: str


def describe(
    hang: Hang, heard: Mapping[int, Sequence[Entered]], places: Sequence[Where | None], run_directory: Path
) -> str:
    """The report, for people.

    Args:
        hang: as it was found.
        heard: the collectives of each rank whose watch answered.
        places: each rank's process and stack.
        run_directory: has the heartbeats.
    """
    lines = [
        f"no progress: rank {hang.rank} has been in {hang.phase} of step {hang.step} for "
        f"{hang.seconds:.0f} s, over the bound of {hang.bound:.0f} s ({hang.why})",
        where_ranks_are(run_directory),
        *who_waits(heard),
        *_culprits(heard, places),
    ]
    return "\n".join([*lines, *_stacks(places)])


def _culprits(heard: Mapping[int, Sequence[Entered]], places: Sequence[Where | None]) -> list[str]:
    silent = [rank for rank in range(len(places)) if rank not in heard]
    lines = []
    if holding := holding_up(heard):
        lines.append(f"{name_ranks(holding)} hold{'' if len(holding) > 1 else 's'} up the others")
    for rank in silent:
        where = places[rank]
        state = where.state if where is not None else ""
        lines.append(f"rank {rank} does not answer{f': its process is {state}' if state else ''}")
    return lines


def _stacks(places: Sequence[Where | None]) -> list[str]:
    """Each stack once, under the ranks that have it."""
    known = [where for where in places if where is not None]
    ranked = sorted(known, key=lambda where: (where.stack, where.rank))
    lines = []
    for stack, alike in groupby(ranked, key=lambda where: where.stack):
        who = list(alike)
        at = ", ".join(f"{where.host} pid {where.pid}" for where in who[:4]) + (", …" if len(who) > 4 else "")
        ranks = name_ranks([where.rank for where in who])
        lines.append(f"the stack of {ranks} ({at}), innermost call first:")
        lines += [f"  {frame}" for frame in stack] or ["  none was written"]
    return lines
