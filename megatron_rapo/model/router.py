"""Megatron's router of tokens to experts, which also measures its choices and may be charged for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rapo.model.routing_replay import Replay

CHANGED, ENTROPY, BALANCE, Z, SUMS = (
    -4,
    -3,
    -2,
    -1,
    4,
)  # places in `Router.measured`, behind a place for each expert


class Router(TopKRouter):
    """What it measures and charges is of forward passes that gradients are taken of.

    Attributes:
        measured: `[experts + SUMS]` fp64, sums over this rank's tokens since it was zeroed: how many chose
            each expert; how many were sent to others than they would have been (`Replay`); the entropies of
            its distributions in nats; the two losses below, times no coefficient.
        balance: coefficient of the load-balancing loss a token: E · Σᵢ fᵢ pᵢ, where f is the share of a
            microbatch's choices that are expert i, and p the token's distribution (Switch Transformer, arXiv
            2101.03961, equation 4).
        z: coefficient of the z-loss a token, (log Σ exp logits)² (ST-MoE, arXiv 2202.08906, equation 5).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.measured = torch.zeros(self.num_experts + SUMS, dtype=torch.float64)
        self.balance = self.z = 0.0
        self.router_replay = Replay(self.num_experts)

    def routing(self, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As Megatron's; `logits` are `[tokens, 1, experts]`."""
        shares, chosen = super().routing(logits, *args, **options)
        if self.training and torch.is_grad_enabled():
            charged = self._measure(logits.flatten(0, -2), chosen)
            if self.balance or self.z:
                shares = MoEAuxLossAutoScaler.apply(shares, charged)
        return shares, chosen

    def _measure(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Adds to `measured`; the charge for these tokens."""
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        picks = chosen.sum(0)
        z = logits.logsumexp(-1).square().sum()
        balance = torch.zeros_like(z)
        if self.balance:
            whole = picks.clone()  # of the microbatch, which TP and CP ranks share
            dist.all_reduce(whole, group=self.tp_cp_group)
            balance = self.num_experts * (whole / whole.sum() * probs.sum(0)).sum()
        with torch.no_grad():
            entropy = -(probs * log_probs).sum()
            changed = self.router_replay.changed
            changed = torch.zeros_like(z) if changed is None else changed
            sums = torch.cat((picks.double(), torch.stack((changed, entropy, balance, z)).double()))
            self.measured += sums.to(self.measured.device)
        return self.balance * balance + self.z * z
