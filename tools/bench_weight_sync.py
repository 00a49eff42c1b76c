"""Times the ways of weights from a trainer's layout to each kind of engines, beside plain copies of them.

    python tools/bench_weight_sync.py                                 # 1B parameters in bfloat16: 2 GB
    python tools/bench_weight_sync.py --layouts tp1 tp2 tp2-pp2 --transports distributed tensor
    python tools/bench_weight_sync.py --kinds vllm --json result.json

`send` is the whole publication but for the greedy probe, of which `engines` is how long the engines took to
receive and load what they were told of (by `tensor` and `disk` they load alone), and `still` how long they
answered no request; `packing` gathers and lays out in buckets alone, with nothing sent. Packing and the
engines work at the same time. `floor` moves the same bytes over the same medium in the same run: a gloo
broadcast to one process (distributed, shard), a copy into shared memory and another out of it (tensor), a
file written and read (disk). Medians, in turn; a first publication warms up.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cpu_servers import CONNECTS, installed, launcher_of
from random_model import add_size_options, make_random_model
from torch import multiprocessing

from megatron_rapo.config import Model, Parallel, Weights
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.engine import Engine
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.launch.local import run_local
from megatron_rapo.model.build import build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_parameters
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.publish.opening import open_transport
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.load import load_weights
from megatron_rapo.weights.stream import Deliver, WeightStream
from megatron_rapo.weights.tensor_table import tensor_table
from megatron_rapo.weights.transports.group import Meeting, join

LAYOUTS = {
    "tp1": Parallel(),
    "tp2": Parallel(tensor_parallel=2),
    "pp2": Parallel(pipeline_parallel=2),
    "tp2-pp2": Parallel(tensor_parallel=2, pipeline_parallel=2),
}
PIECE = 256 * 2**20  # bytes of one copy or message of a floor
TRANSPORTS = ("distributed", "tensor", "shard", "disk")
ROUNDS = 3
Seconds = dict[str, float]


def main() -> None:
    """Makes the model, runs every layout, and prints a line a transport."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_size_options(parser)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--kinds", nargs="+", choices=CONNECTS, help="default: those that are installed")
    parser.add_argument("--bucket-bytes", type=int, default=512 * 2**20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model, report = Path(folder) / "model", Path(folder) / "report.json"
        gigabytes = 2 * make_random_model(model, options) / 1e9
        print(f"torch {torch.__version__}, {gigabytes:.2f} GB in bfloat16, medians of {ROUNDS}")
        for kind in options.kinds or installed():
            launcher = launcher_of(kind, model, "bfloat16")
            if kind == "embedded":
                launcher = EmbeddedLauncher(model, options.device, "bfloat16", threads=1)
            with LocalServers(
                launcher, CONNECTS[kind], count=1, log_directory=Path(folder) / kind, startup_timeout=300.0
            ) as servers:
                for name in options.layouts:
                    # To kinds that take whole tensors alone, `shard` sends as `distributed`.
                    ways = [way for way in options.transports if kind == "embedded" or way != "shard"]
                    arguments = (kind, LAYOUTS[name], model, servers.urls, ways, options.bucket_bytes, report)
                    run_local(measure, arguments, LAYOUTS[name].world_size)
                    for transport, seconds in json.loads(report.read_text()).items():
                        found = {"kind": kind, "layout": name, "transport": transport, "GB": gigabytes}
                        results.append({**found, **seconds})
                        print(line(kind, name, transport, gigabytes, seconds), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


def line(kind: str, layout: str, transport: str, gigabytes: float, seconds: Seconds) -> str:
    """A line of the table."""
    send, floor = seconds["send"], seconds["floor"]
    parts = "   ".join(f"{name} {seconds[name]:6.2f} s" for name in ("engines", "still", "packing", "floor"))
    return (
        f"{kind:8} {layout:8} {transport:12} send {send:6.2f} s {gigabytes / send:6.2f} GB/s   "
        f"{parts}   {send / floor:5.2f} × floor"
    )


def measure(
    kind: str,
    layout: Parallel,
    path: Path,
    urls: list[str],
    transports: list[str],
    bucket_bytes: int,
    report: Path,
) -> None:
    """In each rank: every transport's times, written by the main rank."""
    with ExitStack() as stack:
        placement = stack.enter_context(process_groups(layout, seed=1))
        architecture, model = read_architecture(path), Model(path=path)
        chunks = build_chunks(architecture, model, layout)
        load_weights(chunks, architecture, path, placement.tensor_rank, placement.expert_tensor_rank)
        pool = None
        if placement.is_main:
            vocabulary = architecture.vocabulary
            pool = stack.enter_context(
                EnginePool(
                    urls, CONNECTS[kind], vocab_size=vocabulary, prompts_per_request=1, request_timeout=300.0
                )
            )
        held = StageWeights(chunks, architecture, placement)
        table = tensor_table(architecture, layout)
        packing = WeightStream(table, held, placement, torch.bfloat16, bucket_bytes)
        times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in transports}
        ways = {}
        for name in transports:
            options: dict[str, Any] = {} if name == "disk" else {"bucket_bytes": bucket_bytes}
            weights = Weights.model_validate({"transport": name, **options})
            ways[name] = open_transport(
                weights, model, chunks, architecture, placement, report.parent / "weights"
            )
        for number in range(ROUNDS + 1):
            for name, way in ways.items():
                floor = partial(FLOORS[name], 2 * count_parameters(architecture), report.parent)
                engines = TimedPool(pool) if pool is not None else None
                found = {
                    "send": seconds(partial(way.send, engines, number)),
                    "engines": engines.seconds if engines is not None else 0.0,
                    "still": engines.still if engines is not None else 0.0,
                    "packing": seconds(partial(packing.run, nowhere if placement.is_main else None)),
                    "floor": floor() if placement.is_main else 0.0,
                }
                for what, value in found.items():
                    times[name][what].append(value)
        if placement.is_main:
            medians = {
                name: {what: statistics.median(values[1:]) for what, values in kinds.items()}
                for name, kinds in times.items()
            }
            report.write_text(json.dumps(medians))


class TimedPool:
    """A pool, the seconds that its engines took to take weights, and those that they answered nothing."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self.seconds = self.still = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def each(self, ask: Callable[[Engine, Any], Any], parts: Sequence[Any]) -> Future[list[Any]]:
        """As the pool's."""
        began = time.perf_counter()
        answers = self._pool.each(ask, parts)
        answers.add_done_callback(lambda _: self._count(began))
        return answers

    def begin_update(self) -> None:
        """As the pool's."""
        self.still -= time.perf_counter()
        self._pool.begin_update()

    def end_update(self, weight_version: int) -> None:
        """As the pool's."""
        self._pool.end_update(weight_version)
        self.still += time.perf_counter()

    def update_weights(self, model_path: Path, weight_version: int) -> None:
        """As the pool's."""
        began = time.perf_counter()
        self._pool.update_weights(model_path, weight_version)
        self._count(began)
        self.still += time.perf_counter() - began

    def _count(self, began: float) -> None:
        self.seconds += time.perf_counter() - began


def seconds(work: Callable[[], object]) -> float:
    """Of what all ranks do together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def nowhere() -> Deliver:
    """Engines that take everything at once."""
    return lambda bucket, flat: lambda: None


def copy_through_shared_memory(nbytes: int, folder: Path) -> float:
    """Seconds of a copy in and a copy out."""
    size = min(nbytes, PIECE)
    source, shared, sink = (torch.ones(size, dtype=torch.uint8) for _ in range(3))
    shared.share_memory_()
    began = time.perf_counter()
    for _ in range(nbytes // size):
        shared.copy_(source)
        sink.copy_(shared)
    return time.perf_counter() - began


def write_and_read(nbytes: int, folder: Path) -> float:
    """Seconds of a file's way to the disk's cache and back."""
    size = min(nbytes, PIECE)
    piece, file = bytes(size), folder / "floor"
    began = time.perf_counter()
    with file.open("wb", buffering=0) as sink:
        for _ in range(nbytes // size):
            sink.write(piece)
    with file.open("rb", buffering=0) as source:
        while source.read(size):
            pass
    took = time.perf_counter() - began
    file.unlink()
    return took


def broadcast(nbytes: int, folder: Path) -> float:
    """Seconds of broadcasts over gloo to one other process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meeting = Meeting(
            "127.0.0.1", listener.getsockname()[1], f"floor-{time.monotonic()}", "gloo", 1, (1,)
        )
        store = dist.TCPStore(
            meeting.address,
            meeting.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    size = min(nbytes, PIECE)
    pieces = nbytes // size
    other = multiprocessing.get_context("spawn").Process(target=receive, args=(meeting, size, pieces))
    other.start()
    group = join(meeting, 0)
    flat = torch.ones(size, dtype=torch.uint8)
    group.broadcast(flat, 0).wait()
    began = time.perf_counter()
    for _ in range(pieces):
        group.broadcast(flat, 0).wait()
    took = time.perf_counter() - began
    other.join(60)
    del store  # it served as long as it was referenced
    return took


def receive(meeting: Meeting, size: int, pieces: int) -> None:
    """The other process of `broadcast`."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torch wants one
    group = join(meeting, 1)
    flat = torch.empty(size, dtype=torch.uint8)
    for _ in range(pieces + 1):
        group.broadcast(flat, 0).wait()
    os._exit(0)  # gloo's threads are still there: an orderly end would wait for the other side's


FLOORS: dict[str, Callable[[int, Path], float]] = {
    "distributed": broadcast,
    "shard": broadcast,
    "tensor": copy_through_shared_memory,
    "disk": write_and_read,
}


if __name__ == "__main__":
    main()
