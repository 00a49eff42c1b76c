"""The objective of one microbatch: the method's terms, over statistics and weights that know no method.

    loss = Σ_t weight_t · Σ_i coefficient_i · term_i(t)

over response tokens. The token weights were made of the whole minibatch, so the loss is a plain sum over
microbatches and ranks.

What is reported beside the loss is of all response tokens alike, also of those that are masked out of it:
so it is the same quantity in runs that weight or mask them differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss, chunked_statistics
from megatron_rapo.loss.importance import importance_weight
from megatron_rapo.loss.mismatch import Mismatch
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.loss.trial import OF_EVERY_UPDATE, reported_names
from megatron_rapo.loss.vocabulary import VocabularyShard
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.term import OF_SEQUENCES, AtToken, Need


@dataclass(frozen=True)
class HeadStates:
    """A model at the response tokens: hidden states `[tokens, hidden]`, head `[vocabulary / TP, hidden]`."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Tokens:
    """A microbatch's response tokens; every field `[tokens]`, by name the marks, or None."""

    weights: Tensor
    advantages: Tensor
    phi: Tensor
    engine_log_probs: Tensor
    response_positions: Tensor
    old_log_probs: Tensor | None
    flattened_log_probs: Tensor | None
    reference_log_probs: Tensor | None
    sequence_log_ratios: Tensor | None
    sequence_importance: Tensor | None
    off_policy: Tensor
    marks: Mapping[str, Tensor]

    def rows(self, rows: slice) -> _Tokens:
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "marks"}
        cut = {name: value[rows] for name, value in parts.items() if value is not None}
        return replace(self, **cut, marks={name: values[rows] for name, values in self.marks.items()})


class Objective:
    """Computes a microbatch's share of the loss from final hidden states."""

    def __init__(
        self,
        method: Method,
        *,
        temperature: float,
        vocabulary: int,
        group: dist.ProcessGroup,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            method: whose terms are the loss.
            temperature: of the rollouts.
            vocabulary: real tokens; head rows behind them have no probability.
            group: the tensor-parallel group.
            context_group: the context-parallel group; ratios of responses are summed over it.

        Raises:
            RapoError: a term does not work on a few tokens.
        """
        self.method = method
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.group = group
        self.context_group = context_group
        self.needs = method.needs
        self._reads = frozenset(name for _, term in method.terms() for name in term.reads)
        self._reported = reported_names(method)
        self.parts = OF_EVERY_UPDATE + tuple(name for names in self._reported for name in names)

    @property
    def wants_reference_hidden(self) -> bool:
        """Whether the loss needs the reference's whole distribution, so its hidden states."""
        return self.method.wants_reference_hidden

    @property
    def wants_distribution(self) -> bool:
        """Whether the loss needs a frozen model's whole distribution: the teacher's, else the reference's."""
        return self.method.wants_teacher or self.method.wants_reference_hidden

    def head(self, weight: Tensor) -> Head:
        """How a head's logits are read."""
        shard = VocabularyShard.of(weight.size(0), self.vocabulary, self.group)
        return Head(weight, shard, self.temperature, self.method.options.loss_chunk_tokens)

    def reference_log_probs(self, states: HeadStates, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of a microbatch's response tokens: as it is, and flattened."""
        chosen = microbatch.is_response
        phi = microbatch.phi[chosen]
        reference = ReferenceStates(states.hidden, states.weight, phi, forward=True, reverse=True)
        statistics = chunked_statistics(
            states.hidden, microbatch.targets[chosen], self.head(states.weight), reference
        )
        assert statistics.reference_log_prob is not None and statistics.flattened_log_prob is not None
        return statistics.reference_log_prob, statistics.flattened_log_prob

    def __call__(
        self, microbatch: Microbatch, policy: HeadStates, frozen: HeadStates | None
    ) -> tuple[Tensor, Tensor, Mismatch]:
        """The microbatch's share of the loss.

        Args:
            microbatch: its response tokens are what counts.
            policy: at these tokens; the loss is differentiable in both of its tensors.
            frozen: the teacher, else the reference, at these tokens, if `wants_distribution`.

        Returns:
            The loss (a sum), `[len(parts)]` sums in fp64, and how far engine and trainer are apart.

        Raises:
            RapoError: a term reads a mark that there is not.
        """
        chosen = microbatch.is_response
        if lacking := self._reads - microbatch.marks.keys():
            raise RapoError(
                f'terms of method "{self.method.options.method}" read the marks '
                f"{', '.join(sorted(lacking))}, which neither mark_responses nor mark_tokens gives; let one "
                "of them"
            )
        sequence_log_ratios, sequence_importance = self._of_responses(microbatch, policy)
        tokens = _Tokens(
            weights=microbatch.weights[chosen],
            advantages=microbatch.advantages[chosen],
            phi=microbatch.phi[chosen],
            engine_log_probs=microbatch.engine_log_probs[chosen],
            response_positions=microbatch.response_positions[chosen],
            old_log_probs=_chosen(microbatch.old_log_probs, chosen),
            flattened_log_probs=microbatch.flattened_log_probs,
            reference_log_probs=microbatch.reference_log_probs,
            sequence_log_ratios=sequence_log_ratios,
            sequence_importance=sequence_importance,
            off_policy=microbatch.off_policy[chosen],
            marks={name: values[chosen] for name, values in microbatch.marks.items()},
        )
        sums = torch.zeros(len(self.parts), dtype=torch.float64, device=chosen.device)
        mismatch = Mismatch(chosen.device)

        def token_loss(statistics: TokenStatistics, rows: slice) -> Tensor:
            chunk = tokens.rows(rows)
            loss, parts = self._token_loss(statistics, chunk)
            with torch.no_grad():
                sums.add_(torch.stack([parts[name].sum(dtype=torch.float64) for name in self.parts]))
                own = ~chunk.off_policy
                trainers = self._trainers_log_prob(statistics, chunk)
                mismatch.add(trainers[own], chunk.engine_log_probs[own], chunk.response_positions[own])
            return chunk.weights * loss

        states = None
        if frozen is not None and self.wants_distribution:
            states = self._frozen_states(frozen, tokens.phi)
        head = self.head(policy.weight)
        loss = chunked_loss(policy.hidden, microbatch.targets[chosen], head, token_loss, states)
        return loss, sums, mismatch

    def metrics(self, sums: Tensor, updates: int = 1) -> Mapping[str, float]:
        """Metrics of some updates from their summed `[len(parts)]`: the mean loss, and means over tokens."""
        values = dict(zip(self.parts, sums.tolist(), strict=True))
        tokens = values["tokens"] or 1.0  # no response may have a probability at all
        means = {name: value / tokens for name, value in values.items()}
        metrics = {
            "loss/total": values["total"] / updates,
            "loss/tokens": values["tokens_in_loss"],
            "loss/entropy": means["entropy"],
            "loss/not_finite": means["not_finite"],
        }
        if self.method.demonstrations is None:
            metrics |= {
                "importance/mean": means["importance"],
                "importance/corrected": means["importance_corrected"],
                # Kish: (Σ w)² / (n Σ w²), the share of the samples that the reweighted ones are worth.
                "importance/effective_samples": means["importance"] ** 2
                / (means["importance_square"] or 1.0),
            }
        for (_, term), names in zip(self.method.terms(), self._reported, strict=True):
            metrics |= term.metrics({name: means[name] for name in names})
        return metrics

    def _token_loss(self, statistics: TokenStatistics, tokens: _Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Each token's loss without its weight, and what is reported of it, `[tokens]` each."""
        old = _old_log_prob(statistics, tokens)
        sampled = torch.where(tokens.off_policy, old, tokens.engine_log_probs)  # of a ratio of 1
        correction = self._importance(old, sampled)
        at_token = AtToken(
            log_prob=statistics.log_prob,
            entropy=statistics.entropy,
            old_log_prob=old,
            engine_log_prob=tokens.engine_log_probs,
            advantage=tokens.advantages,
            phi=tokens.phi,
            position=tokens.response_positions,
            flattened_log_prob=tokens.flattened_log_probs,
            reference_log_prob=tokens.reference_log_probs,
            sequence_log_ratio=tokens.sequence_log_ratios,
            importance=correction,
            sequence_importance=tokens.sequence_importance,
            marks=tokens.marks,
        )
        at_token = self._with_distribution(at_token, statistics)
        loss = torch.zeros_like(statistics.log_prob)
        parts: dict[str, Tensor] = {}
        for coefficient, term in self.method.terms():
            value, reported = term(at_token)
            loss = loss + coefficient * value
            parts.update(reported)
        with torch.no_grad():
            uncorrected = (self._trainers_log_prob(statistics, tokens) - sampled).exp()
            parts |= {
                "total": tokens.weights * loss,
                "entropy": statistics.entropy,
                "importance": uncorrected,
                "importance_square": uncorrected.square(),
                "importance_corrected": (correction != 1.0) & (correction != uncorrected),
                "not_finite": ~statistics.log_prob.isfinite(),
                "tokens": torch.ones_like(loss),
                "tokens_in_loss": tokens.weights > 0,
            }
        return loss, parts

    def _trainers_log_prob(self, statistics: TokenStatistics, tokens: _Tokens) -> Tensor:
        """What is compared with the engine's: the trainer's, by the policy that the step began with, or by
        this one where only the engine's is known of that."""
        if self.method.options.old_log_probs == "engine":
            return statistics.log_prob.detach()
        return _old_log_prob(statistics, tokens)

    def _importance(self, old_log_probs: Tensor, engine_log_probs: Tensor) -> Tensor:
        options = self.method.options
        return importance_weight(
            old_log_probs, engine_log_probs, options.importance_correction, options.importance_cap
        )

    def _frozen_states(self, states: HeadStates, phi: Tensor) -> ReferenceStates:
        """The model whose distribution the loss needs, and what is wanted of it. No teacher is flattened."""
        if self.method.wants_teacher:
            return ReferenceStates(
                states.hidden,
                states.weight,
                torch.ones_like(phi),
                forward=Need.TEACHER_FORWARD_KL in self.needs,
                reverse=Need.TEACHER_REVERSE_KL in self.needs,
                mixture=self.method.mixture if Need.TEACHER_JENSEN_SHANNON in self.needs else None,
            )
        return ReferenceStates(
            states.hidden,
            states.weight,
            phi,
            forward=bool(self.needs & {Need.FORWARD_KL, Need.FLATTENED_LOG_PROB}),
            reverse=bool(self.needs & {Need.REVERSE_KL, Need.REFERENCE_LOG_PROB}),
            mixture=self.method.mixture if Need.JENSEN_SHANNON in self.needs else None,
        )

    def _with_distribution(self, at_token: AtToken, statistics: TokenStatistics) -> AtToken:
        """With what terms read of the frozen model's distribution, where the loss needs one."""
        if self.method.wants_teacher:
            return at_token._replace(
                teacher_forward_kl=statistics.forward_kl,
                teacher_reverse_kl=statistics.reverse_kl,
                teacher_jensen_shannon=statistics.jensen_shannon,
            )
        if not self.method.wants_reference_hidden:
            return at_token
        return at_token._replace(
            forward_kl=statistics.forward_kl,
            reverse_kl=statistics.reverse_kl,
            jensen_shannon=statistics.jensen_shannon,
            flattened_log_prob=statistics.flattened_log_prob,
            reference_log_prob=statistics.reference_log_prob,
        )

    def _of_responses(
        self, microbatch: Microbatch, policy: HeadStates
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of each response token, its response's mean log π / π_old, and its mean importance weight.

        None where no term needs them. Costs a pass over the head, but where both are known to be 1: on the
        step's first update without importance correction.
        """
        if not self.needs & OF_SEQUENCES:
            return None, None
        chosen = microbatch.is_response
        engine = microbatch.engine_log_probs[chosen]
        if microbatch.old_log_probs is None and self.method.options.importance_correction == "off":
            return torch.zeros_like(engine), torch.ones_like(engine)
        head = self.head(policy.weight)
        log_prob = chunked_statistics(policy.hidden, microbatch.targets[chosen], head).log_prob
        old = log_prob if microbatch.old_log_probs is None else microbatch.old_log_probs[chosen]
        importance = self._importance(old, torch.where(microbatch.off_policy[chosen], old, engine))
        sequence = microbatch.sequences[chosen]
        totals = log_prob.new_zeros(3, microbatch.sequence_count)
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
