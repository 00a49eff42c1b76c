"""The device that trainer ranks compute on."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from megatron_rapo.errors import RapoError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def device() -> torch.device:
    """This rank's compute device: its current CUDA device, or the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_device() -> None:
    """Gives each rank of a node a GPU of its own: number LOCAL_RANK, as torchrun and the launcher set it.

    Raises:
        RapoError: the node has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        raise RapoError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {devices}; start at most "
            f"{devices} ranks on it"
        )
    torch.cuda.set_device(local_rank)


def peak_memory() -> int:
    """Bytes: the most that this rank has had allocated on its GPU; on CPU, that its process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_peak_memory() -> int | None:
    """Bytes as `peak_memory`, but since this was last asked.

    On CPU the kernel keeps the most that the process has held (VmHWM), and begins anew when told to (proc(5),
    `clear_refs`); None where it does not, as on other systems than Linux.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def communication_backend() -> str:
    """The torch.distributed backend for that device; CPU tensors always travel over gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
