"""The links between a layout's ranks: whether sums are right, how fast they are, and whether clocks agree."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rapo.config import Parallel
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.local import run_local
from megatron_rapo.machine.finding import Finding
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement, process_groups

SECONDS = 1.0  # that each group is measured for
LARGE = 4 << 20  # elements of four bytes
CLOCK_S = 5.0  # by which clocks may differ: logs, locks and heartbeats are read beside each other
TIMEOUT_S = 60.0


def links(layout: Parallel) -> list[Finding]:
    """Measures the layout's groups, by this machine's processes, or as one rank of a torchrun or srun job.

    Raises:
        RapoError: a rank failed.
    """
    environment = RankEnvironment.read()
    if environment is not None:
        environment.check_world_size(layout.world_size)
        os.environ.update(environment.variables())
        return _measure(layout)
    with tempfile.TemporaryDirectory(prefix="megatron-rapo-doctor-") as directory:
        report = Path(directory) / "findings.json"
        run_local(
            _measure_and_write, (layout, report), layout.world_size, imports=["megatron_rapo.machine.links"]
        )
        return [Finding(**one) for one in json.loads(report.read_text())]


def _measure_and_write(layout: Parallel, report: Path) -> None:
    findings = _measure(layout)
    if os.environ["RANK"] == "0":
        report.write_text(json.dumps([asdict(one) for one in findings]))


def _measure(layout: Parallel) -> list[Finding]:
    short = layout.model_copy(update={"timeout_s": min(layout.timeout_s, TIMEOUT_S)})
    with process_groups(short, seed=0) as placement:
        return [*_groups(placement), _clocks(placement)]


def _groups(placement: Placement) -> Iterator[Finding]:
    groups = {
        "TP": placement.tensor_group,
        "PP": placement.pipeline_group,
        "CP": placement.context_group,
        "DP × CP": placement.gradient_group,
        "all ranks": placement.host_group,
    }
    for name, group in groups.items():
        if dist.get_world_size(group) > 1:
            on_host = group is placement.host_group
            yield _group(
                f"collectives of {name}", group, placement, torch.device("cpu") if on_host else device()
            )


def _group(name: str, group: dist.ProcessGroup, placement: Placement, where: torch.device) -> Finding:
    ranks = dist.get_world_size(group)
    wrong = placement.largest(float(not _sums_are_right(group, where)))
    small = placement.largest(_seconds(torch.zeros(1, device=where), group))
    large = placement.largest(_seconds(torch.zeros(LARGE, device=where), group))
    # All-reduce moves 2 (n − 1) / n of the bytes over each rank's link (a ring's bus bandwidth).
    rate = 2 * (ranks - 1) / ranks * 4 * LARGE / large / 1e9
    found = f"{ranks} ranks: {small * 1e6:,.0f} µs for a number, {rate:.1f} GB/s for 16 MiB (slowest group)"
    if wrong:
        return Finding(
            name, "wrong", found, "an all-reduce gave a wrong sum: see to network, NCCL and memory"
        )
    return Finding(name, "ok", found)


def _sums_are_right(group: dist.ProcessGroup, where: torch.device) -> bool:
    """Of numbers that are exact in fp32, another one in each place and of each rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    places = torch.arange(1 << 16, device=where) % 251
    values = (places * (rank + 1)).float()
    dist.all_reduce(values, group=group)
    return bool((values == (places * (ranks * (ranks + 1) // 2)).float()).all())


def _seconds(values: torch.Tensor, group: dist.ProcessGroup) -> float:
    """The median of all-reduces within SECONDS, of which all ranks make as many."""
    times: list[float] = []
    began = time.perf_counter()
    while True:
        for _ in range(5):
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            if values.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        over = values.new_full((1,), float(time.perf_counter() - began > SECONDS / 2))
        dist.all_reduce(over, group=group)
        if over.item():
            return statistics.median(times)


def _clocks(placement: Placement) -> Finding:
    """Wall clocks as all ranks read them right after a barrier."""
    dist.barrier(placement.host_group)
    clocks = placement.share_from_all((time.time(), os.uname().nodename))
    skew = max(clocks)[0] - min(clocks)[0]
    hosts = len({host for _, host in clocks})
    found = f"{timedelta(seconds=round(skew, 3))} apart on {hosts} machine{'s' if hosts > 1 else ''}"
    if skew <= CLOCK_S:
        return Finding("clocks", "ok", found)
    return Finding(
        "clocks", "wrong", found, "logs and locks of several machines need one time: run an NTP client"
    )
