"""A run's directory tells what it was begun with, and with what it may go on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.checkpoint import files
from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.config.options import option_names
from megatron_rapo.config.resuming import CLASSES, Change, change_of, changes, options_of, table
from megatron_rapo.config.write import to_toml
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.record.identity import Identity
from megatron_rapo.record.standing import check_standing, finish
from megatron_rapo.record.start import begin, check_identity
from megatron_rapo.report.configuration import _run_options
from tests.own_method import ADDRESS, write_method

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/models/tiny-countdown"
VERSIONS = {"torch": "2"}
PROMPTS = [Prompt(index, f"{index}+1?", (index, 7), str(index + 1)) for index in range(6)]


def config(directory: Path, *settings: str, **changes: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "run": {"directory": str(directory), "steps": 10},
        "model": {"path": str(MODEL), "dtype": "float32"},
        "data": {"source": "countdown", "numbers": 3},
        "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 32, "max_response_tokens": 32},
    }
    for name, options in changes.items():
        values[name] = {**values.get(name, {}), **options}
    return validate(values, source="test")


def identity(run: RunConfig, prompts: list[Prompt] = PROMPTS, **evaluation: str) -> Identity:
    return Identity.of(run, prompts, evaluation)


def saved(directory: Path, step: int) -> None:
    """As far as names tell, a checkpoint of the step."""
    folder = directory / files.FOLDER / files.folder_of(step)
    folder.mkdir(parents=True)
    (folder / files.RECORD).write_text("{}")


def run_until(run: RunConfig, step: int, **evaluation: str) -> None:
    """The records of a run that was begun, and saved after `step`."""
    run.run.directory.mkdir(exist_ok=True)
    begin(run, identity(run, **evaluation), VERSIONS, None)
    saved(run.run.directory, step)


# The table


def test_every_option_is_in_one_class() -> None:
    plain = set(option_names(RunConfig))
    leaves = [name for name in plain if not any(other.startswith(f"{name}.") for other in plain)]
    for option in leaves:
        assert change_of(option) in Change
    named = [name for listed in CLASSES.values() for name in listed]
    assert len(named) == len(set(named))
    assert set(named) <= plain, "a name that is no option"


def test_the_page_has_the_table() -> None:
    assert table() in (ROOT / "docs/resume.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("run.seed", Change.NEVER),
        ("data.shuffle", Change.NEVER),
        ("model.dtype", Change.NEVER),
        ("optimizer.learning_rate", Change.ASKED),
        ("algorithm.divergence_coefficient", Change.ASKED),
        ("rollout.prompts_per_step", Change.ASKED),
        ("reward.verifier", Change.ASKED),
        ("evaluate.data", Change.ASKED),
        ("data.path", Change.CONTENT),
        ("model.path", Change.CONTENT),
        ("rollout.max_prompt_tokens", Change.CONTENT),
        ("parallel.tensor_parallel", Change.FREE),
        ("rollout.engine.urls", Change.FREE),
        ("checkpoint.every", Change.FREE),
        ("slurm.time_limit", Change.FREE),
    ],
)
def test_what_an_option_is(option: str, change: Change) -> None:
    assert change_of(option) is change


def test_an_option_that_came_with_a_later_version_is_no_change_at_its_default() -> None:
    now = {"optimizer.beta1": 0.9, "optimizer.beta2": 0.9}
    assert changes({}, now) == {"optimizer.beta2": (0.95, 0.9)}


def test_an_option_of_a_method_that_came_later_has_that_methods_default() -> None:
    before, now = ({"algorithm.method": method} for method in ("dapo", "dapo"))
    assert not changes(before, {**now, "algorithm.clip_high": 0.28})
    assert changes(before, {**now, "algorithm.clip_high": 0.2}) == {"algorithm.clip_high": (0.28, 0.2)}


def test_defaults_that_follow_from_others_are_written_out(tmp_path: Path) -> None:
    options = options_of(config(tmp_path, optimizer={"decay": "linear"}))
    assert options["optimizer.decay_steps"] == 10
    assert options["reward.verifier"] == "countdown"
    assert options["algorithm.minibatch_prompts"] == 4
    assert "checkpoint.accept_changes" not in options


# Options


@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": {"learning_rate": 1e-3}},
        {"algorithm": {"method": "grpo"}},
        {"rollout": {"prompts_per_step": 8}},
        {"algorithm": {"minibatch_prompts": 2}},
        {"reward": {"time_limit_s": 9.0}},
    ],
)
def test_another_objective_rate_or_batch_is_refused_unless_it_is_asked_for(
    tmp_path: Path, changed: dict[str, dict[str, Any]]
) -> None:
    run_until(config(tmp_path), 5)
    before = (tmp_path / "config.toml").read_text()
    with pytest.raises(
        RapoError, match=r"would go on with other options than before: .*, now .*ask for it:"
    ) as told:
        check_standing(config(tmp_path, **changed))
    accepted = str(told.value).partition("--accept-changes ")[2].split()
    asked = config(tmp_path, **changed, checkpoint={"accept_changes": accepted})
    assert check_standing(asked) == ""
    assert (tmp_path / "config.toml").read_text() == before, "a look changes nothing"

    lines = begin(asked, identity(asked), VERSIONS, 5)
    assert any("with other options than before" in line for line in lines)
    assert [entry.step for entry in read_configurations(tmp_path)] == [0, 5]
    assert (tmp_path / "config.toml").read_text() == to_toml(asked)
    # A job that requeues itself goes on without the flag, and what was before is another change.
    assert check_standing(config(tmp_path, **changed)) == ""
    with pytest.raises(RapoError, match="--accept-changes"):
        check_standing(config(tmp_path))


def test_options_of_the_users_own_are_asked_for_as_ours_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another method and environment, too, that the run goes on without."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    write_method(tmp_path / "code")
    (tmp_path / "code/mine_env.py").write_text("class E:\n    def __init__(self, tries): pass\n")
    code = {"code": [str(tmp_path / "code")]}
    own: dict[str, dict[str, Any]] = {
        "run": code,
        "algorithm": {"method": ADDRESS, "penalty": 0.5},
        "environment": {"use": "mine_env:E", "options": {"tries": 2}},
    }
    run_until(config(tmp_path / "run", **own), 5)
    for changed in (
        {**own, "algorithm": {"method": ADDRESS, "penalty": 0.25}},
        {**own, "environment": {"use": "mine_env:E", "options": {"tries": 3}}},
        {},
    ):
        with pytest.raises(RapoError, match="ask for it: --accept-changes") as told:
            check_standing(config(tmp_path / "run", **changed))
        accepted = str(told.value).partition("--accept-changes ")[2].split()
        asked = config(tmp_path / "run", **changed, checkpoint={"accept_changes": accepted})
        assert check_standing(asked) == ""
    sys.modules.pop("my_method")


def test_the_refusal_names_values_before_and_now(tmp_path: Path) -> None:
    run_until(config(tmp_path), 5)
    message = (
        r"optimizer\.learning_rate = 1e-06, now 0\.001; restore them, or ask for it: --accept-changes opt"
    )
    with pytest.raises(RapoError, match=message):
        check_standing(config(tmp_path, optimizer={"learning_rate": 1e-3}))


@pytest.mark.parametrize(
    "changed",
    [
        {"parallel": {"tensor_parallel": 2}},
        {"checkpoint": {"every": 3, "keep": 5}},
        {"rollout": {"request_timeout_s": 5.0, "engine": {"servers": 2}}},
        {"run": {"steps": 20}},
        {"evaluate": {"problems": 4}},
    ],
)
def test_how_it_is_computed_may_change(tmp_path: Path, changed: dict[str, dict[str, Any]]) -> None:
    run_until(config(tmp_path), 5)
    changed_config = config(tmp_path, **changed)
    assert check_standing(changed_config) == ""
    begin(changed_config, identity(changed_config), VERSIONS, 5)
    assert [entry.step for entry in read_configurations(tmp_path)] == [0, 5]


@pytest.mark.parametrize("changed", [{"run": {"seed": 7}}, {"model": {"dtype": "bfloat16"}}])
def test_what_the_state_follows_from_never_changes(
    tmp_path: Path, changed: dict[str, dict[str, Any]]
) -> None:
    run_until(config(tmp_path), 5)
    with pytest.raises(RapoError, match=r"same options alone: .* = .*, now .*; restore them"):
        check_standing(config(tmp_path, **changed))


def test_a_schedule_is_not_stretched_by_more_steps(tmp_path: Path) -> None:
    linear = {"optimizer": {"decay": "linear"}}
    run_until(config(tmp_path, **linear), 10)
    with pytest.raises(RapoError, match=r"decay_steps = 10, now 20 \(which follows run\.steps: .* jump\)"):
        check_standing(config(tmp_path, run={"steps": 20}, **linear))
    own = {"optimizer": {"decay": "linear", "decay_steps": 10, "min_learning_rate": 1e-7}}
    with pytest.raises(RapoError, match="min_learning_rate"):
        check_standing(config(tmp_path, run={"steps": 20}, **own))


def test_a_schedule_of_its_own_length_goes_on(tmp_path: Path) -> None:
    own = {"optimizer": {"decay": "linear", "decay_steps": 30}}
    run_until(config(tmp_path, **own), 10)
    assert check_standing(config(tmp_path, run={"steps": 20}, **own)) == ""


def test_other_problems_to_evaluate_on_are_asked_for(tmp_path: Path) -> None:
    run_until(config(tmp_path, evaluate={"problems": 4}), 5, countdown="one")
    with pytest.raises(RapoError, match=r"--accept-changes evaluate\.problems$"):
        check_standing(config(tmp_path, evaluate={"problems": 8}))
    asked = config(tmp_path, evaluate={"problems": 8}, checkpoint={"accept_changes": ["evaluate.problems"]})
    assert check_standing(asked) == ""
    check_identity(asked, identity(asked, countdown="two"))


@pytest.mark.parametrize("option", ["run.seed", "optimizer.rate", "parallel.tensor_parallel"])
def test_only_what_can_be_asked_for_is_accepted(tmp_path: Path, option: str) -> None:
    with pytest.raises(RapoError, match=rf"--accept-changes {option}: this is no option"):
        check_standing(config(tmp_path, checkpoint={"accept_changes": [option]}))


def test_a_run_of_an_earlier_version_is_judged_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(config(tmp_path)))
    saved(tmp_path, 5)
    assert check_standing(config(tmp_path)) == ""
    with pytest.raises(RapoError, match="learning_rate"):
        check_standing(config(tmp_path, optimizer={"learning_rate": 1e-3}))


def test_the_report_shows_from_which_step_on_an_option_had_another_value(tmp_path: Path) -> None:
    run_until(config(tmp_path), 5)
    for step, rate in ((5, 1e-3), (7, 1e-4)):
        changed = config(tmp_path, optimizer={"learning_rate": rate})
        begin(changed, identity(changed), VERSIONS, step)
    assert (
        _run_options(tmp_path)["optimizer.learning_rate"]
        == "1e-06; after step 5: 0.001; after step 7: 0.0001"
    )
    assert _run_options(tmp_path)["optimizer.beta1"] == "0.9"


# Where the run stands


def test_a_finished_run_says_so_and_keeps_its_record(tmp_path: Path) -> None:
    run_until(config(tmp_path), 10)
    assert check_standing(config(tmp_path)) == "", "its model is still to be written"
    finish(tmp_path, 10)
    assert check_standing(config(tmp_path)) == f"{tmp_path} finished at step 10; raise run.steps to go on"
    assert check_standing(config(tmp_path, run={"steps": 20})) == ""


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, decay: str) -> None:
    """Said before the decay, which follows run.steps."""
    run_until(config(tmp_path, optimizer={"decay": decay}), 10)
    with pytest.raises(RapoError, match=r"run\.steps = 9, but the run in .* has done 10; set 10 or more"):
        check_standing(config(tmp_path, run={"steps": 9}, optimizer={"decay": decay}))


def test_a_run_that_must_not_go_on_is_refused(tmp_path: Path) -> None:
    run_until(config(tmp_path), 5)
    with pytest.raises(RapoError, match=r"holds step_000005; choose another directory, or set checkpoint"):
        check_standing(config(tmp_path, checkpoint={"resume": False}))


def log(directory: Path, last: int) -> None:
    lines = [json.dumps({"step": step, "time_s": 1.0}) for step in range(last + 1)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_going_on_is_told_with_what_comes_again(tmp_path: Path) -> None:
    run = config(tmp_path)
    run_until(run, 5)
    log(tmp_path, 5)
    assert begin(run, identity(run), VERSIONS, 5) == [
        f"going on after step 5 of 10, from {tmp_path}/checkpoints/step_000005"
    ]
    log(tmp_path, 7)
    assert begin(run, identity(run), VERSIONS, 5)[0].endswith("; steps 6 to 7 were not saved, and come again")


def test_a_start_without_a_checkpoint_keeps_its_records(tmp_path: Path) -> None:
    run = config(tmp_path)
    assert begin(run, identity(run), VERSIONS, None) == []
    for number in (1, 2):
        log(tmp_path, number)
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "published.jsonl").write_text("")
        [line] = begin(run, identity(run), VERSIONS, None)
        kept = tmp_path / f"earlier/00{number}"
        assert (
            line == f"an earlier start came to step {number} without a checkpoint: its records are in {kept}"
        )
        assert (kept / "metrics.jsonl").read_text().count("\n") == number + 1
        assert {path.name for path in kept.iterdir()} > {
            "tensorboard",
            "published.jsonl",
            "configurations.jsonl",
        }
    assert not (tmp_path / "metrics.jsonl").exists()
    assert len(read_configurations(tmp_path)) == 1


# Contents


OTHERS = {
    "another answer in row 2": [replace(p, answer="0") if p.index == 2 else p for p in PROMPTS],
    "another answer in rows 0, 1, 2 and 3 more": [replace(p, answer="0") for p in PROMPTS],
    "another question in row 0": [replace(p, question="?") if p.index == 0 else p for p in PROMPTS],
    "other tokens of the same question in row 5": [
        replace(p, token_ids=(1,)) if p.index == 5 else p for p in PROMPTS
    ],
    "other columns of the same question and answer in row 3": [
        replace(p, columns={"level": {"of": [1, 2.5]}}) if p.index == 3 else p for p in PROMPTS
    ],
    "no more rows 0, 1": PROMPTS[2:],
    "new row 9": [*PROMPTS, Prompt(9, "9?", (9,), "9")],
    "in another order": PROMPTS[::-1],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_prompts_are_refused_by_what_differs(tmp_path: Path, what: str) -> None:
    run = config(tmp_path)
    run_until(run, 5)
    check_identity(run, identity(run))
    with pytest.raises(RapoError) as told:
        check_identity(run, identity(run, OTHERS[what]))
    assert f"was begun with other training prompts ({what})" in str(told.value).replace(
        "; no more", "; no more"
    )
    assert len(str(told.value)) < 400


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model.safetensors", "other weights of model.path"),
        ("config.json", "other weights of model.path"),
        ("tokenizer.json", "other tokenizer or chat template of model.path"),
        ("chat_template.jinja", "other tokenizer or chat template of model.path"),
    ],
)
def test_a_model_may_move_and_must_not_change(tmp_path: Path, file: str, what: str) -> None:
    run_until(config(tmp_path / "run"), 5)
    moved = tmp_path / "moved"
    shutil.copytree(MODEL, moved)
    elsewhere = config(tmp_path / "run", model={"path": str(moved)})
    assert check_standing(elsewhere) == ""
    check_identity(elsewhere, identity(elsewhere))
    with (moved / file).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(RapoError, match=f"was begun with {what}; it goes on with the same alone"):
        check_identity(elsewhere, identity(elsewhere))


def test_reference_and_initial_checkpoint_must_not_change(tmp_path: Path) -> None:
    reference, checkpoint = tmp_path / "reference", tmp_path / "checkpoint"
    shutil.copytree(MODEL, reference)
    checkpoint.mkdir()
    (checkpoint / "__0_0.distcp").write_bytes(b"weights")
    run = config(tmp_path / "run", model={"reference_path": str(reference), "checkpoint": str(checkpoint)})
    run_until(run, 5)
    (checkpoint / "__0_0.distcp").write_bytes(b"Weights")
    (reference / "model.safetensors").write_bytes(b"")
    with pytest.raises(RapoError, match=r"of model\.checkpoint, other weights of model\.reference_path"):
        check_identity(run, identity(run))


@pytest.mark.parametrize("changed", ["model.safetensors", "checkpoint/__0_0.distcp"])
def test_the_teacher_must_not_change(tmp_path: Path, changed: str) -> None:
    """Its checkpoint, where its weights are of one."""
    teacher = tmp_path / "teacher"
    shutil.copytree(MODEL, teacher)
    (teacher / "checkpoint").mkdir()
    (teacher / "checkpoint/__0_0.distcp").write_bytes(b"weights")
    options = {"path": str(teacher)}
    if changed.startswith("checkpoint"):
        options["checkpoint"] = str(teacher / "checkpoint")
    run = config(tmp_path / "run", teacher=options, algorithm={"method": "distill"})
    run_until(run, 5)
    (teacher / changed).write_bytes(b"Weights")
    with pytest.raises(RapoError, match="was begun with other weights of the teacher; it goes on with"):
        check_identity(run, identity(run))


def test_other_problems_under_the_same_options_are_refused(tmp_path: Path) -> None:
    run = config(tmp_path, evaluate={"problems": 4})
    run_until(run, 5, countdown="one", held_out="two")
    check_identity(run, identity(run, countdown="one"))
    with pytest.raises(RapoError, match="other problems to evaluate on in countdown"):
        check_identity(run, identity(run, countdown="other", held_out="two"))


def test_before_the_first_checkpoint_nothing_is_held_to(tmp_path: Path) -> None:
    run = config(tmp_path)
    begin(run, identity(run), VERSIONS, None)
    check_identity(run, identity(run, PROMPTS[:3]))
    assert check_standing(config(tmp_path, optimizer={"learning_rate": 1e-3})) == ""


@pytest.mark.parametrize("file", ["identity.json", "configurations.jsonl"])
def test_a_damaged_record_is_named(tmp_path: Path, file: str) -> None:
    run = config(tmp_path)
    run_until(run, 5)
    (tmp_path / file).write_text('{"contents"')
    with pytest.raises(RapoError, match=rf"{file} is .*restore it"):
        check_standing(run)
        check_identity(run, identity(run))


def test_a_checkpoints_fingerprints_are_of_all_that_training_depends_on(tmp_path: Path) -> None:
    run = config(tmp_path)
    found = identity(run, countdown="one").fingerprints()
    assert found.keys() == {
        "training prompts",
        "weights of model.path",
        "tokenizer or chat template of model.path",
    }
    assert identity(run, PROMPTS[::-1]).fingerprints()["training prompts"] != found["training prompts"]
