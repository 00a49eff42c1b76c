"""What an evaluation came to on one data set at one setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.counts import COUNTED, Counts, codes, count
from megatron_rapo.evaluation.draws import tries
from megatron_rapo.evaluation.interval import Estimate, estimate
from megatron_rapo.evaluation.majority import majority_at_k
from megatron_rapo.evaluation.mean_reward import are_graded, mean_reward, without_last
from megatron_rapo.evaluation.pass_at_k import pass_at_k

Values = npt.NDArray[np.float64]

COLUMNS = (*COUNTED, "reward")
"""The columns of the store that statistics are made of."""


@dataclass(frozen=True)
class Lengths:
    """Response tokens, over all samples."""

    mean: float
    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class Statistics:
    """Means over problems, each with its 95% interval; shares of all samples.

    Attributes:
        samples: the fewest samples of a problem, and the most.
        drawn: samples of all problems together.
        mean: mean@N, the mean share of correct samples.
        pass_at_k: unbiased, by k.
        majority_at_k: by k.
        reward: of the samples whose reward is known; None where none is.
        graded: whether rewards say more than the outcomes, 1 of a correct sample and 0 of another.
        outcomes: share of each outcome.
        unextracted: share of samples in which no final answer was found.
        truncated: share of samples that were cut at the length limit.
    """

    problems: int
    samples: tuple[int, int]
    drawn: int
    mean: Estimate
    pass_at_k: Mapping[int, Estimate]
    majority_at_k: Mapping[int, Estimate]
    reward: Estimate | None
    graded: bool
    outcomes: Mapping[Outcome, float]
    unextracted: float
    truncated: float
    lengths: Lengths

    @property
    def unknown(self) -> float:
        """Share of samples that could not be verified (timeout, crash); they count as not correct."""
        return sum(share for outcome, share in self.outcomes.items() if not outcome.known)


def summarise(
    samples: pyarrow.Table,
    problems: Sequence[str],
    ks: Sequence[int],
    *,
    seed: int,
    majority_ks: Sequence[int] | None = None,
) -> Statistics:
    """The statistics of samples whose number did not depend on their outcomes.

    Args:
        samples: the `COLUMNS` of a store.
        problems: ids; each needs max(ks) samples.
        ks: of pass@k.
        seed: of the subsets that maj@k is the mean over; the same seed gives the same numbers.
        majority_ks: of maj@k; None: `ks`.

    Raises:
        RapoError: a problem has fewer samples than a k.
    """
    counts = count(samples, problems)
    majority_ks = list(ks if majority_ks is None else majority_ks)
    check_k(counts, [*ks, *majority_ks])
    return _statistics(
        samples,
        counts,
        mean=counts.correct / counts.samples,
        passes={k: pass_at_k(counts.correct, counts.samples, k) for k in ks},
        majorities=_majorities(samples, problems, majority_ks, seed),
        reward=mean_reward(samples, problems),
    )


def summarise_adaptive(
    samples: pyarrow.Table, problems: Sequence[str], ks: Sequence[int], *, correct: int, most: int
) -> Statistics:
    """The statistics of samples that stopped at the `correct`-th correct one of each problem.

    Mean, pass@k and mean reward are unbiased (`sequential`). There is no maj@k; outcomes, lengths and
    truncation are those of the samples that were drawn, of which hard problems have more.

    Args:
        samples: the `COLUMNS` of a store, and `sample`.
        problems: ids.
        ks: at most `most`.
        correct, most: r and N of the stopping rule.

    Raises:
        RapoError: a problem is still open, or a k too large.
    """
    if max(ks, default=1) > most:
        raise RapoError(f"k = {max(ks)} needs as many samples, but {most} were the most; ask for smaller k")
    draws = tries(samples, problems, most, correct).draws()
    return _statistics(
        samples,
        count(samples, problems),
        mean=draws.pass_at_k(1),
        passes={k: draws.pass_at_k(k) for k in ks},
        majorities={},
        reward=mean_reward(without_last(samples, problems, draws), problems),
    )


def _statistics(
    samples: pyarrow.Table,
    counts: Counts,
    *,
    mean: Values,
    passes: Mapping[int, Values],
    majorities: Mapping[int, Values],
    reward: Estimate | None,
) -> Statistics:
    total = int(counts.samples.sum())
    lengths = samples["length"].to_numpy()
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return Statistics(
        problems=len(counts.problems),
        samples=(int(counts.samples.min()), int(counts.samples.max())),
        drawn=total,
        mean=estimate(mean),
        pass_at_k={k: estimate(values) for k, values in passes.items()},
        majority_at_k={k: estimate(values) for k, values in majorities.items()},
        reward=reward,
        graded=are_graded(samples),
        outcomes={outcome: int(getattr(counts, outcome.value).sum()) / total for outcome in Outcome},
        unextracted=int(counts.unextracted.sum()) / total,
        truncated=int(counts.truncated.sum()) / total,
        lengths=Lengths(float(lengths.mean()), float(median), float(p95), int(lengths.max())),
    )


def check_k(counts: Counts, ks: Sequence[int]) -> None:
    """Refuses a k for which a problem has too few samples.

    Raises:
        RapoError: names the problem with the fewest.
    """
    fewest = int(counts.samples.argmin())
    if max(ks) > counts.samples[fewest]:
        raise RapoError(
            f"k = {max(ks)} needs as many samples of each problem, but problem {counts.problems[fewest]} has "
            f"{counts.samples[fewest]}; ask for smaller k, or finish the evaluation with more samples"
        )


def _majorities(
    samples: pyarrow.Table, problems: Sequence[str], ks: Sequence[int], seed: int
) -> Mapping[int, npt.NDArray[np.float64]]:
    """`[problems]` maj@k by k."""
    values = {k: np.zeros(len(problems)) for k in ks}
    if not ks:
        return values
    samples = samples.unify_dictionaries()
    rows = codes(samples["problem"], {name: place for place, name in enumerate(problems)})
    votes = _votes(samples)
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(len(problems) + 1))
    generator = np.random.default_rng(seed)
    for place in range(len(problems)):
        mine = votes[order[starts[place] : starts[place + 1]]]
        for k, value in majority_at_k(mine, ks, generator).items():
            values[k][place] = value
    return values


def _votes(samples: pyarrow.Table) -> npt.NDArray[np.int64]:
    """Which answer each sample gives: 0 a correct one, -1 none, else a number for each text."""
    texts = pyarrow.compute.replace_substring_regex(
        samples["extracted"].combine_chunks(), pattern=r"\s", replacement=""
    )
    encoded = texts.dictionary_encode().indices.fill_null(-2).to_numpy(zero_copy_only=False)
    votes = encoded.astype(np.int64) + 1  # -1 where nothing was extracted; 0 is left for correct answers
    correct = codes(samples["outcome"], {outcome.value: i for i, outcome in enumerate(Outcome)}) == list(
        Outcome
    ).index(Outcome.CORRECT)
    votes[correct] = 0
    return votes
