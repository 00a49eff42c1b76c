"""Which of the base's samples choose the hard problems, and which of the others judge the choice."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.draws import Draws, Tries, stored_tries
from megatron_rapo.evaluation.store import Evaluation

SECOND_HALF = "the second half of the base's samples"


@dataclass(frozen=True)
class Choice:
    """The hard problems, and samples of them that took no part in the choice.

    Attributes:
        problems: ids.
        chosen_by: samples of each, none of them correct.
        again, model: the base's and the model's other samples of these problems.
        control: where the base's are from.
    """

    problems: tuple[str, ...]
    chosen_by: int
    again: Draws
    model: Draws
    control: str


def choose(
    base: Evaluation, model: Evaluation, control: Evaluation | None, data: str, setting: str
) -> Choice | str:
    """The hard problems, or why none can be chosen.

    What judges must be independent of what chooses. Samples of the same number share their randomness where
    evaluations have the same seed. Then a control, which has another seed, chooses for both; without one it
    is the first half of the base's samples, and the second halves judge.
    """
    shared = base.manifest.seed == model.manifest.seed
    old, new = (stored_tries(evaluation, data, setting) for evaluation in (base, model))
    if control is not None:
        anew = stored_tries(control, data, setting)
        if shared:
            return _choice(anew, old, new, f"{base.directory}; chosen by {control.directory}")
        return _choice(old, anew, new, str(control.directory))
    if shared and new.stop is not None:
        return (
            f"both evaluations have seed {base.manifest.seed}, and an adaptive budget leaves no samples of "
            "the model that took no part in the choice; give --control, or evaluate one of both with another "
            "--set run.seed"
        )
    half = (base.manifest.samples if old.stop else int(old.there.sum(axis=1).min())) // 2
    if half == 0:
        return (
            f"{base.directory} has a single sample of some problems of {data}, which leaves no control of "
            "the hard subset; evaluate with more samples"
        )
    later = slice(half, None)
    judging = new.part(numbers=later) if shared else new
    return _choice(old.part(numbers=slice(half)), old.part(numbers=later), judging, SECOND_HALF)


def _choice(choosing: Tries, again: Tries, model: Tries, control: str) -> Choice:
    hard = choosing.right.sum(axis=1) == 0
    choice = Choice(
        problems=choosing.part(problems=hard).problems,
        chosen_by=int(choosing.there[hard].sum(axis=1).min(initial=choosing.there.shape[1])),
        again=again.part(problems=hard).draws(),
        model=model.part(problems=hard).draws(),
        control=control,
    )
    if min(choice.again.most, choice.model.most) == 0:
        raise RapoError(
            f"of hard problem {choice.problems[0]} there are no samples of the model, or none of the base "
            f"({control}) that took no part in the choice; finish the evaluations, or give them more samples"
        )
    return choice


def check_control(base: Evaluation, control: Evaluation) -> None:
    """Refuses an evaluation that is no control of this base.

    Raises:
        RapoError: it has the base's samples, or is of other weights.
    """
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
