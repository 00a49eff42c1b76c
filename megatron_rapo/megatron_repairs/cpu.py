"""Lets Megatron-Core run without CUDA.

megatron-core asks for CUDA in a few places (device strings, generator states, tensor type names, the current
stream), and is answered with the CPU. That changes where tensors live, never what is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

VERSIONS = ">=0.16.1,<0.20"


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


class _Stream:
    """What Megatron asks of a stream where tokens go to their experts; on the CPU all before it is done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


_STREAM = _Stream()


_entered: list[_CudaAsCpu] = []


def repair() -> None:
    """Makes Megatron-Core usable in this thread of a process without CUDA; does nothing where there is CUDA.

    The function mode belongs to the calling thread: Megatron code must not run in another one.
    """
    if torch.cuda.is_available():
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
    cuda.Stream = _Stream  # a class, since annotations of other libraries name it
    cuda.current_stream = lambda *_, **__: _STREAM
    cuda.stream = lambda *_, **__: nullcontext()
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
    _entered.append(mode)  # for as long as the process lasts
