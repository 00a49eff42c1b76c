"""Problems that the base never solved, and how often it solves them when it is asked again.

Problems that were chosen for 0 of N are partly problems of bad luck: asked again, the base solves some
(regression to the mean). What a model solves of them counts only against samples of the base that took no
part in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.evaluation.control import Choice
from megatron_rapo.evaluation.frontier import Paired, curve, paired
from megatron_rapo.evaluation.interval import Estimate


@dataclass(frozen=True)
class HardSubset:
    """Problems of which none of the base's choosing samples is correct.

    Attributes:
        problems: their ids; the rest is None if there are none.
        chosen_by: samples of each that they were chosen by.
        k: samples of each that control and model are compared at: the fewest that both have.
        control: pass@k of the base's other samples: what chance alone gives.
        model: pass@k of the model.
        comparison: model against control, on the same problems.
    """

    problems: tuple[str, ...]
    chosen_by: int
    k: int
    control: Estimate | None
    model: Estimate | None
    comparison: Paired | None


def hard_subset(choice: Choice, *, seed: int) -> HardSubset:
    """Compares model and base on the problems of the choice."""
    k = min(choice.again.most, choice.model.most)
    if not choice.problems:
        return HardSubset((), choice.chosen_by, 0, None, None, None)
    [control], [model] = (curve(draws, [k]) for draws in (choice.again, choice.model))
    [comparison] = paired(choice.again, choice.model, [k], seed=seed)
    return HardSubset(
        problems=choice.problems,
        chosen_by=choice.chosen_by,
        k=k,
        control=control,
        model=model,
        comparison=comparison,
    )
