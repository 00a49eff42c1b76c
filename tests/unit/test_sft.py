"""Supervised fine-tuning: its losses against transformers', and what of a run it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo import preflight
from megatron_rapo.config import Model, Optimizer, RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import order_of
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.given_loss import GivenLoss
from megatron_rapo.experience.batch import Batch, collect
from megatron_rapo.experience.course import follow
from megatron_rapo.experience.delivery import with_tokens
from megatron_rapo.experience.given import Given, summarise_given
from megatron_rapo.guards.idle import Idle
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.closing import metrics_summary
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.policy import Policy
from tests import rounds
from tests.methods import a_method
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement

VOCABULARY, RATE, STEPS = 61, 1e-3, 3
# Of mixed lengths; the last one's text is too long, and so is not learnt.
ROWS = [{"question": f"{n}+{n}=", "worked": "so " * n + str(2 * n)} for n in (1, 2, 3, 4, 5, 6, 7, 30)]


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as placement:
        yield placement


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("sft") / "model", num_hidden_layers=2)


def config(model: Path, base: Path, /, **sections: Any) -> RunConfig:
    data = base / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options: dict[str, Any] = {
        "run": {"directory": str(base / "run"), "steps": STEPS},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"source": "file", "path": str(data), "template": "plain", "template_text": "{prompt}"},
        "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 16, "max_response_tokens": 40},
        "algorithm": {"method": "sft", "solution": "worked", "max_tokens_per_microbatch": 64},
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.0},
    }
    for name, changes in sections.items():
        options[name] = {**options.get(name, {}), **changes}
    return validate(options, source="test")


def batches(run: RunConfig, placement: Placement) -> Iterator[Batch]:
    """What each step learns from."""
    prompts = order_of(load_training_prompts(run, load_tokenizer(run.model.path)), run.run.seed)
    given = Given(placement)

    def read(wanted: Any) -> Any:
        return rounds.collect(given, wanted.prompts, chosen=Sampling(1.0, 8, 40), weight_version=0, seed=0)

    for step in range(STEPS):
        yield (batch := follow(collect(prompts, 4, run.new_method(), None), read))
        summary = summarise_given(batch, prompts)
        assert summary["data/epochs"] == pytest.approx(4 * (step + 1) / 7)  # one of eight is too long


def trained(run: RunConfig, placement: Placement) -> tuple[list[dict[str, float]], list[Batch]]:
    """The metrics of each step's update, and what it learnt from."""
    architecture, method = read_architecture(run.model.path), run.new_method()
    policy = Policy(run.model, run.optimizer, architecture, placement, STEPS)
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    found, learnt = [], []
    for batch in batches(run, placement):
        samples = make_samples(batch.groups, method, VOCABULARY, run.minibatch_prompts)
        plans = plan_minibatches(samples, run)
        minibatches = build_minibatches(with_tokens(samples, plans, batch, placement), plans, run, placement)
        policy.annotate(minibatches, objective)
        found.append(dict(policy.update(minibatches, objective, None)))
        learnt.append(batch)
    return found, learnt


def by_transformers(model: Path, learnt: list[Batch], minibatch: int) -> list[list[float]]:
    """Each update's loss, as transformers computes it of labels, under PyTorch's AdamW."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[list[float]] = []
    for batch in learnt:
        sequences = [
            batch.sampled.whole[place].episodes[0].episode.sequences[0] for place in range(len(batch.groups))
        ]
        losses.append([])
        for start in range(0, len(sequences), minibatch):
            part = sequences[start : start + minibatch]
            longest = max(map(len, part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(part):
                own = torch.from_numpy(sequence.token_ids).long()
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
                labels[row, : len(own)] = torch.where(torch.from_numpy(sequence.trained), own, -100)
            loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses[-1].append(loss.item())
    return losses


@pytest.mark.parametrize("minibatch", [4, 2])
def test_each_steps_loss_is_that_of_transformers(
    model: Path, tmp_path: Path, placement: Placement, minibatch: int
) -> None:
    """Of the same batch, packed to 64 tokens a microbatch; the policy moves as PyTorch's optimizer has it."""
    found, learnt = trained(config(model, tmp_path, algorithm={"minibatch_prompts": minibatch}), placement)
    expected = by_transformers(model, learnt, minibatch)
    assert found[0]["loss/total"] == pytest.approx(sum(expected[0]) / len(expected[0]), rel=1e-6)
    for metrics, losses in zip(found, expected, strict=True):
        assert metrics["loss/total"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found[-1]["loss/total"] < found[0]["loss/total"]
    told = {name.partition("/")[0] for name in found[0]}
    assert told == {"loss", "optimizer"}, "no engine was asked, so nothing is told of it"


def test_the_loss_on_held_out_texts_is_that_of_transformers(
    model: Path, tmp_path: Path, placement: Placement
) -> None:
    """The last two that can be learnt, and no others; when it is due."""
    run = config(model, tmp_path, algorithm={"held_out": 2, "held_out_every": 2})
    prompts = load_training_prompts(run, load_tokenizer(run.model.path))
    assert [prompt.index for prompt in prompts.held_out] == [5, 6]
    assert {prompt.index for prompt in prompts.prompts} == {0, 1, 2, 3, 4}
    assert prompts.report.endswith("held out: 2 texts")
    policy = Policy(run.model, run.optimizer, read_architecture(model), placement, STEPS)
    objective = Objective(
        run.new_method(), temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group
    )
    subject = GivenLoss(run, policy, objective, prompts.held_out)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, tokens = 0.0, 0
    for prompt in prompts.held_out:
        assert prompt.demonstration is not None
        ids = torch.from_numpy(prompt.demonstration.token_ids).long()
        learnt = torch.from_numpy(prompt.demonstration.trained)
        with torch.no_grad():
            loss = network(input_ids=ids[None], labels=torch.where(learnt, ids, -100)[None]).loss
        total, tokens = total + loss.item() * int(learnt.sum()), tokens + int(learnt.sum())
    assert subject.measure()["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert [subject.due(step) for step in range(4)] == [True, False, True, True]


def test_texts_must_be_left_to_learn(model: Path, tmp_path: Path) -> None:
    run = config(model, tmp_path, algorithm={"held_out": 7})
    with pytest.raises(RapoError, match=r"held_out = 7 leaves none of the 7 texts of .*; lower it"):
        load_training_prompts(run, load_tokenizer(run.model.path))


def test_a_mean_over_texts_is_another_loss(model: Path, tmp_path: Path, placement: Placement) -> None:
    run = config(model, tmp_path, algorithm={"loss_aggregation": "sequence_mean"})
    found, learnt = trained(run, placement)
    losses = [by_transformers(model, [_one(learnt[0], place)], 1)[0][0] for place in range(4)]
    assert found[0]["loss/total"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def _one(batch: Batch, place: int) -> Batch:
    batch.sampled.whole[0] = batch.sampled.whole[place]
    return Batch(batch.groups[:1], batch.sampled, 0)


def test_texts_are_drawn_anew_each_epoch_by_the_runs_seed(
    model: Path, tmp_path: Path, placement: Placement
) -> None:
    def drawn(seed: int) -> list[str]:
        run = config(model, tmp_path, run={"seed": seed})
        return [group.problem.id for batch in batches(run, placement) for group in batch.groups]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert sorted(first[:7]) == [str(row) for row in range(7)]
    assert first[7:12] != first[:5]


@pytest.mark.parametrize(
    ("sections", "wrong"),
    [
        ({"rollout": {"responses_per_prompt": 4}}, "rollout.responses_per_prompt = 4 would have no effect"),
        ({"rollout": {"restarts": 1}}, "rollout.restarts = 1 would have no effect"),
        ({"rollout": {"engine": {"kind": "embedded", "servers": 2}}}, "rollout.engine would have no effect"),
        ({"rollout": {"dynamic_sampling": {}}}, "rollout.dynamic_sampling = {…} would have no effect"),
        ({"rollout": {"temperature": 0.5}}, "learns what the policy says at temperature 1"),
        ({"observe": {"samples_every": 2}}, "observe.samples_every = 2 would have no effect"),
        ({"reward": {"workers": 3}}, "[reward] would have no effect"),
        ({"weights": {"transport": "disk"}}, "[weights] would have no effect"),
        ({"slurm": {"ranks_per_node": 1, "gpus_per_node": 0}}, "[slurm] starts engines, and "),
        ({"algorithm": {"held_out_every": 2}}, "algorithm.held_out_every = 2 would have no effect"),
        ({"algorithm": {"mask_truncated": True}}, "algorithm.mask_truncated = True would have no effect"),
        ({"algorithm": {"importance_correction": "masked"}}, "no term of method sft reads importance"),
        (
            {"optimizer": {"in_host_memory_during_rollouts": True}, "model": {"dtype": "bfloat16"}},
            "optimizer.in_host_memory_during_rollouts = true would have no effect",
        ),
        ({"algorithm": {"share_prompts": True}}, 'share_prompts = true would have no effect: method "sft"'),
        ({"algorithm": {"old_log_probs": "engine"}}, "does not go with method sft"),
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness = 1 would have no effect"),
        ({"teacher": {"path": "t"}}, "no term of method sft reads a teacher"),
    ],
)
def test_what_only_samples_need_is_refused(
    model: Path, tmp_path: Path, sections: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(RapoError) as refused:
        config(model, tmp_path, **sections)
    assert wrong in str(refused.value)


def test_with_an_evaluation_there_are_engines_and_rewards(model: Path, tmp_path: Path) -> None:
    held_out = [{"source": "countdown", "numbers": 3}]
    run = config(model, tmp_path, evaluate={"data": held_out}, reward={"workers": 3}, rollout={"restarts": 1})
    assert run.opens_engines
    assert not config(model, tmp_path).opens_engines


def test_the_plan_of_a_run_without_engines(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # of this process's group
        monkeypatch.delenv(name, raising=False)
    run = config(model, tmp_path)
    preflight.check(run)
    plan = preflight.describe_plan(run)
    assert "4 given texts a step in 1 updates; 3 updates in all" in plan
    assert "none: texts are given, and nothing is sampled" in plan
    assert "dropped 1 whose text to learn is longer than 40 tokens: rows 7" in plan
    assert validate(run.resolved(), source="test") == run


def test_data_without_answers_are_planned_with_before_the_model_is_there(model: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "nowhere", tmp_path, run={"steps": 1})
    planned = run.model.model_copy(update={"config": model / "config.json"})
    assert "8 rows, no tokenizer" in preflight.describe_plan(run.model_copy(update={"model": planned}))


def test_a_gradient_of_0_is_told_without_rewards(model: Path, tmp_path: Path) -> None:
    found = Idle(config(model, tmp_path))({"loss/tokens": 5.0, "optimizer/gradient_norm": 0.0})
    assert found is not None and "the gradient is 0: all that the data say is certain already" in found


def test_a_finished_run_tells_its_loss() -> None:
    lines = [{"step": step, "loss/total": loss} for step, loss in enumerate([2.0, 1.5, 1.0], 1)]
    assert metrics_summary(lines) == ["loss: 2.000 in the first step, 1.000 in the last"]
    told = metrics_summary([{"step": 0, "evaluate/loss": 3.0}, {**lines[0], "evaluate/loss": 2.5}])
    assert told == [
        "loss: 2.000 in the only step",
        "held-out loss: 3.000 in the first step, 2.500 in the last",
    ]


@pytest.mark.parametrize(("option", "value"), [("solution", "x"), ("turns", "last")])
def test_distillation_learns_from_given_texts_where_asked(option: str, value: str) -> None:
    """Then it is asked which; else engines sample."""
    assert a_method("distill").demonstrations is None
    subject = a_method("distill", learns_from="solutions", **{option: value})
    assert getattr(subject.demonstrations, {"solution": "column"}.get(option, option)) == value
    assert a_method("sft", turns="last").demonstrations.turns == "last"
    with pytest.raises(ValueError, match=f"{option} = '{value}' would have no effect: learns_from is"):
        a_method("distill", **{option: value})
    with pytest.raises(ValueError, match=r"policy_coefficient = 1.0 would have no effect"):
        a_method("distill", learns_from="solutions", policy_coefficient=1.0)


def test_a_model_and_an_optimizer_are_all_it_needs() -> None:
    """Neither a reference nor a teacher."""
    subject = a_method("sft", solution="worked")
    assert not (subject.wants_reference or subject.wants_teacher)
    assert Model(path="m").reference_path is None
    assert Optimizer().distributed
