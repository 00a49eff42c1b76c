"""What two runs computed, and where it differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet


def contents(directory: Path) -> dict[str, Any]:
    """What a run computed, by name: comparable with `==`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {f"metrics of step {line['step']}": _lasting(line) for line in lines}
    for path in sorted((directory / "model").iterdir()):
        found[f"model/{path.name}"] = path.read_bytes()
    for folder in ("samples", "evaluations"):
        for path in sorted((directory / folder).rglob("*.parquet")):
            found[str(path.relative_to(directory))] = pyarrow.parquet.read_table(path).to_pylist()
    *_, last = sorted((directory / "checkpoints").glob("step_*"))
    found["last checkpoint"] = json.loads((last / "run.json").read_text())["state"]
    for path in sorted(last.glob("*.distcp")):
        found[f"{last.name}/{path.name}"] = path.read_bytes()
    return found


def _lasting(line: dict[str, Any]) -> dict[str, Any]:
    """Without what is of time, of memory, and of engines that were lost and came back."""
    passing = ("time", "throughput/", "memory/", "engines/", "publish/send_s", "compute/update_tflop_per_s")
    return {name: value for name, value in line.items() if not name.startswith(passing)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    return sorted(
        name for name in one.keys() | other.keys() if _text(one.get(name)) != _text(other.get(name))
    )


def _text(value: Any) -> Any:
    return value if isinstance(value, bytes) else json.dumps(value, default=str, sort_keys=True)
