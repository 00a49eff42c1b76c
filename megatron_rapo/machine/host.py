"""What a machine lends to processes: memory, disk, open files, ports, and the means to confine a tool."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_rapo.machine.finding import Finding
from megatron_rapo.processes.confine import Confinement, lacking

OPEN_FILES = 4096  # connections to engines, workers' pipes and shards of checkpoints, with room
SHARED_MEMORY = Path("/dev/shm")
GIB = 1 << 30


def host(directory: Path, weights: int, checkpoint: int, kept: int) -> Iterator[Finding]:
    """What this machine has.

    Args:
        directory: where a run would write.
        weights: bytes of the policy's weights, as they go to engines; 0 where no run is meant.
        checkpoint: bytes of one checkpoint.
        kept: checkpoints that the run keeps.
    """
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB are free"
    yield Finding("CPU and memory", "ok", f"{cores} cores, {free}")
    yield _space(
        "disk",
        _existing(directory),
        (kept + 1) * checkpoint,
        "checkpoints: free some, or lower checkpoint.keep",
    )
    yield _space(
        "shared memory",
        SHARED_MEMORY,
        weights,
        'weights to engines on this machine (weights.transport = "tensor" and '
        '"shard"): enlarge it (docker run --shm-size), or take "disk" or "distributed"',
    )
    yield _open_files()
    yield _ports()
    yield _confinement(directory)


def _space(name: str, place: Path, wanted: int, what_for: str) -> Finding:
    free = shutil.disk_usage(place).free
    found = f"{_size(free)} are free in {place}"
    if not os.access(place, os.W_OK):
        return Finding(
            name, "wrong", f"{place} takes no files", "choose another run.directory, or mend its rights"
        )
    if free < wanted:
        return Finding(name, "wrong", found, f"{_size(wanted)} are needed for {what_for}")
    return Finding(name, "ok", found + (f", {_size(wanted)} are needed" if wanted else ""))


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"


def _existing(directory: Path) -> Path:
    """It, or the first folder above it that is there."""
    return next(one for one in (directory.absolute(), *directory.absolute().parents) if one.is_dir())


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} a process ({hard} at most)"
    if soft >= OPEN_FILES:
        return Finding("open files", "ok", found)
    remedy = f"large runs have thousands of connections: ulimit -n {min(hard, 65536)}"
    return Finding("open files", "wrong" if soft < 1024 else "absent", found, remedy)


def _ports() -> Finding:
    """One that the kernel chooses, on loopback, which engines and rendezvous of one machine have."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return Finding("loopback", "ok", f"port {port} took a connection")
    except OSError as error:
        remedy = "engines and ranks of one machine meet there: ip link set lo up"
        return Finding("loopback", "wrong", f"no connection: {error.strerror}", remedy)


def _confinement(directory: Path) -> Finding:
    missing = lacking(Confinement(folder=directory))
    if not missing:
        return Finding("confinement", "ok", "tools can be kept from network, files and other processes")
    without = (
        "tools and users' functions run with your own rights only where environment.options.allow says so"
    )
    return Finding("confinement", "absent", f"the kernel has no {' and no '.join(missing)}", without)
