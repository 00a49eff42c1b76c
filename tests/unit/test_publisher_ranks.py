"""A publication on several ranks: the main one deals with the engines, and all of them meet with the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.publish import publisher as publishers
from megatron_rapo.publish.proof import TOKENS, Continuation
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.publish.record import Record
from tests.distributed.jobs import layout
from tests.ranks import Ranks

PROMPT = Prompt(0, "", (1, 2), "")
CHECKSUMS = {"norm": 5}


class Pool:
    """A head's engines; the main rank's are asked, the others' are told which are left."""

    def __init__(self) -> None:
        self.urls = ["http://a", "http://b"]
        self.membership = 0
        self.failures: dict[str, str] = {}
        self.log: list[str] = []
        self.arrived: Mapping[str, int] = CHECKSUMS
        self.lost_at: dict[str, int] = {}

    def lose(self, where: str) -> None:
        """Loses an engine where that is due."""
        self.log.append(where)
        if self.lost_at.pop(where, None):
            self.urls, self.membership = self.urls[1:], self.membership + 1
            raise EngineLost(f"lost at {where}")

    def revive(self, lost: Mapping[str, str]) -> None:
        self.log.append("revive")

    def resume_memory(self) -> None:
        self.lose("onload")

    def weights_checksums(self, dtype: str) -> dict[str, Mapping[str, int]]:
        assert dtype == "float32"
        self.lose("checksums")
        return dict.fromkeys(self.urls, self.arrived)

    def tensor_parallel(self) -> list[int]:
        self.log.append("are they there")
        return [1] * len(self.urls)

    def abandon_update(self) -> None:
        self.log.append("abandon")

    def use(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)


class Case:
    """What the ranks of one case have in common."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path, differences: Mapping[str, float]) -> None:
        self.ranks = Ranks(layout("tp2"), patch)
        self.pools = {rank: Pool() for rank in (0, 2)}  # of the two replicas' heads
        self.main = self.pools[0]
        self.sent: list[tuple[int, Any, int]] = []
        self.checked: list[tuple[int, int]] = []
        self.compared: list[tuple[int, tuple[str, ...]]] = []
        self.differences = differences
        self.directory = directory
        self.refusal: RapoError | None = None
        patch.setattr(publishers, "check_policy", self._check_policy)
        patch.setattr(publishers, "probe", self._probe)
        patch.setattr(publishers, "mean_differences", self._mean_differences)

    def _check_policy(self, policy: Any, place: Placement, prompts: Any, version: int, multiple: int) -> None:
        assert (prompts, multiple) == ([PROMPT], 16) and policy.log == ["synchronised"]
        self.checked.append((place.rank, version))

    def _probe(self, pool: Any, prompts: Any, version: int, vocabulary: int) -> list[Continuation]:
        assert (pool, prompts, vocabulary) == (self.main, [PROMPT], 77)
        pool.lose("probe")
        zeros = np.zeros(TOKENS)
        return [Continuation(url, PROMPT, zeros.astype(np.int32), zeros) for url in pool.urls]

    def _mean_differences(
        self, policy: Any, place: Placement, found: Sequence[Continuation], multiple: int
    ) -> dict[str, float]:
        assert policy.architecture.vocabulary == 77 and multiple == 16
        self.compared.append((place.rank, tuple(each.url for each in found)))
        return {each.url: self.differences[each.url] for each in found}

    def publish(
        self, work: Callable[[Publisher, Placement], Any], *, tolerance: float | None = 0.1
    ) -> list[Any]:
        """What `work` returns on each rank, or the text of its refusal."""

        def one(place: Placement) -> Any:
            log: list[str] = []
            policy = SimpleNamespace(
                synchronise_parameters=lambda: log.append("synchronised"),
                architecture=SimpleNamespace(vocabulary=77),
                log=log,
            )
            pool = cast(Any, self.pools.get(place.rank))
            made = Publisher(
                SimpleNamespace(send=lambda *given: self._send(place.rank, *given)),
                cast(Any, policy),
                place,
                SharedEngines(place, pool, None, colocated=True),
                [PROMPT],
                dtype="float32",
                tolerance=tolerance,
                sequence_multiple=16,
                record=Record(self.directory) if place.is_main and tolerance is not None else None,
            )
            try:
                return work(made, place)
            except RapoError as error:
                return f"{type(error).__name__}: {error}"

        return self.ranks.run(one)

    def _send(self, rank: int, pool: Any, version: int) -> Mapping[str, int]:
        self.sent.append((rank, pool, version))
        if pool is None:
            return {}
        pool.lose("send")
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        return CHECKSUMS


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    return Case(monkeypatch, tmp_path, {"http://a": 0.01, "http://b": 0.02})


def published(case: Case) -> list[dict[str, Any]]:
    file = case.directory / "published.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_all_ranks_send_and_compare_and_the_main_one_records(case: Case) -> None:
    case.pools[2].urls = ["http://of an earlier time"]
    metrics = case.publish(lambda publisher, _: publisher.publish(7))
    assert [each["publish/probe_difference"] for each in metrics] == [0.02] * 4
    assert all(each["time/publish/send_s"] > 0 for each in metrics)
    assert sorted(case.sent, key=lambda sent: sent[0]) == [
        (0, case.main, 7),
        *((rank, None, 7) for rank in (1, 2, 3)),
    ]
    assert sorted(case.checked) == [(rank, 7) for rank in range(4)]
    assert sorted(case.compared) == [(rank, ("http://a", "http://b")) for rank in range(4)]
    assert case.main.log == ["revive", "onload", "send", "checksums", "probe"]
    assert case.pools[2].log == [], "its engines are asked by the main rank alone"
    assert case.pools[2].urls == case.main.urls, "all heads take the engines that have the weights"
    [line] = published(case)
    assert (line["version"], line["dtype"], line["engines"], line["difference"]) == (7, "float32", 2, 0.02)
    assert line["seconds"] > 0


@pytest.mark.parametrize("where", ["onload", "send", "checksums", "probe"])
def test_all_ranks_send_again_where_an_engine_is_lost(case: Case, where: str) -> None:
    case.main.lost_at[where] = 1
    metrics = case.publish(lambda publisher, _: publisher.publish(7))
    assert [each["publish/probe_difference"] for each in metrics] == [0.02] * 4
    tries = 1 if where == "onload" else 2
    assert sorted(rank for rank, _, _ in case.sent) == sorted(list(range(4)) * tries)
    assert case.main.log.count("revive") == 2
    assert ("abandon" in case.main.log) == (where == "send")
    assert case.pools[2].urls == case.main.urls == ["http://b"]
    assert sorted(case.compared) == [(rank, ("http://b",)) for rank in range(4)]
    assert published(case)[0]["engines"] == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("checksum", r"RapoError: 1 of 1 tensors arrived at http://a otherwise"),
        ("difference", r"RapoError: http://b has weights of version 7 by name"),
        ("refusal", r"RapoError: another shape"),
    ],
)
def test_what_the_main_rank_refuses_is_refused_on_all(case: Case, fault: str, message: str) -> None:
    if fault == "checksum":
        case.main.arrived = {"norm": 6}
    elif fault == "difference":
        case.differences = {"http://a": 0.1, "http://b": 0.101}
    else:
        case.refusal = RapoError("another shape")
    told = case.publish(lambda publisher, _: publisher.publish(7))
    assert len(set(map(str, told))) == 1 and str(told[0]).startswith(message)
    assert published(case) == []
    if fault == "refusal":
        assert case.main.log == ["revive", "onload", "send", "abandon", "are they there"]


def test_the_doctor_compares_refuses_and_records_nothing(case: Case) -> None:
    case.main.arrived = {"norm": 6}
    case.differences = {"http://a": 9.0, "http://b": 1.0}
    metrics = case.publish(lambda publisher, _: publisher.publish(7), tolerance=None)
    assert [each["publish/probe_difference"] for each in metrics] == [9.0] * 4
    assert "checksums" not in case.main.log
    assert published(case) == []


def test_losses_do_not_count_as_tries_in_vain(case: Case) -> None:
    """Two tries may fail with all engines there; a loss between them begins the count anew."""
    failures = iter(["in vain", "loss", "in vain", None])

    def send(rank: int, pool: Any, version: int) -> Mapping[str, int]:
        if pool is None:
            return {}
        failure = next(failures)
        if failure == "loss":
            pool.lost_at["send"] = 1
        pool.lose("send")
        if failure:
            raise EngineLost(failure)
        return CHECKSUMS

    case._send = send  # type: ignore[method-assign]
    metrics = case.publish(lambda publisher, _: publisher.publish(7))
    assert [each["publish/probe_difference"] for each in metrics] == [0.02] * 4
    assert case.main.log.count("send") == 4


def test_weights_of_a_checkpoint_are_compared_with_those_published_before(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.publish(lambda publisher, _: publisher.publish(7))
    case.publish(lambda publisher, _: publisher.publish(7, resumed=True))
    monkeypatch.setitem(CHECKSUMS, "norm", 6)
    told = case.publish(lambda publisher, _: publisher.publish(7, resumed=True))
    assert len(set(told)) == 1 and "weights of step 7 are not those that were published" in told[0]
    assert len(published(case)) == 2
