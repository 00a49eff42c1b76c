"""The policy's updates in one process, against plain PyTorch; and what is not finite, which ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rapo.config import Model, Optimizer
from megatron_rapo.config import Teacher as TeacherOptions
from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.dapo import DAPO
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.finite import check_finite, named_parameters
from megatron_rapo.policy.learning_rate import LearningRate
from megatron_rapo.policy.policy import Policy, _connect
from megatron_rapo.policy.reference import Reference
from megatron_rapo.policy.teacher import Teacher
from megatron_rapo.policy.weighing import weigh
from megatron_rapo.publish.proof import check_policy
from megatron_rapo.testing.ranks import on_ranks
from tests.distributed import test_training_modes as modes
from tests.distributed.minibatches import VOCABULARY, make_minibatches, make_samples
from tests.episodes import prompt_tokens
from tests.methods import a_method
from tests.models import make_hf_model
from tests.ranks import replica_of
from tests.unit.one_rank import one_placement

KEYS = ("loss", "norm", "clipped", "rate")


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as placement:
        yield placement


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    make_hf_model(base / "policy", seed=0, **modes.SMALL)
    make_hf_model(base / "reference", seed=7, **modes.SMALL)
    return base


def make_policy(models: Path, placement: Placement, updates: int = 10, **optimizer: Any) -> Policy:
    model = Model(path=models / "policy", dtype="float32")
    return Policy(model, Optimizer(**optimizer), read_architecture(model.path), placement, updates)


def make_objective(placement: Placement) -> Objective:
    method = a_method(divergence_coefficient=0.0)
    return Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)


@pytest.mark.parametrize(
    ("optimizer", "minibatches"),
    [
        ({"clip_gradient": 0.5}, 1),  # gradients' norms are above it
        ({"beta1": 0.5, "beta2": 0.99}, 2),
        ({"decay": "linear", "warmup_updates": 2}, 2),
        ({"decay": "cosine", "warmup_updates": 1, "min_learning_rate": modes.LOWEST}, 2),
    ],
)
def test_updates_equal_plain_pytorch(
    models: Path, placement: Placement, optimizer: dict[str, Any], minibatches: int
) -> None:
    """Clipping, moments, rates, the policy that sampled in each ratio, and the reference of its own path."""
    mode = modes.Mode("dp1", minibatches=minibatches, optimizer=optimizer)
    expected = modes.plain_pytorch(models, mode)
    found = modes._train(models, mode, placement)
    for key in KEYS:
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    assert found["exported"] == pytest.approx(expected["exported"], rel=1e-5)
    assert max(expected["clipped"]) > 0.01 or minibatches == 1, "the data never reach the clip"
    if "clip_gradient" in optimizer:
        assert min(expected["norm"]) > optimizer["clip_gradient"]


class FakeOptimizer:
    """What Megatron's schedule writes to."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("lowest", [0.0, 0.25])
def test_every_update_has_the_rate_of_its_formula(decay: Any, warmup: int, lowest: float) -> None:
    """Also after a run was resumed in the middle; none is 0, the first after the warm-up is the full rate."""
    if decay == "constant":
        lowest = 0.0
    updates, top = 8, 2.0
    options = Optimizer(
        learning_rate=top,
        warmup_updates=warmup,
        decay=decay,
        **({"min_learning_rate": lowest} if decay != "constant" else {}),
    )
    expected = []
    for update in range(1, updates + 1):
        place = (update - 1 - warmup) / (updates - warmup)
        shape = {"constant": 1.0, "linear": 1 - place, "cosine": (1 + math.cos(math.pi * place)) / 2}[decay]
        expected.append(top * update / warmup if update <= warmup else lowest + (top - lowest) * shape)
    assert min(expected) > 0
    assert expected[warmup] == top

    for done in (0, warmup, 5):
        fake = FakeOptimizer()
        rate = LearningRate(fake, options, updates)
        rate.go_to(done)
        found = []
        for _ in range(done, updates):
            rate.begin_update()
            found.append(fake.param_groups[0]["lr"])
        assert found == pytest.approx(expected[done:])


def test_the_rate_told_is_the_rate_used(models: Path, placement: Placement) -> None:
    """AdamW's first step moves a weight by the rate, as long as its gradient is far above ε."""
    policy = make_policy(models, placement, 4, learning_rate=1e-3, weight_decay=0.0, decay="linear")
    before = [p.detach().clone() for p in policy.chunks[0].parameters()]
    policy.go_to_update(2)
    told = policy.update(make_minibatches(placement, [0]), make_objective(placement), None)
    moved = max(
        float((p - b).abs().max()) for p, b in zip(policy.chunks[0].parameters(), before, strict=True)
    )
    assert told["optimizer/learning_rate"] == pytest.approx(1e-3 * 2 / 4)
    assert moved == pytest.approx(told["optimizer/learning_rate"], rel=1e-3)


def test_padded_rows_of_the_head_change_nothing(models: Path, placement: Placement) -> None:
    found = {}
    for multiple in (1, 64):
        model = Model(path=models / "policy", dtype="float32", vocabulary_multiple=multiple)
        policy = Policy(model, Optimizer(learning_rate=1e-3), read_architecture(model.path), placement, 1)
        told = policy.update(make_minibatches(placement, [0]), make_objective(placement), None)
        found[policy.chunks[-1].head_weight.size(0)] = told
    assert found.keys() == {61, 64}
    assert found[64] == pytest.approx(found[61], rel=1e-5)


def test_a_reference_in_host_memory_needs_another_one(models: Path, placement: Placement) -> None:
    model = Model(path=models / "policy", dtype="float32", reference_in_host_memory=True)
    with pytest.raises(
        RapoError, match=r"reference_in_host_memory = true has no effect where .* CPU; remove it"
    ):
        Reference(model, read_architecture(model.path), placement)


def named(models: Path, placement: Placement) -> tuple[Policy, str, torch.nn.Parameter]:
    """A policy, and one of its parameters."""
    policy = make_policy(models, placement, learning_rate=1e-3)
    name, parameter = list(policy.chunks[0].named_parameters())[3]
    return policy, name, parameter


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e4])
def test_weights_that_an_update_ruined_are_named(
    models: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    policy, name, parameter = named(models, placement)

    def ruin() -> tuple[bool, float, None]:
        parameter.data.view(-1)[-1] = value
        return True, 1.0, None

    monkeypatch.setattr(policy.optimizer, "step", ruin)
    expected = (
        rf"after the step's updates, weights hold NaN or infinity, or .*: {name} on rank 0 .*lower optimizer"
    )
    with pytest.raises(RapoError, match=expected):
        policy.update(make_minibatches(placement, [0]), make_objective(placement), None)


def test_a_hundredfold_weight_is_too_large_and_no_smaller_one(models: Path, placement: Placement) -> None:
    """Of what was the largest at the start, or of 1 where all were smaller."""
    policy, _, parameter = named(models, placement)
    start = max(float(p.detach().abs().max()) for p in policy.chunks[0].parameters())
    objective, minibatch = make_objective(placement), make_minibatches(placement, [0])
    parameter.data.view(-1)[0] = 99 * max(start, 1.0)
    policy._check_parameters("weights", "", policy._largest_weight)
    parameter.data.view(-1)[0] = 101 * max(start, 1.0)
    with pytest.raises(RapoError, match="diverged"):
        policy.update(minibatch, objective, None)


def test_a_rate_that_ruins_the_weights_ends_the_run_at_once(models: Path, placement: Placement) -> None:
    """They stay finite, and all logits become the same: nothing but their size tells it."""
    policy = make_policy(models, placement, learning_rate=1e6)
    with pytest.raises(RapoError, match=r"weights hold .* or more than \d+: .* on rank 0 .*diverged"):
        policy.update(make_minibatches(placement, [0]), make_objective(placement), None)


def test_a_gradient_that_is_not_finite_is_named_before_it_is_applied(
    models: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, name, parameter = named(models, placement)
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        RapoError, match=f"gradients hold NaN or infinity: {name} on rank 0 .pipeline stage 0."
    ):
        policy.update(make_minibatches(placement, [0]), make_objective(placement), None)
    assert torch.equal(parameter.detach(), before)


def test_an_update_that_is_not_allowed_changes_nothing_and_counts_in_the_schedule(
    models: Path, placement: Placement
) -> None:
    """Of three minibatches the second: weights and moments are those of the other two, at their own rates."""
    batches, objective = [make_minibatches(placement, [n])[0] for n in range(3)], make_objective(placement)
    options = {"learning_rate": 1e-3, "decay": "linear"}
    skipping, other = make_policy(models, placement, **options), make_policy(models, placement, **options)
    seen: list[dict[str, float]] = []

    def allow(metrics: Any, damage: str | None) -> bool:
        assert damage is None
        seen.append(dict(metrics))
        return len(seen) != 2

    told = skipping.update(batches, objective, None, allow)
    other.update(batches[:1], objective, None)
    other.go_to_update(2)
    other.update(batches[2:], objective, None)
    for mine, its in zip(skipping.chunks[0].parameters(), other.chunks[0].parameters(), strict=True):
        assert torch.equal(mine, its)
    assert told["optimizer/gradient_norm"] == pytest.approx(
        sum(one["optimizer/gradient_norm"] for one in seen) / 3
    )
    assert told["optimizer/learning_rate"] == pytest.approx(1e-3 * (1.0 + 0.9 + 0.8) / 3)
    assert told["optimizer/changed_tensors"] == 1.0
    assert all(math.isfinite(one["mismatch/engine_log_prob_spread"]) for one in seen)


def test_a_step_whose_updates_are_not_finite_goes_on_without_them(models: Path, placement: Placement) -> None:
    policy, _, parameter = named(models, placement)
    before = [p.detach().clone() for p in policy.chunks[0].parameters()]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    found: list[str | None] = []

    def allow(metrics: Any, damage: str | None) -> bool:
        found.append(damage)
        return damage is None

    told = policy.update(make_minibatches(placement, [0]), make_objective(placement), None, allow)
    assert found[0] is not None and "gradients hold NaN or infinity" in found[0]
    assert all(torch.equal(p, b) for p, b in zip(policy.chunks[0].parameters(), before, strict=True))
    assert told["optimizer/changed_tensors"] == 0.0 and math.isnan(told["optimizer/gradient_norm"])
    assert math.isfinite(told["loss/total"])


def test_all_damaged_tensors_are_counted(models: Path, placement: Placement) -> None:
    policy, name, parameter = named(models, placement)
    parameter.data[0] = math.nan
    list(policy.chunks[0].parameters())[-1].data[0] = math.inf
    with pytest.raises(RapoError, match=rf"{name} on rank 0 .*, and 1 more"):
        policy._check_parameters("weights", "")


@pytest.mark.parametrize("model", ["policy", "reference"])
def test_damaged_weights_are_told_when_they_are_loaded(
    models: Path, placement: Placement, tmp_path: Path, model: str
) -> None:
    path = make_hf_model(tmp_path / "damaged", seed=0, **modes.SMALL)
    spoil(path)
    of = {"policy": {"path": path}, "reference": {"path": models / "policy", "reference_path": path}}
    options = Model(dtype="float32", **of[model])  # type: ignore[arg-type]
    architecture = read_architecture(path)
    build: Any = {
        "policy": lambda: Policy(options, Optimizer(), architecture, placement, 1),
        "reference": lambda: Reference(options, architecture, placement),
    }[model]
    with pytest.raises(
        RapoError, match=rf"the {model}'s weights of {path} hold NaN or infinity: .*undamaged copy"
    ):
        build()


def spoil(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = math.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_policy_that_cannot_be_computed_is_told_before_engines_are_asked(
    models: Path, placement: Placement
) -> None:
    """Weights that are finite, and so large that their products are not."""

    policy, prompts = (
        make_policy(models, placement),
        [Prompt(0, "?", (5, 6, 7), "!"), Prompt(1, "?", (9,), "!")],
    )
    check_policy(policy, placement, prompts, 3, 1)
    for parameter in policy.chunks[0].parameters():
        parameter.data.mul_(1e25)
    policy._check_parameters("weights", "")  # none of them alone is to blame
    with pytest.raises(RapoError, match=r"policy of version 4 gives NaN or infinite log-probs: .*diverged"):
        check_policy(policy, placement, prompts, 4, 1)


def updated(model: Model, placement: Placement, method: Method) -> tuple[Policy, dict[str, float]]:
    """A policy after a step's update with its reference, and the step's metrics."""
    architecture = read_architecture(model.path)
    policy = Policy(model, Optimizer(learning_rate=1e-3), architecture, placement, 3)
    reference = Reference(model, architecture, placement)
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    minibatches = make_minibatches(placement, [0])
    policy.annotate(minibatches, objective)
    reference.annotate(minibatches, objective)
    return policy, dict(policy.update(minibatches, objective, reference))


def test_an_optimizer_in_host_memory_is_refused_without_a_gpu(models: Path, placement: Placement) -> None:
    with pytest.raises(
        RapoError, match=r"in_host_memory_during_rollouts = true has no effect .* CPU; remove"
    ):
        make_policy(models, placement, in_host_memory_during_rollouts=True)


def test_a_reference_is_frozen(models: Path, placement: Placement) -> None:
    model = Model(path=models / "reference", dtype="float32")
    reference = Reference(model, read_architecture(model.path), placement)
    assert not any(parameter.requires_grad for parameter in reference.chunks[0].parameters())


def test_a_reference_in_host_memory_is_on_the_device_only_to_annotate(
    models: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"path": models / "policy", "reference_path": models / "reference", "dtype": "float32"}
    plain = updated(Model(**options), placement, a_method())[1]  # type: ignore[arg-type]
    moves: list[str] = []
    to = torch.nn.Module.to

    def move(module: torch.nn.Module, target: Any) -> torch.nn.Module:
        if not module.training:  # the frozen reference alone
            moves.append("device" if target is GPU else str(target))
        return to(module, "cpu")

    class Gpu:
        """Stands for a GPU where the reference asks which device it has."""

        type = "cuda"

    GPU = Gpu()
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr("megatron_rapo.policy.frozen.device", lambda: GPU)
    monkeypatch.setattr(
        "megatron_rapo.policy.reference.Reference.states",
        lambda self, microbatch: HeadStates(microbatch.reference_hidden[microbatch.is_response], self._head),
    )
    model = Model(**options, reference_in_host_memory=True)  # type: ignore[arg-type]
    kept = updated(model, placement, a_method())[1]
    assert moves == ["cpu", "device", "cpu"]
    assert kept == plain


@pytest.fixture(scope="module")
def teachers(models: Path) -> Path:
    """A teacher of another family, depth and width, as a HF directory and as a Megatron checkpoint."""
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 67}
    make_hf_model(models / "teacher", family="qwen3", seed=3, **{**modes.SMALL, **shape})
    convert_to_megatron(models / "teacher", models / "teacher-checkpoint")
    return models


def distilled(
    models: Path, placement: Placement, method: Method, options: TeacherOptions
) -> dict[str, float]:
    """The metrics of an update towards the teacher."""
    model = Model(path=models / "policy", dtype="float32")
    own = read_architecture(model.path)
    policy = Policy(model, Optimizer(learning_rate=1e-3), own, placement, 3)
    its = Teacher(options, read_architecture(options.path), model, own, placement)
    assert not any(parameter.requires_grad for parameter in its.chunks[0].parameters())
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    minibatches = make_minibatches(placement, [0])
    policy.annotate(minibatches, objective)
    its.annotate(minibatches, objective)
    return dict(policy.update(minibatches, objective, its))


@pytest.mark.parametrize("form", ["HF", "Megatron"])
def test_the_divergence_from_a_teacher_is_that_of_plain_pytorch(
    teachers: Path, placement: Placement, form: str
) -> None:
    path, options = teachers / "teacher", TeacherOptions(path=teachers / "teacher")
    if form == "Megatron":
        options = TeacherOptions(path=path, checkpoint=teachers / "teacher-checkpoint")
    subject = a_method("distill", divergence="forward", divergence_coefficient=0.5)
    found = distilled(teachers, placement, subject, options)
    networks = [
        AutoModelForCausalLM.from_pretrained(teachers / name, dtype=torch.float32)
        for name in ("policy", "teacher")
    ]
    values = []
    for sample in make_samples():
        ids = torch.from_numpy(np.asarray(sample.sequence.token_ids)).long()
        predicting = slice(prompt_tokens(sample.sequence) - 1, -1)
        with torch.no_grad():
            of_policy, of_teacher = (
                network(ids[None]).logits[0, predicting, :VOCABULARY].log_softmax(-1) for network in networks
            )
        values.append((of_teacher.exp() * (of_teacher - of_policy)).sum(-1))
    assert found["loss/distillation"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)


def test_a_teacher_in_host_memory_needs_another_one(teachers: Path, placement: Placement) -> None:
    with pytest.raises(RapoError, match=r"teacher.in_host_memory = true has no effect .* CPU; remove it"):
        options = TeacherOptions(path=teachers / "teacher", in_host_memory=True)
        distilled(teachers, placement, a_method("distill"), options)


@pytest.mark.parametrize("divergence", ["k3", "forward_printed"])
def test_sampled_divergences_are_those_of_plain_pytorch(
    models: Path, placement: Placement, divergence: Any
) -> None:
    """At the sampled tokens, from what the reference left there: its log-probs, or the flattened ones."""
    model = Model(path=models / "policy", reference_path=models / "reference", dtype="float32")
    method = a_method("grpo" if divergence == "k3" else "rapo", divergence=divergence)
    found = updated(model, placement, method)[1]["loss/divergence"]
    networks = [
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        for name in ("policy", "reference")
    ]
    values = []
    for sample in make_samples(0):
        ids = torch.from_numpy(sample.sequence.token_ids).long()
        with torch.no_grad():
            policy, reference = (
                network(ids[None])
                .logits[0, prompt_tokens(sample.sequence) - 1 : -1, :VOCABULARY]
                .log_softmax(-1)
                for network in networks
            )
        if divergence == "forward_printed":
            reference = (sample.phi * reference).log_softmax(-1)
        at = ids[prompt_tokens(sample.sequence) :, None]
        log_rho = (reference - policy).gather(1, at).clamp(-10.0, math.log(10.0))
        rho = log_rho.exp()
        values.append(rho - log_rho - 1 if divergence == "k3" else rho * log_rho - rho + 1)
    assert found == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)


class Recorded:
    """Notes the names of the methods that are called on it, and with which options."""

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return lambda **options: self.calls.append((name, options))


def test_it_is_offloaded_once_and_onloaded_once(models: Path, placement: Placement) -> None:
    """Only where the option says so; whoever asks twice, as after an error, moves nothing twice."""
    policy = make_policy(models, placement)
    optimizer, chunks = Recorded(), [Recorded(), Recorded()]
    policy.optimizer, policy.wrapped = optimizer, chunks  # type: ignore[assignment]
    for turn in (policy.offload, policy.onload):
        turn()
    assert optimizer.calls == chunks[0].calls == []
    policy._offloads = True
    policy.onload()
    for turn in (policy.offload, policy.offload, policy.onload, policy.onload):
        turn()
    policy.offload()
    with policy.onloaded():
        assert [name for name, _ in optimizer.calls][-2:] == ["offload_to_cpu", "restore_from_cpu"]
    turns = ("offload", "restore", "offload", "restore", "offload")
    names = {"offload": "offload_to_cpu", "restore": "restore_from_cpu"}
    assert optimizer.calls == [(names[turn], {}) for turn in turns]
    for chunk in chunks:
        assert chunk.calls == [(f"{turn}_grad_buffers", {}) for turn in turns]


def test_parameters_that_are_gathered_late_are_made_current(models: Path, placement: Placement) -> None:
    policy = make_policy(models, placement)
    chunks = [Recorded(ddp_config=SimpleNamespace(overlap_param_gather=late)) for late in (True, False)]
    policy.wrapped = chunks  # type: ignore[assignment]
    policy.synchronise_parameters()
    assert [chunk.calls for chunk in chunks] == [[("start_param_sync", {"force_sync": True})], []]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("overlapped", [False, True])
def test_schedules_know_how_to_hold_communication_back(chunks: int, overlapped: bool) -> None:
    """Megatron takes one function of one chunk, and a list of those of several."""
    wrapped: Any = [SimpleNamespace(config=SimpleNamespace(), no_sync=f"no_sync {n}") for n in range(chunks)]
    _connect(wrapped, SimpleNamespace(scale_loss="scale"), Optimizer(overlap_communication=overlapped))
    config = wrapped[0].config
    assert config.grad_scale_func == "scale"
    expected = {1: "no_sync 0", 2: ["no_sync 0", "no_sync 1"]}[chunks]
    assert getattr(config, "no_sync_func", None) == (expected if overlapped else None)


def test_parameters_are_named_by_their_chunk_where_there_are_several() -> None:
    chunks = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False)]
    assert [name for name, _ in named_parameters(chunks[:1])] == ["weight", "bias"]
    names = ["chunk 0, weight", "chunk 0, bias", "chunk 1, weight"]
    assert [name for name, _ in named_parameters(chunks)] == names


class Weighing(DAPO):
    """Weighs tokens, so that it needs what the policy makes of them before any update."""

    def weigh(self, tokens: Annotated) -> torch.Tensor:
        return tokens.weights * tokens.old_entropies


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_old_entropies_are_there_for_methods_that_weigh(
    models: Path, placement: Placement, weighs: bool, minibatches: int
) -> None:
    """Of plain PyTorch; a step of one update has the policy run once more for them."""
    method = (Weighing if weighs else DAPO)(DAPO.Options(), Sampling(1.0, 2, 64))
    policy = make_policy(models, placement)
    objective = Objective(method, temperature=0.7, vocabulary=VOCABULARY, group=placement.tensor_group)
    batches = make_minibatches(placement, list(range(minibatches)))
    before = [[microbatch.weights.clone() for microbatch in batch] for batch in batches]
    policy.annotate(batches, objective)
    weigh(batches, method, placement)
    for batch, weights in zip(batches, before, strict=True):
        for microbatch, plain in zip(batch, weights, strict=True):
            assert (microbatch.old_log_probs is not None) == (weighs or minibatches == 2)
            assert (microbatch.old_entropies is not None) == weighs
            chosen = microbatch.is_response
            factor = microbatch.old_entropies[chosen] if weighs else 1.0
            torch.testing.assert_close(microbatch.weights[chosen], plain[chosen] * factor)
    if weighs:
        network = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
        (sample, *_), found = make_samples(0), batches[0]
        ids = torch.from_numpy(sample.sequence.token_ids).long()
        with torch.no_grad():
            logits = network(ids[None]).logits[0, prompt_tokens(sample.sequence) - 1 : -1, :VOCABULARY]
        log_policy = (logits / 0.7).log_softmax(-1)
        expected = -(log_policy.exp() * log_policy).sum(-1)
        # The sample is known by its weight, which no other has.
        at = [torch.isclose(plain, torch.tensor(sample.token_weight)) for plain in before[0]]
        mine = torch.cat([m.old_entropies[where] for m, where in zip(found, at, strict=True)])
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("follows", [False, True])
def test_marks_are_made_before_each_update(models: Path, placement: Placement, follows: bool) -> None:
    """Of the policy as the update finds it, where the method wants to follow it; else as the step began."""
    seen: list[Annotated] = []

    class Marking(DAPO):
        follows_policy = follows

        def mark_tokens(self, tokens: Annotated) -> dict[str, torch.Tensor]:
            seen.append(tokens)
            return {"entropy": tokens.entropies}

    method = Marking(DAPO.Options(), Sampling(1.0, 2, 64))
    policy = make_policy(models, placement, learning_rate=1e-2)
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    batches = make_minibatches(placement, [0, 1])
    policy.annotate(batches, objective)
    policy.update(batches, objective, None)
    first, last = seen
    assert torch.equal(first.log_probs, first.old_log_probs)
    assert torch.equal(last.log_probs, last.old_log_probs) != follows
    assert torch.equal(last.entropies, last.old_entropies) != follows
    marks = torch.cat([one.marks["entropy"][one.is_response] for one in batches[1]])
    torch.testing.assert_close(marks, last.entropies)


@pytest.mark.parametrize("divergence", ["forward_exact", "reverse_exact", "k3"])
def test_a_reference_leaves_what_the_divergence_needs_and_nothing_else(
    models: Path, placement: Placement, divergence: Any
) -> None:
    """Hidden states where it needs whole distributions; else log-probs at the response tokens."""
    model = Model(path=models / "policy", dtype="float32")
    reference = Reference(model, read_architecture(model.path), placement)
    method = a_method("rapo" if divergence == "forward_exact" else "grpo", divergence=divergence)
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    minibatches = make_minibatches(placement, [0])
    reference.annotate(minibatches, objective)
    for microbatch in minibatches[0]:
        tokens = int(microbatch.is_response.sum())
        log_probs = microbatch.reference_log_probs, microbatch.flattened_log_probs
        if divergence == "k3":
            assert microbatch.reference_hidden is None
            assert [found is not None and len(found) for found in log_probs] == [tokens, tokens]
        else:
            assert microbatch.reference_hidden is not None and log_probs == (None, None)
            assert len(microbatch.reference_hidden) == len(microbatch.token_ids)


def test_what_is_not_finite_on_one_rank_is_told_on_every_rank() -> None:
    """The other rank's tensors are whole; both name the damaged one and where it is."""

    def check(group: dist.ProcessGroup) -> list[str | float]:
        placement = replica_of(group)
        found: list[str | float] = []
        for value, bound in ((7.0, math.inf), (math.nan, math.inf), (7.0, 5.0)):
            tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, value if group.rank() else -3.0])}
            try:
                found.append(check_finite("weights", tensors, placement, "mend it", bound))
            except RapoError as error:
                found.append(str(error))
        return found

    expected = [
        7.0,
        "weights hold NaN or infinity: b on rank 1 (pipeline stage 0): nan; mend it",
        "weights hold NaN or infinity, or more than 5: b on rank 1 (pipeline stage 0): 7; mend it",
    ]
    assert on_ranks(2, check) == [expected] * 2
