"""Choices of experts that are used again, on one rank: recorded, taken, counted, and where they are refused.

What they do to loss and gradient at each layout is in tests/distributed/test_update_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rapo.config import Model, Optimizer, RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.data.trees import pack_trees
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.routing_replay import Replay, Routing
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.reference import Reference
from megatron_rapo.preflight import planned_architecture
from megatron_rapo.weights.export import hf_tensors
from tests.distributed.replayed_routing import choices, fix
from tests.methods import a_method
from tests.models import load_reference, make_hf_model
from tests.unit.one_rank import one_placement

RATE = 0.02


def best(scores: Tensor, topk: int, *_: Any) -> tuple[Tensor, Tensor]:
    found = scores.topk(topk, dim=1)
    return found.values, found.indices


@pytest.mark.parametrize(("experts", "kind"), [(255, torch.uint8), (256, torch.uint16)])
def test_choices_are_kept_in_the_smallest_type_and_taken_as_they_were(
    experts: int, kind: torch.dtype
) -> None:
    scores = torch.randn(5, experts, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = 9.0  # the highest number is chosen by all
    choices: dict[int, Tensor] = {}
    replay = Replay(experts)
    replay.layer, replay.routing = 3, Routing(choices, recorded=True)
    _, recorded = replay.get_replay_topk(scores, 2, default_compute_topk=best)
    assert replay.changed is None
    assert choices[3].dtype is kind and recorded[:, 0].tolist() == [experts - 1] * 5

    other = scores.clone().requires_grad_()
    with torch.no_grad():
        other[0] = -scores[0]  # of row 0 other experts would be chosen; of row 1 the same, in another order
        other[1, recorded[1]] = scores[1, recorded[1]].flip(0)
    replay.routing = Routing(choices, recorded=False)
    shares, taken = replay.get_replay_topk(other, 2, default_compute_topk=best)
    assert taken.equal(recorded) and taken.dtype is torch.int64
    assert shares.equal(other.detach().gather(1, recorded))
    assert replay.changed == 1
    shares.sum().backward()
    assert other.grad is not None and other.grad.nonzero().shape == (10, 2)


def test_choices_of_other_rows_are_refused() -> None:
    replay = Replay(4)
    replay.layer, replay.routing = 1, Routing({1: torch.zeros(3, 2, dtype=torch.uint8)}, recorded=False)
    with pytest.raises(ValueError, match=r"layer 1 has 5 rows, and choices \(3, 2\)"):
        replay.get_replay_topk(torch.zeros(5, 4), 2, default_compute_topk=best)


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as own:
        yield own


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("replay") / "model", family="qwen3_moe")


def samples(seed: int) -> list[Sample]:
    """Of even lengths, so that nothing is padded; the responses go on from one prompt."""
    random = np.random.default_rng(seed)
    prompt = random.integers(2, 59, 6).astype(np.int32)
    return [
        Sample(
            Sequence.of_response(prompt, random.integers(2, 59, size).astype(np.int32), log_probs, 0),
            phi=1.0,
            advantage=float(random.normal()),
            token_weight=0.05,
            beginnings=((6, 0),),  # type: ignore[arg-type]
        )
        for size in (8, 4, 20)
        for log_probs in [random.normal(-2, 1, size).astype(np.float32)]
    ]


def packed(seed: int, *, shared: bool = False) -> Microbatch:
    return pack_trees(samples(seed), multiple=2) if shared else pack(samples(seed), sequence_multiple=2)


def objective(
    placement: Placement, routing_replay: str, *, vocabulary: int = 59, **options: Any
) -> Objective:
    options = {"divergence_coefficient": 0.0, **options}
    method = a_method("rapo", routing_replay=routing_replay, **options)
    return Objective(method, temperature=1.0, vocabulary=vocabulary, group=placement.tensor_group)


def trained(
    path: Path, placement: Placement, routing_replay: str, *, shared: bool = False, recompute: Any = "none"
) -> tuple[dict[str, float], dict[str, Tensor], list[Microbatch], dict[str, Tensor]]:
    """A step of two updates: metrics, weights after it and after the first, and the microbatches."""
    model = Model(path=path, dtype="float32", recompute=recompute)
    architecture = read_architecture(path)
    policy = Policy(
        model, Optimizer(learning_rate=RATE, epsilon=1e-4, distributed=False), architecture, placement, 2
    )
    minibatches = [[packed(0, shared=shared)], [packed(1, shared=shared)]]
    own = objective(placement, routing_replay)
    policy.annotate(minibatches, own)
    policy.update(minibatches[:1], own, None)
    moved = {n: t.clone() for n, t in hf_tensors(policy.chunks, architecture, placement)}
    metrics = dict(policy.update(minibatches[1:], own, None))
    weights = {n: t.clone() for n, t in hf_tensors(policy.chunks, architecture, placement)}
    policy.close()
    return metrics, weights, [one for minibatch in minibatches for one in minibatch], moved


def test_the_metric_is_the_share_of_choices_that_transformers_would_change(
    mixture: Path, placement: Placement, tmp_path: Path
) -> None:
    metrics, _, microbatches, moved = trained(mixture, placement, "old")
    old, now = load_reference(mixture), load_reference(mixture)
    _fill(now, moved)
    differing = tokens = 0
    start = 0
    for sample in samples(1):
        taken = choices(old, sample)
        fix(now, taken)
        own = choices(now, sample)
        differing += int((own.sort(-1).values != taken.sort(-1).values).any(-1).sum())
        tokens += taken.size(0) * taken.size(1)
        end = start + taken.size(1)
        assert microbatches[1].experts is not None
        for layer, found in microbatches[1].experts.items():
            assert found[start:end].tolist() == taken[layer - 1].tolist()
        start = end
    assert differing > 0
    assert metrics["router/replay_changed"] == pytest.approx(differing / tokens, abs=1e-12)


def _fill(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Published tensors into transformers' own, which hold all experts of a layer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.rpartition(".experts.")[0]
            if name.endswith("experts.gate_up_proj"):
                for expert, both in enumerate(parameter):
                    parts = [tensors[f"{layer}.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up")]
                    both.copy_(torch.cat(parts))
            elif name.endswith("experts.down_proj"):
                for expert, matrix in enumerate(parameter):
                    matrix.copy_(tensors[f"{layer}.experts.{expert}.down_proj.weight"])
            else:
                parameter.copy_(tensors[name])


def test_without_replay_nothing_is_kept_and_another_model_is_trained(
    mixture: Path, placement: Placement
) -> None:
    plain, free, microbatches, _ = trained(mixture, placement, "off")
    assert all(one.experts is None for one in microbatches)
    assert "router/replay_changed" not in plain
    _, replayed, _, _ = trained(mixture, placement, "old")
    assert any(not free[name].equal(replayed[name]) for name in free)


def test_recomputed_layers_go_the_same_way(mixture: Path, placement: Placement) -> None:
    metrics, weights, _, _ = trained(mixture, placement, "old")
    again, recomputed, _, _ = trained(mixture, placement, "old", recompute="full")
    assert again == metrics
    assert all(weights[name].equal(recomputed[name]) for name in weights)


def test_shared_prompts_are_sent_once(mixture: Path, placement: Placement) -> None:
    """What a prompt's rows do once, they do for all of its responses: the same update up to rounding."""
    _, apart, _, _ = trained(mixture, placement, "old")
    _, shared, microbatches, _ = trained(mixture, placement, "old", shared=True)
    rows = sum(len(sample.sequence) for sample in samples(1)) - 2 * 6
    assert microbatches[1].experts is not None
    assert {tuple(each.shape) for each in microbatches[1].experts.values()} == {(rows, 2)}
    for name in apart:
        torch.testing.assert_close(shared[name], apart[name], rtol=1e-3, atol=1e-4)


def test_a_reference_chooses_by_itself(mixture: Path, placement: Placement) -> None:
    model = Model(path=mixture, dtype="float32")
    reference = Reference(model, read_architecture(mixture), placement)
    own = objective(placement, "off", divergence_coefficient=0.1)
    found = []
    for planted in (None, torch.zeros):
        microbatch = packed(0)
        if planted is not None:
            rows = torch.tensor([0, 1], dtype=torch.uint8).repeat(len(microbatch.token_ids), 1)
            microbatch.experts = dict.fromkeys(range(1, 5), rows)
        reference.annotate([[microbatch]], own)
        found.append(microbatch.reference_hidden)
    assert found[0] is not None and found[1] is not None
    assert found[0].equal(found[1])


def configured(**options: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"directory": "/nowhere", "steps": 1},
        "model": {"path": "/nowhere"},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 8, "max_response_tokens": 8},
        "algorithm": {"routing_replay": "old", "minibatch_prompts": 2},
    }
    return validate(
        {name: {**values.get(name, {}), **options.get(name, {})} for name in values}, source="test"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"minibatch_prompts": 4},
            "would have no effect: a step's only update starts from the policy of the",
        ),
        (
            {"old_log_probs": "engine"},
            'does not go with algorithm.old_log_probs = "engine", by which no pass',
        ),
        ({"method": "sft"}, 'would have no effect: method "sft" learns from texts that are given'),
    ],
)
def test_replay_without_effect_is_refused(options: dict[str, Any], message: str) -> None:
    configured()
    with pytest.raises(RapoError, match=message):
        configured(algorithm={"routing_replay": "old", "minibatch_prompts": 2, **options})


def test_replay_of_a_dense_model_is_refused(tmp_path: Path, mixture: Path) -> None:
    dense = make_hf_model(tmp_path / "dense")
    assert planned_architecture(configured(model={"path": str(mixture)})).experts is not None
    with pytest.raises(
        RapoError, match=r'algorithm\.routing_replay = "old" has no effect: a qwen2 has no experts; remove it'
    ):
        planned_architecture(configured(model={"path": str(dense)}))
