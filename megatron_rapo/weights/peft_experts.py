"""Adapters of experts as PEFT has them on transformers 5, where a layer's experts are two tensors.

PEFT takes matrices of each expert by their published names as well, and joins them, but of some families
alone.

A of a tensor is `[experts · rank, in]`, expert by expert. B is `[out, rank · experts]`, and of each of its
`rank` columns it has those of all experts side by side. Gate and up projections are one tensor, of twice the
rank: their As stand one below the other, their Bs on a diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rapo.config.adapter import OF_MLP
from megatron_rapo.model.adapter_rules import A, B

CONVERTED = ("qwen3_moe", "mixtral")  # families whose published names PEFT 0.21 knows
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # transformers' tensors
_OF_EXPERT = re.compile(
    rf"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<target>\w+)\.(?P<which>{A}|{B})\.weight"
)


def joined(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A and B of each layer's experts in place of each expert's.

    Args:
        tensors: by the names of matrices; all experts of a layer are there.

    Returns:
        Tensors by PEFT's names, and transformers' tensors that they adapt.
    """
    found = {name: one for name, one in tensors.items() if _OF_EXPERT.fullmatch(name) is None}
    layers: dict[str, dict[tuple[str, str], dict[int, Tensor]]] = {}
    for name, one in tensors.items():
        if of_expert := _OF_EXPERT.fullmatch(name):
            key = of_expert["target"], of_expert["which"]
            layers.setdefault(of_expert["experts"], {}).setdefault(key, {})[int(of_expert["expert"])] = one
    adapted: list[str] = []
    for layer, matrices in layers.items():
        gate, up, down = OF_MLP
        adapted = [whole for whole, one in ((GATE_UP, gate), (DOWN, down)) if (one, A) in matrices]
        for whole in adapted:
            parts = (gate, up) if whole == GATE_UP else (down,)
            # PEFT wraps the layer once for each tensor: what it wraps first comes to lie inside.
            inside = ".base_layer" if whole == GATE_UP and DOWN in adapted else ""
            of_a, of_b = (
                [
                    [matrices[part, which][expert] for part in parts]
                    for expert in sorted(matrices[parts[0], A])
                ]
                for which in (A, B)
            )
            found[f"{layer}{inside}.{A}.weight"] = torch.cat([one for parts_of in of_a for one in parts_of])
            found[f"{layer}{inside}.{B}.weight"] = _side_by_side(of_b)
    return found, [f"experts.{whole}" for whole in adapted]


def _side_by_side(of_experts: Sequence[Sequence[Tensor]]) -> Tensor:
    """`[out, rank · experts]` of each expert's parts, which stand on a diagonal."""
    wholes = torch.stack([torch.block_diag(*parts) for parts in of_experts])
    return wholes.permute(1, 2, 0).flatten(1)
