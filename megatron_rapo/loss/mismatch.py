"""How far engine and trainer are apart: two computations of one policy's log-probs at the sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import Tensor

from megatron_rapo.parallel.placement import Placement

# Positions in the response, counted from 0, at which a stretch of the profile begins.
STRETCHES = (0, 16, 64, 256, 1024, 4096)


class Mismatch:
    """Statistics over response tokens. They add up over microbatches, ranks and updates, in any order.

    With Δ = log π_trainer − log π_engine at a token, both of the policy that sampled it, they hold the mean
    and the maximum of |Δ|, and the mean of e^Δ − 1 − Δ, whose expectation over the engine's samples is
    KL(engine ‖ trainer) (Schulman's k3: never negative, of low variance). All response tokens count alike.
    Of log π_engine alone they hold the mean, and the largest and smallest.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Of no tokens."""
        # Tokens, |Δ| and k3, by stretch; the maximum is no sum, so it stands apart.
        self._sums = torch.zeros(3, len(STRETCHES), dtype=torch.float64, device=device)
        self._largest = torch.zeros(len(STRETCHES), dtype=torch.float64, device=device)
        # Of the engines' log-probs alone: their sum; the largest, and the largest of the negated ones.
        self._engine = torch.zeros(1, dtype=torch.float64, device=device)
        self._extremes = torch.full((2,), -math.inf, dtype=torch.float64, device=device)
        self._bounds = torch.tensor(STRETCHES[1:], device=device)

    def add(self, log_probs: Tensor, engine_log_probs: Tensor, positions: Tensor) -> None:
        """Takes tokens in, `[tokens]` each.

        Args:
            log_probs: the trainer's, under the policy that sampled.
            engine_log_probs: as sampled.
            positions: int64, of each token in its response.
        """
        log_ratio = (log_probs - engine_log_probs).double()
        stretch = torch.bucketize(positions, self._bounds, right=True)
        values = torch.stack([torch.ones_like(log_ratio), log_ratio.abs(), log_ratio.expm1() - log_ratio])
        self._sums.index_add_(1, stretch, values)
        self._largest.scatter_reduce_(0, stretch, log_ratio.abs(), "amax")
        engine = engine_log_probs.double()
        self._engine += engine.sum()
        if len(engine):
            self._extremes = torch.maximum(self._extremes, torch.stack([engine.max(), (-engine).max()]))

    def merge(self, other: Mismatch) -> None:
        """Takes another's tokens in."""
        self._sums += other._sums
        self._largest = torch.maximum(self._largest, other._largest)
        self._engine += other._engine
        self._extremes = torch.maximum(self._extremes, other._extremes)

    def reduce(self, placement: Placement) -> None:
        """Takes in those of all DP × CP ranks, from the last stage, where tokens are added, to all stages."""
        placement.sum_from_last_stage(self._sums)
        placement.max_from_last_stage(self._largest)
        placement.sum_from_last_stage(self._engine)
        placement.max_from_last_stage(self._extremes)

    def metrics(self) -> Mapping[str, float]:
        """Over all tokens, and over each stretch that has some: `…/64_255`, the last one `…/4096_on`."""
        metrics = _metrics("", self._sums.sum(1), self._largest.max())
        for index, (first, end) in enumerate(zip_longest(STRETCHES, STRETCHES[1:])):
            sums, largest = self._sums[:, index], self._largest[index]
            if sums[0] > 0:
                metrics |= _metrics(f"/{first}_{'on' if end is None else end - 1}", sums, largest)
        return metrics | self._of_engine()

    def _of_engine(self) -> dict[str, float]:
        tokens = float(self._sums[0].sum())
        if not tokens:
            return {}
        return {
            "mismatch/engine_log_prob": float(self._engine) / tokens,
            "mismatch/engine_log_prob_spread": float(self._extremes.sum()),
        }


def _metrics(where: str, sums: Tensor, largest: Tensor) -> dict[str, float]:
    tokens, difference, divergence = sums.tolist()
    tokens = tokens or 1.0  # no response may have a probability at all
    return {
        f"mismatch/log_prob_mean{where}": difference / tokens,
        f"mismatch/log_prob_max{where}": largest.item(),
        f"mismatch/kl{where}": divergence / tokens,
    }
