"""The watch of a run's rank, as the run's options say."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from megatron_rapo.config import RunConfig
from megatron_rapo.hangs.bounds import Bounds
from megatron_rapo.hangs.watch import Watch, new_start
from megatron_rapo.launch.rank import give_up
from megatron_rapo.parallel.placement import Placement


def open_watch(config: RunConfig, placement: Placement) -> Watch:
    """Of this rank; all ranks call it. It listens to the rank's phases (`Watch.beat`)."""
    observe, rollout = config.observe, config.rollout
    answer, start = rollout.request_timeout_s, rollout.startup_timeout_s
    # Where weights are published, lost engines are waited for; evaluation publishes where it loses them.
    patience = {
        **dict.fromkeys(("rollout", "reward"), answer),
        **dict.fromkeys(("publish", "evaluate"), max(answer, start)),
        "start engines": start,
    }
    bounds = Bounds(
        observe.hang_factor,
        observe.hang_least_s,
        config.parallel.timeout_s,
        patience,
    )
    folder = config.run.directory / "hangs" / placement.share_from_main(new_start())
    told = partial(_tell, folder, placement.rank, ends=observe.hang_action == "end")
    return Watch(folder, placement.rank, placement.layout.world_size, bounds, told)


def _tell(folder: Path, rank: int, report: str, *, ends: bool) -> None:
    """Keeps the report, and ends this rank with it, or prints it."""
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    if ends:
        give_up(rank, f"{report}\nthis report and all stacks are in {folder}")
    print(f"warning: {report}\nthe run goes on (observe.hang_action)", file=sys.stderr, flush=True)
