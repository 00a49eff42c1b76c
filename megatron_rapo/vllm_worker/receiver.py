"""How a vLLM worker takes weights: a backend of vLLM's own routes for weight transfer.

vLLM reloads layer by layer: tensors wait until all of a layer's have come, then the layer is made anew and
takes the place of the old one. What a rank does not need of a tensor, it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from megatron_rapo.wire.bucket import lay_out, views
from megatron_rapo.wire.group import new_group
from megatron_rapo.wire.memory import Shared, open_shared

Named = Iterator[tuple[str, Tensor]]


@dataclass
class Invitation(WeightTransferInitInfo):
    """Where trainer and engines meet, and the group's rank of this server's first worker."""

    address: str
    port: int
    name: str
    backend: str
    first_rank: int
    size: int
    timeout_s: float


@dataclass
class Piece(WeightTransferUpdateInfo):
    """Some tensors of an update: in a broadcast of one flat buffer, in memory of this machine, or on disk.

    Attributes:
        layout: `[[name, dtype, shape], …]` of the broadcast's tensors, one behind the other.
        group: that it comes by.
        shared: storages that are open to this process.
        folder: HF directory of safetensors.
    """

    layout: list[tuple[str, str, list[int]]] | None = None
    group: str | None = None
    shared: list[Shared] | None = None
    folder: str | None = None


class Receiver(WeightTransferEngine[Invitation, Piece]):
    """One worker's side of updates."""

    init_info_cls = Invitation
    update_info_cls = Piece

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._flat: Tensor | None = None
        self._tied: list[VocabParallelEmbedding] = []

    def init_transfer_engine(self, init_info: Invitation) -> None:
        """Joins the group of an invitation, and leaves any earlier one."""
        self.shutdown()
        timeout = timedelta(seconds=init_info.timeout_s)
        # With the size it counts itself among those who come, as a store that waits for all expects.
        store = dist.TCPStore(
            init_info.address, init_info.port, init_info.size, is_master=False, timeout=timeout
        )
        rank = init_info.first_rank + self.parallel_config.rank
        self._groups[init_info.name] = new_group(
            store, rank, init_info.size, init_info.name, init_info.backend, timeout
        )

    def start_weight_update(self) -> None:
        """Makes the model ready for all of its tensors, whatever an update that failed has left."""
        if not self.is_whole():
            for layer in self.model.modules():
                info = get_layerwise_info(layer)
                info.loaded_weights.clear()
                info.load_numel = 0
            finalize_layerwise_reload(self.model, self.model_config)
        self._tied = list(_tied_layers(self.model))
        initialize_layerwise_reload(self.model)
        for layer in self._tied:
            get_layerwise_info(layer).load_numel_total = 0

    def is_whole(self) -> bool:
        """Whether no layer waits for weights: a token would need them."""
        return not any(get_layerwise_info(layer).can_load() for layer in self.model.modules())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes a piece; it may be used anew by who sent it once this returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Piece) -> None:
        """Loads the piece's tensors into the model."""
        borrowed: set[int] = set()  # memory that its owner uses anew

        def named() -> Named:
            for name, tensor in self._arriving(update_info):
                if update_info.folder is None:
                    borrowed.add(tensor.untyped_storage().data_ptr())
                yield name, tensor

        self.model.load_weights(named())
        self._copy_what_waits(borrowed)

    def finish_weight_update(self) -> None:
        """Puts the new weights in place.

        Raises:
            RuntimeError: not all have come; the model is of no use until an update that brings all.
        """
        lacking = [name for name, layer in self.model.named_modules() if _lacks_weights(layer)]
        if lacking:
            raise RuntimeError(f"{len(lacking)} modules lack weights of this update: {lacking[:5]}")
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self._tied:  # on CPUs vLLM has packed a copy of its weights
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Leaves the trainer's group."""
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1])

    def _arriving(self, piece: Piece) -> Named:
        if piece.layout is not None:
            yield from self._broadcast(piece.layout, self._groups[str(piece.group)])
        for shared in piece.shared or ():
            yield from open_shared(shared)
        if piece.folder is not None:
            for file in sorted(Path(piece.folder).glob("*.safetensors")):
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                        yield name, tensors.get_tensor(name)

    def _broadcast(self, layout: list[tuple[str, str, list[int]]], group: dist.ProcessGroup) -> Named:
        names, dtypes, shapes = zip(*layout, strict=True)
        tensors = lay_out(names, [getattr(torch, dtype) for dtype in dtypes], shapes)
        nbytes = tensors[-1].end_idx
        if self._flat is None or self._flat.numel() < nbytes:
            self._flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        flat = self._flat[:nbytes]
        group.broadcast(flat, 0).wait()
        yield from views(flat, tensors)

    def _copy_what_waits(self, borrowed: set[int]) -> None:
        """Tensors that wait for others of their layer leave memory that is used anew."""
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in borrowed:
                        call.arguments[name] = value.clone()


def _tied_layers(model: torch.nn.Module) -> Iterator[VocabParallelEmbedding]:
    """Heads that have the embedding's matrix. None comes for them."""
    seen: set[int] = set()
    for layer in model.modules():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if isinstance(layer, VocabParallelEmbedding) and own <= seen:
            yield layer
        seen |= own


def _lacks_weights(layer: torch.nn.Module) -> bool:
    """Whether not all of a layer's parameters have come. Rows that pad a vocabulary never do."""
    info = get_layerwise_info(layer)
    if not info.can_load() or not any(True for _ in layer.parameters(recurse=False)):
        return False
    expected = info.load_numel_total or 0
    if isinstance(layer, VocabParallelEmbedding):  # of a small one a rank may have padding alone
        expected = min(expected, layer.shard_indices.num_org_elements)
    return info.load_numel < expected
