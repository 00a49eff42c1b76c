"""`megatron-rapo compare`: from two stored evaluations to files and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.evaluation import comparison_files
from megatron_rapo.evaluation.compare import Comparison, compare
from megatron_rapo.evaluation.frontier import powers_of_two
from megatron_rapo.evaluation.manifest import FILE, Manifest
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
        RapoError: one is no evaluation, they cannot be compared, or their models are gone.
    """
    first, second = _open(base), _open(model)
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
    """The evaluation in a directory, or a run's newest one: then a line says which."""
    found = [file.parent for file in directory.glob(f"evaluations/*/{FILE}")]
    if (directory / FILE).exists() or not found:
        return Evaluation.open(directory)
    newest = max(found, key=lambda path: (Manifest.read(path).model.step or 0, path.name))
    print(f"{directory} is a run; its newest evaluation is {newest}")
    return Evaluation.open(newest)


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
