"""A mixture of experts in plain PyTorch, expert by expert, for certificates (`plain.py`).

The router's softmax is fp32 whatever the weights' type, as HF and Megatron both have it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import plain
from megatron_rapo.model.families.mixture import QWEN, Names
from megatron_rapo.model.families.plain import Weights


def logits(names: Names = QWEN) -> Callable[[Weights, Architecture, Tensor], Tensor]:
    """The family's, which calls its tensors so: `[tokens, vocabulary]` of one sequence `[tokens]`."""
    return partial(plain.logits, feed_forward=partial(_mixture, names))


def _mixture(names: Names, own: Weights, architecture: Architecture, x: Tensor) -> Tensor:
    experts = architecture.experts
    assert experts is not None
    scores = x @ own[f"{names.router}.weight"].T
    chosen = scores.topk(experts.chosen, dim=-1).indices
    if experts.renormalised:
        shares = scores.gather(1, chosen).float().softmax(-1)
    else:
        shares = scores.float().softmax(-1).gather(1, chosen)
    shares = shares.to(x.dtype)
    parts = torch.zeros_like(x)
    for expert in range(experts.count):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        of_expert = _swiglu(x[token], *(own[name] for name in names.of(expert)))
        parts = parts.index_add(0, token, shares[token, place, None] * of_expert)
    if experts.shared is not None:
        matrices = (own[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
        parts = parts + (x @ own["mlp.shared_expert_gate.weight"].T).sigmoid() * _swiglu(x, *matrices)
    return parts


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
