"""The publisher that a run's configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.config import Model, RunConfig, Weights
from megatron_rapo.data.prompts import TrainingPrompts
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.publisher import Publisher, Transport
from megatron_rapo.publish.record import Record
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.stream import WeightStream, device_memory
from megatron_rapo.weights.tensor_table import tensor_table
from megatron_rapo.weights.transports.disk import DiskTransport
from megatron_rapo.weights.transports.distributed import DistributedTransport
from megatron_rapo.weights.transports.shard import ShardTransport
from megatron_rapo.weights.transports.tensor import TensorTransport, handle_memory

PROBE_PROMPTS = 2


def open_publisher(
    config: RunConfig,
    policy: Policy,
    placement: Placement,
    engines: SharedEngines,
    prompts: TrainingPrompts,
    *,
    trusting: bool = False,
) -> Publisher:
    """The publisher of a run. The probe continues the training set's first prompts.

    `trusting`: whatever engines turn out to have is let pass, and nothing is recorded: the doctor judges for
    itself.
    """
    return Publisher(
        open_transport(
            config.weights,
            config.model,
            policy.chunks,
            policy.architecture,
            placement,
            config.run.directory / "weights",
        ),
        policy,
        placement,
        engines,
        prompts.prompts[:PROBE_PROMPTS],
        dtype=config.model.dtype,
        tolerance=None if trusting else config.probe_tolerance,
        sequence_multiple=config.sequence_multiple,
        record=Record(config.run.directory) if placement.is_main and not trusting else None,
    )


def open_transport(
    weights: Weights,
    model: Model,
    chunks: Sequence[Body],
    architecture: Architecture,
    placement: Placement,
    directory: Path,
) -> Transport:
    """The transport that `weights` asks for.

    Args:
        weights: which, and its options.
        model: whose type the weights have, and whose HF directory goes with those on disk.
        chunks: this rank's weights.
        architecture: theirs.
        placement: this rank's.
        directory: where weights on disk go.
    """
    if weights.transport == "disk":
        return DiskTransport(chunks, architecture, placement, directory, model.path)
    held, dtype = StageWeights(chunks, architecture, placement), DTYPES[model.dtype]
    memory = handle_memory if weights.transport == "tensor" else device_memory
    table = tensor_table(architecture, placement.layout)
    stream = WeightStream(table, held, placement, dtype, weights.bucket_bytes, memory)
    if weights.transport == "shard":
        return ShardTransport(
            architecture,
            held,
            placement,
            dtype,
            DistributedTransport(stream),
            vocabulary_multiple=model.vocabulary_multiple,
            bucket_bytes=weights.bucket_bytes,
        )
    return TensorTransport(stream) if weights.transport == "tensor" else DistributedTransport(stream)
