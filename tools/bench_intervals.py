"""How often 95% intervals cover the truth, and how wide they are, by simulation.

    python tools/bench_intervals.py

Problems' chances of a correct sample are drawn from beta distributions, 64 samples of each problem from them.
Each cell says how often the interval covers the truth, and × its mean width over that of the true standard
deviation. Beside the product's interval stands the percentile bootstrap over problems. Differences are of two
models on the same problems: with the same chances (`same`), with chances p^0.7 (`better`), and shifted by a
normal number of logits around 0.5 (`shifted`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluation.interval import Estimate, estimate_differences, estimates
from megatron_rapo.evaluation.majority import majority_at_k
from megatron_rapo.evaluation.pass_at_k import pass_at_k

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]
Change = Callable[[np.random.Generator, Floats], Floats]

SAMPLES = 64
POPULATIONS = ((1, 1), (0.3, 0.7), (0.1, 2), (2, 5), (0.05, 1))
PROBLEMS = (30, 100, 500)
DATA_SETS, RESAMPLES = 2_000, 1_000
TRUTH = 2_000_000  # problems that the true mean and deviation are taken of


@dataclass(frozen=True)
class Quantity:
    """What is measured: `draw` gives its values, `[problems, data sets]`."""

    name: str
    draw: Draw
    interval: Callable[[Floats], list[Estimate]]


@dataclass(frozen=True)
class Measured:
    """Share of intervals that cover the truth, and their mean width over that of the true deviation."""

    covered: float
    width: float


def quantities() -> Iterator[Quantity]:
    """pass@k, maj@k and differences of pass@k in every population."""
    counts = np.arange(SAMPLES + 1)
    generator = np.random.default_rng(0)
    passes = {k: pass_at_k(counts, SAMPLES, k) for k in (1, 8, 64)}
    votes = [np.repeat([0, 1], [count, SAMPLES - count]) for count in counts]  # all wrong answers are alike
    majorities = {k: np.array([majority_at_k(vote, [k], generator)[k] for vote in votes]) for k in (8, 64)}
    for a, b in POPULATIONS:
        for name, by_k in (("pass", passes), ("maj", majorities)):
            for k, table in by_k.items():
                yield Quantity(f"{name}@{k}, Beta({a}, {b})", _values(table, a, b), estimates)
        for kind, change in CHANGES.items():
            for k, table in passes.items():
                draw = _differences(table, a, b, change)
                yield Quantity(f"Δ pass@{k} {kind}, Beta({a}, {b})", draw, estimate_differences)


def truth(quantity: Quantity, *, seed: int = 0, problems: int = TRUTH) -> tuple[float, float]:
    """Mean and standard deviation over many problems."""
    values = quantity.draw(np.random.default_rng([seed, 1]), (problems, 1))
    return float(values.mean()), float(values.std())


def measure(
    quantity: Quantity,
    problems: int,
    true: tuple[float, float],
    *,
    seed: int = 0,
    data_sets: int = DATA_SETS,
    interval: Callable[[Floats], list[Estimate]] | None = None,
) -> Measured:
    """An interval, by default the product's, on many data sets of so many problems."""
    values = quantity.draw(np.random.default_rng(seed), (problems, data_sets))
    ends = [(one.low, one.high) for one in (interval or quantity.interval)(values)]
    low, high = np.array(ends).T
    mean, deviation = true
    ideal = 2 * 1.96 * deviation / problems**0.5
    return Measured(float(((low <= mean) & (mean <= high)).mean()), float((high - low).mean()) / ideal)


def bootstrap(values: Floats) -> list[Estimate]:
    """The percentile bootstrap over problems; the same resamples serve all data sets."""
    problems = len(values)
    generator = np.random.default_rng(0)
    weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
    ends = np.quantile(weights @ values / problems, [0.025, 0.975], axis=0)
    return [Estimate(*one) for one in zip(values.mean(axis=0), *ends, strict=True)]


def _values(table: Floats, a: float, b: float) -> Draw:
    return lambda generator, shape: table[generator.binomial(SAMPLES, generator.beta(a, b, shape))]


def _differences(table: Floats, a: float, b: float, change: Change) -> Draw:
    def draw(generator: np.random.Generator, shape: tuple[int, int]) -> Floats:
        base = generator.beta(a, b, shape)
        model = change(generator, base)
        return table[generator.binomial(SAMPLES, model)] - table[generator.binomial(SAMPLES, base)]

    return draw


def _shifted(generator: np.random.Generator, base: Floats) -> Floats:
    base = np.clip(base, 1e-12, 1 - 1e-12)
    return 1 / (1 + (1 - base) / base * np.exp(-generator.normal(0.5, 1, base.shape)))


CHANGES: dict[str, Change] = {
    "same": lambda generator, base: base,
    "better": lambda generator, base: base**0.7,
    "shifted": _shifted,
}


def main() -> None:
    """Prints a Markdown table, a row for each quantity: coverage and width at each number of problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    seed = parser.parse_args().seed
    kinds: dict[str, list[tuple[Measured, ...]]] = {}
    print("| | " + " | ".join(f"{n}: interval | {n}: bootstrap" for n in PROBLEMS) + " |")
    print("|---" * (1 + 2 * len(PROBLEMS)) + "|")
    for quantity in quantities():
        true = truth(quantity, seed=seed)
        cells: list[str] = []
        for problems in PROBLEMS:
            own = measure(quantity, problems, true, seed=seed)
            resampled = measure(quantity, problems, true, seed=seed, interval=bootstrap)
            kinds.setdefault(f"{quantity.name[:4]}… at {problems}", []).append((own, resampled))
            cells += [f"{one.covered:.1%} × {one.width:.2f}" for one in (own, resampled)]
        print(f"| {quantity.name} | " + " | ".join(cells) + " |", flush=True)
    print("\n| lowest coverage, mean width | interval | bootstrap |\n|---|---|---|")
    for kind, pairs in kinds.items():
        columns = [
            f"{min(one.covered for one in of):.1%} × {sum(one.width for one in of) / len(of):.2f}"
            for of in zip(*pairs, strict=True)
        ]
        print(f"| {kind} | " + " | ".join(columns) + " |")
    print("\nThe standard error of a share of coverage is about 0.5%.")


if __name__ == "__main__":
    main()
