"""The lines of a family's table: which HF tensors a Megatron parameter is made of, and how.

Every HF tensor, or each of its sections, is cut over tensor parallelism into equal contiguous slices of one
dimension (or not at all), and a Megatron parameter is one, or a fusion of several, such slices. So loading
reads slices and fuses them, exporting splits and concatenates, and a resharding plan needs nothing but the
lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rapo.model.architecture import Architecture

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, COLUMNS, WHOLE = 0, 1, None  # the dimension of the HF tensor that tensor parallelism cuts


@dataclass(frozen=True)
class Fusion:
    """How the local slices of several HF tensors become one Megatron parameter, and back."""

    fuse: Callable[[Sequence[Tensor], Architecture], Tensor]
    split: Callable[[Tensor, Architecture], Sequence[Tensor]]


def _fuse_qkv(parts: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Query, key, value rows interleaved by key-value group: [q… k v] [q… k v] …"""
    groups = parts[1].size(0) // architecture.head_dim
    grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, architecture: Architecture) -> Sequence[Tensor]:
    dim, per_group = architecture.head_dim, architecture.heads // architecture.kv_heads
    grouped = fused.view(-1, (per_group + 2) * dim, *fused.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([per_group * dim, dim, dim], dim=1)]


ONE = Fusion(lambda parts, _: parts[0], lambda whole, _: [whole])
GATE_UP = Fusion(lambda parts, _: torch.cat(tuple(parts)), lambda fused, _: fused.chunk(2))
QKV = Fusion(_fuse_qkv, _split_qkv)


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter, and how the HF tensors it is made of are cut and fused.

    Attributes:
        megatron: its name; in a layer, without what stands before the layer's modules.
        hf: the HF tensors by name, with their whole shapes; in a layer, likewise.
        cut: the dimension of each that tensor parallelism cuts.
        transformer_engine: its name where Transformer Engine fuses the norm into the linear.
        vocabulary: whether rows are the vocabulary's, which is padded before it is cut.
        heads: whether rows are those of attention heads, none of which is cut.
        copy: whether it repeats what another parameter holds: it is loaded as well, never exported or stored.
        expert: of a layer's experts the one that it is a parameter of; expert tensor parallelism cuts it.
        sections: equal parts of the rows, one under the other, each of which is cut by itself.
        whole_in_engines: whether ranks of an engine have all of it, although the trainer's do not.
    """

    megatron: str
    hf: Mapping[str, tuple[int, ...]]
    cut: int | None
    fusion: Fusion = ONE
    transformer_engine: str | None = None
    vocabulary: bool = False
    heads: bool = False
    copy: bool = False
    expert: int | None = None
    sections: int = 1
    whole_in_engines: bool = False

    def of_layer(self, index: int) -> Rule:
        """The same with the HF names of one layer."""
        return replace(self, hf={f"model.layers.{index}.{name}": shape for name, shape in self.hf.items()})
