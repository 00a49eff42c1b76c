"""Checkpoints saved and loaded by one rank; what several ranks do with them is in tests/distributed."""

from __future__ import annotations

import json
import os
import random
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rapo.checkpoint import files
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import Objective
from megatron_rapo.megatron_repairs.buckets import _with_padding
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.load import open_tensors
from megatron_rapo.weights.stored_parameters import stored_parameters
from tests.distributed.minibatches import VOCABULARY, make_minibatches
from tests.models import make_hf_model
from tests.unit.full_disk import no_file_beyond
from tests.unit.one_rank import one_placement


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as placement:
        yield placement


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    make_hf_model(path, seed=0, hidden_size=32, intermediate_size=48, head_dim=8)
    return path


@pytest.fixture
def config(tmp_path: Path, model: Path) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(tmp_path), "steps": 9},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "algorithm": {"method": "dapo"},
            "optimizer": {"learning_rate": 4e-3, "decay": "linear"},
            "checkpoint": {"keep": 1},
            "evaluate": {"best": "pass@1"},
        },
        "test",
    )


def make_policy(config: RunConfig, placement: Placement) -> Policy:
    architecture = read_architecture(config.model.path)
    return Policy(config.model, config.optimizer, architecture, placement, total_updates=9)


def changed(config: RunConfig, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """The configuration with other options in these sections."""
    new = {name: getattr(config, name).model_copy(update=options) for name, options in sections.items()}
    return config.model_copy(update=new)


def train(policy: Policy, config: RunConfig, updates: range) -> list[float]:
    """Losses of one update a number, on that number's data."""
    objective = Objective(
        config.new_method(), temperature=1.0, vocabulary=VOCABULARY, group=policy.placement.tensor_group
    )
    batches = [make_minibatches(policy.placement, [number]) for number in updates]
    return [policy.update(batch, objective, None)["loss/total"] for batch in batches]


def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_training_goes_on_bit_for_bit(config: RunConfig, placement: Placement) -> None:
    """Weights, moments, steps of Adam and the rate; also where nothing was trained before the save."""
    for done in (0, 2):
        policy, store = make_policy(config, placement), CheckpointStore(config)
        train(policy, config, range(done))
        store.save(policy, TrainState(step=done, prompts_drawn=7))
        expected = train(policy, config, range(done, 4))

        resumed, store = make_policy(config, placement), CheckpointStore(config)
        newest = store.newest()
        assert newest is not None
        assert store.load(newest, resumed) == TrainState(step=done, prompts_drawn=7)
        assert train(resumed, config, range(done, 4)) == expected
        pairs = zip(weights(resumed), weights(policy), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_holds_weights_and_moments_by_the_names_that_all_layouts_share(
    config: RunConfig, placement: Placement
) -> None:
    policy, store = make_policy(config, placement), CheckpointStore(config)
    train(policy, config, range(1))
    store.save(policy, TrainState(1, 1))
    newest = store.newest()
    assert newest is not None
    with open_tensors(newest, policy.architecture) as written:
        for name, values in hf_tensors(policy.chunks, policy.architecture, placement):
            assert torch.equal(written.read(name, None, 0, 0), values), name
    index = FileSystemReader(newest).read_metadata().state_dict_metadata
    for key in {parameter.key for parameter in stored_parameters(policy.architecture)}:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert index[f"optimizer.state.{moment}.{key}"].size == index[key].size


def test_the_newest_and_the_best_are_kept(config: RunConfig, placement: Placement) -> None:
    policy, store = make_policy(config, placement), CheckpointStore(config)
    (store.directory / ".partial_step_000001").mkdir(parents=True)
    (store.directory / ".partial_step_000001/left").write_text("by a start that was killed")
    for step, value in ((1, 0.1), (2, 0.5), (3, 0.4), (4, 0.3)):
        assert store.best is not None
        store.best.take(step, {"evaluate/pass@1": value})
        store.save(policy, TrainState(step, step))
    assert names(store) == ["best.json", "step_000002", "step_000004"]
    assert json.loads((store.directory / "best.json").read_text())["step"] == 2
    sums = json.loads((store.directory / "step_000004/checksums.json").read_text())
    found = {path.name: path.read_bytes() for path in (store.directory / "step_000004").iterdir()}
    found.pop("checksums.json")
    assert sums == {
        name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in found.items()
    }


def test_what_is_saved_in_the_background_is_as_it_was_when_it_began(
    config: RunConfig, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, with other weights and moments, before the first byte is written."""
    config = changed(config, {"checkpoint": {"in_background": True}})
    policy, store = make_policy(config, placement), CheckpointStore(config)
    train(policy, config, range(2))
    begin, started = threading.Event(), threading.Thread.run

    def late(thread: threading.Thread) -> None:
        if thread.name == "checkpoint":
            assert begin.wait(60)
        started(thread)

    monkeypatch.setattr(threading.Thread, "run", late)
    store.save(policy, TrainState(2, 7))
    expected = train(policy, config, range(2, 4))
    store.finish(placement, wait=False)
    assert names(store) == [".partial_step_000002"] and store.newest_whole(placement) is None
    begin.set()
    store.finish(placement)
    assert names(store) == ["step_000002"]
    store.finish(placement)  # there is no more to complete

    resumed, store = make_policy(config, placement), CheckpointStore(config)
    newest = store.newest_whole(placement)
    assert newest is not None
    assert store.load(newest, resumed) == TrainState(2, 7)
    assert train(resumed, config, range(2, 4)) == expected
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(policy), strict=True))


def test_what_a_killed_start_left_half_written_is_removed(config: RunConfig, placement: Placement) -> None:
    """And is never gone on from."""
    store = CheckpointStore(config)
    half = store.directory / ".partial_step_000003"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    assert store.newest() is None and store.newest_whole(placement) is None
    store.remove_partial(placement)
    assert names(store) == []


def test_a_write_in_the_background_that_fails_is_told_when_it_is_completed(
    config: RunConfig, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(changed(config, {"checkpoint": {"in_background": True}}))
    policy = make_policy(config, placement)
    store.save(policy, TrainState(1, 1))
    store.finish(placement)
    largest = max(file.stat().st_size for file in (store.directory / "step_000001").iterdir())
    with no_file_beyond(largest // 2):
        store.save(policy, TrainState(2, 2))
        with pytest.raises(
            RapoError, match=r"step_000002 cannot be written: .*the newest checkpoint is .*01"
        ):
            store.finish(placement)
    assert names(store) == ["step_000001"]


def test_some_are_kept_for_good(config: RunConfig, placement: Placement) -> None:
    policy = make_policy(config, placement)
    store = CheckpointStore(changed(config, {"checkpoint": {"every": 1, "keep_every": 2}}))
    for step in range(1, 6):
        store.save(policy, TrainState(step, step))
    assert names(store) == ["step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shard", r"cannot be read: .*; remove it to go on from the one before"),
        ("record", r"is damaged \(run\.json: .*; remove it"),
        ("index", r"cannot be read: .*; remove it"),
        ("data", r"made with fingerprint of data = 'a', this run has 'b'; restore it, or choose another run"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: RunConfig, placement: Placement, damage: str, message: str
) -> None:
    policy = make_policy(config, placement)
    CheckpointStore(config, {"data": "a"}).save(policy, TrainState(1, 1))
    store = CheckpointStore(config, {"data": "b" if damage == "data" else "a"})
    checkpoint = store.newest()
    assert checkpoint is not None
    if damage == "shard":
        os.truncate(next(checkpoint.glob("*.distcp")), 100)
    elif damage == "record":
        os.truncate(checkpoint / "run.json", 20)
    elif damage == "index":
        (checkpoint / ".metadata").write_bytes(bytes((checkpoint / ".metadata").stat().st_size))
    with pytest.raises(RapoError, match=message):
        store.load(checkpoint, policy)


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_put_aside(
    config: RunConfig, placement: Placement, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 3})})
    policy, store = make_policy(config, placement), CheckpointStore(config)
    assert store.newest_whole(placement) is None
    for step in (1, 2, 3):
        store.save(policy, TrainState(step, step))
    assert store.newest_whole(placement) == store.directory / "step_000003"
    shard = next((store.directory / "step_000003").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (store.directory / "step_000002/run.json").write_text("{}")
    assert store.newest_whole(placement) == store.directory / "step_000001"
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        f"checkpoint {store.directory}/step_000003 is damaged: {shard.name} has other contents than were "
        "saved (crc32); it is now damaged_step_000003",
        f"checkpoint {store.directory}/step_000002 is damaged: run.json or checksums.json: KeyError('state')"
        "; it is now damaged_step_000002",
    ]
    assert names(store) == ["damaged_step_000002", "damaged_step_000003", "step_000001"]


def test_a_flipped_bit_in_any_file_is_found(
    config: RunConfig, placement: Placement, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of run.json and of the checksums among them: another digit there is still JSON."""
    policy, store = make_policy(config, placement), CheckpointStore(config)
    store.save(policy, TrainState(1, 40))
    whole, draw = store.directory / "step_000001", random.Random(0)
    paths = [path for path in whole.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} >= {".distcp", ".json", ".pt", ""}
    for path in paths:
        content = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(content)
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(RapoError, match=r"checkpoint .*step_000001 is damaged: "):
                store.newest_whole(placement)
            (store.directory / "damaged_step_000001").rename(whole)
        path.write_bytes(content)
    assert store.newest_whole(placement) == whole


def test_a_checkpoint_of_an_earlier_version_has_sizes_alone(config: RunConfig, placement: Placement) -> None:
    policy, store = make_policy(config, placement), CheckpointStore(config)
    store.save(policy, TrainState(1, 1))
    record = json.loads((store.directory / "step_000001/run.json").read_text())
    sums = store.directory / "step_000001/checksums.json"
    record["files"] = {name: saved["bytes"] for name, saved in json.loads(sums.read_text()).items()}
    del record["files"]["run.json"]
    sums.unlink()
    (store.directory / "step_000001/run.json").write_text(json.dumps(record))
    assert store.newest_whole(placement) == store.directory / "step_000001"
    os.truncate(next((store.directory / "step_000001").glob("*.distcp")), 100)
    with pytest.raises(
        RapoError, match=r"distcp has 100 of \d+ bytes\nno checkpoint is whole; remove .* anew"
    ):
        store.newest_whole(placement)


def test_a_failed_save_tells_the_first_ranks_reason_and_leaves_nothing(
    config: RunConfig, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: Mapping[int, Any] = {2: (ValueError("second"), None), 1: (OSError("first"), None)}

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointException("both", dict(failures))

    monkeypatch.setattr(dist_checkpointing, "save", fail)
    policy, store = make_policy(config, placement), CheckpointStore(config)
    told = r"OSError: first \(rank 1\), with \d+ MiB free on that disk; .* there is no checkpoint yet"
    with pytest.raises(RapoError, match=told):
        store.save(policy, TrainState(1, 1))
    assert names(store) == []
    (store.directory / "step_000003").mkdir()
    (store.directory / "step_000003" / files.RECORD).write_text("{}")
    with pytest.raises(RapoError, match=r"the newest checkpoint is .*step_000003, and the same command"):
        store.save(policy, TrainState(4, 1))


def test_what_is_no_matter_of_the_disk_is_not_told_as_one(
    config: RunConfig, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a peer is lost")

    monkeypatch.setattr(dist_checkpointing, "save", fail)
    with pytest.raises(RuntimeError, match="a peer is lost"):
        CheckpointStore(config).save(make_policy(config, placement), TrainState(1, 1))


def test_a_bucket_lies_where_its_offset_says() -> None:
    """The elements are strung together; in the buffer each bucket begins at its own place, zeros between."""

    class Bucket:
        def __init__(self, offset: int, numel_unpadded: int) -> None:
            self.offset, self.numel_unpadded = offset, numel_unpadded

    class Buffer:
        numel = 8
        buckets = (Bucket(0, 3), Bucket(4, 2))

    found = _with_padding(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), Buffer())
    assert found.tolist() == [1, 2, 3, 0, 4, 5, 0, 0]


def test_a_full_disk_is_told_in_one_message_and_spares_the_checkpoint_before(
    config: RunConfig, placement: Placement, caplog: pytest.LogCaptureFixture
) -> None:
    """Megatron's writer would log torch's words for it, too."""
    policy, store = make_policy(config, placement), CheckpointStore(config)
    store.save(policy, TrainState(1, 1))
    largest = max(file.stat().st_size for file in (store.directory / "step_000001").iterdir())
    with (
        no_file_beyond(largest // 2),
        pytest.raises(
            RapoError, match=r"checkpoint .*step_000002 cannot be written: .* the newest checkpoint is"
        ),
    ):
        store.save(policy, TrainState(2, 1))
    assert caplog.records == []
    assert names(store) == ["step_000001"]
    newest = store.newest()
    assert newest is not None and store.load(newest, make_policy(config, placement)).step == 1
