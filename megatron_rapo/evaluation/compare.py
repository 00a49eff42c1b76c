"""A model against its base, from two stored evaluations of the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.control import check_control, choose
from megatron_rapo.evaluation.draws import stored_tries
from megatron_rapo.evaluation.frontier import Crossover, Paired, crossover, curve, grid, paired
from megatron_rapo.evaluation.hard_subset import HardSubset, hard_subset
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.ledger import Entry, ledger
from megatron_rapo.evaluation.store import Evaluation


@dataclass(frozen=True)
class Comparison:
    """One data set at one setting.

    Attributes:
        ks: of the curves, from 1 to the fewest samples that any problem has in both; with an adaptive budget
            to N, at which it gives a problem up.
        base, model: the curves, an estimate for each k.
        tests: the paired test at each k that was asked for.
        ledger: an entry for each problem.
        hard: the problems that the base never solved; None where nothing is left to judge them by.
        control: what controls the hard subset: an evaluation's directory, or some of the base's samples; or
            why there is none.
    """

    data: str
    setting: str
    ks: tuple[int, ...]
    base: tuple[Estimate, ...]
    model: tuple[Estimate, ...]
    crossover: Crossover
    tests: tuple[Paired, ...]
    ledger: tuple[Entry, ...]
    hard: HardSubset | None
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
        control: another evaluation of the base, with another seed, for the hard subset (`choose`); None: half
            of the base's samples.
        seed: of the tests' flips.

    Raises:
        RapoError: they are of different problems, or sampled in different ways, or not comparable otherwise.
    """
    _check_same(base, model)
    _check_budgets(base, model)
    if control is not None:
        _check_same(base, control)
        check_control(base, control)
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
    old, new = (stored_tries(evaluation, data, setting).draws() for evaluation in (base, model))
    most = min(old.most, new.most)
    if most == 0:
        raise RapoError(
            f"{data} {setting} has problems without a sample in {base.directory} or {model.directory}; "
            "finish both evaluations (run the same commands again)"
        )
    steps = grid(most)
    tests = {test.k: test for test in paired(old, new, sorted({*steps, *_within(ks, most)}), seed=seed)}
    choice = choose(base, model, control, data, setting)
    return Comparison(
        data=data,
        setting=setting,
        ks=tuple(steps),
        base=tuple(curve(old, steps)),
        model=tuple(curve(new, steps)),
        crossover=crossover([tests[k] for k in steps]),
        tests=tuple(tests[k] for k in _within(ks, most)),
        ledger=tuple(ledger([problem.id for problem in base.problems(data)], old, new)),
        hard=None if isinstance(choice, str) else hard_subset(choice, seed=seed),
        control=choice if isinstance(choice, str) else choice.control,
    )


def _within(ks: Sequence[int], most: int) -> list[int]:
    return [k for k in ks if k <= most]


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
        verifiers = [one.manifest.verifier[data.name] for one in (base, other)]
        if verifiers[0] != verifiers[1]:
            raise RapoError(
                f"{where} differ in the verifier of {data.name} ({' and '.join(verifiers)}); evaluate "
                "both alike"
            )
        if base.manifest.prompts[data.name] != other.manifest.prompts[data.name]:
            told = " and ".join(one.manifest.told_prompts(data.name) for one in (base, other))
            raise RapoError(
                f"{where} differ in the prompts of {data.name} ({told}): another template, tokenizer or day; "
                "evaluate both alike" + _same_day(base, other)
            )
    for address, code in base.manifest.code.items():
        if other.manifest.code.get(address, code) != code:
            raise RapoError(
                f"{where} differ in the code of {address}, which changed between them; evaluate both alike"
            )
    for setting in base.manifest.settings:
        if setting.name in settings and settings[setting.name] != setting:
            raise RapoError(
                f"{where} differ in setting {setting.name}: {setting} and {settings[setting.name]}; evaluate "
                "both alike"
            )


def _same_day(base: Evaluation, other: Evaluation) -> str:
    """How to evaluate on the day that the base's chat template was told."""
    day = base.manifest.date
    return "" if day in (None, other.manifest.date) else f" (--set run.date={day}, for the day)"


def _check_budgets(base: Evaluation, model: Evaluation) -> None:
    mine, theirs = base.manifest, model.manifest
    if (mine.adaptive or theirs.adaptive) and mine.samples != theirs.samples:
        raise RapoError(
            f"{base.directory} and {model.directory} have up to {mine.samples} and {theirs.samples} samples "
            "of a problem, and at least one has an adaptive budget: a problem without a correct sample would "
            "not be as unsolved in both; run the smaller evaluation again with --samples "
            f"{max(mine.samples, theirs.samples)}, which goes on"
        )
