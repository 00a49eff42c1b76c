"""What is mended in Megatron: its optimizer, on a stand-in for it, once, and of releases with the fault."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import queue
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rapo.errors import RapoError
from megatron_rapo.megatron_repairs import (
    adam,
    buckets,
    cpu,
    gloo_sizes,
    notices,
    pickles,
    results_queue,
    router_gemm,
)
from megatron_rapo.megatron_repairs import install as installing
from megatron_rapo.megatron_repairs.install import SUPPORTED, check_version, install
from tests.unit.test_examples import setup_arguments

REPAIRS = (cpu, gloo_sizes, adam, buckets, notices, pickles, results_queue, router_gemm)


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


def test_parts_of_several_sizes_are_gathered_as_parts_of_one() -> None:
    ranks = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]

    def gather(parts: list[torch.Tensor], given: torch.Tensor) -> None:
        assert given.tolist() == [[3.0], [0.0]]
        for part, values in zip(parts, ranks, strict=True):
            assert part.shape == given.shape
            part[: len(values)] = values

    found = [torch.zeros_like(values) for values in ranks]
    gloo_sizes.with_uneven_parts(gather)(found, ranks[1])
    assert [part.tolist() for part in found] == [values.tolist() for values in ranks]


def test_sizes_of_any_kind_become_integers() -> None:
    told: list[Any] = []
    exchange = gloo_sizes.with_integer_sizes(lambda *args, **options: told.append((args, options)))
    exchange("out", "in", output_split_sizes=torch.tensor([1, 2]), input_split_sizes=None, group="group")
    assert told == [(("out", "in", [1, 2], None), {"group": "group"})]


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
        assert torch.cuda.Stream | None, "libraries that are imported later may annotate with it"


@pytest.mark.parametrize("found", ["0.16.0", "0.16.1rc1", "0.19.2rc1", "0.20.0"])
def test_another_version_is_refused_before_anything_is_mended(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "version", {"megatron-core": found}.get)
    monkeypatch.setattr(adam, "repair", lambda: pytest.fail("mended all the same"))
    for refuse in (check_version, install.__wrapped__):
        with pytest.raises(
            RapoError, match=rf"megatron-core {found} is .*pip install 'megatron-core>=0\.16\.1,<0\.20'"
        ):
            refuse()


@pytest.mark.parametrize(
    ("found", "spared"),
    [
        ("0.16.1", {notices, pickles}),
        ("0.16.1+cpu", {notices, pickles}),
        ("0.17.1", {notices}),
        ("0.19.2", {router_gemm}),
    ],
)
def test_a_release_gets_the_repairs_that_name_it(
    found: str, spared: set[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = []
    monkeypatch.setattr(installing, "version", {"megatron-core": found}.get)
    for module in REPAIRS:
        monkeypatch.setattr(module, "repair", partial(mended.append, module))
    install.__wrapped__()
    assert set(mended) == set(REPAIRS) - spared


def test_lines_about_calls_on_purpose_are_left_out_and_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    notices.repair()
    for name, text in notices.MADE_ON_PURPOSE.items():
        logging.getLogger(name).warning("%s: see the guide", text)
        logging.getLogger(name).warning("another line")
    assert [record.getMessage() for record in caplog.records] == ["another line"] * 2


def test_what_is_supported_is_what_is_installed_with_the_package() -> None:
    requirements = map(Requirement, setup_arguments()["install_requires"])
    (needed,) = (str(one.specifier) for one in requirements if one.name == "megatron-core")
    assert SpecifierSet(needed) == SpecifierSet(SUPPORTED)


# Whether the release that is installed still has each fault: where it has not, its VERSIONS end before it.


@pytest.fixture
def original() -> Callable[[str], Any]:
    """A module of Megatron as it is shipped, whatever has been mended in this process."""

    def load(name: str) -> Any:
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def has_fault(module: Any) -> bool:
    return check_version() in SpecifierSet(module.VERSIONS)


def test_loading_still_takes_step_for_a_moment(original: Callable[[str], Any]) -> None:
    shipped = original("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    main = torch.nn.Parameter(torch.zeros(1))
    state = {name: torch.zeros(1) for name in ("exp_avg", "exp_avg_sq", "step")}
    optimizer = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={"parameter": (0, 0)},
        optimizer=SimpleNamespace(param_groups=[{"params": [main]}], state={main: state}),
    )
    saved = {name: torch.ones(1) for name in ("param", "exp_avg", "exp_avg_sq")}
    with (
        torch.no_grad(),
        pytest.raises(KeyError, match="step") if has_fault(adam) else nullcontext(),
    ):
        shipped._set_main_param_and_optimizer_states(optimizer, "parameter", saved)


def test_what_is_gathered_still_lacks_the_padding(
    original: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = original("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda _: [0])
    optimizer = SimpleNamespace(
        data_parallel_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
        optimizer_state_keys=("exp_avg", "exp_avg_sq"),
        gbuf_ranges=[{"float32": []}],
        buffers=[SimpleNamespace(numel=8, numel_unpadded=5)],
    )
    state = shipped.get_parameter_state_dp_zero(optimizer, use_gloo_comm=False, empty_data=True)
    assert (state[0]["float32"]["param"].numel() == 5) == has_fault(buckets)


def test_the_routers_product_is_still_undefined(original: Callable[[str], Any]) -> None:
    shipped = original("megatron.core.transformer.moe.moe_utils")
    given, weight = torch.ones(3, 1, 2), torch.ones(4, 2)
    with pytest.raises(NameError, match="te_general_gemm") if has_fault(router_gemm) else nullcontext():
        assert shipped.router_gating_linear(given, weight, None, torch.float32).shape == (3, 1, 4)


def test_a_queue_of_results_still_starts_a_process(
    original: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = original("megatron.core.dist_checkpointing.strategies.filesystem_async")
    started = []
    context = SimpleNamespace(Manager=lambda: started.append("manager") or SimpleNamespace(Queue=queue.Queue))
    monkeypatch.setattr(shipped.mp, "get_context", lambda _: context)
    (name,) = {"get_write_results_queue", "_get_write_results_queue"} & vars(shipped).keys()
    getattr(shipped, name)()
    assert bool(started) == has_fault(results_queue)


def test_lines_about_calls_on_purpose_are_still_logged() -> None:
    sources = {text: inspect.getsource(import_module(name)) for name, text in notices.MADE_ON_PURPOSE.items()}
    assert any(text in source for text, source in sources.items()) == has_fault(notices)


def test_a_pickled_tensor_still_names_megatron_where_it_is_not_mended() -> None:
    """In processes of their own: the function in question is torch's, and stays as it is put."""
    imported = pickled_after("import megatron.core")
    assert (b"megatron" in imported) == has_fault(pickles)
    mended = pickled_after(f"from {installing.__name__} import install; install()")
    assert b"megatron" not in mended and b"_load_from_bytes" in mended


def pickled_after(statement: str) -> bytes:
    """A tensor's pickle in a process that has run `statement`."""
    program = f"import pickle, sys, torch; {statement}; sys.stdout.buffer.write(pickle.dumps(torch.ones(1)))"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120).stdout
