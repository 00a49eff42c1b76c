"""Publishing to real embedded servers from every kind of layout, against HF transformers; and faults.

The truth is the policy's weights as `write_hf_model` leaves them (test_model_parity), read by transformers.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.config import Model, Optimizer, Parallel, Weights
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.engine import Generation
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.model.build import build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.opening import open_transport
from megatron_rapo.publish.publisher import Publisher, Transport
from megatron_rapo.publish.record import Record
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.export import write_hf_model
from megatron_rapo.weights.load import load_weights
from tests.distributed.jobs import layout, run_job
from tests.models import make_hf_model

CASES = [
    ("distributed", "dp4"),
    ("distributed", "tp2-pp2"),
    ("distributed", "tp2-pp2-vpp2-sp"),
    ("distributed", "cp2-pp2"),
    ("tensor", "tp4"),
    ("tensor", "tp2-cp2"),
    ("tensor", "pp2"),
    ("shard", "tp2-pp2"),
    ("shard", "tp2"),
    ("shard", "pp2-vpp2"),
    ("disk", "tp2-pp2"),
]
LOSSES = ["distributed", "shard"]
OFFLOADED = ["tp2-cp2", "tp2"]  # whose engines have given their memory back before
PROMPTS = [Prompt(0, "", (5, 9, 23, 17), ""), Prompt(1, "", (40, 2, 31), "")]
TOKENS = 6
BUCKET_BYTES = 30_000  # several buckets of several tensors, and tensors that go alone
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("publishing")
    path = make_hf_model(base / "model", family="qwen3", tied=True, num_key_value_heads=4)
    launcher = EmbeddedLauncher(path, "cpu", "float32", threads=1)
    with LocalServers(
        launcher, EmbeddedClient, count=3, log_directory=base, startup_timeout=120.0
    ) as servers:
        processes = [server.process.pid for server in servers._servers.values()]
        found = run_job(measure, path, servers.urls, processes, directory=base)
    found["left in shared memory"] = [str(path) for path in Path("/dev/shm").glob(f"torch_{found['main']}_*")]
    return found


@pytest.mark.parametrize(("transport", "name"), CASES)
def test_engines_serve_what_was_published(measured: dict[str, Any], transport: str, name: str) -> None:
    """Greedy tokens of every engine are those of transformers, and so are their log-probs."""
    case = measured[f"{transport} {name}"]
    assert len(case["engines"]) == 3
    for tokens, log_probs in case["engines"]:
        assert tokens == case["expected"][0]
        assert log_probs == pytest.approx(case["expected"][1], abs=1e-4)
    assert case["metrics"]["publish/probe_difference"] < 1e-5


def test_the_weights_of_cases_differ(measured: dict[str, Any]) -> None:
    """Else a case would pass with the engines' weights of the one before."""
    expected = [str(measured[" ".join(case)]["expected"][1]) for case in CASES]
    assert len(set(expected)) == len(expected)


def test_sending_other_weights_than_the_policys_is_found_out(measured: dict[str, Any]) -> None:
    """The classic fault after a resume: the reference's weights are sent."""
    assert "by name, but not in fact" in measured["other weights"]


def test_a_tensor_that_arrived_otherwise_is_found_out(measured: dict[str, Any]) -> None:
    assert "model.norm.weight" in measured["damaged"]
    assert "1 of 46 tensors arrived" in measured["damaged"]


def test_weights_of_a_checkpoint_must_be_those_published_before(measured: dict[str, Any]) -> None:
    assert measured["republished"] is None
    assert "are not those that were published" in measured["not republished"]


@pytest.mark.parametrize("transport", LOSSES)
def test_an_engine_killed_in_an_update_is_left_out(measured: dict[str, Any], transport: str) -> None:
    case = measured[f"killed, {transport}"]
    assert len(case["engines"]) == 2 - LOSSES.index(transport)
    for tokens, log_probs in case["engines"]:
        assert tokens == case["expected"][0]
        assert log_probs == pytest.approx(case["expected"][1], abs=1e-4)


def test_nothing_is_left_in_shared_memory(measured: dict[str, Any]) -> None:
    assert measured["left in shared memory"] == []


def measure(path: Path, urls: list[str], processes: list[int], report: Path) -> None:
    """In each rank: every case; the main rank reports."""
    results: dict[str, Any] = {}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        vocabulary = read_architecture(path).vocabulary
        pool = None
        if everyone.is_main:
            pool = EnginePool(
                urls, EmbeddedClient, vocab_size=vocabulary, prompts_per_request=1, request_timeout=60.0
            )
        for version, (transport, name) in enumerate(CASES):
            run = Run(path, layout(name), transport, pool, report.parent)
            run.scale(1.0 + 0.05 * version)
            if name in OFFLOADED:
                run.engines.offload()
                assert pool is None or all(map(weights_are_released, pool.urls))
            metrics = run.publisher().publish(version)
            results[f"{transport} {name}"] = {"metrics": metrics, **run.compare()}
            run.policy.close()
        results |= faults(path, pool, report.parent)
        for number, transport in enumerate(LOSSES):
            run = Run(path, layout("tp2-pp2"), transport, pool, report.parent)
            run.scale(0.8 - 0.1 * number)
            killing = Killing(run.transport, processes[number])
            run.publisher(killing).publish(100 + number)
            results[f"killed, {transport}"] = run.compare()
            run.policy.close()
        if pool is not None:
            pool.__exit__(None, None, None)
            report.write_text(json.dumps({**results, "main": os.getpid()}))


class Run:
    """A policy, and its way to the engines."""

    def __init__(
        self, path: Path, parallel: Parallel, transport: str, pool: EnginePool | None, directory: Path
    ) -> None:
        self.placement = arrange(parallel, seed=1)
        self.path, self.directory, self.pool = path, directory, pool
        self.model, self.architecture = Model(path=path, dtype="float32"), read_architecture(path)
        self.policy = Policy(self.model, Optimizer(), self.architecture, self.placement, total_updates=10)
        options = {} if transport == "disk" else {"bucket_bytes": BUCKET_BYTES}
        self.weights = Weights.model_validate({"transport": transport, **options})
        self.transport = self.transport_of(self.policy.chunks)
        self.engines = SharedEngines(self.placement, self.pool, None, colocated=True)

    def transport_of(self, chunks: Sequence[Any]) -> Transport:
        return open_transport(
            self.weights, self.model, chunks, self.architecture, self.placement, self.directory / "weights"
        )

    def publisher(self, transport: Transport | None = None, record: Record | None = None) -> Publisher:
        layout = self.placement.layout
        return Publisher(
            transport or self.transport,
            self.policy,
            self.placement,
            self.engines,
            PROMPTS,
            dtype="float32",
            tolerance=TOLERANCE,
            sequence_multiple=2 * layout.context_parallel * layout.tensor_parallel,
            record=record,
        )

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for chunk in self.policy.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(factor)

    def compare(self) -> dict[str, Any]:
        """On the main rank: each engine's greedy continuation of the first prompt, and transformers'."""
        exported = self.directory / "exported"
        write_hf_model(self.policy.chunks, self.architecture, self.placement, exported, self.path)
        if self.pool is None:
            return {}
        found = [[answer.token_ids.tolist(), answer.log_probs.tolist()] for [answer] in self.generate()]
        return {"engines": found, "expected": continue_greedily(exported, PROMPTS[0].token_ids)}

    def generate(self) -> list[Any]:
        """Each engine's greedy continuation of the first prompt; on the main rank."""
        assert self.pool is not None
        wanted = [Generation(PROMPTS[0].token_ids, TOKENS, 0.0, ignore_eos=True)]
        return self.pool.each(lambda engine, _: engine.generate(wanted, timeout=60), self.pool.urls).result()


def weights_are_released(url: str) -> bool:
    return "released" in httpx.get(f"{url}/weights_checksum").text


def continue_greedily(path: Path, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids, log_probs = list(prompt), []
    for _ in range(TOKENS):
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        log_probs.append(float(row.max()))
    return ids[len(prompt) :], log_probs


def faults(path: Path, pool: EnginePool | None, directory: Path) -> dict[str, Any]:
    """What is refused, with the message that every rank gets."""
    run = Run(path, layout("tp2-pp2"), CASES[0][0], pool, directory)
    record = Record(directory) if run.placement.is_main else None
    published = run.publisher(record=record).publish(50)
    assert published["time/publish/send_s"] > 0
    found = {"republished": refusal(lambda: again(run, directory).publish(50, resumed=True), run.placement)}
    start = build_chunks(run.architecture, run.model, run.placement.layout)
    load_weights(start, run.architecture, path, run.placement.tensor_rank)
    run.scale(1.3)  # training went on, and what is sent is what it began with
    other = run.publisher(run.transport_of(start))
    found["other weights"] = refusal(lambda: other.publish(51), run.placement)
    damaging = run.publisher(Damaging(own(run)))
    found["damaged"] = refusal(lambda: damaging.publish(52), run.placement)
    found["not republished"] = refusal(lambda: again(run, directory).publish(50, resumed=True), run.placement)
    return found


def again(run: Run, directory: Path) -> Publisher:
    """As after a resume: the record is read anew."""
    return run.publisher(own(run), record=Record(directory) if run.placement.is_main else None)


def own(run: Run) -> Transport:
    """A transport of its own: an engine leaves a group once weights come over a newer one."""
    return run.transport_of(run.policy.chunks)


def refusal(work: Callable[[], object], placement: Placement) -> str | None:
    """The error of `work`, which all ranks must get alike."""
    text = None
    try:
        work()
    except RapoError as error:
        text = str(error)
    everyone: list[str | None] = [None] * placement.layout.world_size
    dist.all_gather_object(everyone, text, group=placement.host_group)
    assert len(set(everyone)) == 1, everyone
    return text


class Damaging:
    """A transport on whose way a tensor becomes another one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def send(self, engines: Engines | None, version: int) -> Mapping[str, int]:
        checksums = self._transport.send(engines, version)
        name = "model.norm.weight"
        return {**checksums, name: checksums[name] ^ 1} if engines is not None else checksums


class Killing:
    """A transport whose second bucket an engine does not live to see."""

    def __init__(self, transport: Transport, process: int) -> None:
        self._transport = transport
        self._process = process
        self._requests = 0

    def send(self, engines: Engines | None, version: int) -> Mapping[str, int]:
        return self._transport.send(engines and Watched(engines, self._count), version)

    def _count(self) -> None:
        self._requests += 1
        if self._requests == 3:
            os.kill(self._process, signal.SIGKILL)


class Watched:
    """Engines, with a call before every request."""

    def __init__(self, engines: Engines, before: Callable[[], None]) -> None:
        self._engines = engines
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def each(self, ask: Any, parts: Sequence[Any]) -> Future[list[Any]]:
        self._before()
        return self._engines.each(ask, parts)
