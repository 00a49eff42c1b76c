"""The numbers of a stored evaluation: as JSON, as CSV, and as a table for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.statistics import COLUMNS, Statistics, summarise, summarise_adaptive
from megatron_rapo.evaluation.store import Evaluation

EXAMPLES = 3  # of failed extractions that are shown
EXCERPT = 200  # characters of each, from its end


@dataclass(frozen=True)
class Result:
    """The statistics of one data set at one setting."""

    data: str
    setting: str
    statistics: Statistics


def compute(evaluation: Evaluation, ks: Sequence[int]) -> list[Result]:
    """The statistics of all data sets and settings.

    Raises:
        RapoError: a problem has fewer samples than a k.
    """
    results = []
    for data, setting in evaluation:
        store = evaluation.samples(data, setting)
        ids = [problem.id for problem in store.problems]
        manifest = evaluation.manifest
        samples = store.read([*COLUMNS, "sample"])
        if manifest.adaptive is None:
            statistics = summarise(samples, ids, ks, seed=manifest.seed)
        else:
            statistics = summarise_adaptive(
                samples, ids, ks, correct=manifest.adaptive, most=manifest.samples
            )
        results.append(Result(data, setting, statistics))
    return results


def write(results: Sequence[Result], directory: Path) -> None:
    """Writes results.json, with all there is, and results.csv, with a row for each number."""
    (directory / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    with (directory / "results.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "setting", "metric", "value", "low", "high"])
        for result in results:
            for name, value in _metrics(result.statistics):
                numbers = (
                    (value.mean, value.low, value.high) if isinstance(value, Estimate) else (value, "", "")
                )
                rows.writerow([result.data, result.setting, name, *numbers])


def flat(results: Sequence[Result]) -> dict[str, float]:
    """Each number by `DATA/SETTING/METRIC`, with `…_low` and `…_high` where it has an interval."""
    found: dict[str, float] = {}
    for result in results:
        for metric, value in _metrics(result.statistics):
            name = f"{result.data}/{result.setting}/{metric}"
            if isinstance(value, Estimate):
                found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                found[name] = value
    return found


def table(results: Sequence[Result]) -> str:
    """A block for each data set and setting, for a terminal."""
    blocks = []
    for result in results:
        fewest, most = result.statistics.samples
        number = str(most) if fewest == most else f"{fewest} to {most}"
        title = f"{result.data} {result.setting} · {result.statistics.problems} problems × {number} samples"
        rows = [(name, _shown(value)) for name, value in _metrics(result.statistics)]
        width = max(len(name) for name, _ in rows)
        blocks.append("\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)]))
        blocks[-1] += "".join(f"\n  {warning}" for warning in _warnings(result.statistics))
    return "\n\n".join(blocks)


def _warnings(statistics: Statistics) -> Iterator[str]:
    """What keeps the numbers from meaning what they seem to."""
    if statistics.unknown:
        yield (
            f"{statistics.unknown:.2%} of the samples could not be verified (timeout or crash); they count "
            "as not correct"
        )
    if statistics.outcomes.get(Outcome.CORRECT, 0.0) == 0.0:
        yield (
            f"no sample is correct, and in {statistics.unextracted:.0%} no answer was found: the model may "
            "not have been made for these problems, this template or this form of answers; look at some "
            "responses"
        )


def examples_of_failed_extraction(evaluation: Evaluation) -> str:
    """The ends of some responses in which no answer was found; empty if there are none."""
    blocks = []
    for data, setting in evaluation:
        shown: list[str] = []
        columns = ["problem", "sample", "extracted", "text"]
        for batch in evaluation.samples(data, setting).stream(columns, outcome=Outcome.WRONG):
            shown += [
                f"  {row['problem']} #{row['sample']}: …{row['text'][-EXCERPT:]!r}"
                for row in batch.to_pylist()
                if row["extracted"] is None
            ]
            if len(shown) >= EXAMPLES:
                break
        if shown:
            title = f"no answer was found in ({data} {setting}), for example:"
            blocks.append("\n".join([title, *shown[:EXAMPLES]]))
    return "".join(f"{block}\n\n" for block in blocks)


def _metrics(statistics: Statistics) -> Iterator[tuple[str, Estimate | float]]:
    if statistics.graded and statistics.reward is not None:
        yield "reward", statistics.reward
    yield f"mean@{statistics.samples[1]}", statistics.mean
    for k, estimate in statistics.pass_at_k.items():
        yield f"pass@{k}", estimate
    for k, estimate in statistics.majority_at_k.items():
        yield f"maj@{k}", estimate
    for outcome, share in statistics.outcomes.items():
        yield outcome.value, share
    yield "no answer found", statistics.unextracted
    yield "truncated", statistics.truncated
    for name, tokens in asdict(statistics.lengths).items():
        yield f"tokens {name}", tokens


def _shown(value: Estimate | float) -> str:
    if isinstance(value, Estimate):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return f"{value:,.0f}" if value > 1 else f"{value:.3f}"
