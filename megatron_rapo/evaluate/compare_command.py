"""`megatron-rapo compare`: from two stored evaluations to files and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.evaluate import comparison_files
from megatron_rapo.evaluate.compare import Comparison, compare
from megatron_rapo.evaluate.frontier import powers_of_two
from megatron_rapo.evaluate.store import Evaluation
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
    first, second = Evaluation.open(base), Evaluation.open(model)
    comparisons = compare(
        first,
        second,
        ks or powers_of_two(min(first.manifest.samples, second.manifest.samples)),
        control=None if control is None else Evaluation.open(control),
    )
    out = out or model / "comparison"
    with own_folder(out, "--out"):
        return _write(first, second, comparisons, diagnosed, out)


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
        from megatron_rapo.evaluate import diagnosis  # torch and transformers take seconds

        print(diagnosis.run(first, second, limit=diagnosed, directory=out), end="\n\n")
        files.append("diagnostics.json")
    print(f"{out}  {', '.join(files)}")
    return 0
