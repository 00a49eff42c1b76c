"""The whole loss of a method's step, and what a paper's formula makes of the same tokens."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.policy.weighing import mark, weigh
from tests.ranks import replica_of

LIMIT = 16  # tokens of a response
TEMPERATURE, VOCABULARY, ROWS, HIDDEN = 0.7, 61, 64, 8
BAR = 1e-10
_RANDOM = np.random.default_rng(3)


def a_method(name: str, responses: int = 4, *, method: type[Method] | None = None, **options: Any) -> Method:
    """As a run of these options makes it, with `responses` of LIMIT tokens to a prompt."""
    method = method or METHODS[name]
    made = method.Options.model_validate({"method": name, **options})
    return method(made, Sampling(TEMPERATURE, responses, LIMIT))


def planted(name: str, old: str, new: str) -> type[Method]:
    """The method's class with another text in its file: a fault that a test is to find."""
    module = inspect.getmodule(METHODS[name])
    assert module is not None
    source = inspect.getsource(module)
    assert old in source, f"{name} has no {old!r}; plant another fault"
    faulty = types.ModuleType(f"faulty_{name}")
    sys.modules[faulty.__name__] = faulty  # pydantic looks annotations up there
    exec(compile(source.replace(old, new), faulty.__name__, "exec"), faulty.__dict__)
    return getattr(faulty, METHODS[name].__name__)


def an_episode(
    right: float | None,
    tokens: int,
    guide: Guide = PLAIN,
    *,
    answer: str | None = None,
    text: str = "",
    truncated: bool = False,
    turns: Sequence[int] = (),
    **facts: float,
) -> ScoredEpisode:
    """One of random tokens: rewarded with `right` (None: unknown), given where the guide has a response.

    With `turns`, it has so many tokens in each, and `tokens` given between them.
    """
    if turns:
        return replace(
            an_episode(right, sum(turns), guide, answer=answer, text=text),
            episode=_dialogue(turns, tokens, text),
        )
    token_ids = _RANDOM.integers(2, VOCABULARY, tokens).astype(np.int32)
    log_probs = _RANDOM.normal(-2.0, 0.5, tokens).astype(np.float32)
    sequence = TokenSequence.of_response((7, 8), token_ids, log_probs, version=0)
    if guide.response is not None:
        sequence = TokenSequence.of_text((7, 8), token_ids)
    outcome = Outcome.CRASH if right is None else Outcome.CORRECT if right >= 1.0 else Outcome.WRONG
    verification = Verification(outcome, answer, reward=right, facts=facts)
    return ScoredEpisode(Episode((sequence,), text, truncated=truncated), verification, guide)


def _dialogue(turns: Sequence[int], given: int, text: str) -> Episode:
    parts = [part for turn in turns for part in ((False, given), (True, turn))]
    sampled = np.repeat([part[0] for part in parts], [part[1] for part in parts])
    sequence = TokenSequence(
        token_ids=_RANDOM.integers(2, VOCABULARY, len(sampled)).astype(np.int32),
        sampled=sampled,
        log_probs=np.where(sampled, _RANDOM.normal(-2.0, 0.5, len(sampled)), np.nan).astype(np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
    )
    return Episode((sequence,), text)


def a_group(*episodes: ScoredEpisode, number: int = 0, question: str = "1+1", **columns: Any) -> Group:
    """The episodes of a problem with these columns."""
    problem = Problem(str(number), question, "2", token_ids=(7, 8), columns=columns)
    return Group(problem, episodes)


@dataclass(frozen=True)
class Said:
    """One episode's tokens, `[tokens]` each: under the policy (differentiable), before, by the engine."""

    scored: ScoredEpisode
    log_prob: Tensor
    old: Tensor
    engine: Tensor
    reference: Tensor
    entropy: Tensor

    @property
    def ratio(self) -> Tensor:
        return (self.log_prob - self.old).exp()


@dataclass
class Step:
    """A method's step over some groups, and the models of it.

    Attributes:
        gradient: of the loss, in the policy's hidden states.
    """

    method: Method
    groups: Sequence[Group]
    loss: float = field(init=False)
    gradient: Tensor = field(init=False)
    metrics: dict[str, float] = field(init=False)
    samples: list[Sample] = field(init=False)

    def __post_init__(self) -> None:
        method, groups = self.method, self.groups
        seen = groups if method.reads_responses else [group.brief() for group in groups]
        (brief,) = make_samples(seen, copy.deepcopy(method), VOCABULARY, len(groups))
        (whole,) = make_samples(groups, method, VOCABULARY, len(groups))
        assert [s.token_weight for s in brief] == [s.token_weight for s in whole]
        self.samples = whole
        batch = _exact(whole)
        count = int(batch.is_response.sum())
        self._policy, self._old, self._reference = (_model(count, seed) for seed in range(3))
        self._batch = batch
        batch.old_log_probs = self._spread(_chosen(self._old, batch))
        batch.old_entropies = self._spread(_entropy(self._old))
        group: Any = dist.group.WORLD
        weigh([[batch]], method, replica_of(group))
        mark([batch], method, replica_of(group))
        objective = Objective(method, temperature=TEMPERATURE, vocabulary=VOCABULARY, group=group)
        if method.wants_reference:
            plain, flattened = objective.reference_log_probs(self._reference, batch)
            batch.reference_log_probs, batch.flattened_log_probs = plain, flattened
        loss, sums, _ = objective(
            batch, self._policy, self._reference if objective.wants_reference_hidden else None
        )
        self.loss = float(loss.detach())
        (self.gradient,) = torch.autograd.grad(loss, [self._policy.hidden])
        self.metrics = dict(objective.metrics(sums))

    def plainly(self, paper: Callable[[list[list[Said]]], Tensor]) -> tuple[float, Tensor]:
        """The formula's loss of the same tokens, and its gradient by autograd."""
        values = [_chosen(model, self._batch) for model in (self._policy, self._old, self._reference)]
        values.append(_entropy(self._policy))
        lengths = [one.episode.trained_tokens for group in self.groups for one in group.episodes]
        parts = iter(zip(*(value.split(lengths) for value in values), strict=True))

        def said(scored: ScoredEpisode) -> Said:
            log_prob, old, reference, entropy = next(parts)
            own = [s for s in scored.episode.sequences if isinstance(s, TokenSequence)]
            engine = [np.nan_to_num(s.log_probs[s.trained]) for s in own]
            measured = torch.from_numpy(np.concatenate(engine or [np.zeros(0)])).double()
            return Said(scored, log_prob, old.detach(), measured, reference.detach(), entropy)

        loss = paper([[said(one) for one in group.episodes] for group in self.groups])
        (gradient,) = torch.autograd.grad(loss, [self._policy.hidden])
        return float(loss.detach()), gradient

    def apart(self, paper: Callable[[list[list[Said]]], Tensor]) -> float:
        """How far the formula's loss and gradient are from the method's, at most."""
        loss, gradient = self.plainly(paper)
        return max(abs(loss - self.loss), float((gradient - self.gradient).abs().max()))

    def _spread(self, values: Tensor) -> Tensor:
        whole = values.new_zeros(len(self._batch.targets))
        whole[self._batch.is_response] = values.detach()
        return whole


def _model(tokens: int, seed: int) -> HeadStates:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)
    head = torch.Generator().manual_seed(9)  # one head, so that ratios are near 1
    weight = torch.randn(ROWS, HIDDEN, generator=head, dtype=torch.float64) * 0.3
    if seed:
        hidden = _model(tokens, 0).hidden.detach() + 0.2 * hidden
    return HeadStates(hidden.requires_grad_(seed == 0), weight)


def _log_distribution(model: HeadStates) -> Tensor:
    return ((model.hidden @ model.weight.T)[:, :VOCABULARY] / TEMPERATURE).log_softmax(-1)


def _chosen(model: HeadStates, batch: Microbatch) -> Tensor:
    targets = batch.targets[batch.is_response]
    return _log_distribution(model).gather(1, targets[:, None]).squeeze(1)


def _entropy(model: HeadStates) -> Tensor:
    own = _log_distribution(model)
    return -(own.exp() * own).sum(-1)


def _exact(samples: Sequence[Sample]) -> Microbatch:
    """The samples in one microbatch, what the method says of them in fp64."""
    names = list(samples[0].marks)
    batch = pack(samples, sequence_multiple=1, mark_names=names)

    def of_tokens(values: Sequence[Any]) -> Tensor:
        whole = torch.zeros(len(batch.targets), dtype=torch.float64)
        parts = [
            np.broadcast_to(np.asarray(value, float), (sample.sequence.trained_tokens,))  # type: ignore[union-attr]
            for value, sample in zip(values, samples, strict=True)
        ]
        whole[batch.is_response] = torch.from_numpy(np.concatenate(parts))
        return whole

    batch.weights = of_tokens([sample.token_weight for sample in samples])
    batch.advantages = of_tokens([sample.advantage for sample in samples])
    batch.phi = of_tokens([sample.phi for sample in samples])
    batch.marks = {name: of_tokens([sample.marks[name] for sample in samples]) for name in names}
    batch.engine_log_probs = batch.engine_log_probs.double()
    return batch
