"""Where each rank is: a small file a rank, written at phase changes, so that a hang names its rank."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_rapo.folder import write_whole


class Heartbeat:
    """Writes `<run>/heartbeat/rank_00000.json`."""

    def __init__(self, run_directory: Path, rank: int, world_size: int) -> None:
        self._path = run_directory / "heartbeat" / f"rank_{rank:05d}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._who = {"rank": rank, "world_size": world_size, "host": socket.gethostname(), "pid": os.getpid()}

    def beat(self, step: int, phase: str) -> None:
        """This rank enters `phase` of `step` now. A reader sees this beat or the one before, never half."""
        beat = {**self._who, "step": step, "phase": phase, "since": time.time()}
        write_whole(self._path, json.dumps(beat))


def describe(run_directory: Path, now: float | None = None) -> str:
    """In which phase each rank is and for how long, those that are behind first; ranks alike share a line.

    It never raises: it is asked when something else already failed.

    Args:
        run_directory: `run.directory`.
        now: Unix time in seconds to measure from; default: the current time.
    """
    folder = run_directory / "heartbeat"
    beats, unreadable = _read(folder)
    if not beats:
        return "\n".join([f"no rank left a heartbeat in {folder}", *unreadable])
    # An earlier part of the run may have had more ranks: the newest beat knows how many there are.
    world_size = max(beats, key=lambda beat: beat["since"])["world_size"]
    beats = [beat for beat in beats if beat["rank"] < world_size]
    missing = sorted(set(range(world_size)) - {beat["rank"] for beat in beats})
    beats.sort(key=lambda beat: (beat["step"], beat["phase"], beat["rank"]))
    groups = [list(alike) for _, alike in groupby(beats, key=lambda beat: (beat["step"], beat["phase"]))]
    groups.sort(key=lambda alike: (alike[0]["step"], min(beat["since"] for beat in alike)))
    lines = [_line(alike, time.time() if now is None else now) for alike in groups]
    if missing:
        lines.insert(0, f"{name_ranks(missing)}: no heartbeat yet")
    return "\n  ".join([f"where the ranks are ({folder}):", *lines, *unreadable])


def where_is(run_directory: Path, rank: int) -> str:
    """Where this process is, which is the rank: `in step 3 (rollout)`."""
    beats, _ = _read(run_directory / "heartbeat")
    mine = [beat for beat in beats if beat["rank"] == rank and beat["pid"] == os.getpid()]
    return f"in step {mine[0]['step']} ({mine[0]['phase']})" if mine else "before the first step"


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The heartbeats, and a line for each file that is none."""
    beats, unreadable = [], []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            beats.append({name: beat[name] for name in _FIELDS})
        except (OSError, ValueError, TypeError, KeyError) as error:
            unreadable.append(f"{path.name}: unreadable ({error!r})")
    return beats, unreadable


_FIELDS = ("rank", "world_size", "host", "pid", "step", "phase", "since")


def _line(alike: list[dict[str, Any]], now: float) -> str:
    ages = [now - beat["since"] for beat in alike]
    shortest, longest = f"{min(ages):.0f}", f"{max(ages):.0f}"
    span = longest if shortest == longest else f"{shortest} to {longest}"
    first = alike[0]
    where = f" ({first['host']}, pid {first['pid']})" if len(alike) == 1 else ""
    ranks = name_ranks([beat["rank"] for beat in alike])
    return f"{ranks}: step {first['step']}, {first['phase']}, for {span} s{where}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    pairs = enumerate(sorted(ranks))
    runs = [[rank for _, rank in run] for _, run in groupby(pairs, key=lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
