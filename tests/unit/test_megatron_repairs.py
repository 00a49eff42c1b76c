"""What is mended in Megatron: its optimizer, on a stand-in for it, once, and of a known version alone."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rapo.errors import RapoError
from megatron_rapo.megatron_repairs import adam, buckets
from megatron_rapo.megatron_repairs import install as installing
from megatron_rapo.megatron_repairs.install import check_version, install


class Optimizer:
    """As much of Megatron's DistributedOptimizer as is mended."""

    def __init__(self, states: dict[Any, Any]) -> None:
        self.optimizer = SimpleNamespace(state=states)
        self.config = "configuration"

    def init_state_fn(self, optimizer: Any, config: str) -> None:
        assert config == self.config
        optimizer.state.update({name: {"exp_avg": torch.zeros(2)} for name in ("a", "b")})

    def state_dict(self) -> dict[str, Any]:
        return {name: float(values["step"]) for name, values in self.optimizer.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for values in self.optimizer.state.values():
            values["step"] = state["step"]

    def _set_main_param_and_optimizer_states(self) -> None:
        raise NotImplementedError

    def get_parameter_state_dp_zero(self, *, state: Any) -> Any:
        return state


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    optimizer = type("Mended", (Optimizer,), {})
    monkeypatch.setattr(adam, "DistributedOptimizer", optimizer)
    monkeypatch.setattr(adam, "HAVE_APEX_OR_TE", False)
    monkeypatch.setattr(buckets, "DistributedOptimizer", optimizer)
    adam.repair()
    buckets.repair()
    return optimizer


def test_transformer_engines_adam_needs_no_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = type("Left", (Optimizer,), {})
    monkeypatch.setattr(adam, "DistributedOptimizer", optimizer)
    monkeypatch.setattr(adam, "HAVE_APEX_OR_TE", True)
    adam.repair()
    assert optimizer.state_dict is Optimizer.state_dict


def test_a_fresh_optimizer_has_a_step_to_save_and_a_trained_one_keeps_its_own(mended: type[Any]) -> None:
    assert mended({}).state_dict() == {"a": 0.0, "b": 0.0}
    assert mended({"a": {"step": torch.tensor(3.0)}}).state_dict() == {"a": 3.0}


def test_each_parameter_counts_its_own_steps_after_a_load(mended: type[Any]) -> None:
    loaded = mended({"a": {}, "b": {}})
    loaded.load_state_dict({"step": torch.tensor(3.0)})
    loaded.optimizer.state["a"]["step"] += 1
    assert loaded.state_dict() == {"a": 4.0, "b": 3.0}


def test_a_loaded_parameter_gets_its_values_and_moments_and_no_step(mended: type[Any]) -> None:
    main = torch.nn.Parameter(torch.zeros(2))
    other = torch.nn.Parameter(torch.zeros(2))
    states = {each: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)} for each in (main, other)}
    optimizer = mended(states)
    optimizer.optimizer.param_groups = [{"params": [other]}, {"params": [other, main]}]
    optimizer.model_param_group_index_map = {"parameter": (1, 1)}
    tensors = {
        "param": torch.tensor([1.0, 2.0]),
        "exp_avg": torch.tensor([3.0, 4.0]),
        "exp_avg_sq": torch.tensor([5.0, 6.0]),
        "step": torch.tensor(7.0),
    }
    optimizer._set_main_param_and_optimizer_states("parameter", tensors)
    assert main.tolist() == [1.0, 2.0]
    assert {name: values.tolist() for name, values in states[main].items()} == {
        "exp_avg": [3.0, 4.0],
        "exp_avg_sq": [5.0, 6.0],
    }
    assert not any(values.any() for values in states[other].values()) and not other.any()


def test_each_buffers_tensors_are_laid_out_with_its_padding(mended: type[Any]) -> None:
    """Elements are strung together; in a buffer each bucket begins at its own place, zeros between."""

    def buffer(numel: int, *buckets: tuple[int, int]) -> Any:
        made = [SimpleNamespace(offset=offset, numel_unpadded=size) for offset, size in buckets]
        return SimpleNamespace(numel=numel, buckets=made)

    optimizer = mended({})
    optimizer.buffers = [buffer(8, (0, 3), (4, 2)), buffer(3, (0, 1))]
    state = [
        {"float32": {"param": torch.arange(1.0, 6.0), "numel_unpadded": 5}},
        {"float32": {"param": torch.tensor([9.0])}},
    ]
    found = optimizer.get_parameter_state_dp_zero(state=state)
    assert found[0]["float32"]["param"].tolist() == [1, 2, 3, 0, 4, 5, 0, 0]
    assert found[0]["float32"]["numel_unpadded"] == 5
    assert found[1]["float32"]["param"].tolist() == [9, 0, 0]
    assert optimizer.get_parameter_state_dp_zero(state=None) is None, "as ranks beside the first have it"


def test_repairs_are_made_once() -> None:
    """Each repair calls what it took the place of."""
    install()
    found = DistributedOptimizer.state_dict, DistributedOptimizer.get_parameter_state_dp_zero
    install()
    assert found == (DistributedOptimizer.state_dict, DistributedOptimizer.get_parameter_state_dp_zero)
    assert found[0].__module__ == adam.__name__ and found[1].__module__ == buckets.__name__
    assert isinstance(filesystem_async._results_queue, queue.Queue)
    if not torch.cuda.is_available():
        assert torch.zeros(1, device="cuda").device.type == "cpu"


@pytest.mark.parametrize("found", ["0.16.0", "0.16.10", "0.17.0", "0.16.1rc1"])
def test_another_version_is_refused_before_anything_is_mended(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "version", {"megatron-core": found}.get)
    monkeypatch.setattr(adam, "repair", lambda: pytest.fail("mended all the same"))
    for refuse in (check_version, install.__wrapped__):
        with pytest.raises(
            RapoError, match=rf"megatron-core {found} is .*pip install megatron-core==0\.16\.1"
        ):
            refuse()


def test_a_build_of_a_known_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "version", {"megatron-core": "0.16.1+cpu"}.get)
    check_version()
