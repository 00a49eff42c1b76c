"""A checkpoint's files as they were saved, or not: looked at by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rapo.file_sums import Sums, damage, read_sums
from megatron_rapo.parallel.placement import Placement


def saved_sums(directory: Path, record: Mapping[str, Any]) -> Sums:
    """What its files were when it was saved.

    Args:
        directory: the checkpoint's.
        record: its run.json, where earlier versions kept them, first as bytes alone.

    Raises:
        DAMAGED: one of these (`file_sums`).
    """
    sums = read_sums(directory)
    if sums is not None:
        return sums
    return {n: {"bytes": own} if isinstance(own, int) else own for n, own in record["files"].items()}


def damage_to(directory: Path, saved: Sums, placement: Placement) -> str | None:
    """What is wrong with the files, on all ranks, which share the reading; None where they are as saved."""
    share = sorted(saved)[placement.rank :: placement.layout.world_size]
    mine = damage(directory, {name: saved[name] for name in share})
    return next((one for one in placement.share_from_all(mine) if one is not None), None)
