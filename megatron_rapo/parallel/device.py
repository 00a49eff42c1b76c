"""The device that trainer ranks compute on, and the adapter that lets Megatron-Core run without CUDA.

Where CUDA is present `install_cpu_adapter` does nothing. Elsewhere Megatron-Core 0.16 still asks for CUDA in
a few places (device strings, generator states, tensor type names); the adapter answers them with the CPU.
It changes where tensors live, never what is computed.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_rapo.errors import RapoError


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


def communication_backend() -> str:
    """The torch.distributed backend for that device; CPU tensors always travel over gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaAsCpu(TorchFunctionMode):
    """Turns requests for CUDA tensors into CPU tensors (about 1.4 µs an operation)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare this string with 'torch.cuda.FloatTensor' and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


_installed: list[_CudaAsCpu] = []


def install_cpu_adapter() -> None:
    """Makes Megatron-Core usable in this thread of a process without CUDA. Call it once, before any model.

    The function mode belongs to the calling thread: Megatron code must not run in another one.
    """
    if _installed or torch.cuda.is_available():
        return

    def get_state(device: Any = None, **_: Any) -> torch.Tensor:
        return torch.random.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, **_: Any) -> None:
        torch.random.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.random.default_generator.manual_seed(seed)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda.manual_seed = manual_seed

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    # Its warning that the CPU generator changed is about the very thing done here on purpose.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    mode = _CudaAsCpu()
    mode.__enter__()
    _installed.append(mode)
