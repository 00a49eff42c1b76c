"""Checkpoints of several ranks, and of several chunks a rank: who writes what, and what all are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rapo.checkpoint import store as stores
from megatron_rapo.checkpoint import writing
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.parallel.placement import Placement
from tests.distributed.jobs import layout
from tests.models import make_hf_model
from tests.ranks import Ranks


class Chunk:
    """A model chunk whose state is a word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def sharded_state_dict(self, metadata: Any) -> str:
        assert metadata["dp_cp_group"] == "gradient group"
        return self.word

    def load_state_dict(self, state: str, strict: bool) -> None:
        assert strict
        self.word = state


class Optimizer:
    def __init__(self) -> None:
        self.words: Any = None

    def sharded_state_dict(self, model: dict[str, str], is_loading: bool, metadata: Any) -> Any:
        assert metadata["distrib_optim_sharding_type"] == "fully_reshardable"
        return {"of": list(model), "loading": is_loading}

    def load_state_dict(self, state: Any) -> None:
        self.words = state


def policy_of(place: Placement, words: list[str]) -> Any:
    log: list[Any] = []
    return SimpleNamespace(
        placement=SimpleNamespace(
            **{name: getattr(place, name) for name in ALONE}, gradient_group="gradient group"
        ),
        chunks=[Chunk(word) for word in words],
        adapter=None,
        optimizer=Optimizer(),
        synchronise_parameters=lambda: log.append("synchronised"),
        go_to_update=log.append,
        log=log,
    )


ALONE: dict[str, Any] = {
    "is_main": True,
    "rank": 0,
    "layout": SimpleNamespace(world_size=1),
    "share_from_main": lambda mine: mine,
    "share_from_all": lambda mine: [mine],
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    model = make_hf_model(tmp_path / "model", num_hidden_layers=1)
    return validate(
        {
            "run": {"directory": str(tmp_path / "run"), "steps": 9},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
        },
        "test",
    )


def on_ranks(
    patch: pytest.MonkeyPatch, config: RunConfig, save: Callable[..., None], work: Callable[..., Any]
) -> list[Any]:
    """`work` on each of four ranks, or the text of its refusal; `save` is dist_checkpointing's."""
    patch.setattr(dist_checkpointing, "save", save)
    ranks = Ranks(layout("dp4"), patch)

    def one(place: Placement) -> Any:
        try:
            return work(CheckpointStore(config), policy_of(place, ["weights"]), place)
        except RapoError as error:
            return str(error)

    return ranks.run(one)


@pytest.mark.parametrize("words", [["weights"], ["first", "second", "third"]])
def test_every_chunk_gets_its_own_state_back(
    words: list[str], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Any] = {}

    def save(state: dict[str, Any], directory: str, **_: Any) -> AsyncRequest:
        saved.update(state)
        (Path(directory) / "shard").write_text("written")
        return AsyncRequest(None, (), [])

    def load(state: dict[str, Any], directory: str) -> dict[str, Any]:
        assert state["optimizer"]["loading"] and (Path(directory) / "shard").exists()
        return {**saved, "optimizer": "moments"}

    monkeypatch.setattr(dist_checkpointing, "save", save)
    monkeypatch.setattr(dist_checkpointing, "load", load)
    place = cast(Any, SimpleNamespace(**ALONE))
    store, policy = CheckpointStore(config), policy_of(place, words)
    store.save(policy, TrainState(4, 40))
    keys = ["model"] if len(words) == 1 else ["model0", "model1", "model2"]  # as Megatron-LM names them
    assert saved == {**dict(zip(keys, words, strict=True)), "optimizer": {"of": keys, "loading": False}}
    assert policy.log == ["synchronised"]

    other = policy_of(place, ["?"] * len(words))
    newest = store.newest()
    assert newest is not None
    assert store.load(newest, other) == TrainState(4, 40)
    assert [chunk.word for chunk in other.chunks] == words
    assert other.optimizer.words == "moments"
    assert other.log == [4 * config.updates_per_step]


def test_all_ranks_write_shards_and_the_main_one_all_else(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrote, completed = [], []
    complete = CheckpointStore._complete

    def save(state: Any, directory: str, **_: Any) -> AsyncRequest:
        assert not (Path(directory) / "left").exists()
        wrote.append(state)
        return AsyncRequest(None, (), [])

    def counted(store: CheckpointStore, *arguments: Any) -> None:
        completed.append(store)
        complete(store, *arguments)

    monkeypatch.setattr(CheckpointStore, "_complete", counted)
    state = TrainState(4, 40, "rapo", {"seen": 3})
    partial = tmp_path / "run/checkpoints/.partial_step_000004"
    partial.mkdir(parents=True)
    (partial / "left").write_text("by a start that was killed")
    on_ranks(monkeypatch, config, save, lambda store, policy, _: store.save(policy, state))
    assert len(wrote) == 4 and len(completed) == 1
    record = json.loads((tmp_path / "run/checkpoints/step_000004/run.json").read_text())
    assert record["state"] == {
        "step": 4,
        "prompts_drawn": 40,
        "method": "rapo",
        "method_state": {"seen": 3},
        "guards": None,
    }
    assert record["model_path"] == str(config.model.path)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000004"]


@pytest.mark.parametrize("fault", ["folder", "shards", "a full disk", "record"])
def test_what_fails_is_told_on_all_ranks_and_found_out_by_the_main_one(
    fault: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def fail(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no way")

    def save(state: Any, directory: str, **_: Any) -> AsyncRequest:
        if fault in ("shards", "a full disk"):
            raise CheckpointException("both", {0: (ValueError("of shards"), cast(Any, None))})
        return AsyncRequest(None, (), [])

    def refusal(directory: Path) -> str | None:
        asked.append(directory)
        return "full" if fault == "a full disk" else None

    if fault == "folder":
        monkeypatch.setattr(stores, "_make_empty", fail)
    elif fault == "record":
        monkeypatch.setattr(CheckpointStore, "_complete", fail)
    else:
        monkeypatch.setattr(writing, "refusal", refusal)
    told = on_ranks(monkeypatch, config, save, lambda store, policy, _: store.save(policy, TrainState(4, 4)))
    reason = {"shards": "of shards", "a full disk": "cannot be written: full;"}.get(fault, "OSError: no way")
    assert len(set(told)) == 1 and reason in told[0]
    assert len(asked) == 1, "by the main rank"
    folder = tmp_path / "run/checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_rank_0s_own_refusal_is_its_alone(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others fail as they will: they lost their peer."""
    monkeypatch.setattr(writing, "refusal", lambda _: "full")

    def write(store: CheckpointStore, policy: Any, place: Placement) -> str:
        def save(*_: Any, **__: Any) -> None:
            raise RuntimeError("a peer is lost")

        monkeypatch.setattr(dist_checkpointing, "save", save)
        try:
            return str(writing.Writing({}, store.directory, place, in_background=False).failure)
        except RuntimeError as error:
            return str(error)

    told = on_ranks(monkeypatch, config, lambda *_, **__: None, write)
    assert told == ["full", *["a peer is lost"] * 3]
