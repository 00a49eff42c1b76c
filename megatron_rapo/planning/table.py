"""A plan for people."""

from __future__ import annotations

from megatron_rapo.planning.plan import Plan, Planned
from megatron_rapo.planning.workload import Workload
from megatron_rapo.scaling.memory import GIB

_COLUMNS = ("step", "rollout", "reward", "annotate", "update", "bubble", "publish")


def lines(plan: Plan, workload: Workload, devices: int, most: int) -> list[str]:
    """The fastest ways with their seconds and memory, then why others were rejected."""
    shown = [
        "".join(f"{column:>9}" for column in _COLUMNS)
        + f"{'GiB':>7}{'tok/s/dev':>11}  devices; layout; engines"
    ]
    shown += [_line(way, workload, devices) for way in plan.found[:most]]
    if plan.rejected:
        shown += ["", "rejected:"]
        shown += [f"{count:6,} × {reason}" for reason, count in plan.rejected.most_common(8)]
    return shown


def _line(way: Planned, workload: Workload, devices: int) -> str:
    trainer = way.trainer
    seconds = (
        *(way.step_s, way.rollout_s, way.reward_s, trainer.annotate),
        *(trainer.update, trainer.bubble, way.publish_s),
    )
    rate = workload.responses * workload.sequence / way.step_s / devices
    ahead = ", one step ahead" if way.max_staleness else ""
    return (
        "".join(f"{value:9.4g}" for value in seconds)
        + f"{way.memory.total / GIB:7.1f}{rate:11,.0f}  {way.division}{ahead}; {way.layout}; "
        f"{way.split.engines} engines of {way.split.tensor_parallel}"
    )
