"""The certificate's batch, of episodes that share a turn as well as their prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_rapo.certify import cases
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.methods.method import Method


def deep_batch(*_: Method) -> list[Group]:
    """The certificate's, with a turn of 20 tokens that a group's episodes share; one ends with it."""
    random = np.random.default_rng(5)

    def longer(group: Group) -> Group:
        turn = random.integers(0, cases.VOCABULARY, 20).astype(np.int32)
        log_probs = random.normal(-4.0, 0.3, 20).astype(np.float32)
        episodes = []
        for number, one in enumerate(group.episodes):
            assert isinstance(one.episode, Episode)
            [sequence] = one.episode.sequences
            first = len(group.problem.token_ids)
            parts = [
                np.insert(values, first, turned)
                for values, turned in (
                    (sequence.token_ids, turn),
                    (sequence.sampled, [True] * 20),
                    (sequence.log_probs, log_probs + number / 10),
                    (sequence.versions, [0] * 20),
                )
            ]
            end = first + 20 if number == 3 else len(parts[0])
            whole = TokenSequence(*(values[:end] for values in parts))
            episodes.append(replace(one, episode=Episode((whole,), "")))
        return replace(group, episodes=tuple(episodes))

    return [longer(group) for group in cases.batch()]
