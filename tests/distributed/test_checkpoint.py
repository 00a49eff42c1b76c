"""Checkpoints: a run goes on under any layout as if it had never stopped; a failed save harms nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import Adapter, Parallel, RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.convert.to_hf import convert_to_hf
from megatron_rapo.convert.to_peft import convert_to_peft
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_adapter_parameters
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.policy import Policy
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.load import open_tensors
from megatron_rapo.weights.megatron_files import StoredTensors
from tests.distributed.jobs import layout, run_job
from tests.distributed.minibatches import VOCABULARY, make_minibatches
from tests.models import make_hf_model

# The 61 tokens are padded to 61, 62 or 64 rows: the layouts differ in the very shapes that they save.
ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 16.0, "rank_stabilized": True}
# saved as: model, layout, options; then the layouts that go on from it.
SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "untied": ("untied", "tp2-pp2", {}),
    "tied": ("tied", "tp2-pp2", {}),
    "whole optimizer": ("untied", "tp2-pp2", {"distributed": False}),
    "bf16": ("untied", "tp2-pp2", {"dtype": "bfloat16"}),
    "norm over heads": ("norm over heads", "tp2-pp2", {}),
    "experts": ("experts", "tp2-pp2-sp-ep2", {}),
    "adapters": ("adapted", "tp2-pp2", {"adapter": ADAPTER}),
    "adapters of experts": ("experts", "tp2-pp2-sp-ep2", {"adapter": ADAPTER}),
}
RELOADED = [
    ("untied", "tp2-pp2"),
    ("untied", "pp2-vpp2"),
    ("untied", "dp4"),
    ("untied", "tp4"),
    ("untied", "cp2-pp2"),
    ("tied", "tp2-pp2"),
    ("tied", "pp2-vpp2"),
    ("tied", "tp2-sp"),
    ("whole optimizer", "tp4"),
    ("bf16", "dp4"),
    ("norm over heads", "tp4"),
    ("norm over heads", "dp4"),
    ("experts", "tp2-pp2-sp-ep2"),
    ("experts", "tp2-sp-ep2-etp2"),
    ("experts", "cp2-ep4"),
    ("experts", "dp4"),
    ("adapters", "tp2-pp2"),
    ("adapters", "tp2-pp2-vpp2-sp"),
    ("adapters", "tp4"),
    ("adapters", "cp2"),
    ("adapters of experts", "tp2-pp2-sp-ep2"),
    ("adapters of experts", "tp2-sp-ep2-etp2"),
    ("adapters of experts", "dp4"),
]
IDS = [f"{saved} as {name}" for saved, name in RELOADED]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 4}
ROOT = os.geteuid() == 0
SECONDS = 30.0  # within which a failed save must be over


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    base = tmp_path_factory.mktemp("checkpoints")
    for name in ("tied", "untied", "adapted"):
        make_hf_model(base / name, tied=name != "untied", **SMALL)
    make_hf_model(base / "norm over heads", family="olmo2", **SMALL)
    make_hf_model(base / "experts", family="qwen3_moe", **SMALL)
    with small_disk(base / "full") if ROOT else no_disk():
        yield run_job(measure, base, directory=base)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


@contextmanager
def no_disk() -> Iterator[None]:
    yield


@pytest.mark.parametrize("case", IDS)
def test_training_goes_on_as_if_it_had_never_stopped(measured: dict[str, Any], case: str) -> None:
    """The first loss tells of the weights; the later ones, after an update, of moments and step as well."""
    saved, resumed = measured[case.split(" as ")[0]], measured[case]
    tolerance = {"rel": 0.02, "abs": 0.02} if saved["bf16"] else {"rel": 1e-5, "abs": 1e-6}
    assert resumed["loss"] == pytest.approx(saved["loss"], **tolerance)
    assert resumed["rate"] == saved["rate"]
    assert resumed["norm"] == pytest.approx(saved["norm"], **tolerance)


@pytest.mark.parametrize("case", IDS)
def test_weights_come_back_bit_for_bit(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["same_weights"] is True


@pytest.mark.parametrize("saved", sorted(SAVED))
def test_a_checkpoint_becomes_a_hf_model_without_its_ranks(measured: dict[str, Any], saved: str) -> None:
    assert measured["converted"][saved] is True


def test_the_same_layout_goes_on_bit_for_bit(measured: dict[str, Any]) -> None:
    for saved in ("untied", "adapters"):
        assert measured[f"{saved} as tp2-pp2"]["loss"] == measured[saved]["loss"]


def test_a_checkpoint_of_adapters_holds_these_alone(measured: dict[str, Any]) -> None:
    """Each A and B, and its moments and main weights, of which the optimizer has one more in all."""
    found = measured["stored"]
    assert found["keys"] and all(".lora_" in key for key in found["keys"])
    assert found["numbers"] == 4 * found["adapters"]


def test_what_peft_has_of_a_checkpoint_is_what_was_trained(measured: dict[str, Any]) -> None:
    assert measured["peft"] is True


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shard cut", r"is damaged: __0_0\.distcp has 100 of \d+ bytes\nno checkpoint is whole; remove"),
        ("shard missing", r"is damaged: __0_0\.distcp cannot be read: No such file"),
        ("index missing", r"is damaged: \.metadata cannot be read: No such file"),
        ("index overwritten", r"is damaged: \.metadata has other contents than were saved \(crc32\)"),
        ("bit flipped", r"is damaged: __2_0\.distcp has other contents than were saved \(crc32\)"),
        ("run.json cut", r"is damaged: run\.json or checksums\.json: JSONDecodeError"),
        ("another adapter's", r"was made with adapter = \{'rank': 4.*\}, this run has \{'rank': 8"),
        ("whole weights'", r"was made with adapter = None, this run has \{'rank': 4"),
        (
            "another run's",
            r"was made with run\.seed = 1234, this run has 7; restore it, or choose another run\.dir",
        ),
        ("another optimizer's", r"made with optimizer\.distributed = True, this run has False; restore it"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    measured: dict[str, Any], damage: str, message: str
) -> None:
    found = measured["refused"][damage]
    assert len(found) == 4, "all ranks refuse"
    assert all(re.search(message, text) for text in found), found


@pytest.mark.parametrize("how", ["no folder", "folder vanishes", "full disk"])
def test_a_failed_save_ends_all_ranks_and_leaves_the_earlier_checkpoint(
    measured: dict[str, Any], how: str
) -> None:
    if how == "full disk" and not ROOT:
        pytest.skip("mounting a small disk takes root")
    failed = measured["failed"][how]
    assert len(set(failed["messages"])) == 1, "all ranks tell the same"
    assert "cannot be written" in failed["messages"][0]
    # Where the folder itself has gone there is nothing to go on from, and the message does not claim it.
    left = "no checkpoint yet" if how == "folder vanishes" else "step_000001, and the same command goes on"
    assert left in failed["messages"][0]
    assert failed["reason"] in failed["messages"][0]
    assert failed["seconds"] < SECONDS
    assert failed["left"] == []
    assert failed["earlier_loads"] is True


def test_old_checkpoints_are_removed(measured: dict[str, Any]) -> None:
    assert measured["kept"] == ["step_000002"]


def test_an_incomplete_checkpoint_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(config(tmp_path, "untied", layout("dp4")))
    (tmp_path / "run/checkpoints/step_000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/.partial_step_000004").mkdir()
    (tmp_path / "run/checkpoints/.partial_step_000004/run.json").touch()
    assert store.newest() is None


def config(base: Path, model: str, parallel: Parallel, run: str = "run", **options: Any) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(base / run), "steps": 10, "seed": options.get("seed", 1234)},
            "model": {"path": str(base / model), "dtype": options.get("dtype", "float32")},
            "parallel": {k: v for k, v in parallel.model_dump().items() if k in parallel.model_fields_set},
            "data": {"source": "arithmetic"},
            "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 32, "max_response_tokens": 32},
            "algorithm": {"method": "dapo", "max_tokens_per_microbatch": 64},
            "optimizer": {
                "learning_rate": 4e-3,
                "min_learning_rate": 1e-4,
                "decay": "linear",
                "warmup_updates": 2,
                "epsilon": 1e-5,
                "distributed": options.get("distributed", True),
            },
            "checkpoint": {"keep": 1},
            **({"adapter": options["adapter"]} if "adapter" in options else {}),
        },
        source="test",
    )


class Trainer:
    """A policy of the configuration, and what is done with it here."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.placement: Placement = arrange(run.parallel, seed=1)
        self.architecture = read_architecture(run.model.path)
        self.policy = Policy(
            *(run.model, run.optimizer, self.architecture, self.placement),
            total_updates=10,
            adapter=run.adapter,
            seed=run.run.seed,
        )
        self.store = CheckpointStore(run)
        self.objective = Objective(
            run.new_method(), temperature=1.0, vocabulary=VOCABULARY, group=self.placement.tensor_group
        )

    def train(self, updates: range) -> dict[str, list[float]]:
        """One update a number, on that number's data."""
        metrics = [
            self.policy.update(make_minibatches(self.placement, [number]), self.objective, None)
            for number in updates
        ]
        return {
            "loss": [values["loss/total"] for values in metrics],
            "rate": [values["optimizer/learning_rate"] for values in metrics],
            "norm": [values["optimizer/gradient_norm"] for values in metrics],
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """All HF tensors, on every rank."""
        mine = dict(hf_tensors(self.policy.chunks, self.architecture, self.placement))
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        return {name: tensor for share in shares for name, tensor in share.items()}


def measure(base: Path, report: Path) -> None:
    """In each rank: saves, goes on under other layouts, and meets damaged files and full disks."""
    results: dict[str, Any] = {}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        weights = {}
        for saved, (model, name, options) in SAVED.items():
            trainer = Trainer(config(base, model, layout(name), run=saved, **options))
            trainer.train(range(1))
            trainer.store.save(trainer.policy, TrainState(step=1, prompts_drawn=4))
            weights[saved] = trainer.weights()
            results[saved] = {**trainer.train(range(1, 4)), "bf16": "dtype" in options}
            trainer.policy.close()
        for case, (saved, name) in zip(IDS, RELOADED, strict=True):
            model, _, options = SAVED[saved]
            trainer = Trainer(config(base, model, layout(name), run=saved, **options))
            state = trainer.store.load(trainer.store.newest(), trainer.policy)
            assert state == TrainState(step=1, prompts_drawn=4)
            loaded = trainer.weights()
            same = loaded.keys() == weights[saved].keys() and all(
                torch.equal(loaded[key], tensor) for key, tensor in weights[saved].items()
            )
            results[case] = {**trainer.train(range(1, 4)), "same_weights": same}
            trainer.policy.close()
        results["stored"], results["peft"] = _adapters(base) if everyone.is_main else ({}, None)
        results["converted"] = _converted(base, weights) if everyone.is_main else None
        results["refused"] = _refusals(base)
        results["failed"] = _failed_saves(base)
        results["kept"] = _kept(base)
        if everyone.is_main:
            report.write_text(json.dumps(results))


def _adapters(base: Path) -> tuple[dict[str, Any], bool]:
    """What the checkpoint of adapters holds; and whether PEFT's directory of it merges to the same model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sizes = StoredTensors(base / "adapters/checkpoints/step_000001").sizes
    adapter = Adapter.model_validate(ADAPTER)
    stored = {
        "keys": sorted(sizes),
        "numbers": sum(math.prod(size) for size in sizes.values()),
        "adapters": count_adapter_parameters(read_architecture(base / "adapted"), adapter),
    }
    convert_to_peft(base / "adapters", base / "adapters of peft")
    model = AutoModelForCausalLM.from_pretrained(base / "adapted", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, base / "adapters of peft").merge_and_unload().state_dict()
    convert_to_hf(base / "adapters", base / "adapters merged")
    begun = model_weights(base / "adapted")
    own = model_weights(base / "adapters merged")
    trained = any(not torch.equal(own[name], begun[name]) for name in own)
    with open_tensors(base / "adapters", read_architecture(base / "adapted")) as tensors:
        for name in (name for name in own if name.endswith("_proj.weight")):
            assert torch.equal(tensors.read(name, 0, 5, 17), own[name][5:17]), name
            assert torch.equal(tensors.read(name, 1, 3, 8), own[name][:, 3:8]), name
    return stored, trained and all(torch.allclose(merged[n], own[n], rtol=0, atol=1e-6) for n in own)


def model_weights(path: Path) -> dict[str, torch.Tensor]:
    with HFTensors(path) as tensors:
        return {name: tensors.read(name, None, 0, 0) for name in tensors.names()}


def _converted(base: Path, weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, bool]:
    """Whether each run's checkpoint, converted by one process, has the weights that its ranks had."""
    same = {}
    for saved, expected in weights.items():
        convert_to_hf(base / saved, base / f"{saved} converted")
        with HFTensors(base / f"{saved} converted") as tensors:
            same[saved] = tensors.names() == expected.keys() and all(
                torch.equal(tensors.read(name, None, 0, 0), tensor) for name, tensor in expected.items()
            )
    return same


DAMAGES = ["shard cut", "shard missing", "bit flipped", "index missing", "index overwritten", "run.json cut"]


def _refusals(base: Path) -> dict[str, list[str]]:
    trainer = Trainer(config(base, "untied", layout("dp4")))
    messages = {}
    for damage in DAMAGES:
        checkpoint = _copy(base, damage)
        if trainer.placement.is_main:
            _damage(checkpoint, damage)
        dist.barrier()
        store = CheckpointStore(config(base, "untied", layout("dp4"), run=damage))
        messages[damage] = _message(lambda s=store: s.newest_whole(trainer.placement))
    for damage, options in (("another run's", {"seed": 7}), ("another optimizer's", {"distributed": False})):
        store = CheckpointStore(config(base, "untied", layout("dp4"), run="untied", **options))
        messages[damage] = _message(lambda s=store: s.load(s.newest(), trainer.policy))
    for damage, run, rank in (("another adapter's", "adapters", 8), ("whole weights'", "tied", 4)):
        store = CheckpointStore(
            config(base, "tied", layout("dp4"), run=run, adapter={**ADAPTER, "rank": rank})
        )
        messages[damage] = _message(lambda s=store: s.load(s.newest(), trainer.policy))
    return messages


def _copy(base: Path, run: str) -> Path:
    """The untied run's checkpoint as that of another run directory."""
    copy = base / run / "checkpoints/step_000001"
    if dist.get_rank() == 0:
        shutil.copytree(base / "untied/checkpoints/step_000001", copy)
    dist.barrier()
    return copy


def _damage(checkpoint: Path, damage: str) -> None:
    if damage == "shard cut":
        os.truncate(checkpoint / "__0_0.distcp", 100)
    elif damage == "shard missing":
        (checkpoint / "__0_0.distcp").unlink()
    elif damage == "bit flipped":
        with (checkpoint / "__2_0.distcp").open("r+b") as file:
            file.seek(1000)
            [byte] = file.read(1)
            file.seek(1000)
            file.write(bytes([byte ^ 4]))
    elif damage == "index missing":
        (checkpoint / ".metadata").unlink()
    elif damage == "index overwritten":
        (checkpoint / ".metadata").write_bytes(bytes((checkpoint / ".metadata").stat().st_size))
    elif damage == "run.json cut":
        os.truncate(checkpoint / "run.json", 20)


def _failed_saves(base: Path) -> dict[str, Any]:
    """A save that fails beside an earlier checkpoint, which then is loaded."""
    results = {}
    for how in ("no folder", "folder vanishes", *(["full disk"] if ROOT else [])):
        run = "full" if how == "full disk" else how
        checkpoint = _copy(base, run)
        trainer = Trainer(config(base, "untied", layout("tp2-pp2"), run=run))
        trainer.store.load(checkpoint, trainer.policy)
        dist.barrier()  # Others may still be reading: not every release of Megatron ends a load in step.
        reason = _obstruct(base / run / "checkpoints", how)
        dist.barrier()
        began = time.monotonic()
        messages = _message(lambda t=trainer: t.store.save(t.policy, TrainState(2, 8)))
        seconds = time.monotonic() - began
        dist.barrier()
        if dist.get_rank() == 0:
            _clear(base / run / "checkpoints", how)
        dist.barrier()
        newest = trainer.store.newest()
        results[how] = {
            "messages": messages,
            "reason": reason,
            "seconds": seconds,
            "left": sorted(path.name for path in checkpoint.parent.glob(".partial*")),
            "earlier_loads": newest == checkpoint
            and trainer.store.load(checkpoint, trainer.policy).step == 1,
        }
    return results


def _obstruct(checkpoints: Path, how: str) -> str:
    """Makes the next save fail; part of the reason that it must tell."""
    main = dist.get_rank() == 0
    if how == "no folder":
        if main:
            (checkpoints / ".partial_step_000002").write_text("a file in the folder's place")
        return "File exists"
    if how == "folder vanishes":
        if main:
            checkpoints.rename(checkpoints.with_name("elsewhere"))
            checkpoints.write_text("a file in the folder's place")
        return "Not a directory"
    if main:
        free = shutil.disk_usage(checkpoints).free
        (checkpoints / "filler").write_bytes(bytes(free - (160 << 10)))
    return "No space left on device"


def _clear(checkpoints: Path, how: str) -> None:
    if how == "no folder":
        (checkpoints / ".partial_step_000002").unlink()
    if how == "folder vanishes":
        checkpoints.unlink()
        checkpoints.with_name("elsewhere").rename(checkpoints)


def _kept(base: Path) -> list[str]:
    trainer = Trainer(config(base, "untied", layout("tp2"), run="kept"))
    for step in (1, 2):
        trainer.store.save(trainer.policy, TrainState(step, 4 * step))
    return sorted(path.name for path in (base / "kept/checkpoints").iterdir())


def _message(work: Any) -> list[str]:
    """Of the RapoError that the work must raise, from every rank; anything else passes through."""
    message = "nothing was raised"
    try:
        work()
    except RapoError as error:
        message = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages
