"""The turns of an episode: stretches that were sampled without a token given between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.episode import ScoredEpisode


def turns_of(one: ScoredEpisode) -> list[int]:
    """How many tokens each has, over all sequences."""
    return [tokens for sequence in one.episode.sequences for tokens in sequence.turns]


def spread(values: npt.ArrayLike, one: ScoredEpisode) -> npt.NDArray[np.float64]:
    """`[tokens]`: the value of each sampled token's turn, of a value a turn."""
    return np.repeat(np.asarray(values, np.float64), turns_of(one))
