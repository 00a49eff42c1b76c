"""The objective of one microbatch, composed of its parts.

    loss = Σ_t weight_t · ( −u_t · surrogate_t + α · divergence_t − β · entropy_t )

over response tokens (RAPO, arXiv 2510.03865), u the importance weight. The token weights were made of the
whole minibatch, so the loss is a plain sum over microbatches and ranks.

What is reported beside the loss is of all response tokens alike, also of those that are masked out of it:
so it is the same quantity in runs that weight or mask them differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import Algorithm
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.audit import AUDIT_PARTS, audit_metrics, audit_parts
from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss, chunked_statistics
from megatron_rapo.loss.divergence import DIVERGENCES, LOG_RATIO_BOUNDS, AtToken, Needs, flattening
from megatron_rapo.loss.mismatch import Mismatch
from megatron_rapo.loss.policy_gradient import clipped_surrogate, importance_weight, with_sequence_value
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.loss.vocabulary import VocabularyShard


@dataclass(frozen=True)
class HeadStates:
    """A model at the response tokens: hidden states `[tokens, hidden]`, head `[vocabulary / TP, hidden]`."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Tokens:
    """A microbatch's response tokens; every field `[tokens]` or None."""

    weights: Tensor
    advantages: Tensor
    engine_log_probs: Tensor
    response_positions: Tensor
    old_log_probs: Tensor | None
    flattened_log_probs: Tensor | None
    reference_log_probs: Tensor | None
    sequence_log_ratios: Tensor | None
    sequence_importance: Tensor | None

    def rows(self, rows: slice) -> _Tokens:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in parts.items() if value is not None})


class Objective:
    """Computes a microbatch's share of the loss from final hidden states."""

    # Sums over response tokens that every update reports, besides the audit's; only "total" is weighted.
    PARTS = (
        "total",
        "policy",
        "divergence",
        "entropy",
        "clipped",
        "importance",
        "importance_square",
        "importance_corrected",
        "log_ratio_clamped",
        "not_finite",
        "tokens",
        "tokens_in_loss",
    )

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        temperature: float,
        vocabulary: int,
        group: dist.ProcessGroup,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            algorithm: coefficients and choices.
            temperature: of the rollouts.
            vocabulary: real tokens; head rows behind them have no probability.
            group: the tensor-parallel group.
            context_group: the context-parallel group; ratio = "sequence" sums over it.
        """
        self.algorithm = algorithm
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.group = group
        self.context_group = context_group
        self.needs, self._divergence = DIVERGENCES[algorithm.divergence]
        self.parts = self.PARTS + (AUDIT_PARTS if algorithm.audit_estimators else ())

    @property
    def wants_reference_hidden(self) -> bool:
        """Whether the loss needs the reference's whole distribution, so its hidden states."""
        return self.algorithm.wants_reference_hidden

    def head(self, weight: Tensor) -> Head:
        """How a head's logits are read."""
        shard = VocabularyShard.of(weight.size(0), self.vocabulary, self.group)
        return Head(weight, shard, self.temperature, self.algorithm.loss_chunk_tokens)

    def reference_log_probs(self, states: HeadStates, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of a microbatch's response tokens: as it is, and flattened."""
        chosen = microbatch.is_response
        reference = self._reference_states(states, microbatch, forward=True, reverse=True)
        statistics = chunked_statistics(
            states.hidden, microbatch.targets[chosen], self.head(states.weight), reference
        )
        assert statistics.reference_log_prob is not None and statistics.flattened_log_prob is not None
        return statistics.reference_log_prob, statistics.flattened_log_prob

    def __call__(
        self, microbatch: Microbatch, policy: HeadStates, reference: HeadStates | None
    ) -> tuple[Tensor, Tensor, Mismatch]:
        """The microbatch's share of the loss.

        Args:
            microbatch: its response tokens are what counts.
            policy: at these tokens; the loss is differentiable in both of its tensors.
            reference: at these tokens, if `wants_reference_hidden`.

        Returns:
            The loss (a sum), `[len(parts)]` sums in fp64, and how far engine and trainer are apart.
        """
        chosen = microbatch.is_response
        sequence_log_ratios, sequence_importance = self._of_responses(microbatch, policy)
        tokens = _Tokens(
            weights=microbatch.weights[chosen],
            advantages=microbatch.advantages[chosen],
            engine_log_probs=microbatch.engine_log_probs[chosen],
            response_positions=microbatch.response_positions[chosen],
            old_log_probs=_chosen(microbatch.old_log_probs, chosen),
            flattened_log_probs=microbatch.flattened_log_probs,
            reference_log_probs=microbatch.reference_log_probs,
            sequence_log_ratios=sequence_log_ratios,
            sequence_importance=sequence_importance,
        )
        sums = torch.zeros(len(self.parts), dtype=torch.float64, device=chosen.device)
        mismatch = Mismatch(chosen.device)

        def token_loss(statistics: TokenStatistics, rows: slice) -> Tensor:
            chunk = tokens.rows(rows)
            loss, parts = self._token_loss(statistics, chunk)
            with torch.no_grad():
                sums.add_(torch.stack([parts[name].sum(dtype=torch.float64) for name in self.parts]))
                old = _old_log_prob(statistics, chunk)
                mismatch.add(old, chunk.engine_log_probs, chunk.response_positions)
            return chunk.weights * loss

        states = None
        if reference is not None and self.wants_reference_hidden:
            audit = self.algorithm.audit_estimators
            states = self._reference_states(
                reference,
                microbatch,
                forward=audit or self.needs is Needs.FORWARD,
                reverse=audit or self.needs is Needs.REVERSE,
            )
        head = self.head(policy.weight)
        loss = chunked_loss(policy.hidden, microbatch.targets[chosen], head, token_loss, states)
        return loss, sums, mismatch

    def metrics(self, sums: Tensor, updates: int = 1) -> Mapping[str, float]:
        """Metrics of some updates from their summed `[len(parts)]`: the mean loss, and means over tokens."""
        values = dict(zip(self.parts, sums.tolist(), strict=True))
        tokens = values["tokens"] or 1.0  # no response may have a probability at all
        means = {name: value / tokens for name, value in values.items()}
        metrics = {"loss/total": values["total"] / updates, "loss/tokens": values["tokens_in_loss"]}
        names = ("policy", "divergence", "entropy", "clipped", "log_ratio_clamped", "not_finite")
        metrics |= {f"loss/{name}": means[name] for name in names}
        metrics |= {
            "importance/mean": means["importance"],
            "importance/corrected": means["importance_corrected"],
            # Kish: (Σ w)² / (n Σ w²), the share of the samples that the reweighted ones are worth.
            "importance/effective_samples": means["importance"] ** 2 / (means["importance_square"] or 1.0),
        }
        return metrics | (audit_metrics(means) if self.algorithm.audit_estimators else {})

    def _token_loss(self, statistics: TokenStatistics, tokens: _Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Each token's loss without its weight, and what is reported of it, `[tokens]` each."""
        algorithm, log_prob = self.algorithm, statistics.log_prob
        old = _old_log_prob(statistics, tokens)
        log_ratio = log_prob - old
        if tokens.sequence_log_ratios is not None:
            log_ratio = with_sequence_value(log_prob, tokens.sequence_log_ratios)
        surrogate = clipped_surrogate(
            log_ratio,
            tokens.advantages,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            clip_dual=algorithm.clip_dual,
        )
        correction = importance_weight(
            old, tokens.engine_log_probs, algorithm.importance_correction, algorithm.importance_cap
        )
        at_token = AtToken(
            log_prob=log_prob,
            old_log_prob=old,
            forward_kl=statistics.forward_kl,
            reverse_kl=statistics.reverse_kl,
            flattened_log_prob=_first(statistics.flattened_log_prob, tokens.flattened_log_probs),
            reference_log_prob=_first(statistics.reference_log_prob, tokens.reference_log_probs),
        )
        divergence = self._divergence(at_token)
        # Where all tokens share a ratio, only the mean of their weights is in the loss and in its gradient.
        shared = tokens.sequence_importance
        policy = -(correction if shared is None else shared) * surrogate.value
        loss = (
            policy
            + algorithm.divergence_coefficient * divergence
            - algorithm.entropy_coefficient * statistics.entropy
        )
        with torch.no_grad():
            uncorrected = (old - tokens.engine_log_probs).exp()
            parts = {
                "total": tokens.weights * loss,
                "policy": policy,
                "divergence": divergence,
                "entropy": statistics.entropy,
                "clipped": surrogate.clipped,
                "importance": uncorrected,
                "importance_square": uncorrected.square(),
                "importance_corrected": (correction != 1.0) & (correction != uncorrected),
                "log_ratio_clamped": self._clamped(at_token),
                "not_finite": ~log_prob.isfinite(),
                "tokens": torch.ones_like(loss),
                "tokens_in_loss": tokens.weights > 0,
            }
            if algorithm.audit_estimators:
                parts |= audit_parts(at_token)
        return loss, parts

    def _clamped(self, at_token: AtToken) -> Tensor:
        """Whether a sampled divergence's log-ratio was clamped."""
        sampled = {
            Needs.LOG_PROB: at_token.reference_log_prob,
            Needs.FLATTENED_LOG_PROB: at_token.flattened_log_prob,
        }
        reference = sampled.get(self.needs)
        if reference is None:
            return torch.zeros_like(at_token.log_prob)
        log_rho = reference - at_token.log_prob
        low, high = LOG_RATIO_BOUNDS
        return (log_rho < low) | (log_rho > high)

    def _reference_states(
        self, states: HeadStates, microbatch: Microbatch, *, forward: bool, reverse: bool
    ) -> ReferenceStates:
        phi = flattening(microbatch.rewards[microbatch.is_response], self.algorithm.phi_floor)
        return ReferenceStates(states.hidden, states.weight, phi, forward, reverse)

    def _of_responses(
        self, microbatch: Microbatch, policy: HeadStates
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of each response token, its response's mean log π / π_old, and its mean importance weight.

        None where ratios are of tokens. Costs a pass over the head, but where both are known to be 1: on the
        step's first update without importance correction.
        """
        algorithm, chosen = self.algorithm, microbatch.is_response
        if algorithm.ratio == "token":
            return None, None
        engine = microbatch.engine_log_probs[chosen]
        if microbatch.old_log_probs is None and algorithm.importance_correction == "off":
            return torch.zeros_like(engine), torch.ones_like(engine)
        head = self.head(policy.weight)
        log_prob = chunked_statistics(policy.hidden, microbatch.targets[chosen], head).log_prob
        old = log_prob if microbatch.old_log_probs is None else microbatch.old_log_probs[chosen]
        importance = importance_weight(old, engine, algorithm.importance_correction, algorithm.importance_cap)
        sequence = microbatch.sequences[chosen]
        totals = log_prob.new_zeros(3, len(microbatch.lengths))
        values = torch.stack([log_prob - old, importance, torch.ones_like(log_prob)])
        totals.index_add_(1, sequence, values.to(totals.dtype))
        if self.context_group is not None:
            dist.all_reduce(totals, group=self.context_group)
        means = totals[:2] / totals[2].clamp(min=1.0)
        return means[0, sequence], means[1, sequence]


def _old_log_prob(statistics: TokenStatistics, tokens: _Tokens) -> Tensor:
    """Under the policy that the step began with: until the step's first update, this one."""
    return statistics.log_prob.detach() if tokens.old_log_probs is None else tokens.old_log_probs


def _chosen(values: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if values is None else values[chosen]


def _first(*values: Tensor | None) -> Tensor | None:
    return next((value for value in values if value is not None), None)
