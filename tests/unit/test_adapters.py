"""Adapters: what configurations are refused, what they cost, and what one rank trains by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import Adapter, Model, Optimizer, Parallel, RunConfig, load_config, validate
from megatron_rapo.config.resuming import Change, change_of, changes, options_of
from megatron_rapo.convert.to_hf import convert_to_hf
from megatron_rapo.convert.to_peft import convert_to_peft
from megatron_rapo.errors import RapoError
from megatron_rapo.fingerprint import weights_fingerprint
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.adapter_rules import adapted_linears, adapter_rules
from megatron_rapo.model.adapters import merged
from megatron_rapo.model.architecture import Experts
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_adapter_parameters, count_parameters
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.planning.trainer_cost import TrainerModel
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.reference import PolicyWithoutAdapters, Reference
from megatron_rapo.preflight import describe_plan
from megatron_rapo.scaling.flops import training_flops
from megatron_rapo.weights.adapter_files import AdapterRecord
from megatron_rapo.weights.export import hf_tensors
from tests.distributed.minibatches import VOCABULARY, make_minibatches
from tests.methods import a_method
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement
from tests.unit.test_memory import QWEN2_7B, estimate
from tests.unit.test_planning import LOAD, RATE, forward_by_hand, profile

ROOT = Path(__file__).parents[2]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as placement:
        yield placement


def config(path: Path, base: Path = Path("run"), **sections: Any) -> RunConfig:
    options: dict[str, Any] = {
        "run": {"directory": str(base / "run"), "steps": 1},
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 32, "max_response_tokens": 32},
        "algorithm": {"max_tokens_per_microbatch": 128},
    }
    return validate({**options, **sections}, source="test")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 0}, r"adapter\.rank"),
        ({"alpha": 0.0}, r"adapter\.alpha"),
        ({"targets": []}, r"adapter\.targets = \[\]: must be a list of layers; name some of q_proj"),
        ({"targets": ["q_proj"] * 2}, r'adapter\.targets = .*: "q_proj" stands there twice; name some'),
        ({"targets": ["lm_head"]}, r'adapter\.targets = \["lm_head"\]: "lm_head" is no layer that'),
        ({"targets": "attention"}, r'adapter\.targets = "attention": must be a list of layers'),
        ({"targets": [["q_proj"]]}, r'adapter\.targets = .*: \["q_proj"\] is no layer'),
        ({"dropout": 0.1}, r"adapter\.dropout"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(model: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(RapoError, match=message):
        config(model, adapter=adapter)


def test_the_order_of_targets_plays_no_part() -> None:
    assert Adapter(targets=["up_proj", "q_proj"]) == Adapter(targets=["q_proj", "up_proj"])
    assert Adapter(targets="all").names == (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def test_the_scale_falls_with_the_rank_or_its_root() -> None:
    assert Adapter(rank=16, alpha=8.0).scale == 0.5
    assert Adapter(rank=16, alpha=8.0, rank_stabilized=True).scale == 2.0


def test_a_reference_in_host_memory_is_refused_where_it_is_the_policy(model: Path) -> None:
    section = {"path": str(model), "dtype": "float32", "reference_in_host_memory": True}
    with pytest.raises(RapoError, match=r"reference_in_host_memory = true would have no effect: under \[ad"):
        config(model, adapter={}, model=section)
    config(model, adapter={}, model={**section, "reference_path": str(model)})


def test_no_run_goes_on_with_another_adapter_or_none(model: Path) -> None:
    """Nor does one of whole weights with an adapter, were it one of defaults alone."""
    full, default, wide = (
        options_of(config(model, **sections))
        for sections in ({}, {"adapter": {}}, {"adapter": {"rank": 32, "rank_stabilized": True}})
    )
    options = {f"adapter.{name}" for name in ("rank", "alpha", "targets", "rank_stabilized")}
    assert changes(full, default).keys() == changes(default, full).keys() == options
    assert changes(full, default)["adapter.rank"] == (None, 16)
    assert changes(default, wide) == {
        "adapter.rank": (16, 32),
        "adapter.rank_stabilized": (False, True),
    }
    assert {change_of(option) for option in options} == {Change.NEVER}
    assert changes(default, {k: v for k, v in default.items() if k != "adapter.rank_stabilized"}) == {}


def test_layers_that_a_model_has_not_are_refused_with_those_it_has(tmp_path: Path) -> None:
    architecture = read_architecture(make_hf_model(tmp_path / "glm4", family="glm4"))
    with pytest.raises(
        RapoError, match=r'gate_proj, up_proj, which a glm4 has not; .*"o_proj", "down_proj"\]'
    ):
        list(adapted_linears(architecture, Adapter()))


def test_targets_that_a_family_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rapo.model import adapter_rules as module

    family = module.family_of(QWEN2_7B)
    without = replace(family, layer=lambda a: [r for r in family.layer(a) if "mlp" not in r.megatron])
    monkeypatch.setattr(module, "family_of", lambda architecture: without)
    with pytest.raises(RapoError, match=r'targets = "all" has gate_proj, up_proj, down_proj, which a qwen2'):
        list(adapter_rules(QWEN2_7B, Adapter()))


def test_the_example_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = load_config([ROOT / "examples/adapters/lora.toml"])
    assert example.adapter == Adapter(rank=8, alpha=16.0)
    assert "trained are adapters of rank 8" in describe_plan(example)


def test_the_plan_tells_what_is_trained(model: Path, tmp_path: Path) -> None:
    plan = describe_plan(config(model, tmp_path, adapter={"rank": 2}))
    count = count_adapter_parameters(read_architecture(model), Adapter(rank=2))
    assert f"trained are adapters of rank 2: {count:,} parameters" in plan


def test_parameters_are_those_that_peft_counts(model: Path) -> None:
    peft, adapter = of_peft(model, "all"), Adapter(rank=3)
    trained = sum(parameter.numel() for parameter in peft.parameters() if parameter.requires_grad)
    assert count_adapter_parameters(read_architecture(model), adapter) == trained


def of_peft(model: Path, targets: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    hf = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    return get_peft_model(hf, LoraConfig(r=3, target_modules=list(Adapter(targets=targets).names)))


@pytest.mark.parametrize("targets", ["all", ["q_proj", "down_proj"]])
def test_flops_are_those_that_pytorch_counts_of_peft(model: Path, targets: Any) -> None:
    """Where the first layer hands a gradient on as the others do."""
    from torch.utils.flop_counter import FlopCounterMode

    peft, total = of_peft(model, targets), 0
    peft.enable_input_require_grads()
    for length in (12, 30):
        with FlopCounterMode(display=False) as counter:
            peft(torch.randint(61, (1, length))).logits.sum().backward()
        total += counter.get_total_flops()
    found = training_flops(read_architecture(model), [12, 30], adapter=Adapter(rank=3, targets=targets))
    assert found == pytest.approx(total, rel=0.01)


def test_memory_has_gradients_and_optimizer_of_adapters_alone() -> None:
    adapter = Adapter(rank=16, targets=["q_proj", "down_proj"])
    # A whole and B cut of q_proj; A cut and B whole of down_proj.
    q_proj = 28 * 16 * (3584 + 3584 // 2)
    down_proj = 28 * 16 * (18944 // 2 + 3584)
    trained = q_proj + down_proj
    layout = {"parallel": {"tensor_parallel": 2, "data_parallel": 2}}
    full = estimate(**layout)
    found = estimate(**layout, adapter=adapter.model_dump())
    assert found.weights == full.weights + 2 * trained
    assert found.gradients == 4 * trained
    assert found.optimizer == 12 * (trained // 2)
    assert (found.reference, found.activations) == (0, full.activations)
    assert full.loss - found.loss == 4 * 3584 * 152064 // 2, "no gradient of the head"
    assert found.reference_hidden == full.reference_hidden > 0


def test_memory_has_a_reference_that_is_another_model() -> None:
    apart = estimate(adapter={}, model={"path": "model", "reference_path": "reference"})
    assert apart.reference == estimate().reference > 0


def test_a_mixtures_experts_have_no_states() -> None:
    mixture = replace(QWEN2_7B, family="qwen2_moe", experts=Experts(8, 2, renormalised=True))
    found = estimate(mixture, adapter={"targets": ATTENTION}, parallel={"expert_parallel": 1})
    count = count_adapter_parameters(mixture, Adapter(targets=ATTENTION))  # type: ignore[arg-type]
    assert found.gradients == 4 * count


@pytest.mark.parametrize("recompute", [False, True])
def test_a_planned_update_has_no_products_for_gradients_of_frozen_weights(recompute: bool) -> None:
    """Of what adapters train, gradients and optimizer states alone are moved."""
    budget = {"budget": 4000, "recompute": recompute, "distributed": False, "overlap": False}
    slow = profile(memory_bytes_per_s=1e6)
    costs = [
        TrainerModel(QWEN2_7B, LOAD, device, 2, adapter).cost(Parallel(), **budget)  # type: ignore[arg-type]
        for device in (profile(), slow)
        for adapter in (None, Adapter(rank=16))
    ]
    layers, whole = (forward_by_hand(64_000, 1000, head=head) / RATE for head in (False, True))
    again = layers if recompute else 0.0
    assert costs[0].update == pytest.approx(3 * whole + again, rel=1e-6)
    assert costs[1].update == pytest.approx(2 * whole + again, rel=1e-6)
    share = count_adapter_parameters(QWEN2_7B, Adapter(rank=16)) / count_parameters(QWEN2_7B)
    assert costs[3].optimizer == pytest.approx(share * costs[2].optimizer)


def a_policy(model: Path, placement: Placement, adapter: Adapter, **optimizer: Any) -> Policy:
    options = Model(path=model, dtype="float32")
    architecture = read_architecture(model)
    chosen = Optimizer(learning_rate=1e-2, **optimizer)
    return Policy(options, chosen, architecture, placement, 10, adapter, seed=3)


@pytest.mark.parametrize("options", [{}, {"distributed": False}, {"overlap_communication": True}])
def test_training_moves_adapters_and_leaves_the_rest_bit_for_bit(
    model: Path, placement: Placement, options: dict[str, Any]
) -> None:
    policy = a_policy(model, placement, Adapter(rank=4), **options)
    before = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
    begun = dict(hf_tensors(policy.chunks, policy.architecture, placement))
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, hf[name]) for name, tensor in begun.items()), "B is 0"

    objective = an_objective(placement)
    shares, losses = [], []
    for number in range(3):
        frozen = PolicyWithoutAdapters(policy.chunks, placement)
        minibatches = make_minibatches(placement, [number])
        policy.annotate(minibatches, objective)
        frozen.annotate(minibatches, objective)
        told = policy.update(minibatches, objective, frozen)
        shares.append(told["optimizer/changed_tensors"])
        losses.append(told["loss/total"])
    assert shares[1:] == [1.0, 1.0], "of what is trained"
    for name, parameter in policy.chunks[0].named_parameters():
        assert torch.equal(parameter, before[name]) == (".adapter." not in name), name
    tracked = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in tracked) == count_adapter_parameters(policy.architecture, policy.adapter)
    assert not any(hasattr(p, "main_grad") for n, p in before.items())
    trained = dict(hf_tensors(policy.chunks, policy.architecture, placement))
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, begun[name])}
    assert {name.split(".")[-2] for name in moved} == set(Adapter().names)
    policy.close()


def an_objective(placement: Placement) -> Objective:
    method = a_method("rapo", divergence_coefficient=0.1)
    return Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)


def test_the_reference_is_the_same_as_one_of_its_own(model: Path, placement: Placement) -> None:
    """Before adapters have moved and after; and it takes no memory."""
    policy, objective = a_policy(model, placement, Adapter(rank=4)), an_objective(placement)
    own = Reference(Model(path=model, dtype="float32"), policy.architecture, placement)
    shared = PolicyWithoutAdapters(policy.chunks, placement)
    assert shared.chunks is policy.chunks
    for number in range(2):
        hidden = []
        for frozen in (own, shared):
            minibatches = make_minibatches(placement, [number])
            policy.annotate(minibatches, objective)
            frozen.annotate(minibatches, objective)
            hidden.append([m.reference_hidden for minibatch in minibatches for m in minibatch])
        assert all(torch.equal(*pair) for pair in zip(*hidden, strict=True))
        policy.update(minibatches, objective, shared)
    policy.close()


def test_merging_rounds_once(model: Path, placement: Placement) -> None:
    """In bfloat16 as fp64 has it, which a product in bfloat16 has not."""
    options = Model(path=model, dtype="bfloat16")
    adapter = Adapter(rank=4, alpha=12.0, targets=["k_proj", "v_proj"])
    architecture = read_architecture(model)
    policy = Policy(options, Optimizer(), architecture, placement, 10, adapter, seed=3)
    for name, parameter in policy.chunks[0].named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    matrices = dict(hf_tensors(policy.chunks, architecture, placement, adapter=adapter))
    weights = dict(hf_tensors(policy.chunks, architecture, placement, value=torch.Tensor.detach))
    for name, tensor in hf_tensors(policy.chunks, architecture, placement, value=merged):
        own = name.removesuffix(".weight")
        if not name.endswith(("k_proj.weight", "v_proj.weight")):
            assert torch.equal(tensor, weights[name])
            continue
        a, b = (matrices[f"{own}.lora_{which}.weight"].double() for which in "AB")
        assert torch.equal(tensor, (weights[name].double() + 3.0 * b @ a).bfloat16())
    policy.close()


def saved(model: Path, run: Path, placement: Placement, **sections: Any) -> Path:
    """A checkpoint of a policy that has not moved, in the run's directory."""
    chosen = config(model, run, **sections)
    architecture = read_architecture(model)
    policy = Policy(chosen.model, chosen.optimizer, architecture, placement, 10, chosen.adapter, seed=3)
    fingerprints = {"weights of model.path": weights_fingerprint(model)}
    CheckpointStore(chosen, fingerprints).save(policy, TrainState(1))
    policy.close()
    return run / "run"


def test_a_checkpoint_is_of_its_base_alone(tmp_path: Path, placement: Placement) -> None:
    model = make_hf_model(tmp_path / "model")
    run = saved(model, tmp_path, placement, adapter={"rank": 2})
    convert_to_hf(run, tmp_path / "merged")
    hf = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, tmp_path / "merged")]
    assert all(torch.equal(hf[0][name], hf[1][name]) for name in hf[0]), "B is 0"

    make_hf_model(model, seed=1)
    with pytest.raises(RapoError, match=r"holds adapters of other weights than those in .*model \(fingerpri"):
        convert_to_hf(run, tmp_path / "again", model)
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(RapoError, match=r"holds adapters of .*model, which is not there; bring it there"):
        convert_to_hf(run, tmp_path / "again", tmp_path / "elsewhere")
    with pytest.raises(RapoError, match=r"holds adapters of .*model, which has no config.json; name the HF"):
        convert_to_peft(run, tmp_path / "peft")
    convert_to_peft(run, tmp_path / "peft", tmp_path / "elsewhere")
    assert (tmp_path / "peft/adapter_model.safetensors").is_file()
    record = next(run.glob("checkpoints/*/run.json"))
    record.write_text(record.read_text().replace('"rank": 2', '"rank": 0'))
    with pytest.raises(RapoError, match=r"run\.json is damaged"):
        AdapterRecord.of(record.parent)


def test_adapters_of_another_architecture_are_refused(
    tmp_path: Path, model: Path, placement: Placement
) -> None:
    run = saved(model, tmp_path, placement, adapter={"rank": 2})
    wider = make_hf_model(tmp_path / "wider", intermediate_size=192)
    with pytest.raises(RapoError, match=r"is of another architecture: .*lora_.* has shape \[.*176.*config"):
        convert_to_peft(run, tmp_path / "peft", wider)


def test_whole_weights_are_no_adapters(tmp_path: Path, model: Path, placement: Placement) -> None:
    run = saved(model, tmp_path, placement)
    with pytest.raises(RapoError, match="holds whole weights, and no adapters; convert it by `megatron-rapo"):
        convert_to_peft(run, tmp_path / "peft")
