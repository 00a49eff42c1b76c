"""What the bytes of a folder's files add up to: written beside them, compared before they are loaded."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_rapo.errors import RapoError

FILE = "checksums.json"
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading our own JSON raises then
_PIECE = 8 << 20  # bytes read at once

Sums = dict[str, dict[str, int]]
"""By file: `bytes`, and their `crc32`, which shows every single flipped bit."""


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


def write_sums(folder: Path, known: Sequence[Sums] = ()) -> None:
    """Writes FILE of all files in the folder: as they are `known` from who wrote some, or else read now.

    Raises:
        OSError: a file cannot be read, or FILE cannot be written.
    """
    sums = {name: own for share in known for name, own in share.items()}
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = {name: sums.get(name) or sum_of(path) for name, path in sorted(paths.items())}
    (folder / FILE).write_text(json.dumps(found, indent=1))


def read_sums(folder: Path) -> Sums | None:
    """What `write_sums` left; None where it left nothing.

    Raises:
        DAMAGED: one of these.
    """
    if not (folder / FILE).is_file():
        return None
    read = json.loads((folder / FILE).read_text())
    return {str(name): {"bytes": own["bytes"], "crc32": own["crc32"]} for name, own in read.items()}


def damage(folder: Path, saved: Mapping[str, Mapping[str, int]]) -> str | None:
    """What is wrong with these files of the folder, read side by side; None where they are as saved.

    Args:
        folder: where they are.
        saved: their sums, or bytes alone.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # neither reading nor summing holds the interpreter
        found = threads.map(lambda name: _damage(folder / name, saved[name]), saved)
        return next((one for one in found if one is not None), None)


def check(folder: Path, what: str) -> None:
    """Reads all files of a folder that has sums, and compares them; one without is taken as it is.

    Args:
        folder: of a model, or of a checkpoint.
        what: it is, for errors.

    Raises:
        RapoError: a file is not as it was written.
    """
    try:
        saved = read_sums(folder)
        found = None if saved is None else damage(folder, saved)
    except DAMAGED as error:
        found = f"{FILE} cannot be read ({error!r})"
    if found is not None:
        raise RapoError(
            f"{what} {folder} is damaged: {found}; copy or write it again, or remove {FILE} there if it was "
            "changed on purpose"
        )


def _damage(path: Path, wanted: Mapping[str, int]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path.name} has {size} of {wanted['bytes']} bytes"
        if "crc32" in wanted and sum_of(path)["crc32"] != wanted["crc32"]:
            return f"{path.name} has other contents than were saved (crc32)"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None
