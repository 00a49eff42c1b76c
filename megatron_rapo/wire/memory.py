"""Tensors in memory that another process of the same machine opens: shared memory, or a GPU's (CUDA IPC).

What describes them is JSON, so that no pickle is read.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shared = dict[str, Any]
"""A storage, and the tensors in it: `{memory, tensors: [[name, dtype, shape, first element], …]}`."""


def share(named: Sequence[tuple[str, Tensor]]) -> list[Shared]:
    """Describes contiguous tensors, a dictionary a storage. They must live until the reader is done."""
    storages: dict[int, Shared] = {}
    for name, tensor in named:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            memory = _of_gpu(storage) if tensor.is_cuda else _of_host(storage)
            # To share it can move it: the address is asked for afterwards.
            storages[storage.data_ptr()] = {"memory": memory, "tensors": []}
        where = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.storage_offset()]
        storages[storage.data_ptr()]["tensors"].append(where)
    return list(storages.values())


def open_shared(shared: Shared) -> list[tuple[str, Tensor]]:
    """The tensors in another process's storage. They are read where they lie: nothing is copied."""
    memory = shared["memory"]
    if memory["device"] == "cpu":
        manager, name = (_bytes(memory[field]) for field in ("manager", "name"))
        storage = torch.UntypedStorage._new_shared_filename_cpu(manager, name, memory["nbytes"])
    else:
        fields = [_bytes(value) if isinstance(value, str) else value for value in memory["handle"]]
        storage = torch.UntypedStorage._new_shared_cuda(*fields)
    return [(name, _tensor(storage, dtype, shape, start)) for name, dtype, shape, start in shared["tensors"]]


def _tensor(storage: torch.UntypedStorage, dtype: str, shape: Sequence[int], start: int) -> Tensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return torch.empty(0, dtype=getattr(torch, dtype), device=storage.device).set_(
        storage, start, size, stride
    )


def _of_host(storage: torch.UntypedStorage) -> dict[str, Any]:
    manager, name, nbytes = storage._share_filename_cpu_()
    return {"device": "cpu", "manager": _text(manager), "name": _text(name), "nbytes": nbytes}


def _of_gpu(storage: torch.UntypedStorage) -> dict[str, Any]:
    handle = [_text(value) if isinstance(value, bytes) else value for value in storage._share_cuda_()]
    return {"device": "cuda", "handle": handle}


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(value: str) -> bytes:
    return base64.b64decode(value)
