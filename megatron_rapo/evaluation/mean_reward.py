"""The mean reward of an evaluation's samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.counts import codes
from megatron_rapo.evaluation.draws import Draws
from megatron_rapo.evaluation.interval import Estimate, estimate_between

Floats = npt.NDArray[np.float64]


def mean_reward(samples: pyarrow.Table, problems: Sequence[str]) -> Estimate | None:
    """The mean over problems of the mean of a problem's known rewards; None where none is known.

    Problems without a known reward take no part. The interval takes it that rewards lie between the smallest
    and the largest of the samples, and 0 and 1.

    Args:
        samples: columns problem and reward of a store.
        problems: ids.
    """
    rewards = samples["reward"].to_numpy()
    known = ~np.isnan(rewards)
    if not known.any():
        return None
    rows = codes(samples.unify_dictionaries()["problem"], {name: at for at, name in enumerate(problems)})
    number = np.bincount(rows[known], minlength=len(problems))
    total = np.bincount(rows[known], rewards[known], minlength=len(problems))
    ends = min(0.0, float(rewards[known].min())), max(1.0, float(rewards[known].max()))
    return estimate_between(total[number > 0] / number[number > 0], ends)


def without_last(samples: pyarrow.Table, problems: Sequence[str], draws: Draws) -> pyarrow.Table:
    """The samples of an adaptive budget that a mean over them has no bias from.

    A problem that stopped did so at a correct sample; those before it are as any others (`sequential`).

    Args:
        samples: columns problem and sample of a store, and others.
        problems: ids.
        draws: how many samples of each problem count, and how many of them are correct.
    """
    rows = codes(samples.unify_dictionaries()["problem"], {name: at for at, name in enumerate(problems)})
    before = np.where(draws.correct == draws.stop, draws.samples - 1, draws.samples)
    return samples.filter(pyarrow.array(samples["sample"].to_numpy() < before[rows]))


def are_graded(samples: pyarrow.Table) -> bool:
    """Whether rewards say more than outcomes: one is known that is neither 1 of a correct sample nor 0 else.

    Args:
        samples: columns outcome and reward of a store.
    """
    places = {outcome.value: place for place, outcome in enumerate(Outcome)}
    outcomes = codes(samples.unify_dictionaries()["outcome"], places)
    rewards = samples["reward"].to_numpy()
    earned = (outcomes == places[Outcome.CORRECT]).astype(float)
    return bool((~np.isnan(rewards) & (rewards != earned)).any())
