"""A publication at stand-in engines: what it refuses, whom it leaves out, and what it records."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.publish import proof
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.publish.record import Publication, Record
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.weights.buckets import make_buckets
from megatron_rapo.weights.tensor_table import HFTensor
from megatron_rapo.weights.transports import distributed, group, tensor
from megatron_rapo.weights.transports.distributed import DistributedTransport
from megatron_rapo.weights.transports.tensor import TensorTransport
from tests.stand_in import VOCAB, stand_ins

VERSION = 4
PROMPTS = [Prompt(0, "", (1, 2), ""), Prompt(1, "", (3,), "")]
WEIGHT = torch.arange(6.0).reshape(2, 3)
CHECKSUMS = {"norm": tensor_checksum(WEIGHT)}
LATE_S = 2.0  # in place of two minutes


class Alone:
    """The placement of a single rank."""

    is_main = is_head = True
    rank = data_rank = 0

    def share_from_main(self, mine: Any) -> Any:
        return mine

    def share_from_heads(self, mine: Any) -> list[Any]:
        return [mine]


class Stream:
    """A model of one tensor."""

    buckets = make_buckets([HFTensor("norm", (2, 3), None, 0)], torch.float32, 1000)

    def run(self, open_engines) -> None:
        open_engines()(self.buckets[0], WEIGHT.view(torch.uint8).flatten())()


class Told:
    """A transport that sends nothing, and says what it sent."""

    def send(self, engines, version: int) -> dict[str, int]:
        engines.begin_update()
        engines.end_update(version)
        return CHECKSUMS


def continuations(log_prob: float, version: int = VERSION) -> bytes:
    """What an engine answers to the probe."""
    rows = [[log_prob, token, None] for token in range(proof.TOKENS)]
    meta = {
        "finish_reason": {"type": "length"},
        "weight_version": str(version),
        "output_token_logprobs": rows,
    }
    answer = {"text": "", "output_ids": list(range(proof.TOKENS)), "meta_info": meta}
    return json.dumps([answer] * len(PROMPTS)).encode()


@contextmanager
def publication(
    tmp_path, monkeypatch, transport, *, tolerance: float | None = 0.1, engines: int = 2, **options
):
    """Stand-ins that have arrived at `VERSION`, the pool, and the publisher to them."""
    expected = np.full((len(PROMPTS), proof.TOKENS), -0.5)
    monkeypatch.setattr(proof, "_trainer_log_probs", lambda *_: expected)
    defaults = {
        "connect": SGLangClient,
        "vocab_size": VOCAB,
        "prompts_per_request": 1,
        "request_timeout": 60.0,
    }
    with (
        stand_ins(engines) as (servers, urls),
        EnginePool(urls, **{**defaults, **options}) as pool,
    ):
        for server in servers:
            server.version = str(VERSION)
            server.answers["/generate"] = (200, continuations(-0.5))
        placement = cast(Any, Alone())
        policy = SimpleNamespace(
            synchronise_parameters=lambda: None,
            architecture=SimpleNamespace(vocabulary=VOCAB),
        )
        publisher = Publisher(
            transport,
            cast(Any, policy),
            placement,
            SharedEngines(placement, pool, None),
            PROMPTS,
            dtype="float32",
            tolerance=tolerance,
            sequence_multiple=1,
            record=Record(tmp_path),
        )
        yield servers, pool, publisher


def published(tmp_path) -> list[dict[str, Any]]:
    file = tmp_path / "published.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# What is refused


def test_a_publication_that_arrived_is_recorded(tmp_path, monkeypatch) -> None:
    with publication(tmp_path, monkeypatch, Told()) as (servers, _, publisher):
        told = json.dumps({"weight_version": str(VERSION), "checksums": CHECKSUMS}).encode()
        servers[1].answers["/weights_checksum"] = (200, told)
        metrics = publisher.publish(VERSION)
    assert metrics["publish/probe_difference"] == 0.0
    [line] = published(tmp_path)
    assert (line["version"], line["engines"]) == (VERSION, 2)


def test_another_checksum_at_an_engine_is_refused(tmp_path, monkeypatch) -> None:
    with publication(tmp_path, monkeypatch, Told(), connect=EmbeddedClient) as (servers, pool, publisher):
        for number, server in enumerate(servers):
            found = {"weight_version": str(VERSION), "checksums": {"norm": CHECKSUMS["norm"] ^ number}}
            server.answers["/weights_checksum"] = (200, json.dumps(found).encode())
            info = {"server": "own", "tp_size": 1, "dtype": "float32"}
            server.answers["/server_info"] = (200, json.dumps(info).encode())
        with pytest.raises(RapoError, match=rf"1 of 1 tensors arrived at {pool.urls[1]} otherwise .*norm"):
            publisher.publish(VERSION)
    assert published(tmp_path) == []


@pytest.mark.parametrize(
    ("log_prob", "tolerance", "difference"), [(-0.75, 0.2, "0.25"), (-0.25, 0.2, "0.25"), (-0.75, 0.3, None)]
)
def test_the_probes_tolerance_is_the_one_that_was_set(
    log_prob, tolerance, difference, tmp_path, monkeypatch
) -> None:
    with publication(tmp_path, monkeypatch, Told(), tolerance=tolerance) as (servers, pool, publisher):
        servers[1].answers["/generate"] = (200, continuations(log_prob))
        if difference is None:
            assert publisher.publish(VERSION)["publish/probe_difference"] == pytest.approx(0.25)
            return
        with pytest.raises(RapoError, match=f"{pool.urls[1]} has weights of version 4 by name") as refused:
            publisher.publish(VERSION)
        assert f"differ from the trainer's by {difference} nats" in str(refused.value)
        assert "weights.probe_tolerance = 0.2" in str(refused.value)


def test_a_difference_that_is_no_number_is_refused() -> None:
    with pytest.raises(RapoError, match=r"http://b .* nan nats"):
        proof.check({"http://a": 0.0, "http://b": math.nan}, tolerance=1e9, version=VERSION)


def test_the_doctor_lets_pass_whatever_engines_have(tmp_path, monkeypatch) -> None:
    with publication(tmp_path, monkeypatch, Told(), tolerance=None) as (servers, _, publisher):
        servers[1].answers["/generate"] = (200, continuations(-3.0))
        assert publisher.publish(VERSION)["publish/probe_difference"] == pytest.approx(2.5)


# Engines that accept and never answer


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/generate"])
def test_an_engine_that_never_answers_is_left_out(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensor, "TIMEOUT_S", LATE_S)
    monkeypatch.setattr(proof, "TIMEOUT_S", LATE_S)
    transport = TensorTransport(cast(Any, Stream()))
    with publication(tmp_path, monkeypatch, transport) as (servers, pool, publisher):
        silent = pool.urls[0]
        servers[0].fault, servers[0].faulty = "silent", path
        publisher.publish(VERSION)
        assert pool.urls == [url for url in pool.urls if url != silent] and len(pool.urls) == 1
        assert f"{silent}{path} was not answered within 2 s" in pool.failures[silent]
        assert "request_timeout_s" not in pool.failures[silent], "it has no effect on this request"
    [line] = published(tmp_path)
    assert line["engines"] == 1


def test_an_engine_that_does_not_join_the_group_is_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(group, "TIMEOUT_S", LATE_S)
    transport = DistributedTransport(cast(Any, Stream()))
    with publication(tmp_path, monkeypatch, transport, engines=1) as (servers, pool, publisher):
        servers[0].fault, servers[0].faulty = "silent", "/init_weights_update_group"
        with pytest.raises(RapoError, match="_group was not answered within 2 s"):
            publisher.publish(VERSION)
        assert pool.urls == []


@pytest.mark.parametrize("path", ["/update_weights_from_distributed", "/update_weights_from_shards"])
def test_the_answer_to_a_broadcast_or_message_has_a_limit(path, monkeypatch) -> None:
    """As these transports ask: what they wait for ends by itself, with the engine out."""
    with stand_ins(1) as ([server], urls):
        server.fault, server.faulty = "silent", path
        with EnginePool(
            urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60.0
        ) as pool:

            async def late(engine, _):
                await engine.post(path, {}, timeout=LATE_S)

            answers = pool.each(late, [None])
            work = SimpleNamespace(is_completed=lambda: False)
            with pytest.raises(EngineLost, match=f"{path} was not answered within 2 s"):
                distributed._finish(answers, cast(dist.Work, work))
            assert pool.urls == []


def test_what_fails_again_and_again_with_all_engines_there_ends(tmp_path, monkeypatch) -> None:
    class Failing:
        tries = 0

        def send(self, engines, version: int) -> dict[str, int]:
            self.tries += 1
            raise EngineLost("a message was not taken")

    transport = Failing()
    with publication(tmp_path, monkeypatch, transport) as (_, pool, publisher):
        with pytest.raises(RapoError, match="a message was not taken"):
            publisher.publish(VERSION)
        assert len(pool.urls) == 2
    assert transport.tries == 2


# Records


def test_weights_of_a_checkpoint_must_be_those_published_before(tmp_path, monkeypatch) -> None:
    with publication(tmp_path, monkeypatch, Told()) as (_, _, publisher):
        publisher.publish(VERSION)
    with publication(tmp_path, monkeypatch, Told()) as (_, _, publisher):
        publisher.publish(VERSION, resumed=True)
    assert [line["version"] for line in published(tmp_path)] == [VERSION, VERSION]
    monkeypatch.setitem(CHECKSUMS, "norm", 1)
    with publication(tmp_path, monkeypatch, Told()) as (_, _, publisher):
        with pytest.raises(RapoError, match=r"weights of step 4 are not those that were published .*digest"):
            publisher.publish(VERSION, resumed=True)
        publisher.publish(VERSION)  # of a run that goes on, not of a checkpoint
    assert published(tmp_path)[0]["digest"] != published(tmp_path)[-1]["digest"]


@pytest.mark.parametrize("line", ["{", "[]", '{"version": 1}', '{"version": "x", "dtype": "", "digest": ""}'])
def test_a_record_that_cannot_be_read_names_its_line(line: str, tmp_path) -> None:
    good = {"version": 1, "dtype": "float32", "digest": "d"}
    (tmp_path / "published.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(RapoError, match=r"published\.jsonl, line 2 is no publication"):
        Record(tmp_path)


def test_half_a_line_is_of_no_publication(tmp_path: Path) -> None:
    """A run that ended, or whose disk was full, while it wrote goes on, and writes that line anew."""
    first, second = (Publication(n, "float32", f"d{n}", 1.0, 1, 0.0) for n in (1, 2))
    Record(tmp_path).add(first)
    with (tmp_path / "published.jsonl").open("a") as file:
        file.write('{"version": 2, "dty')
    record = Record(tmp_path)
    record.check(2, "float32", "another")
    record.add(second)
    assert published(tmp_path) == [asdict(first), asdict(second)]
    with pytest.raises(RapoError, match="the weights of step 2 are not those"):
        Record(tmp_path).check(2, "float32", "another")


# An echo of another engine's death


def test_a_refusal_while_another_engine_dies_is_its_echo(tmp_path, monkeypatch) -> None:
    class Breaking:
        tries = 0

        def send(self, engines, version: int) -> dict[str, int]:
            self.tries += 1
            engines.begin_update()
            if self.tries == 1:
                raise RapoError("the broadcast broke off")
            engines.end_update(version)
            return CHECKSUMS

    transport = Breaking()
    with publication(tmp_path, monkeypatch, transport) as (servers, pool, publisher):
        servers[0].fault, servers[0].faulty = "closed", "/server_info"  # dead from now on
        publisher.publish(VERSION)
        assert transport.tries == 2 and len(pool.urls) == 1


def test_a_refusal_by_engines_that_are_all_there_is_final(tmp_path, monkeypatch) -> None:
    class Refused:
        def send(self, engines, version: int) -> dict[str, int]:
            engines.begin_update()
            raise RapoError("another shape")

    with publication(tmp_path, monkeypatch, Refused()) as (servers, _, publisher):
        with pytest.raises(RapoError, match="another shape") as refused:
            publisher.publish(VERSION)
        assert not isinstance(refused.value, EngineLost)
        for server in servers:
            assert server.asked[-1][0] != "/pause_generation"
            assert "/continue_generation" in [path for path, _ in server.asked]
