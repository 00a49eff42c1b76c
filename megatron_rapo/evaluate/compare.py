"""A model against its base, from two stored evaluations of the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate.counts import COUNTED, Counts, count
from megatron_rapo.evaluate.frontier import Crossover, Paired, crossover, curve, grid, paired
from megatron_rapo.evaluate.hard_subset import HardSubset, hard_subset
from megatron_rapo.evaluate.ledger import Entry, ledger
from megatron_rapo.evaluate.pass_at_k import Estimate
from megatron_rapo.evaluate.store import Evaluation

Pair = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Comparison:
    """One data set at one setting.

    Attributes:
        ks: of the curves, from 1 to the fewest samples that any problem has in both.
        base, model: the curves, an estimate for each k.
        tests: the paired test at each k that was asked for.
        ledger: an entry for each problem.
        hard: the problems that the base never solved.
        control: what controls the hard subset: an evaluation's directory, or some of the base's samples.
    """

    data: str
    setting: str
    ks: tuple[int, ...]
    base: tuple[Estimate, ...]
    model: tuple[Estimate, ...]
    crossover: Crossover
    tests: tuple[Paired, ...]
    ledger: tuple[Entry, ...]
    hard: HardSubset
    control: str


def compare(
    base: Evaluation,
    model: Evaluation,
    ks: Sequence[int],
    *,
    control: Evaluation | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compares all that both have sampled.

    Args:
        base, model: of the same problems, by the same prompts, settings and verifier.
        ks: of the paired tests; those beyond the samples are left out.
        control: another evaluation of the base, with another seed. None: the hard subset is chosen by the
            base's samples of even numbers, and controlled by the others.
        seed: of the resampling.

    Raises:
        RapoError: they are of different problems, or sampled in different ways, or not comparable otherwise.
    """
    _check_same(base, model)
    if control is not None:
        _check_same(base, control)
        _check_control(base, control)
    common = [pair for pair in base if pair in set(model)]
    return [_compare(base, model, control, data, setting, ks, seed) for data, setting in common]


def _compare(
    base: Evaluation,
    model: Evaluation,
    control: Evaluation | None,
    data: str,
    setting: str,
    ks: Sequence[int],
    seed: int,
) -> Comparison:
    ids = [problem.id for problem in base.problems(data)]
    old, new = (_pair(e.samples(data, setting).counts()) for e in (base, model))
    fewest = int(min(old[1].min(), new[1].min()))
    if fewest == 0:
        raise RapoError(
            f"{data} {setting} has problems without a sample in {base.directory} or {model.directory}; "
            "finish both evaluations (run the same commands again)"
        )
    steps = grid(fewest)
    choosing, other, fresh = _for_hard_subset(base, model, control, data, setting)
    return Comparison(
        data=data,
        setting=setting,
        ks=tuple(steps),
        base=tuple(curve(*old, steps, seed=seed)),
        model=tuple(curve(*new, steps, seed=seed)),
        crossover=crossover(old, new, steps, seed=seed),
        tests=tuple(paired(old, new, k, seed=seed) for k in ks if k <= fewest),
        ledger=tuple(ledger(ids, old, new)),
        hard=hard_subset(ids, choosing, other, fresh, seed=seed),
        control="the base's samples of odd numbers" if control is None else str(control.directory),
    )


def _pair(counts: Counts) -> Pair:
    return counts.correct, counts.samples


def _for_hard_subset(
    base: Evaluation, model: Evaluation, control: Evaluation | None, data: str, setting: str
) -> tuple[Pair, Pair, Pair]:
    """What chooses the hard problems, what controls the choice, and what the model is judged by.

    The latter two must be independent of what chooses. Samples of the same number share their randomness
    where evaluations have the same seed, so then the model is judged by numbers that took no part in the
    choice.
    """
    shared = base.manifest.seed == model.manifest.seed
    even, odd = _halves(base, data, setting)
    judged = _halves(model, data, setting)[1] if shared else _pair(model.samples(data, setting).counts())
    if control is None:
        return even, odd, judged
    controlling = _pair(control.samples(data, setting).counts())
    return (even if shared else _pair(base.samples(data, setting).counts())), controlling, judged


def _halves(evaluation: Evaluation, data: str, setting: str) -> tuple[Pair, Pair]:
    """Counts of the samples with even and with odd numbers."""
    store = evaluation.samples(data, setting)
    samples = store.read([*COUNTED, "sample"])
    parity = pyarrow.compute.bit_wise_and(samples["sample"], 1)
    ids = [problem.id for problem in store.problems]
    even, odd = (_pair(count(samples.filter(pyarrow.compute.equal(parity, half)), ids)) for half in (0, 1))
    if odd[1].min() == 0:
        raise RapoError(
            f"{evaluation.directory} has a single sample of some problems of {data}, which leaves no "
            "control of the hard subset; evaluate with more samples"
        )
    return even, odd


def _check_same(base: Evaluation, other: Evaluation) -> None:
    theirs = {data.name: data for data in other.manifest.data}
    settings = {setting.name: setting for setting in other.manifest.settings}
    where = f"{base.directory} and {other.directory}"
    common = [data for data in base.manifest.data if data.name in theirs]
    if not common or not settings.keys() & {setting.name for setting in base.manifest.settings}:
        raise RapoError(
            f"{where} have no data set and setting in common ({', '.join(map(' '.join, base))} and "
            f"{', '.join(map(' '.join, other))}); evaluate both on the same"
        )
    for data in common:
        if data.fingerprint != theirs[data.name].fingerprint:
            raise RapoError(
                f"{where} were evaluated on different problems: {data.name} is {data.source} "
                f"({data.problems} problems, fingerprint {data.fingerprint}) and {theirs[data.name].source} "
                f"({theirs[data.name].problems}, {theirs[data.name].fingerprint}); evaluate both on the same"
            )
        for what in ("prompts", "verifier"):
            mine, their = getattr(base.manifest, what)[data.name], getattr(other.manifest, what)[data.name]
            if mine != their:
                raise RapoError(
                    f"{where} differ in the {what} of {data.name} ({mine} and {their}): another template, "
                    "tokenizer or verifier; evaluate both alike"
                )
    for setting in base.manifest.settings:
        if setting.name in settings and settings[setting.name] != setting:
            raise RapoError(
                f"{where} differ in setting {setting.name}: {setting} and {settings[setting.name]}; evaluate "
                "both alike"
            )
    for evaluation in (base, other):
        if evaluation.manifest.adaptive:
            raise RapoError(
                f"{evaluation.directory} was sampled with an adaptive budget, so that its counts depend on "
                "outcomes; compare evaluations with a fixed number of samples"
            )


def _check_control(base: Evaluation, control: Evaluation) -> None:
    if control.manifest.seed == base.manifest.seed:
        raise RapoError(
            f"{control.directory} has the seed of {base.directory}, {base.manifest.seed}: its samples are "
            "the same ones, and no control; evaluate the base once more with --set run.seed=… another"
        )
    if control.manifest.model.fingerprint != base.manifest.model.fingerprint:
        raise RapoError(
            f"{control.directory} is of other weights than {base.directory} "
            f"({control.manifest.model.path}, {base.manifest.model.path}); the control must be of the base"
        )
