"""Texts that the data give, in place of what engines would sample: no rollout, and no reward."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.experience.batch import Batch, Prompts
from megatron_rapo.experience.course import Known, Wanted
from megatron_rapo.experience.sharing import share
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.parallel.placement import Placement

# Their engine's log-probs are nobody's; without a text, since all ranks have the data.
_GIVEN = Guide(response="", name="given")


class Given:
    """In place of a `Collector`: each prompt's own text, as a group of one."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def begin(
        self,
        wanted: Wanted,
        *,
        chosen: Sampling,
        weight_version: int,
        seed: int,
        whole: bool = False,
        answers: Answers | None = None,
    ) -> Known:
        """The prompts' groups; see `Collector.begin`. They count as right, which nobody asks."""
        del chosen, seed, answers
        placement, prompts = self._placement, wanted.prompts
        own = slice(placement.data_rank, None, placement.layout.data_parallel)
        mine = list(map(_group, prompts[own] if placement.is_head else ()))
        problems = [prompt.problem for prompt in prompts]
        return Known(weight_version, lambda phase: share(problems, mine, placement, whole=whole))


def summarise_given(batch: Batch, prompts: Prompts) -> Mapping[str, float]:
    """What a step learns from, as metrics.

    Args:
        batch: of given texts.
        prompts: that they were drawn from.
    """
    lengths = [one.episode.trained_tokens for group in batch.groups for one in group.episodes]
    return {
        "data/epochs": prompts.position / prompts.size,
        "data/tokens_mean": float(np.mean(lengths)),
        "data/tokens_max": float(max(lengths)),
    }


def _group(prompt: Prompt) -> Group:
    assert prompt.demonstration is not None, "prompts were loaded without texts to learn"
    episode = Episode((prompt.demonstration,), "")
    return Group(prompt.problem, (ScoredEpisode(episode, Verification(Outcome.CORRECT), _GIVEN),))
