"""The mark of a run that was simulated: RUN/simulated.json, which readers of a run's folder look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole

FILE = "simulated.json"


def mark_simulated(directory: Path, of: Mapping[str, Any]) -> None:
    """Marks a run's directory, with what it was simulated from."""
    write_whole(directory / FILE, json.dumps(of, indent=1) + "\n")


def is_simulated(directory: Path) -> bool:
    """Whether the run in this directory never ran."""
    return (directory / FILE).is_file()


def shown_name(directory: Path) -> str:
    """The run's name for people."""
    name = directory.resolve().name
    return f"{name} (simulated)" if is_simulated(directory) else name


def refuse_simulated(directory: Path, instead: str) -> None:
    """Refuses a simulated run where a real one is needed.

    Raises:
        RapoError: it is one.
    """
    if is_simulated(directory):
        raise RapoError(f"{directory} holds a simulated run ({FILE}), which never ran; {instead}")
