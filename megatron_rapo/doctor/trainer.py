"""The trainer's readings of responses, at the run's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.doctor.engines import Answer
from megatron_rapo.doctor.readings import COLUMNS, Readings, read
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.hidden_states import whole_tokens
from megatron_rapo.policy.pipeline import run_forward
from megatron_rapo.policy.policy import Policy

CHUNK_TOKENS = 128  # whose full logits exist at a time
SHAKE = 4.0


class Trainer:
    """The policy that answers are held against. All ranks call its methods together."""

    def __init__(self, config: RunConfig, policy: Policy, placement: Placement, vocabulary: int) -> None:
        """`vocabulary`: real tokens; the head's rows behind them are spare."""
        self._config = config
        self._policy = policy
        self._placement = placement
        self._vocabulary = vocabulary

    def foreign(self, answer: Answer) -> int:
        """How many of its tokens the trainer has not."""
        return int((answer.token_ids >= self._vocabulary).sum())

    def knows(self, answer: Answer) -> bool:
        """Whether the trainer has all of its tokens."""
        return self.foreign(answer) == 0

    def read(self, answers: Sequence[Answer], temperature: float) -> list[Readings]:
        """Readings of each answer's tokens, on all ranks.

        Args:
            answers: the same on all ranks; all tokens real.
            temperature: of the request.
        """
        if not answers:
            return []
        longest = max(len(answer.token_ids) for answer in answers)
        found = torch.zeros(len(answers), longest, COLUMNS, dtype=torch.float64)
        plan, microbatches = self._microbatches(answers)

        def collect(microbatch: Microbatch, hidden: Tensor) -> Tensor:
            chosen = microbatch.is_response
            states = whole_tokens(hidden, self._placement)[chosen]
            return self._read(states, microbatch.targets[chosen], temperature)

        columns = run_forward(self._policy.wrapped, microbatches, collect)
        if self._placement.tensor_rank == self._placement.data_rank == 0:  # the others have the same
            for numbers, microbatch, values in zip(plan, microbatches, columns, strict=False):
                chosen = microbatch.is_response
                rows = torch.tensor(numbers)[microbatch.sequences[chosen].cpu()]
                found[rows, microbatch.response_positions[chosen].cpu()] = values.cpu()
        dist.all_reduce(found, group=self._placement.host_group)
        return [
            Readings.of_columns(values[: len(answer.token_ids)].numpy())
            for answer, values in zip(answers, found, strict=True)
        ]

    @contextmanager
    def shaken(self) -> Iterator[None]:
        """Other weights for as long as the block lasts: the first norm, on which all else depends, scaled."""
        norm = None
        if self._placement.pipeline_rank == 0:
            named = self._policy.chunks[0].named_parameters()
            norm = next(p for name, p in named if p.dim() == 1 and "norm" in name)
        before = None if norm is None else norm.detach().clone()
        try:
            if norm is not None:
                # Of a norm that multiplies by 1 + weight, that factor.
                offset = float(self._policy.chunks[0].config.layernorm_zero_centered_gamma)
                norm.data.add_(offset).mul_(SHAKE).sub_(offset)
            yield
        finally:
            if norm is not None and before is not None:
                norm.data.copy_(before)

    def _microbatches(self, answers: Sequence[Answer]) -> tuple[list[list[int]], list[Microbatch]]:
        """Which answers are in which microbatch; every replica works through all of them."""
        layout, multiple = self._config.parallel, self._config.sequence_multiple
        lengths = [padded_length(len(answer.sequence), multiple) for answer in answers]
        budget = max(self._config.algorithm.max_tokens_per_microbatch, *lengths)
        (plan,) = plan_microbatches(
            lengths,
            replicas=1,
            token_budget=budget,
            count_multiple=layout.pipeline_parallel if layout.virtual_pipeline_parallel else 1,
        )
        total = max(sum(lengths[number] for number in numbers) for numbers in plan)
        return plan, [
            pack(
                [_sample(answers[number]) for number in numbers],
                sequence_multiple=multiple,
                total_tokens=total if layout.pipeline_parallel > 1 else None,
                context_rank=self._placement.context_rank,
                context_ranks=layout.context_parallel,
                device=device(),
            )
            for numbers in plan
        ]

    def _read(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """`[tokens, COLUMNS]`, from full logits of a few tokens at a time."""
        group, head = self._placement.tensor_group, self._policy.head_weight
        parts = [torch.zeros(0, COLUMNS, dtype=torch.float64, device=hidden.device)]
        for start in range(0, len(targets), CHUNK_TOKENS):
            local = (hidden[start : start + CHUNK_TOKENS] @ head.T).float()
            shards = [torch.empty_like(local) for _ in range(group.size())]
            dist.all_gather(shards, local.contiguous(), group=group)
            logits = torch.cat(shards, dim=1)[:, : self._policy.architecture.vocabulary]
            chunk = targets[start : start + CHUNK_TOKENS]
            parts.append(read(logits, chunk, self._vocabulary, temperature))
        return torch.cat(parts)


def _sample(answer: Answer) -> Sample:
    tokens = np.array(answer.sequence[len(answer.prompt) :], np.int32)  # log-probs are compared elsewhere
    return Sample(
        sequence=TokenSequence.of_response(
            answer.prompt, tokens, np.zeros(len(tokens), np.float32), version=0
        ),
        phi=1.0,
        advantage=0.0,
        token_weight=1.0,
    )
