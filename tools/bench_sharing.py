"""Measures a step's responses on their way from the heads that sampled them to the ranks that train on them.

    python tools/bench_sharing.py                         # 512 prompts × 16 responses of 8,192 tokens: 67M
    python tools/bench_sharing.py --prompts 64 --layouts dp4 --json result.json

Each head holds its share of synthetic responses, tokens and texts, when it begins. `lengths` is what a run
does: all ranks get lengths, rewards and facts, plan alike, and tokens go to the replica that trains on them.
`everything` has all ranks get tokens and texts of all responses, as for a method with `reads_responses`.
Of all ranks the largest: bytes received; host memory beyond what it began with, at the peak, and at the end
with all that was received still held; seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rapo.config import Parallel
from megatron_rapo.data.batching import Plan, Sample, plan_microbatches
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.delivery import with_tokens
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.launch.local import run_local
from megatron_rapo.parallel.placement import Placement, process_groups

LAYOUTS = {
    "dp4": Parallel(data_parallel=4),
    "dp2-tp2": Parallel(data_parallel=2, tensor_parallel=2),
    "tp2-pp2": Parallel(tensor_parallel=2, pipeline_parallel=2),
}
WAYS = ("lengths", "everything")
Figures = dict[str, float]


def main() -> None:
    """Runs every layout and way in processes of their own, and prints a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--responses", type=int, default=16, help="to each prompt")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of a response in the mean: from half to 1.5 ×"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        for name in options.layouts:
            for way in WAYS:
                sizes = (options.prompts, options.responses, options.tokens)
                run_local(measure, (LAYOUTS[name], way, sizes, report), LAYOUTS[name].world_size)
                figures: Figures = json.loads(report.read_text())
                results.append({"layout": name, "way": way, **figures})
                parts = "   ".join(f"{part} {value:.2f}" for part, value in figures.items())
                print(f"{name:8} {way:10} {parts}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


def measure(layout: Parallel, way: str, sizes: tuple[int, int, int], report: Path) -> None:
    """One rank's part; rank 0 writes the figures, the largest of all ranks."""
    with process_groups(layout, seed=1) as placement:
        mine = list(groups(placement, *sizes))
        problems = [problem(number) for number in range(sizes[0])]
        gc.collect()
        placement.share_from_main(None)
        before, began = resident(), time.perf_counter()
        forget_peak()
        with counted() as received:
            sampled = share(problems, mine, placement, whole=way == "everything")
            # To be held until it is measured.
            samples = trained(sampled, placement) if way == "lengths" else sampled.groups
        seconds = time.perf_counter() - began
        found = {
            "received GB": sum(received) / 1e9,
            "peak GB": (peak() - before) / 1e9,
            "held GB": (resident() - before) / 1e9,
            "seconds": seconds,
        }
        assert samples
        largest = {name: placement.largest(value) for name, value in found.items()}
        if placement.is_main:
            report.write_text(json.dumps(largest))


def groups(placement: Placement, prompts: int, responses: int, tokens: int) -> Iterator[Group]:
    """A head's share."""
    if not placement.is_head:
        return
    random = np.random.default_rng(placement.data_rank)
    for number in range(placement.data_rank, prompts, placement.layout.data_parallel):
        episodes = []
        for _ in range(responses):
            count = int(random.integers(tokens // 2, tokens + tokens // 2))
            token_ids = random.integers(0, 150_000, count, dtype=np.int32)
            log_probs = random.standard_normal(count, dtype=np.float32)
            sequence = Sequence.of_response(problem(number).token_ids, token_ids, log_probs, 1)
            text = random.bytes(2 * count).hex()  # four characters a token
            episodes.append(ScoredEpisode(Episode((sequence,), text), Verification(Outcome.WRONG)))
        yield Group(problem(number), tuple(episodes))


def problem(number: int) -> Problem:
    """One of a prompt of 256 tokens."""
    return Problem(str(number), "?", token_ids=tuple(range(256)))


def trained(sampled: Shared, placement: Placement) -> list[list[Sample]]:
    """The samples of a step of one minibatch, with the tokens of this replica."""
    episodes = [one.episode for group in sampled.groups for one in group.episodes]
    samples = [Sample(sequence, 1.0, 0.0, 1.0) for one in episodes for sequence in one.sequences]
    lengths = [len(sample.sequence) for sample in samples]
    replicas = placement.layout.data_parallel
    plan: Plan = plan_microbatches(lengths, replicas=replicas, token_budget=2 * max(lengths))
    return with_tokens([samples], [plan], Batch(sampled.groups, sampled, 0), placement)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of each message that this rank receives meanwhile."""
    received: list[int] = []
    broadcast, irecv = distributed_c10d.broadcast, dist.irecv

    under_way: list[torch.Tensor] = []

    def counting_broadcast(
        tensor: torch.Tensor,
        src: Any = None,
        group: Any = None,
        async_op: bool = False,
        group_src: Any = None,
    ) -> Any:
        source = dist.get_group_rank(group, src) if group_src is None else group_src
        if source != dist.get_rank(group) and not under_way:  # the CPU adapter calls it once more
            received.append(tensor.nbytes)
        under_way.append(tensor)
        try:
            return broadcast(tensor, src, group, async_op, group_src)
        finally:
            under_way.pop()

    def counting_irecv(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        received.append(tensor.nbytes)
        return irecv(tensor, *args, **options)

    # Objects are broadcast by the one name, tensors by the other.
    distributed_c10d.broadcast = dist.broadcast = counting_broadcast
    dist.irecv = counting_irecv
    try:
        yield received
    finally:
        distributed_c10d.broadcast = dist.broadcast = broadcast
        dist.irecv = irecv


def resident() -> int:
    """Bytes of host memory that this process holds."""
    return of_status("VmRSS")


def peak() -> int:
    """The most that it has held since `forget_peak`."""
    return of_status("VmHWM")


def of_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def forget_peak() -> None:
    """Starts to look for the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
