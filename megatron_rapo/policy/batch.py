"""From scored rollout groups to the microbatches of each update, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import (
    Microbatch,
    OwnChoices,
    Plan,
    Sample,
    pack,
    padded_length,
    plan_microbatches,
)
from megatron_rapo.data.trees import count_rows, pack_trees, plan_trees
from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.brief import BriefEpisode, BriefSequence
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement


def make_samples(
    groups: Sequence[Group], method: Method, vocabulary: int, minibatch_prompts: int
) -> list[list[Sample]]:
    """The training samples of each minibatch, one a sequence.

    The method looks at all groups at once; token weights are made over each minibatch, on every rank alike.
    `vocabulary` is the tokenizer's: a response with another token has no probability, and is masked.

    Raises:
        RapoError: the method does not take a reward, or does not say what it must of an episode.
    """
    _check_rewards(groups, method)
    asked = {
        hook: _checked(getattr(method, hook)(groups), hook, groups, method)
        for hook in ("choose", "advantages", "flatten", "off_policy")
    }
    marks = {
        name: _checked(said, f"mark_responses, of {name!r}", groups, method)
        for name, said in method.mark_responses(groups).items()
    }
    shared = [group.beginnings() if method.options.share_prompts else None for group in groups]
    judged = [
        [
            _Judged(
                scored,
                beginnings=None if (own := shared[place]) is None else own[number],
                in_loss=bool(asked["choose"][place][number]) and scored.reward is not None,
                advantage=asked["advantages"][place][number],
                phi=asked["flatten"][place][number],
                off_policy=bool(asked["off_policy"][place][number]),
                marks={name: said[place][number] for name, said in marks.items()},
            )
            for number, scored in enumerate(group.episodes)
        ]
        for place, group in enumerate(groups)
    ]
    starts = range(0, len(groups), minibatch_prompts)
    minibatches = [list(chain(*judged[start : start + minibatch_prompts])) for start in starts]
    return [_minibatch(minibatch, method, vocabulary) for minibatch in minibatches]


@dataclass(frozen=True)
class _Judged:
    """An episode, and what the method says of it."""

    scored: ScoredEpisode
    beginnings: Sequence[tuple[Beginning, ...]] | None
    in_loss: bool
    advantage: Any
    phi: Any
    off_policy: bool
    marks: Mapping[str, Any]


def plan_minibatches(minibatches: Sequence[Sequence[Sample]], config: RunConfig) -> list[Plan]:
    """Which replica trains on which samples of each minibatch, and in which microbatch.

    Lengths are all it needs, and what sequences share: every rank plans alike, so microbatches agree without
    communication.
    """
    layout, multiple = config.parallel, config.sequence_multiple
    budget = config.algorithm.max_tokens_per_microbatch
    options: dict[str, int] = {
        "replicas": layout.data_parallel,
        "token_budget": budget // multiple * multiple,
        "count_multiple": layout.pipeline_parallel if layout.virtual_pipeline_parallel else 1,
    }
    if config.algorithm.share_prompts:
        return [plan_trees(samples, **options) for samples in minibatches]
    return [
        plan_microbatches([padded_length(len(sample.sequence), multiple) for sample in samples], **options)
        for samples in minibatches
    ]


def build_minibatches(
    minibatches: Sequence[Sequence[Sample]],
    plans: Sequence[Plan],
    config: RunConfig,
    placement: Placement,
    choices: ChoiceShape | None = None,
) -> list[list[Microbatch]]:
    """Minibatches of samples (`make_samples`), each as this rank's packed microbatches.

    Of this replica's samples, which must have their tokens, this context-parallel rank's tokens become
    tensors. So do the choices of experts that samples have, where `choices` says of which shape.
    """
    own_choices = None
    if choices is not None:
        cut = config.parallel.sequence_parallel
        own_choices = OwnChoices(
            choices,
            placement.layers_of(choices.layers),
            placement.tensor_rank if cut else 0,
            config.parallel.tensor_parallel if cut else 1,
        )
    mine = [
        [[samples[index] for index in chosen] for chosen in plan[placement.data_rank]]
        for samples, plan in zip(minibatches, plans, strict=True)
    ]
    multiple, total_tokens = config.sequence_multiple, _common_length(mine, config)

    def packed(chosen: Sequence[Sample], mark_names: Iterable[str]) -> Microbatch:
        if config.algorithm.share_prompts:
            return pack_trees(
                chosen,
                multiple=multiple,
                total_tokens=total_tokens,
                mark_names=mark_names,
                device=device(),
            )
        return pack(
            chosen,
            sequence_multiple=multiple,
            total_tokens=total_tokens,
            mark_names=mark_names,
            context_rank=placement.context_rank,
            context_ranks=config.parallel.context_parallel,
            device=device(),
            choices=own_choices,
        )

    return [
        [packed(chosen, samples[0].marks) for chosen in microbatches]
        for samples, microbatches in zip(minibatches, mine, strict=True)
    ]


def _check_rewards(groups: Sequence[Group], method: Method) -> None:
    low, high = method.reward_range
    for group in groups:
        for number, reward in enumerate(group.rewards):
            if reward is not None and not (low <= reward <= high and np.isfinite(reward)):
                raise RapoError(
                    f"response {number} to problem {group.problem.id} has reward {reward}, and "
                    f"{_named(method)} takes finite rewards from {low:g} to {high:g}; scale the "
                    "reward, or choose another algorithm.method"
                )


def _checked(said: OfEpisodes, hook: str, groups: Sequence[Group], method: Method) -> OfEpisodes:
    """What a hook says of each episode, `[groups][episodes]`; an array's rows may be longer."""
    found, wanted = [len(row) for row in said], [len(group.episodes) for group in groups]
    padded = isinstance(said, np.ndarray) and found == [max(wanted)] * len(wanted)
    if found != wanted and not padded:
        raise RapoError(
            f"{hook} of {_named(method)} returned {len(found)} groups of {sorted(set(found))} values, for "
            f"{len(wanted)} groups of {sorted(set(wanted))} episodes; return a value of each episode of each "
            "group"
        )
    return said


def _minibatch(judged: Sequence[_Judged], method: Method, vocabulary: int) -> list[Sample]:
    """The sequences of a minibatch's episodes, with token weights over all of it."""
    lengths = [one.scored.episode.trained_tokens for one in judged]
    in_loss = [one.in_loss and not one.scored.episode.leaves(vocabulary) for one in judged]
    kept = [place for place, keep in enumerate(in_loss) if keep]
    weights = np.zeros(len(judged))
    if kept:
        found = _numbers(method.aggregate([lengths[place] for place in kept]))
        if found.shape != (len(kept),) or not (np.isfinite(found) & (found >= 0)).all():
            raise RapoError(
                f"aggregate of {_named(method)} returned {found!r:.200} for {len(kept)} episodes; return a "
                "weight of each, from 0 up"
            )
        weights[kept] = found
    return [
        sample
        for one, weight in zip(judged, weights, strict=True)
        for sample in _samples(one, float(weight), method, vocabulary)
    ]


def _samples(judged: _Judged, weight: float, method: Method, vocabulary: int) -> Iterator[Sample]:
    """An episode's sequences, each with its part of what the method says of the episode."""
    episode, known = judged.scored.episode, judged.scored.reward is not None
    advantage = _of_tokens(judged.advantage if known else 0.0, "advantages", episode, method)
    marks = {
        name: _of_tokens(value, f"mark_responses, of {name!r}", episode, method)
        for name, value in judged.marks.items()
    }
    phi = _numbers(judged.phi)
    if phi.shape != () or not (np.isfinite(phi) and phi >= 0):
        raise RapoError(
            f"flatten of {_named(method)} returned {judged.phi!r}; return a finite number that is not "
            "negative"
        )
    start = 0
    sequences: Sequence[TokenSequence | BriefSequence] = episode.sequences
    for number, sequence in enumerate(sequences):
        end = start + sequence.trained_tokens
        yield Sample(
            sequence=sequence,
            phi=float(phi),
            advantage=_part(advantage, start, end),
            token_weight=weight,
            has_probability=not sequence.leaves(vocabulary),
            off_policy=judged.off_policy,
            marks={name: _part(values, start, end) for name, values in marks.items()},
            beginnings=() if judged.beginnings is None else judged.beginnings[number],
        )
        start = end


def _of_tokens(
    value: Any, hook: str, episode: Episode | BriefEpisode, method: Method
) -> npt.NDArray[np.float64]:
    """A finite number of an episode, or one of each of its trained tokens."""
    found = _numbers(value)
    if found.shape not in ((), (episode.trained_tokens,)) or not np.isfinite(found).all():
        raise RapoError(
            f"{hook} of {_named(method)} returned {value!r} for an episode of {episode.trained_tokens} "
            "trained tokens; return a finite number, or one for each of them"
        )
    return found


def _part(values: npt.NDArray[np.float64], start: int, end: int) -> float | npt.NDArray[np.float64]:
    return values[start:end] if values.shape else float(values)


def _numbers(value: Any) -> npt.NDArray[np.float64]:
    """What a method returned, as numbers; NaN if it is none."""
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return np.array(np.nan)


def _named(method: Method) -> str:
    return f'method "{method.options.method}"'


def _common_length(mine: Sequence[Sequence[Sequence[Sample]]], config: RunConfig) -> int | None:
    """What the replica's microbatches are padded to, if pipeline stages exchange their tensors."""
    if config.parallel.pipeline_parallel == 1:
        return None

    def tokens(samples: Sequence[Sample]) -> int:
        if config.algorithm.share_prompts:
            return count_rows(samples)
        return sum(padded_length(len(sample.sequence), config.sequence_multiple) for sample in samples)

    return max(tokens(samples) for microbatches in mine for samples in microbatches)
