"""Gloo jobs for tests: several layouts in one launch, since starting ranks costs more than most cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rapo.config import Parallel
from megatron_rapo.launch.local import run_local

SHORT = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline_parallel",
    "cp": "context_parallel",
    "dp": "data_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
    "sp": "sequence_parallel",
}


def layout(name: str) -> Parallel:
    """The layout of a short name such as `tp2-pp2-sp`; data parallelism fills four ranks up."""
    options: dict[str, Any] = {}
    for part in name.split("-"):
        key = part.rstrip("0123456789")
        options[SHORT[key]] = int(part[len(key) :]) if part != key else True
    of_a_replica = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    options.setdefault("data_parallel", 4 // math.prod(options.get(each, 1) for each in of_a_replica))
    return Parallel(**options)


def run_job(function: Callable[..., None], *args: Any, directory: Path, world_size: int = 4) -> Any:
    """Runs `function(*args, report)` on every rank; returns what rank 0 wrote to `report` as JSON."""
    report = directory / "report.json"
    run_local(function, (*args, report), world_size)
    return json.loads(report.read_text())
