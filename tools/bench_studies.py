"""How often a study's intervals cover the truth, and how often equal arms are told apart, by simulation.

    python tools/bench_studies.py                  # all cells, minutes
    python tools/bench_studies.py --studies 500

A problem's chance of a correct sample is beta-distributed. In logits an arm adds its own effect on each
problem, each seed an effect on all problems (its deviation is the cell's) and one on each problem (deviation
0.3). Of these chances 256 samples are drawn. The truth is the mean over new seeds and new problems. Contrasts
go the product's way (`study.crossed`, `study.correction`, `study.added_seeds`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.study.added_seeds import enough
from megatron_rapo.study.correction import LEVEL, holm
from megatron_rapo.study.crossed import RESAMPLES, crossed

Floats = npt.NDArray[np.float64]

SAMPLES = 256
ARM_DEVIATION, REST_DEVIATION = 0.3, 0.3
TRUTH = (2_000, 2_000)  # seeds × problems
MOST_SEEDS = 40
CONTRASTS = 3  # of a study whose arms are all equal


@dataclass(frozen=True)
class Cell:
    """A population of studies.

    Attributes:
        beta: of the problems' chances.
        seed_deviation: of a seed's effect, in logits.
        shift: of one arm against the other, in logits; 0: equal arms.
        k: of pass@k.
    """

    seeds: int
    problems: int
    beta: tuple[float, float] = (0.3, 0.7)
    seed_deviation: float = 0.3
    shift: float = 0.0
    k: int = 16

    def __str__(self) -> str:
        arms = f"shifted by {self.shift:g}" if self.shift else "equal arms"
        return (
            f"{self.seeds} seeds × {self.problems} problems, Beta{self.beta}, seed deviation "
            f"{self.seed_deviation:g}, pass@{self.k}, {arms}"
        )


def cells() -> Iterator[Cell]:
    """Those that the table shows."""
    for seeds in (2, 3, 5, 10):
        for deviation in (0.1, 0.5):
            for k in (1, 16):
                for shift in (0.0, 0.7):
                    yield Cell(seeds, 128, seed_deviation=deviation, k=k, shift=shift)
    for beta in ((1.0, 1.0), (0.1, 2.0)):
        for shift in (0.0, 0.7):
            yield Cell(5, 64, beta, shift=shift)


def arms(cell: Cell, generator: np.random.Generator, number: int = 2) -> list[Floats]:
    """pass@k of arms on the same problems, `[seeds, problems]` each; the first one is not shifted."""
    chances = np.clip(generator.beta(*cell.beta, cell.problems), 1e-9, 1 - 1e-9)
    logits = np.log(chances / (1 - chances))
    by_count = pass_at_k(np.arange(SAMPLES + 1), SAMPLES, cell.k)
    found = []
    for arm in range(number):
        own = generator.normal(0, ARM_DEVIATION, (1, cell.problems))
        of_seeds = generator.normal(0, cell.seed_deviation, (cell.seeds, 1))
        rest = generator.normal(0, REST_DEVIATION, (cell.seeds, cell.problems))
        shifted = logits + own + of_seeds + rest + (cell.shift if arm else 0.0)
        found.append(by_count[generator.binomial(SAMPLES, 1 / (1 + np.exp(-shifted)))])
    return found


def truth(cell: Cell) -> float:
    """The difference over very many seeds and problems; 0 of equal arms."""
    if not cell.shift:
        return 0.0
    seeds, problems = TRUTH
    first, second = arms(replace(cell, seeds=seeds, problems=problems), np.random.default_rng(10_001))
    return float(second.mean() - first.mean())


@dataclass(frozen=True)
class Covered:
    """Shares of studies whose interval covers the truth, and the interval's mean width."""

    interval: float
    bootstrap: float
    width: float


def coverage(cell: Cell, studies: int, *, seed: int = 0, bootstrap: bool = True) -> Covered:
    """Of so many studies."""
    true, generator = truth(cell), np.random.default_rng(seed)
    held, resampled, width = 0, 0, 0.0
    for _ in range(studies):
        first, second = arms(cell, generator)
        found = crossed(second - first, (-1.0, 1.0), resamples=RESAMPLES // 4 if bootstrap else 0)
        held += found.low <= true <= found.high
        width += found.width
        if found.bootstrap is not None:
            resampled += found.bootstrap[0] <= true <= found.bootstrap[1]
    return Covered(held / studies, resampled / studies, width / studies)


def mistakes(cell: Cell, studies: int, *, seed: int = 0) -> tuple[float, float]:
    """Shares of studies of equal arms in which Holm, and in which the plain p, tells any two apart."""
    generator = np.random.default_rng(seed)
    corrected, plain = 0, 0
    for _ in range(studies):
        first, *others = arms(replace(cell, shift=0.0), generator, CONTRASTS + 1)
        p_values = [crossed(one - first, (-1.0, 1.0)).p_value for one in others]
        corrected += min(holm(p_values)) <= LEVEL
        plain += min(p_values) <= LEVEL
    return corrected / studies, plain / studies


def until_interval(cell: Cell, target: float, studies: int, *, seed: int = 0) -> tuple[float, float]:
    """Share of studies that cover the truth where seeds are added until they are narrow; mean seeds."""
    true, generator = truth(cell), np.random.default_rng(seed)
    held, used = 0, 0
    for _ in range(studies):
        first, second = arms(replace(cell, seeds=MOST_SEEDS), generator)
        looks: list[tuple[int, float]] = []
        for seeds in range(cell.seeds, MOST_SEEDS + 1):
            found = crossed((second - first)[:seeds], (-1.0, 1.0))
            looks.append((seeds, found.width))
            if enough(looks, target):
                break
        held += found.low <= true <= found.high
        used += seeds
    return held / studies, used / studies


def main() -> None:
    """Prints the tables of docs/studies.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=1_000, help="of each cell")
    studies = parser.parse_args().studies
    print("| studies | interval covers | bootstrap covers | mean width |\n|---|---|---|---|")
    for cell in cells():
        found = coverage(cell, studies)
        print(f"| {cell} | {found.interval:.1%} | {found.bootstrap:.1%} | {found.width:.3f} |", flush=True)
    print(f"\nequal arms, {CONTRASTS} contrasts: any told apart by Holm, by p without correction")
    for seeds in (3, 4, 5, 10):
        cell = Cell(seeds, 128)
        print("| {} | {:.1%} | {:.1%} |".format(cell, *mistakes(cell, studies)), flush=True)
    print("\nseeds added until the interval is narrow: covers, mean seeds")
    for target in (0.05, 0.06, 0.08):
        cell = Cell(5, 128, shift=0.7)
        covered, used = until_interval(cell, target, studies)
        print(f"| {cell}, width {target:g} | {covered:.1%} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
