"""`megatron-rapo compare`: from two stored evaluations to files and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import comparison_files
from megatron_rapo.evaluation.compare import Comparison, compare
from megatron_rapo.evaluation.frontier import powers_of_two
from megatron_rapo.evaluation.manifest import FILE
from megatron_rapo.evaluation.of_run import evaluations_of
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.folder import own_folder


def run_compare(
    base: Path,
    model: Path,
    control: Path | None,
    ks: Sequence[int] | None,
    diagnosed: int | None,
    out: Path | None,
) -> int:
    """Compares stored evaluations, writes the files, prints what they say; 0.

    Raises:
        RapoError: one is no evaluation, they are one and the same, they cannot be compared, or their models
            are gone.
    """
    first, second = _open(base), _open(model)
    _refuse_same(base, first, second)
    comparisons = compare(
        first,
        second,
        ks or powers_of_two(min(first.manifest.samples, second.manifest.samples)),
        control=None if control is None else _open(control),
    )
    out = out or second.directory / "comparison"
    with own_folder(out, "--out"):
        return _write(first, second, comparisons, diagnosed, out)


def _open(directory: Path) -> Evaluation:
    """The evaluation in a directory, or a run's newest finished one: then a line says which."""
    if (directory / FILE).exists():
        evaluation = Evaluation.open(directory)
        if evaluation.manifest.finished is None:
            print(f"{directory} is not finished; the samples that it has so far are compared")
        return evaluation
    found = evaluations_of(directory)
    if not found.finished and not found.unfinished:
        return Evaluation.open(directory)
    if not found.finished:
        raise RapoError(
            f"{directory} is a run, and none of its evaluations is finished ({found.unfinished[-1]}): let it "
            "go on, or name that evaluation to compare the samples that it has"
        )
    for path in found.unfinished:
        print(f"{path} is not finished, and left out")
    print(f"{directory} is a run; its newest finished evaluation is {found.finished[-1]}")
    return Evaluation.open(found.finished[-1])


def _refuse_same(given: Path, first: Evaluation, second: Evaluation) -> None:
    if first.directory.resolve() != second.directory.resolve():
        return
    others = [path for path in evaluations_of(given).finished if path != first.directory]
    example = f", such as `megatron-rapo compare {others[0]} {second.directory}`" if others else ""
    raise RapoError(f"{first.directory} would be compared with itself; name two evaluations{example}")


def _write(
    first: Evaluation,
    second: Evaluation,
    comparisons: Sequence[Comparison],
    diagnosed: int | None,
    out: Path,
) -> int:
    comparison_files.write(comparisons, out)
    print(f"{second.manifest.model.label} against {first.manifest.model.label}\n")
    for comparison in comparisons:
        print(f"{comparison_files.describe(comparison)}\n")
    files = ["comparison.json", "frontier.csv", "ledger.csv"]
    if diagnosed is not None:
        from megatron_rapo.evaluation import diagnosis  # torch and transformers take seconds

        print(diagnosis.run(first, second, limit=diagnosed, directory=out), end="\n\n")
        files.append("diagnostics.json")
    print(f"{out}  {', '.join(files)}")
    return 0
