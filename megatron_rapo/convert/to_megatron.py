"""A HF model directory into a Megatron checkpoint, which loads under any layout."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_rapo import file_sums
from megatron_rapo.convert.destination import new_directory
from megatron_rapo.convert.progress import Progress
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_directory import write_companions
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import TRACKER
from megatron_rapo.weights.stored_parameters import StoredParameter, stored_parameters

# Megatron-LM reads it: 3.0 has today's order of query, key and value rows.
COMMON = {"checkpoint_version": 3.0, "iteration": 0}
# Modules that Megatron asks for an `_extra_state` of when it loads: fp8 scales, or as here nothing.
STATEFUL_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
NORMS_AFTER = ("self_attn_bda.norm", "mlp_bda.norm")
LINEARS = ("linear_fc1", "linear_fc2")


def convert_to_megatron(source: Path, destination: Path) -> None:
    """Writes a HF model as Megatron's torch_dist checkpoint, in a folder as Megatron-LM's `--load` takes it.

    Args:
        source: HF model directory; configuration and tokenizer are carried along.
        destination: the folder to make: a tracker file, and the checkpoint in `release/`.

    Raises:
        RapoError: nothing is written, and the message says why.
    """
    architecture = read_architecture(source)
    file_sums.check(source, "model")
    with HFTensors(source) as tensors:
        check_tensors(tensors, architecture)
        parameters = list(stored_parameters(architecture))
        planner = _Planner(parameters, tensors, architecture)
        with new_directory(destination, planner.progress.total) as directory:
            release = directory / "release"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = dcp.FileSystemWriter(str(release), single_file_per_rank=True, thread_count=1)
                _save(writer, planner)
            save_config(CheckpointingConfig("torch_dist", 1), str(release))
            torch.save(COMMON, release / "common.pt")
            write_companions(release, companions_of=source)
            file_sums.write_sums(release)
            (directory / TRACKER).write_text("release\n")


def _save(writer: dcp.FileSystemWriter, planner: _Planner) -> None:
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as failed:
        # torch wraps what happened, and its writer follows a full disk's error with one of its own.
        error: BaseException | None = next(error for error, _ in failed.failures.values())
        while error is not None and not isinstance(error, OSError | RapoError):
            error = error.__context__
        raise error or failed from failed


class _Planner(DefaultSavePlanner):
    """Tells torch's writer what there is to write, and reads each tensor when its turn comes."""

    def __init__(
        self, parameters: list[StoredParameter], tensors: HFTensors, architecture: Architecture
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parameters = {(p.key, p.offsets): p for p in parameters}
        self._tensors = tensors
        self._architecture = architecture
        self._dtypes = {key: _dtype(parameter, tensors) for key, parameter in self._parameters.items()}
        self.progress = Progress(
            sum(math.prod(p.shape) * self._dtypes[key].itemsize for key, p in self._parameters.items())
        )

    def create_local_plan(self) -> SavePlan:
        items = [self._item(parameter) for parameter in self._parameters.values()]
        return SavePlan([*items, *map(_empty_item, self._extra_states())])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        assert write_item.tensor_data is not None
        offsets = write_item.tensor_data.chunk.offsets
        parameter = self._parameters[write_item.index.fqn, tuple(offsets)]
        self._tensors.close_files()
        parts = [self._tensors.read(name, None, 0, 0) for name in parameter.rule.hf]
        fused = parameter.rule.fusion.fuse(parts, self._architecture)
        self.progress.add(fused.nbytes)
        return fused.view(parameter.part)

    def _item(self, parameter: StoredParameter) -> WriteItem:
        offsets = torch.Size(parameter.offsets)
        return WriteItem(
            index=MetadataIndex(parameter.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size(parameter.part)),
                properties=TensorProperties(self._dtypes[parameter.key, parameter.offsets]),
                size=torch.Size(parameter.whole),
            ),
        )

    def _extra_states(self) -> list[str]:
        layers, experts = self._architecture.layers, self._architecture.experts
        mlp = "mlp" if experts is None else "mlp.shared_experts"
        norms = NORMS_AFTER if self._architecture.norms.after else ()
        names = [
            f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
            for module in (*STATEFUL_MODULES, *norms, *(f"{mlp}.{linear}" for linear in LINEARS))
            for layer in range(layers)
        ]
        if experts is not None:
            names += [
                f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
                f"shard_{layer}.{expert}_{layers}.{experts.count}"
                for linear in LINEARS
                for layer in range(layers)
                for expert in range(experts.count)
            ]
        return [*names, "decoder.final_layernorm._extra_state/shard_0_1"]


def _empty_item(name: str) -> WriteItem:
    return WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)


def _dtype(parameter: StoredParameter, tensors: HFTensors) -> torch.dtype:
    """The one type of the tensors that a parameter is fused of."""
    dtypes = {name: tensors.read(name, 0, 0, 0).dtype for name in parameter.rule.hf}
    if len(set(dtypes.values())) > 1:
        raise RapoError(f"tensors of {tensors.directory} differ in type: {dtypes}; save them in one type")
    return next(iter(dtypes.values()))
