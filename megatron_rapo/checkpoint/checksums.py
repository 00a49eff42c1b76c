"""The bytes of a checkpoint's files: summed up as they are saved, compared before they are loaded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.parallel.placement import Placement

_PIECE = 8 << 20  # bytes read at once

Sums = dict[str, dict[str, int]]
"""By file: `bytes`, and their `crc32`, which shows every single flipped bit."""


def sums_of(directory: Path, known: Sequence[Sums]) -> Sums:
    """Of all files in the folder: as they are `known` from each rank that wrote some, or else read now.

    Raises:
        OSError: a file cannot be read.
    """
    of_ranks = {name: sums for share in known for name, sums in share.items()}
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return {name: of_ranks.get(name) or sum_of(path) for name, path in sorted(paths.items())}


def damage_to(directory: Path, saved: Mapping[str, Any], placement: Placement) -> str | None:
    """What is wrong with the files, on all ranks, which share the reading; None where they are as saved.

    Args:
        directory: the checkpoint's.
        saved: what `sums_of` said when it was saved, or bytes alone, as earlier versions kept them.
        placement: this rank's.
    """
    found = (_damage(directory / name, saved[name]) for name in _share(sorted(saved), placement))
    mine = next((one for one in found if one is not None), None)
    return next((one for one in placement.share_from_all(mine) if one is not None), None)


def _share(names: list[str], placement: Placement) -> list[str]:
    return names[placement.rank :: placement.layout.world_size]


def _damage(path: Path, saved: Mapping[str, int] | int) -> str | None:
    wanted = {"bytes": saved} if isinstance(saved, int) else saved
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path.name} has {size} of {wanted['bytes']} bytes"
        if "crc32" in wanted and sum_of(path)["crc32"] != wanted["crc32"]:
            return f"{path.name} has other contents than were saved (crc32)"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def sum_of(path: Path) -> dict[str, int]:
    """Of a file.

    Raises:
        OSError: it cannot be read.
    """
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return {"bytes": size, "crc32": crc}
