"""Where a conversion writes: checked before, and there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import locked

RESERVE = 64 << 20  # bytes for what comes beside the weights: tokenizer, index


@contextmanager
def new_directory(path: Path, expected_bytes: int) -> Iterator[Path]:
    """A folder beside `path` to write into, which becomes `path` when the block ends without an error.

    Raises:
        RapoError: `path` is taken or cannot be written to, or another process is making it, or its disk is
            too small, as far as can be told before; or the disk became full meanwhile. Nothing is left of it.
    """
    path = path.absolute()
    _check(path, expected_bytes)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), str(path)):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RapoError(
            f"{path} cannot be written: {error.strerror or error}; free space or choose another place"
        ) from error


def _check(path: Path, expected_bytes: int) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RapoError(f"{path} exists already; remove it, or choose another place")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RapoError(f"{path} cannot be written: {parent} takes no files; choose another place")
    free = shutil.disk_usage(parent).free
    if free < expected_bytes + RESERVE:
        raise RapoError(
            f"{path} needs {expected_bytes / 2**30:.2f} GiB, its disk has {free / 2**30:.2f} GiB free; "
            "make room or choose another place"
        )
