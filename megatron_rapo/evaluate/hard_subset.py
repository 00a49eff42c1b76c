"""Problems that the base never solved, and how often it solves them when it is asked again.

Problems that were chosen for 0 of N are partly problems of bad luck: asked again, the base solves some
(regression to the mean). What a model solves of them counts only against samples of the base that took no
part in the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluate.frontier import Paired, paired
from megatron_rapo.evaluate.pass_at_k import Estimate, mean_pass_at_k

Pair = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]


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


def hard_subset(
    problems: Sequence[str], choosing: Pair, control: Pair, model: Pair, *, seed: int
) -> HardSubset:
    """Chooses by `choosing`, compares `model` with `control`.

    Args:
        problems: ids.
        choosing, control: (correct, samples) of the base, each `[problems]`, from independent samples.
        model: the same of the model, independent of `choosing`, too.
    """
    hard = np.flatnonzero(choosing[0] == 0)
    k = int(min(control[1].min(), model[1].min()))
    names = tuple(problems[place] for place in hard.tolist())
    chosen_by = int(choosing[1].min())
    if not names:
        return HardSubset(names, chosen_by, k, None, None, None)
    again, judged = (control[0][hard], control[1][hard]), (model[0][hard], model[1][hard])
    return HardSubset(
        problems=names,
        chosen_by=chosen_by,
        k=k,
        control=mean_pass_at_k(*again, k, seed=seed),
        model=mean_pass_at_k(*judged, k, seed=seed),
        comparison=paired(again, judged, k, seed=seed),
    )
