"""All measurements, as a profile."""

from __future__ import annotations

import os
import platform
import tempfile
from datetime import date
from pathlib import Path

import psutil
import torch

from megatron_rapo.calibration import device as own
from megatron_rapo.calibration.engine import engine_rates, verifications_per_s
from megatron_rapo.calibration.ranks import Dtype, layer_and_link
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.planning.profile import Profile
from megatron_rapo.scaling.devices import own_device_name

GIB = 1 << 30


def calibrate(dtype: Dtype, folder: Path) -> Profile:
    """Measures this machine, in a minute or two.

    On a CPU a device is one core, whatever OMP_NUM_THREADS says. `folder` is on the disk that is measured.

    Raises:
        RapoError: a process that measures failed, or there are no two devices for a link between them.
    """
    cuda = torch.cuda.is_available()
    devices = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if cuda and devices < 2:
        raise RapoError(
            "megatron-rapo calibrate measures the link between two GPUs, and torch sees one; take a shipped "
            "profile (--profile h100, h200, b200)"
        )
    where = torch.device("cuda", 0) if cuda else torch.device("cpu")
    threads = torch.get_num_threads()
    if not cuda:
        torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="calibrate-") as scratch:
            layer_s, link = layer_and_link(dtype, Path(scratch))
            return Profile(
                device=own_device_name(),
                source=f"measured on {platform.node()}, {date.today()}, torch {torch.__version__}",
                dtype=dtype,
                devices_per_node=devices,
                memory_gib=_memory_gib(devices),
                memory_bytes_per_s=own.memory_bytes_per_s(where),
                matrix=own.matrix_rates(where, DTYPES[dtype]),
                attention=own.attention_rates(where, DTYPES[dtype]),
                layer_s=layer_s,
                step_s=0.0,
                within_node=link,
                between_nodes=link,
                engine=engine_rates(where, dtype, Path(scratch)),
                verifications_per_s=verifications_per_s(),
                disk_bytes_per_s=own.disk_bytes_per_s(Path(scratch)),
            )
    finally:
        torch.set_num_threads(threads)


def to_toml(profile: Profile) -> str:
    """The profile as a file."""
    notes = {
        "step_s": "not measured: what a run's step takes beside all phases of a plan may be put here",
        "between_nodes": "not measured: as within a node",
    }
    lines = []
    for key, value in profile.model_dump(mode="json").items():
        note = f" # {notes[key]}" if key in notes else ""
        lines.append(f"{key} = {toml_value(value)}{note}")
    return "\n".join(lines) + "\n"


def _memory_gib(devices: int) -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return psutil.virtual_memory().total / devices / GIB
