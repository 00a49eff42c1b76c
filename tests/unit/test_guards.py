"""Each guard finds the fault that is planted, in all its actions, and nothing where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.guards.findings import read_findings, told
from megatron_rapo.guards.guards import Guards

VOCABULARY = 61
SOUND: dict[str, Any] = {
    "loss/tokens": 40.0, "loss/entropy": 0.4, "optimizer/gradient_norm": 0.3, "optimizer/learning_rate": 1e-6,
    "optimizer/changed_tensors": 1.0, "reward/mean": 0.5, "reward/unknown": 0.0,
    "reward/groups_without_variance": 0.0, "rollout/truncated": 0.0, "rollout/outside_vocabulary": 0.0,
    "mismatch/log_prob_mean": 0.01, "mismatch/engine_log_prob": -0.5, "mismatch/engine_log_prob_spread": 3.0,
}  # fmt: skip
NO_GRADIENT = {**SOUND, "optimizer/gradient_norm": 0.0, "reward/groups_without_variance": 1.0}
NO_TOKENS = {**SOUND, "loss/tokens": 0.0, "optimizer/gradient_norm": 0.0}
ALIKE = {**SOUND, "reward/groups_without_variance": 1.0}

# What plants each fault that a step's metrics show, and how its message begins.
FAULTS: dict[str, tuple[dict[str, float], str]] = {
    "gradient_spike": (
        {"optimizer/gradient_norm": 6.1},
        "the gradient's norm is 6.1, 20 times the usual 0.3",
    ),
    "entropy_collapse": ({"loss/entropy": 9e-4}, "the policy's entropy is 0.0009 nats a token"),
    "equal_rewards": ({"reward/groups_without_variance": 1.0}, "every group earned the same reward"),
    "truncation": ({"rollout/truncated": 0.96}, "96% of the responses end at their limit"),
    "engine_log_probs": (
        {"mismatch/engine_log_prob": -math.log(VOCABULARY), "mismatch/engine_log_prob_spread": 1.0},
        "the engines' log-probs of the step's tokens are -4.111 on average",
    ),
    "mismatch": ({"mismatch/log_prob_mean": 0.11}, "mismatch/log_prob_mean = 0.11 nats is beyond"),
    "no_learning_rate": ({"optimizer/learning_rate": 0.0}, "the learning rate is 0"),
    "unchanged_weights": ({"optimizer/changed_tensors": 0.0}, "no weight changed, although"),
    "no_gradient": ({"optimizer/gradient_norm": 0.0}, "it teaches nothing: the gradient is 0"),
}


OFF = {
    "guards": {
        "gradient_spike": "off",
        "entropy_collapse": "off",
        "equal_rewards": "off",
        "truncation": "off",
        "engine_log_probs": "off",
        "mismatch": "off",
        "no_learning_rate": "off",
        "unchanged_weights": "off",
        "no_gradient": "off",
    }
}


def config(directory: Path, algorithm: dict[str, Any] | None = None, **guards: Any) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(directory), "steps": 20},
            "model": {"path": "model"},
            "data": {"source": "arithmetic"},
            "rollout": {"prompts_per_step": 2, "max_response_tokens": 8},
            "algorithm": algorithm or {},
            "checkpoint": {"every": 1} if "roll_back" in guards.values() else {},
            "guards": guards,
        },
        source="test",
    )


def guards_of(run: RunConfig, *, is_main: bool = True) -> Guards:
    run.run.directory.mkdir(exist_ok=True)
    guards = Guards(run, VOCABULARY, is_main=is_main)
    guards.go_on(None, 0)
    return guards


def watch(guards: Guards, *steps: dict[str, Any], first: int = 1) -> list[bool]:
    """Steps of one update each, with their metrics; which of the updates were applied."""
    applied = []
    for step, metrics in enumerate(steps, first):
        guards.begin_step(step)
        applied.append(guards.allow(metrics, None))
        guards.finish_step(metrics)
        guards.check_end()
    return applied


def test_a_sound_run_of_200_steps_sets_off_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{**SOUND, "optimizer/gradient_norm": 0.3 + 0.2 * math.sin(step)} for step in range(200)]
    guards = guards_of(config(tmp_path))
    assert guards.finish_step({}) == {
        "guards/findings": 0, "guards/skipped_updates": 0, "guards/rollbacks": 0
    }  # fmt: skip
    assert all(watch(guards, *steps))
    assert read_findings(tmp_path) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_warned_of_once_a_stretch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changes, message = FAULTS[name]
    faulty, options = {**SOUND, **changes}, {"no_gradient": "warn", "steps_in_a_row": 3}
    needed = 3 if name in ("equal_rewards", "truncation") else 1
    steps = [SOUND] * 8 + [faulty] * (needed + 1) + [SOUND] + [faulty] * needed
    watch(guards_of(config(tmp_path, **options)), *steps)
    found = read_findings(tmp_path)
    assert [(one.guard, one.action, one.step) for one in found] == [
        (name, "warn", 8 + needed),
        (name, "warn", 8 + needed + 2 + needed),
    ]
    assert found[0].message.startswith(message)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and f"(guards.{name})" in warnings[0] and "warning: step " in warnings[0]
    (line,) = told(found)
    assert line.startswith(f"{name}: warned, 2 times, first in step {8 + needed}: {message}")


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_off_is_not_watched_for(tmp_path: Path, name: str) -> None:
    faulty = {**SOUND, **FAULTS[name][0]}
    watch(guards_of(config(tmp_path, **{name: OFF["guards"][name]})), *[SOUND] * 8, *[faulty] * 6)
    assert name not in {one.guard for one in read_findings(tmp_path)}


@pytest.mark.parametrize("name", FAULTS)
def test_each_ends_the_run_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    faulty, options = {**SOUND, **FAULTS[name][0]}, {name: "stop", "steps_in_a_row": 2}
    guards = guards_of(config(tmp_path, **options))
    counted = name in ("equal_rewards", "truncation", "no_gradient")
    with pytest.raises(RapoError, match=rf"step {10 if counted else 9}.*: {FAULTS[name][1][:10]}.*{name}"):
        watch(guards, *[SOUND] * 8, faulty, *([faulty] if counted else []))
    assert read_findings(tmp_path)[-1].action == "stop"


SKIPPING = ["gradient_spike", "engine_log_probs", "mismatch", "equal_rewards", "truncation"]


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("is_main", [True, False])
def test_updates_are_not_applied_where_that_is_asked_for(tmp_path: Path, name: str, is_main: bool) -> None:
    """On every rank alike."""
    faulty = {**SOUND, **FAULTS[name][0]}
    guards = guards_of(config(tmp_path, **{name: "skip"}), is_main=is_main)
    needed = 5 if name in ("equal_rewards", "truncation") else 1
    applied = watch(guards, *[SOUND] * 8, *[faulty] * needed, SOUND)
    assert applied == [True] * (8 + needed - 1) + [False, True]
    assert not guards.rolls_back
    assert [one.action for one in read_findings(tmp_path)] == (["skip"] if is_main else [])


def test_a_step_of_which_nothing_is_finite_sets_off_that_guard_alone(tmp_path: Path) -> None:
    """Its metrics are those of no tokens."""
    guards = guards_of(config(tmp_path, not_finite="skip"))
    guards.begin_step(1)
    assert not guards.allow({**SOUND, "loss/entropy": math.nan}, "gradient_norm = inf")
    nothing = {"loss/entropy": 0.0, "loss/tokens": 0.0, "optimizer/gradient_norm": math.nan}
    guards.finish_step({**SOUND, **nothing, "optimizer/changed_tensors": 0.0})
    assert [one.guard for one in read_findings(tmp_path)] == ["not_finite"]


def test_a_skipped_step_is_counted_and_teaches_nothing_on_purpose(tmp_path: Path) -> None:
    guards = guards_of(config(tmp_path, mismatch="skip"))
    guards.begin_step(1)
    assert not guards.allow({**SOUND, "mismatch/log_prob_mean": 0.5}, None)
    assert guards.allow(SOUND, None), "each minibatch for itself"
    found = guards.finish_step({**SOUND, "optimizer/gradient_norm": 0.0, "optimizer/changed_tensors": 0.0})
    assert found == {"guards/findings": 1, "guards/skipped_updates": 1, "guards/rollbacks": 0}


def test_what_is_not_finite_is_skipped_rolled_back_or_ends_the_run(tmp_path: Path) -> None:
    guards = guards_of(config(tmp_path / "stop"))
    with pytest.raises(RapoError, match="loss is NaN"):
        guards.allow(SOUND, "loss is NaN")
    guards = guards_of(config(tmp_path, not_finite="skip"))
    guards.begin_step(1)
    assert not guards.allow({}, "loss is NaN") and not guards.rolls_back
    assert guards.allow(SOUND, None)
    guards = guards_of(config(tmp_path, not_finite="roll_back"))
    guards.begin_step(1)
    assert not guards.allow({}, "loss is NaN") and guards.rolls_back
    assert not guards.allow(SOUND, None), "the rest of a step that is rolled back is not applied either"


@pytest.mark.parametrize("name", ["gradient_spike", "entropy_collapse", "engine_log_probs", "mismatch"])
def test_steps_are_rolled_back_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    guards = guards_of(config(tmp_path, **{name: "roll_back", "rollbacks": 2}))
    applied = watch(guards, *[SOUND] * 8, {**SOUND, **FAULTS[name][0]})
    assert applied == [True] * 8 + [False] and guards.rolls_back
    guards.check_rollback(possible=True)
    with pytest.raises(RapoError, match=r"step 9 is to be rolled back .* no checkpoint yet"):
        guards.check_rollback(possible=False)
    guards.go_on({**guards.state(), "rollbacks": 2}, 4)
    assert not guards.rolls_back
    with pytest.raises(RapoError, match=r"the run has been 2 times, which is guards\.rollbacks"):
        guards.check_rollback(possible=True)


def test_too_many_unknown_rewards_end_the_run_or_keep_the_step_out(tmp_path: Path) -> None:
    each = {"skip": {"guards": {"unknown_rewards": "skip"}}, "warn": {"guards": {"unknown_rewards": "warn"}}}
    each |= {"off": {"guards": {"unknown_rewards": "off"}}}
    for action, applied in (("skip", False), ("warn", True), ("off", True)):
        guards = guards_of(config(tmp_path / action, **each[action]["guards"]))
        guards.begin_step(1)
        guards.refuse_unknown("3 of 4 rewards are unknown", 1)
        assert guards.allow(SOUND, None) is applied
        found = [(one.guard, one.action) for one in read_findings(tmp_path / action)]
        assert found == ([("unknown_rewards", action)] if action != "off" else [])
        guards.begin_step(2)
        guards.refuse_unknown(None, 2)
        assert guards.allow(SOUND, None)
    with pytest.raises(RapoError, match="3 of 4"):
        guards_of(config(tmp_path)).refuse_unknown("3 of 4 rewards are unknown", 1)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"guards": {"gradient_spike_factor": 3.0}}, {"optimizer/gradient_norm": 1.0}),
        ({"guards": {"entropy_least": 0.5}}, {}),
        ({"guards": {"truncated_share": 0.25, "steps_in_a_row": 1}}, {"rollout/truncated": 0.25}),
        ({"guards": {"mismatch_limit": 0.005}}, {}),
    ],
)
def test_thresholds_are_options(tmp_path: Path, options: dict[str, Any], changes: dict[str, float]) -> None:
    steps = [SOUND] * 8 + [{**SOUND, **changes}]
    watch(guards_of(config(tmp_path / "default")), *steps)
    assert read_findings(tmp_path / "default") == []
    watch(guards_of(config(tmp_path, **options["guards"])), *steps)
    assert len(read_findings(tmp_path)) == 1


def test_engines_whose_log_probs_are_constant_are_found(tmp_path: Path) -> None:
    """Whatever the constant is."""
    same = {**SOUND, "mismatch/engine_log_prob": -1.5, "mismatch/engine_log_prob_spread": 0.0}
    watch(guards_of(config(tmp_path)), same)
    (found,) = read_findings(tmp_path)
    assert "log-probs of the step's tokens are all -1.5 (−log of 61 tokens is -4.111)" in found.message


def test_a_scale_that_stays_becomes_the_usual(tmp_path: Path) -> None:
    """So a spike that is skipped does not end learning for good."""
    guards = guards_of(config(tmp_path, gradient_spike="skip"))
    applied = watch(guards, *[SOUND] * 32, *[{**SOUND, "optimizer/gradient_norm": 30.0}] * 40)
    assert not any(applied[32:48]) and all(applied[49:])


def test_what_they_remember_goes_with_the_checkpoint(tmp_path: Path) -> None:
    """A run that is killed and goes on finds and does the same, and its file says each once."""
    steps = [SOUND] * 8 + [
        ALIKE,
        ALIKE,
        {**SOUND, "optimizer/gradient_norm": 9.0},
        ALIKE,
        ALIKE,
        ALIKE,
        SOUND,
    ]
    options = {"gradient_spike": "skip", "equal_rewards": "warn", "steps_in_a_row": 3}
    whole = guards_of(config(tmp_path / "whole", **options))
    applied = watch(whole, *steps)
    for saved in range(len(steps)):
        run = config(tmp_path / str(saved), **options)
        guards = guards_of(run)
        watch(guards, *steps[:saved])
        state = json.loads(json.dumps(guards.state()))
        watch(guards, *steps[saved:-1], first=saved + 1)  # and it is killed
        guards = Guards(run, VOCABULARY, is_main=True)
        guards.go_on(state, saved)
        assert watch(guards, *steps[saved:], first=saved + 1) == applied[saved:]
        assert guards.state() == whole.state()
        assert read_findings(run.run.directory) == read_findings(tmp_path / "whole")


def test_what_a_rolled_back_step_found_stays(tmp_path: Path) -> None:
    guards = guards_of(config(tmp_path, mismatch="roll_back"))
    state = guards.state()
    watch(guards, SOUND, {**SOUND, "mismatch/log_prob_mean": 0.5})
    guards.go_on({**state, "rollbacks": 1}, 0)
    watch(guards, SOUND, SOUND, SOUND)
    assert [(one.rollbacks, one.step) for one in read_findings(tmp_path)] == [(0, 2)]
    with (tmp_path / "guards.jsonl").open("a") as file:
        file.write('{"rollbacks": 1, "st')  # killed within a line
    assert len(read_findings(tmp_path)) == 1
    (tmp_path / "guards.jsonl").write_text("{}\n")
    with pytest.raises(RapoError, match=r"guards.jsonl line 1 is no finding"):
        read_findings(tmp_path)


# Steps that teach nothing


def test_chance_is_warned_of_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three in a row, twice: each first one is told."""
    run = config(tmp_path, steps_in_a_row=3)
    watch(guards_of(run), *[NO_GRADIENT, NO_GRADIENT, SOUND] * 2, NO_GRADIENT)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": it teaches nothing")[0] for line in warnings] == [
        f"warning: step {step}" for step in (1, 4, 7)
    ]
    assert "100% of the groups earned the same reward throughout (mean 0.500)" in warnings[0]


def test_what_only_divergence_and_entropy_move_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However small its gradient is; once a stretch, and the run goes on."""
    alike = {**ALIKE, "reward/mean": 0.0}
    rounding = {**alike, "optimizer/gradient_norm": 4e-7}
    steps = [alike, alike, SOUND, rounding, alike, rounding, alike, alike, SOUND]
    watch(guards_of(config(tmp_path, steps_in_a_row=3)), *steps)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step 6 is number 3 in a row: every group earned the same reward throughout" in warning
    assert "(mean 0.000)" in warning and "megatron-rapo samples" in warning


def test_groups_of_one_response_compare_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, steps_in_a_row=3)
    alone = run.model_copy(update={"rollout": run.rollout.model_copy(update={"responses_per_prompt": 1})})
    watch(guards_of(alone), *[ALIKE] * 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("idle", [NO_GRADIENT, NO_TOKENS, {**NO_GRADIENT, "loss/tokens": 0.0}])
def test_some_in_a_row_end_the_run(tmp_path: Path, idle: dict[str, Any]) -> None:
    with pytest.raises(RapoError, match=r"step 4 is number 3 in a row: it teaches nothing.*no_gradient"):
        watch(guards_of(config(tmp_path, steps_in_a_row=3)), SOUND, idle, idle, idle, SOUND)


def test_five_by_default(tmp_path: Path) -> None:
    watch(guards_of(config(tmp_path / "four")), *[NO_TOKENS] * 4)
    with pytest.raises(RapoError, match="step 5 is number 5 in a row"):
        watch(guards_of(config(tmp_path / "five")), *[NO_TOKENS] * 5)


@pytest.mark.parametrize(
    ("algorithm", "name", "cause"),
    [
        ({}, "rollout/outside_vocabulary", "have tokens that the tokenizer lacks"),
        ({}, "reward/unknown", "have no reward, since the verifier timed out or crashed"),
        ({"mask_truncated": True}, "rollout/truncated", "were truncated (raise rollout.max_response_tokens"),
        (
            {"groups_without_variance": "drop"},
            "reward/groups_without_variance",
            "of the groups earned the same reward throughout",
        ),
    ],
)
def test_the_cause_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: dict[str, Any], name: str, cause: str
) -> None:
    others = {"rollout/truncated": 0.25} if name != "rollout/truncated" else {}
    watch(guards_of(config(tmp_path, algorithm)), {**NO_TOKENS, **others, name: 0.75})
    (warning,) = capsys.readouterr().err.splitlines()
    assert cause in warning
    assert "75%" in warning
    assert "25%" not in warning, "what is truncated and not masked is no cause"
