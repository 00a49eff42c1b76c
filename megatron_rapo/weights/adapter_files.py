"""A run's checkpoints that hold adapters alone: the adapters, and the model that they make of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.errors import RapoError
from megatron_rapo.fingerprint import weights_fingerprint
from megatron_rapo.model.adapter_rules import A, B
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import (
    MegatronTensors,
    StoredTensors,
    find_checkpoint,
    is_checkpoint,
)
from megatron_rapo.weights.stored_parameters import StoredParameter, stored_parameters

KEY = "adapter."  # of a matrix in a checkpoint, before its HF name
RECORD = "run.json"
_OF_WEIGHTS = "fingerprint of weights of model.path"
_SUFFIX = ".weight"


@dataclass(frozen=True)
class AdapterRecord:
    """What a checkpoint's run.json tells of its adapters.

    Attributes:
        adapter: their options.
        base: the HF directory or Megatron checkpoint of the weights that they are added to.
        dtype: of the policy.
        fingerprint: of the weights of `base`; None where the record has none.
    """

    adapter: Adapter
    base: Path
    dtype: torch.dtype
    fingerprint: str | None

    @classmethod
    def of(cls, checkpoint: Path) -> AdapterRecord | None:
        """Of a checkpoint; None where it holds whole weights.

        Raises:
            RapoError: the record is damaged.
        """
        file = checkpoint / RECORD
        if not file.is_file():
            return None
        try:
            record: Mapping[str, Any] = json.loads(file.read_text())
            shared = record["must_match"]
            if shared.get("adapter") is None:
                return None
            adapter = Adapter.model_validate(shared["adapter"])
            dtype = DTYPES[shared["model.dtype"]]
            return cls(adapter, Path(record["base"]), dtype, shared.get(_OF_WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RapoError(f"{file} is damaged ({error!r}); copy the checkpoint again") from error


class AdapterTensors:
    """The adapters in a checkpoint, A and B of each matrix by HF name, read as they are asked for."""

    def __init__(self, checkpoint: Path, architecture: Architecture, adapter: Adapter) -> None:
        """
        Raises:
            RapoError: it is damaged, or of another architecture.
        """
        self._stored = StoredTensors(checkpoint)
        rules = model_rules(architecture, adapter)
        self.shapes = {name: shape for _, rule in rules for name, shape in rule.hf.items()}
        for name, shape in self.shapes.items():
            found = tuple(self._stored.metadata(KEY + name).size)
            if found != shape:
                raise RapoError(
                    f"checkpoint {checkpoint} is of another architecture: {name} has shape {list(found)}, "
                    f"config.json makes it {list(shape)}; name the HF model that it was trained from"
                )

    def read(self, name: str) -> Tensor:
        """A or B of a matrix, whole."""
        shape = self.shapes[name]
        return self._stored.read(KEY + name, tuple(0 for _ in shape), shape)


class MergedTensors:
    """The model of such a checkpoint, as HF tensors: the base's W, or W + scale · B · A."""

    def __init__(self, checkpoint: Path, architecture: Architecture, record: AdapterRecord) -> None:
        """Opens adapters and base.

        Raises:
            RapoError: one of them is damaged, not there, or not what the adapters were trained on.
        """
        self.directory = checkpoint
        self.parameters = list(stored_parameters(architecture))
        self._record = record
        self._adapters = AdapterTensors(checkpoint, architecture, record.adapter)
        self._base = _open_base(checkpoint, record, architecture)

    def dtype(self, parameter: StoredParameter) -> torch.dtype:
        """The policy's: of all tensors."""
        return self._record.dtype

    def shape(self, name: str) -> list[int]:
        """Shape of the whole HF tensor."""
        return self._base.shape(name)

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """The HF tensor `name`, or its part `start:stop` of `dimension`, as the run exports it."""
        weight = self._base.read(name, dimension, start, stop).to(self._record.dtype)
        of_a, of_b = (f"{name.removesuffix(_SUFFIX)}.{which}{_SUFFIX}" for which in (A, B))
        if of_a not in self._adapters.shapes:
            return weight
        inner, outer = (self._adapters.read(which).double() for which in (of_a, of_b))
        if dimension == 0:
            outer = outer[start:stop]
        elif dimension == 1:
            inner = inner[:, start:stop]
        return (weight.double() + self._record.adapter.scale * (outer @ inner)).to(weight.dtype)


def open_checkpoint(path: Path, architecture: Architecture) -> MegatronTensors | MergedTensors:
    """The model of a Megatron checkpoint, or of a folder of them; with its adapters, where it holds these.

    Raises:
        RapoError: there is none, it is damaged, or it is of another architecture.
    """
    checkpoint = find_checkpoint(path)
    record = AdapterRecord.of(checkpoint)
    if record is None:
        return MegatronTensors(checkpoint, architecture)
    return MergedTensors(checkpoint, architecture, record)


def _open_base(
    checkpoint: Path, record: AdapterRecord, architecture: Architecture
) -> HFTensors | MegatronTensors | MergedTensors:
    if not record.base.is_dir():
        raise RapoError(
            f"checkpoint {checkpoint} holds adapters of {record.base}, which is not there; bring it there"
        )
    if is_checkpoint(record.base):
        return open_checkpoint(record.base, architecture)
    found = weights_fingerprint(record.base)
    if record.fingerprint is not None and found != record.fingerprint:
        raise RapoError(
            f"checkpoint {checkpoint} holds adapters of other weights than those in {record.base} "
            f"(fingerprint {found} in place of {record.fingerprint}); restore the model there"
        )
    tensors = HFTensors(record.base)
    check_tensors(tensors, architecture)
    return tensors
