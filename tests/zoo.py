"""A step of few tokens in fp64, on which a method's loss is computed from whole logits, without the trainer.

All of a method's hooks are called as the trainer calls them, and its terms on what plain PyTorch makes of the
logits, so that the loss can be compared with a formula to 1e-10 (`tests/unit/test_zoo.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import megatron_rapo.methods
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import AtToken, Need
from megatron_rapo.policy.batch import make_samples

VOCABULARY = 7
LIMIT = 12  # longest response


@dataclass(frozen=True)
class One:
    """An episode.

    Attributes:
        reward: None is unknown.
        turns: of each of its sequences, the lengths of what was sampled between given tokens.
        answer: as it was judged.
    """

    reward: float | None
    turns: Sequence[Sequence[int]]
    answer: str | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.turns))


class Case:
    """A step: groups of episodes, and of every sampled token the logits of policy, old policy and reference.

    Attributes:
        groups: as the trainer has them.
        logits: of the policy, `[tokens, VOCABULARY]`; the gradient is taken in them.
        targets: `[tokens]`, what was sampled.
        episode, group: `[tokens]`, which of all episodes, and of all groups, a token belongs to.
        position: `[tokens]`, in its sequence, of sampled tokens.
    """

    def __init__(self, episodes: Sequence[Sequence[One]], columns: Sequence[Mapping[str, Any]] = ()) -> None:
        random = torch.Generator().manual_seed(0)
        flat = [one for group in episodes for one in group]
        lengths = torch.tensor([one.tokens for one in flat])
        total = int(lengths.sum())

        def logits(scale: float) -> Tensor:
            return scale * torch.randn(total, VOCABULARY, generator=random, dtype=torch.float64)

        self.old_logits = logits(1.5)
        self.logits = (self.old_logits + logits(0.4)).requires_grad_()
        self.reference_logits = self.old_logits + logits(0.5)
        self.targets = torch.randint(VOCABULARY, (total,), generator=random)
        self.episode = torch.arange(len(flat)).repeat_interleave(lengths)
        sizes = torch.tensor([len(group) for group in episodes])
        self.group = torch.arange(len(episodes)).repeat_interleave(sizes)[self.episode]
        self.rewards = [one.reward for one in flat]
        self.episodes, self.flat = episodes, flat
        columns = columns or [{}] * len(episodes)
        tokens = iter(self.targets.tolist())
        self.groups = [
            Group(
                Problem(f"p{number}", "?", columns=own),
                tuple(_scored(one, tokens) for one in group),
            )
            for number, (group, own) in enumerate(zip(episodes, columns, strict=True))
        ]
        spans = [sum(turns) for one in flat for turns in one.turns]
        self.position = torch.cat([torch.arange(span) for span in spans])

    def at_targets(self, logits: Tensor) -> Tensor:
        """Log-probs of what was sampled."""
        return logits.log_softmax(-1).gather(1, self.targets[:, None]).squeeze(1)

    def entropy(self, logits: Tensor) -> Tensor:
        """`[tokens]`."""
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    @property
    def log_prob(self) -> Tensor:
        return self.at_targets(self.logits)

    @property
    def old_log_prob(self) -> Tensor:
        return self.at_targets(self.old_logits)

    @property
    def reference_log_prob(self) -> Tensor:
        return self.at_targets(self.reference_logits)

    @property
    def ratio(self) -> Tensor:
        return (self.log_prob - self.old_log_prob).exp()

    def gradient(self, loss: Tensor) -> Tensor:
        """In the policy's logits."""
        return torch.autograd.grad(loss, self.logits)[0]


def _scored(one: One, tokens: Any) -> ScoredEpisode:
    sequences = []
    for turns in one.turns:
        sampled = [False, False]
        for number, turn in enumerate(turns):
            sampled += [False] * (number > 0) + [True] * turn
        mask = np.array(sampled)
        ids = np.array([next(tokens) if own else 0 for own in sampled], np.int32)
        log_probs = np.where(mask, -1.0, np.nan).astype(np.float32)
        sequences.append(TokenSequence(ids, mask, log_probs, np.where(mask, 0, -1).astype(np.int32)))
    outcome = Outcome.TIMEOUT if one.reward is None else Outcome.CORRECT if one.reward >= 1 else Outcome.WRONG
    return ScoredEpisode(
        Episode(tuple(sequences), f"text {one.answer}", truncated=one.truncated, facts=one.facts),
        Verification(outcome, one.answer, reward=one.reward),
    )


def a_method_of(
    kind: type[Method], options: Mapping[str, Any], responses: int = 4, name: str | None = None
) -> Method:
    """A method as a run of these options makes it."""
    own = {"method": name or kind.Options.model_fields["method"].default, **options}
    return kind(kind.Options.model_validate(own), Sampling(1.0, responses, LIMIT))


def loss_of(method: Method, case: Case, *, moved: bool = True) -> Tensor:
    """The method's loss of the case's only minibatch; `moved`: its update is not the step's first."""
    groups = case.groups if method.reads_responses else [group.brief() for group in case.groups]
    [samples] = make_samples(groups, method, VOCABULARY, len(groups))
    counts = [sample.sequence.sampled_tokens for sample in samples]

    def of_tokens(values: Sequence[Any]) -> Tensor:
        parts = [np.broadcast_to(value, count) for value, count in zip(values, counts, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float64))

    policy, old, reference = case.logits, case.old_logits, case.reference_logits
    phi = of_tokens([sample.phi for sample in samples])
    now = policy.detach() if moved and method.follows_policy else old
    annotated = Annotated(
        weights=of_tokens([sample.token_weight for sample in samples]),
        advantages=of_tokens([sample.advantage for sample in samples]),
        phi=phi,
        positions=case.position,
        engine_log_probs=case.old_log_prob,
        old_log_probs=case.old_log_prob,
        old_entropies=case.entropy(old),
        tempered_log_probs=None if method.tempered is None else case.at_targets(old / method.tempered),
        reference_log_probs=case.reference_log_prob if method.wants_reference else None,
        marks={name: of_tokens([sample.marks[name] for sample in samples]) for name in samples[0].marks},
        log_probs=case.at_targets(now),
        entropies=case.entropy(now),
        of_all_ranks=lambda values: values,
    )
    weights = method.weigh(annotated)
    marks = {**annotated.marks, **method.mark_tokens(annotated)}
    log_policy, log_reference = policy.log_softmax(-1), reference.log_softmax(-1)
    log_flattened = (phi[:, None] * log_reference).log_softmax(-1)
    log_middle = ((log_policy.exp() + log_reference.exp()) / 2).log()
    needed = {
        Need.FORWARD_KL: (log_flattened.exp() * (log_flattened - log_policy)).sum(-1),
        Need.REVERSE_KL: (log_policy.exp() * (log_policy - log_reference)).sum(-1),
        Need.JENSEN_SHANNON: (log_policy.exp() * (log_policy - log_middle)).sum(-1) / 2
        + (log_reference.exp() * (log_reference - log_middle)).sum(-1) / 2,
        Need.FLATTENED_LOG_PROB: case.at_targets(log_flattened),
        Need.REFERENCE_LOG_PROB: case.reference_log_prob,
        Need.IMPORTANCE: torch.ones_like(phi),
    }
    token = AtToken(
        log_prob=case.log_prob,
        entropy=case.entropy(policy),
        old_log_prob=case.old_log_prob,
        engine_log_prob=case.old_log_prob,
        advantage=annotated.advantages,
        phi=phi,
        position=case.position,
        marks=marks,
        **{need.value: needed[need] for need in method.needs},
    )
    losses = [coefficient * term(token)[0] for coefficient, term in method.terms()]
    return (weights * torch.stack(losses).sum(0)).sum()


def with_fault(name: str, before: str, after: str, use: Callable[[type[Method]], Any]) -> Any:
    """What `use` makes of a named method in whose file one text stands in place of another."""
    [file] = [Path(path) / f"{name}.py" for path in megatron_rapo.methods.__path__]
    source = file.read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{name}.py has {before!r} {source.count(before)} times"
    module = ModuleType(f"faulty_{name}")
    sys.modules[module.__name__] = module  # where annotations are looked up
    try:
        exec(compile(source.replace(before, after), str(file), "exec"), module.__dict__)
        return use(getattr(module, METHODS[name].__name__))
    finally:
        del sys.modules[module.__name__]


def with_reward(case: Sequence[Sequence[One]], reward: float | None) -> list[list[One]]:
    """The same episodes, all of one reward."""
    return [[replace(one, reward=reward) for one in group] for group in case]
