"""A toy policy, and a method's loss of it under a layout: all between a step's groups and the loss is real.

The toy's final hidden states are a function of what a microbatch says of the token itself, so that how tokens
are packed, cut and spread over ranks cannot change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import Parallel
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.episode.group import Group
from megatron_rapo.loss.chunked import chunked_statistics
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.methods.method import Method
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.policy.weighing import mark, weigh
from megatron_rapo.testing.ranks import alone, on_ranks

HIDDEN = 8
MULTIPLE = 4  # sequences are padded to; a zig-zag over two ranks needs it
_MOVED = 0.2  # how far the policy is from the one that the step began with, as its parameters' deviation
_LIKELY = 4.0  # how much likelier some of the sampled tokens are made


class Toy(NamedTuple):
    """Parameters, in fp64: `[vocabulary, hidden]`, `[positions, hidden]`, and the head, `[rows, hidden]`."""

    embedding: Tensor
    position: Tensor
    head: Tensor

    @classmethod
    def random(cls, seed: int, vocabulary: int, positions: int) -> Toy:
        """One whose head has an even number of rows, some without a token."""
        generator = torch.Generator().manual_seed(seed)
        rows = (vocabulary // 2 + 1) * 2
        sizes = (vocabulary, positions, rows)
        return cls(*(torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in sizes))

    def moved(self, by: Sequence[Tensor], step: float) -> Toy:
        """Each parameter by so many steps."""
        return Toy(*(own + step * change for own, change in zip(self, by, strict=True)))

    def shard(self, group: dist.ProcessGroup) -> Toy:
        """With a rank's rows of the head."""
        return self._replace(head=self.head.chunk(group.size())[group.rank()])

    def states(self, microbatch: Microbatch, likely: Tensor) -> HeadStates:
        """Of all of a microbatch's tokens; `likely` is a head whose rows pull towards the targets."""
        strength = _LIKELY * (microbatch.position_ids % 4) / HIDDEN
        hidden = self.embedding[microbatch.token_ids] + self.position[microbatch.position_ids]
        return HeadStates(hidden + strength[:, None] * likely[microbatch.targets], self.head)


@dataclass(frozen=True)
class Layout:
    """How one loss is computed.

    Attributes:
        chunk: `loss_chunk_tokens`.
        budget: tokens of a microbatch; None packs each sequence alone.
        backwards: whether the groups come in reverse order.
        tensor, context, data: ranks.
    """

    chunk: int = 1 << 20
    budget: int | None = 1 << 20
    backwards: bool = False
    tensor: int = 1
    context: int = 1
    data: int = 1


class Step:
    """What a rank has of a step: its microbatches, annotated.

    Attributes:
        objective: of the method.
        objective_of: makes that of another method, on the same ranks.
    """

    def __init__(
        self,
        method: Method,
        groups: Sequence[Group],
        vocabulary: int,
        layout: Layout,
        everyone: dist.ProcessGroup,
    ) -> None:
        only = alone()
        self._tensor_group = everyone if layout.tensor > 1 else only
        context_group = everyone if layout.context > 1 else only
        gradient_group = everyone if layout.context * layout.data > 1 else only
        self.objective_of = partial(
            Objective,
            temperature=method.configured.temperature,
            vocabulary=vocabulary,
            group=self._tensor_group,
            context_group=context_group,
        )
        self.objective = self.objective_of(method)
        [samples] = make_samples(
            groups[::-1] if layout.backwards else groups, method, vocabulary, len(groups)
        )
        lengths = [padded_length(len(sample.sequence), MULTIPLE) for sample in samples]
        plan = plan_microbatches(lengths, replicas=layout.data, token_budget=layout.budget or max(lengths))[
            everyone.rank() if layout.data > 1 else 0
        ]
        self.microbatches = [
            pack(
                [samples[index] for index in chosen],
                sequence_multiple=MULTIPLE,
                mark_names=samples[0].marks,
                context_rank=everyone.rank() if layout.context > 1 else 0,
                context_ranks=layout.context,
            )
            for chosen in plan
        ]
        old, self._reference = (Toy.random(seed, vocabulary, max(lengths)) for seed in (0, 1))
        self._likely = old.head
        self._annotate(old)
        placement = Placement(
            layout=Parallel(data_parallel=gradient_group.size()),
            rank=gradient_group.rank(),
            tensor_rank=0,
            pipeline_rank=0,
            context_rank=0,
            data_rank=gradient_group.rank(),
            expert_tensor_rank=0,
            tensor_group=self._tensor_group,
            expert_tensor_group=only,
            pipeline_group=only,
            context_group=context_group,
            gradient_group=gradient_group,
            replica_group=only,
            host_group=gradient_group,
        )
        weigh([self.microbatches], method, placement)
        now = self._statistics(self.policy()) if method.follows_policy else None
        mark(self.microbatches, method, placement, now)

    def loss(self, policy: Toy, objective: Objective | None = None) -> Tensor:
        """This rank's part of the loss; by default, of the method's objective."""
        objective = objective or self.objective
        total = torch.zeros((), dtype=torch.float64)
        for microbatch in self.microbatches:
            reference = None
            if objective.wants_distribution:
                reference = self._of_responses(self._reference, microbatch)
            total = total + objective(microbatch, self._of_responses(policy, microbatch), reference)[0]
        return total

    def policy(self) -> Toy:
        """The policy of the step's update, of which this rank has its rows of the head."""
        old = Toy.random(0, len(self._reference.embedding), len(self._reference.position))
        noise = Toy.random(2, len(old.embedding), len(old.position))
        return old.moved(noise, _MOVED).shard(self._tensor_group)

    def _of_responses(self, toy: Toy, microbatch: Microbatch) -> HeadStates:
        states = toy.states(microbatch, self._likely)
        return HeadStates(states.hidden[microbatch.is_response], states.weight)

    def _annotate(self, old: Toy) -> None:
        """As policy and reference do before a step's first update."""
        old, self._reference = (toy.shard(self._tensor_group) for toy in (old, self._reference))
        for microbatch, statistics in zip(self.microbatches, self._statistics(old), strict=True):
            microbatch.old_log_probs, microbatch.old_entropies = statistics.log_prob, statistics.entropy
        if (tempered := self.objective.method.tempered) is not None:
            for microbatch, statistics in zip(
                self.microbatches, self._statistics(old, tempered), strict=True
            ):
                microbatch.tempered_log_probs = statistics.log_prob
        for microbatch in self.microbatches:
            if self.objective.method.wants_reference and not self.objective.wants_reference_hidden:
                plain, flattened = self.objective.reference_log_probs(
                    self._of_responses(self._reference, microbatch), microbatch
                )
                microbatch.reference_log_probs, microbatch.flattened_log_probs = plain, flattened

    def _statistics(self, toy: Toy, tempered: float = 1.0) -> list[TokenStatistics]:
        """Of all tokens of each microbatch, at a multiple of the temperature; the toy has a rank's rows."""
        found = []
        for microbatch in self.microbatches:
            states = toy.states(microbatch, self._likely)
            head = self.objective.head(states.weight)
            head = replace(head, temperature=head.temperature * tempered)
            found.append(chunked_statistics(states.hidden, microbatch.targets, head))
        return found


def samples_of(method: Method, groups: Sequence[Group], vocabulary: int) -> list[Sample]:
    """What a method makes of a step: it sees tokens and texts only where it says that it reads them."""
    seen = groups if method.reads_responses else [group.brief() for group in groups]
    [samples] = make_samples(seen, method, vocabulary, len(groups))
    sequences = [own for group in groups for one in group.episodes for own in one.episode.sequences]
    return [replace(sample, sequence=own) for sample, own in zip(samples, sequences, strict=True)]


def loss_and_gradient(
    new: Callable[[], Method], groups: Sequence[Group], vocabulary: int, layout: Layout
) -> tuple[float, Tensor]:
    """The loss of a step under a layout, and its gradient in all of the toy's parameters, as one vector.

    `new` makes the method of each rank.
    """

    def on_rank(everyone: dist.ProcessGroup) -> tuple[float, list[Tensor]]:
        step = Step(new(), groups, vocabulary, layout, everyone)
        policy = Toy(*(parameter.clone().requires_grad_() for parameter in step.policy()))
        loss = step.loss(policy)
        return float(loss.detach()), list(torch.autograd.grad(loss, list(policy)))

    found = on_ranks(layout.tensor * layout.context * layout.data, on_rank)
    losses, gradients = [loss for loss, _ in found], [gradient for _, gradient in found]
    embedding, position, head = ([own[place] for own in gradients] for place in range(3))
    whole_head = torch.cat(head) if layout.tensor > 1 else torch.stack(head).sum(0)
    parts = [torch.stack(embedding).sum(0), torch.stack(position).sum(0), whole_head]
    loss = losses[0] if layout.tensor > 1 else sum(losses)
    return loss, torch.cat([part.flatten() for part in parts])
