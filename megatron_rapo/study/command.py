"""`megatron-rapo study`: what each of its ways does, one function each."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.errors import RapoError
from megatron_rapo.study import cost
from megatron_rapo.study.local import check_cores
from megatron_rapo.study.making import Stopper, make
from megatron_rapo.study.opened import Opened
from megatron_rapo.study.plan import told
from megatron_rapo.study.stages import Stages
from megatron_rapo.study.standing import Standing, State
from megatron_rapo.study.table import text_table


def show_plan(opened: Opened, cores: int) -> str:
    """The expanded plan with its cost; nothing is started."""
    stages = opened.plan()
    check_cores(stages.runs, cores)
    stand = opened.standings(stages)
    study = opened.study
    lines = [
        study.question,
        f"primary: {study.contrasts[0].name} in {study.contrasts[0].outcome or study.outcome}",
        *(f"also: {one.name} in {one.outcome or study.outcome}" for one in study.contrasts[1:]),
        "",
    ]
    for one in stand:
        seconds, _ = cost.estimate(one.run, stand, stages.results)
        takes = "unknown" if seconds is None else f"{seconds:,.0f} s"
        lines.append(f"{one.run.name}  {one.state.value}  {one.run.cores} cores  {takes}")
        lines += [f"    {told(command)}" for command in one.run.commands()]
    lines += [f"{arm.name}, seed {seed}: follows {arm.follows}" for arm, seed in stages.later]
    if not stages.searched:
        lines.append("options that the search chooses are those of the files here, until it is through")
    lines += ["", *_cost(stand, stages)]
    lines += [f"{name}: a result of no run of this study, left out" for name in stages.strangers]
    return "\n".join(lines)


def _cost(stand: Sequence[Standing], stages: Stages) -> list[str]:
    left = cost.left(stand, stages.results)
    source = f" (from {left.source})" if left.source else ""
    lines = [f"spent: {cost.spent(stages.results)}", f"left: {left}{source}"]
    if stages.later:
        lines.append(f"not in this: {len(stages.later)} runs that follow others")
    if left.unknown:
        waiting = next(one.run.name for one in stand if one.state is not State.DONE)
        lines.append(f"to know what a run costs, make one: --only {waiting}")
    return lines


def show_status(opened: Opened) -> str:
    """Where each run stands, what is spent, what is left."""
    stages = opened.plan()
    stand = opened.standings(stages)
    return "\n".join([text_table(stand, stages.results), *_cost(stand, stages)])


def make_one(opened: Opened, name: str) -> int:
    """One run by its name, here and now: what a task of a SLURM array does."""
    stages = opened.plan()
    runs = {run.name: run for run in (stages.runs if stages.searched else stages.tuning)}
    if name not in runs:
        raise RapoError(
            f"--only {name} is no run that can be made now; there is {', '.join(runs)}"
            + ("" if stages.searched else " until the search is through")
        )
    if name in stages.results:
        print(f"{name} is done")
        return 0
    done = make(runs[name], opened.folder, Stopper())
    print(f"{name} {'is done' if done else 'failed; its log is in ' + str(opened.folder / 'logs')}")
    return 0 if done else 1


def report(opened: Opened) -> str:
    """Analyses what there is, and writes the page."""
    from megatron_rapo.study.analysis import analyse
    from megatron_rapo.study.page import write_report

    stages = opened.plan()
    return write_report(analyse(opened.study, stages, opened.folder), opened.file.stem, opened.folder)
