"""Tensors out of a pickle that may hold nothing else.

The format is SGLang's for `/update_weights_from_tensor`: base64 of a pickle, by pickle itself or by
`torch.multiprocessing`, of a list of (name, tensor), or of a flattened bucket and its metadata. A pickle is a
program that calls what it names; of all that it could name, what rebuilds tensors is admitted: from bytes
within, from shared memory (by file name), and from CUDA's memory handles.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import TensorMetadata, views


def _load_storage(data: bytes) -> Any:
    """In place of torch's own function, which would unpickle anything."""
    return torch.load(io.BytesIO(data), weights_only=True)


ADMITTED: dict[tuple[str, str], Any] = {
    ("torch", "Tensor"): torch.Tensor,
    ("torch", "Size"): torch.Size,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch.storage", "TypedStorage"): torch.TypedStorage,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): TensorMetadata,
} | {
    ("torch.multiprocessing.reductions", name): getattr(reductions, name)
    for name in (
        *("rebuild_tensor", "rebuild_typed_storage", "rebuild_storage_empty"),
        *("rebuild_storage_filename", "rebuild_cuda_tensor"),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        admitted = ADMITTED.get((module, name))
        if admitted is not None:
            return admitted
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise RapoError(
            f"the pickle names {module}.{name}, which is no part of a tensor in this form; send bytes, CUDA "
            "handles, or shared memory under the strategy file_system"
        )


def load_named_tensors(text: str, *, flattened: bool) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors, which may share memory with the sender.

    Args:
        text: base64 of the pickle.
        flattened: it is a bucket, `{flattened_tensor, metadata}`.

    Raises:
        RapoError: it is no such pickle.
    """
    try:
        content = _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except RapoError:
        raise
    except binascii.Error as error:
        raise RapoError(f"serialized_named_tensors is not base64: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise RapoError(f"the pickled tensors cannot be rebuilt: {type(error).__name__}: {error}") from error
    named = _unpacked(content) if flattened else content
    if not isinstance(named, list) or not all(map(_is_named_tensor, named)):
        raise RapoError("the pickle holds no list of (name, tensor)")
    return named


def _is_named_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], torch.Tensor)
    )


def _unpacked(content: Any) -> list[tuple[str, torch.Tensor]]:
    try:
        return views(content["flattened_tensor"], content["metadata"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RapoError(f"the pickle holds no flattened bucket: {error!r}") from error
