"""The search for the fastest layouts beside one that prices each of them anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.planning import plan as planning
from megatron_rapo.planning import profile, trainer_cost
from megatron_rapo.planning.layouts import Division, divisions, engine_splits, trainer_layouts
from megatron_rapo.planning.plan import USABLE, Planned, Planner
from megatron_rapo.planning.profile import read_profile
from megatron_rapo.planning.remembered import remembered, remembered_by
from megatron_rapo.planning.workload import workload_of
from megatron_rapo.scaling.memory import GIB, estimate_memory

EXAMPLES = Path(__file__).parents[2] / "examples/configs"
KEPT = 7


def planner(name: str, *options: str) -> Planner:
    config = load_config([EXAMPLES / f"{name}.toml"], options)
    assert config.model.config is not None
    architecture = read_architecture(config.model.config)
    return Planner(config, architecture, workload_of(config, 200, 1500), read_profile("h100"))


def enumerated(given: Planner, devices: int) -> list[Planned]:
    """The fastest ways of each division, each way predicted by a planner that remembers nothing."""
    found = []
    for division in divisions(devices, given.profile.devices_per_node, colocated=True):
        ways = sorted(of_division(given, division), key=lambda way: way.step_s)
        found += ways[:KEPT]
    return sorted(found, key=lambda way: (way.step_s, way.memory.total))


def of_division(given: Planner, division: Division) -> Iterator[Planned]:
    config, node = given.config, given.profile.devices_per_node
    splits = engine_splits(given.architecture, division.engines, node, node)
    for layout in trainer_layouts(config, given.architecture, division.trainer, node):
        if isinstance(layout, str):
            continue
        algorithm = config.algorithm.model_copy(update={"max_tokens_per_microbatch": layout.budget})
        model = config.model.model_copy(update={"recompute": layout.recompute})
        options = {"parallel": layout.parallel, "algorithm": algorithm, "model": model}
        memory = estimate_memory(config.model_copy(update=options), given.architecture)
        if memory.total > USABLE * given.profile.memory_gib * GIB:
            continue
        fresh = replace(given)
        for staleness in (0,) if division.colocated else (0, 1):
            ways = []
            for split in splits:
                try:
                    ways.append(fresh.predict(division, layout, split, staleness))
                except RapoError:
                    continue
                assert ways[-1].memory == memory
            if ways:
                yield min(ways, key=lambda way: way.rollout_s)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen2.5-7b"])
def test_the_search_finds_what_an_enumeration_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_KEPT", KEPT)
    given = planner(name, "rollout.prompts_per_step=16", "algorithm.minibatch_prompts=8")
    experts = given.architecture.experts and replace(given.architecture.experts, count=8)
    mine = replace(given, architecture=replace(given.architecture, layers=4, experts=experts))
    found = mine.plan(4).found
    expected = enumerated(mine, 4)
    assert len({str(way.division) for way in found}) > 2
    assert found == expected


def test_a_mixture_on_4096_devices_prices_what_layouts_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what takes time: `megatron-rapo plan` is to be over in seconds."""
    counted = []

    def counting(*given: Any) -> float:
        counted.append(given)
        return profile.all_reduce_s(*given)

    monkeypatch.setattr(trainer_cost, "all_reduce_s", counting)
    plan = planner("qwen3-30b-a3b").plan(4096)
    assert plan.found[0].layout.parallel.expert_parallel > 1
    assert 0 < len(counted) < 10_000  # of 8,000 layouts, several of each


@dataclass(frozen=True)
class Adder:
    base: int

    def __post_init__(self) -> None:
        self.__dict__["asked"] = []

    @remembered
    def plus(self, number: int) -> int:
        self.__dict__["asked"].append(number)
        return self.base + number

    @remembered_by(len)
    def size(self, text: str) -> int:
        self.__dict__["asked"].append(text)
        return self.base + len(text)


def test_results_are_remembered_by_instance_and_key() -> None:
    one, other = Adder(1), Adder(10)
    assert [one.plus(1), one.plus(1), one.plus(2), other.plus(1)] == [2, 2, 3, 11]
    assert one.__dict__["asked"] == [1, 2]
    assert [one.size("a"), one.size("b"), other.size("b")] == [2, 2, 11]
    assert one.__dict__["asked"] == [1, 2, "a"]
