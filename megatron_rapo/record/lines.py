"""Files of a run to which a start adds a line where something is not as at the one before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Line = TypeVar("Line", bound=DataclassInstance)


def read_lines(path: Path, kind: type[Line], *, of: str, remedy: str) -> list[Line]:
    """The lines of a file as objects of a dataclass, oldest first; none where there is no file.

    Args:
        path: of JSON lines.
        kind: the dataclass.
        of: what the file records, for errors.
        remedy: where it is damaged.

    Raises:
        RapoError: it is.
    """
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
        return [kind(**fields) for fields in found]
    except (ValueError, TypeError) as error:
        raise RapoError(f"{path} is no record of {of} ({error}); {remedy}") from error


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Writes the file anew; it appears whole or not at all."""
    write_whole(path, "".join(json.dumps(asdict(line)) + "\n" for line in lines))
