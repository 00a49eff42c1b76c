"""The RAPO objective of one microbatch, composed of its parts.

    loss = Σ_t weight_t · ( −surrogate_t + α · divergence_t − β · entropy_t )

over response tokens (RAPO, arXiv 2510.03865). The weights make it a plain sum over microbatches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import Algorithm
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.divergence import flattening, k3
from megatron_rapo.loss.policy_gradient import clipped_surrogate
from megatron_rapo.loss.token_statistics import TokenStatistics, VocabularyShard, token_statistics


class Objective:
    """Computes a microbatch's share of the loss from its logits."""

    METRICS = ("total", "policy", "divergence", "entropy", "clipped", "mismatch", "weight")

    def __init__(
        self, algorithm: Algorithm, *, temperature: float, vocabulary: int, group: dist.ProcessGroup
    ) -> None:
        """
        Args:
            algorithm: coefficients and choices.
            temperature: of the rollouts.
            vocabulary: real tokens; head rows behind them have no probability.
            group: the tensor-parallel group.
        """
        self.algorithm = algorithm
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.group = group

    @property
    def wants_reference_logits(self) -> bool:
        """Whether the divergence is over the reference's whole distribution."""
        return self.algorithm.divergence == "forward_exact"

    @property
    def wants_reference_log_probs(self) -> bool:
        """Whether the divergence needs the reference's log-prob of the sampled token alone."""
        return self.algorithm.divergence == "k3"

    def statistics(self, logits: Tensor, targets: Tensor) -> TokenStatistics:
        """Log-prob and entropy at `targets` `[tokens]` under `logits` `[tokens, vocabulary / TP]`."""
        shard = VocabularyShard.of(logits.size(-1), self.vocabulary, self.group)
        return token_statistics(logits, targets, shard, self.temperature)

    def __call__(
        self, microbatch: Microbatch, logits: Tensor, reference_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The microbatch's share of the loss.

        Args:
            microbatch: its n response tokens are what counts.
            logits: `[tokens / CP, vocabulary / TP]`.
            reference_logits: `[n, vocabulary / TP]` of the response tokens, if wanted.

        Returns:
            The loss (a sum), and `[len(METRICS)]` weighted sums in fp64.
        """
        algorithm, chosen = self.algorithm, microbatch.is_response
        weights = microbatch.weights[chosen]
        shard = VocabularyShard.of(logits.size(-1), self.vocabulary, self.group)
        phi = (
            flattening(microbatch.rewards[chosen], algorithm.flatten_floor)
            if reference_logits is not None
            else None
        )
        statistics = token_statistics(
            logits[chosen], microbatch.targets[chosen], shard, self.temperature, reference_logits, phi
        )
        log_probs = statistics.log_prob
        # On the step's first update the policy is the one that the step began with.
        old = log_probs.detach() if microbatch.old_log_probs is None else microbatch.old_log_probs[chosen]
        surrogate = clipped_surrogate(
            log_probs, old, microbatch.advantages[chosen], algorithm.clip_low, algorithm.clip_high
        )
        divergence = self._divergence(statistics, microbatch, chosen)
        per_token = (
            -surrogate.value
            + algorithm.divergence_coefficient * divergence
            - algorithm.entropy_coefficient * statistics.entropy
        )
        loss = (weights * per_token).sum()
        mismatch = (old - microbatch.engine_log_probs[chosen]).abs()
        parts = (
            per_token,
            -surrogate.value,
            divergence,
            statistics.entropy,
            surrogate.clipped,
            mismatch,
            torch.ones_like(weights),
        )
        with torch.no_grad():
            sums = torch.stack([(weights.double() * part).sum() for part in parts])
        return loss, sums

    def _divergence(self, statistics: TokenStatistics, microbatch: Microbatch, chosen: Tensor) -> Tensor:
        if self.algorithm.divergence == "none":
            return torch.zeros_like(statistics.log_prob)
        if self.algorithm.divergence == "k3":
            assert microbatch.reference_log_probs is not None, "annotate the batch with the reference first"
            return k3(statistics.log_prob, microbatch.reference_log_probs[chosen])
        assert statistics.forward_kl is not None, "the exact forward KL needs reference logits"
        return statistics.forward_kl

    @classmethod
    def metrics(cls, sums: Tensor) -> Mapping[str, float]:
        """Metrics of one update from its summed `[len(METRICS)]`: the loss, and weighted means."""
        values = dict(zip(cls.METRICS, sums.tolist(), strict=True))
        weight = values.pop("weight")
        total = values.pop("total")
        return {"loss/total": total} | {f"loss/{name}": value / weight for name, value in values.items()}
