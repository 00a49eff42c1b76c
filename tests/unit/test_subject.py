"""Which model an evaluation is of, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rapo import file_sums
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import subject
from megatron_rapo.evaluation.subject import default_name, open_model, recorded_configuration


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "run.json").write_text(json.dumps({"state": {"step": step}}))
    return folder


def test_a_hugging_face_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "Qwen"
    model.mkdir()
    (model / "config.json").write_text("{}")
    path, record = open_model(model, tmp_path / "out")
    assert path == model
    assert (record.label, record.run, record.step) == ("Qwen", None, None)
    assert record.fingerprint is not None
    assert default_name(model) == "Qwen"


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "one"
    checkpoint(run, 3)
    newest = checkpoint(run, 12)
    exported = tmp_path / "out" / "model-step_000012"  # as an interrupted evaluation left it
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    for given in (run, newest):
        path, record = open_model(given, tmp_path / "out")
        assert path == exported
        assert (record.label, record.step) == ("one step 12", 12)
        assert default_name(given) == "one_step_000012"


def test_a_runs_final_model_is_of_its_last_step(tmp_path: Path) -> None:
    model = tmp_path / "one" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "one" / "config.toml").write_text("[run]\nsteps = 40\n")
    assert open_model(model, tmp_path / "out")[1].label == "one step 40"


def test_a_model_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 40}')
    file_sums.write_sums(tmp_path)
    open_model(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"vocab_size": 41}')
    with pytest.raises(RapoError, match=r"damaged: config.json has other contents .*, or remove checksums"):
        open_model(tmp_path, tmp_path / "out")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match="does not exist; name a HF directory, a checkpoint or a run"):
        open_model(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(RapoError, match="is no Megatron checkpoint"):
        open_model(tmp_path, tmp_path / "out")


def test_the_configuration_of_the_run_is_found_where_there_is_one(tmp_path: Path) -> None:
    run = tmp_path / "one"
    step = checkpoint(run, 3)
    assert recorded_configuration(step) is None
    (run / "config.toml").write_text("[run]\nsteps = 3\n")
    (run / "model").mkdir()
    (run / "model/config.json").write_text("{}")
    for model in (step, run, run / "model"):
        assert recorded_configuration(model) == run / "config.toml"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert recorded_configuration(other) is None


@pytest.mark.parametrize("text", ["{", "{}", '{"state": null}', '{"state": {"step": "x"}}', None])
def test_a_checkpoint_of_another_trainer_has_neither_run_nor_step(tmp_path: Path, text: str | None) -> None:
    folder = checkpoint(tmp_path / "one", 3)
    record = folder / "run.json"
    record.unlink() if text is None else record.write_text(text)
    assert default_name(folder) == "step_000003"


def test_a_checkpoint_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a HF configuration lies beside its weights."""
    folder = checkpoint(tmp_path / "one", 3)
    (folder / "config.json").write_text("{}")
    exported: list[tuple[Path, Path]] = []

    def convert(source: Path, target: Path) -> None:
        exported.append((source, target))
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(subject, "convert_to_hf", convert)
    for _ in range(2):
        path, record = open_model(folder, tmp_path / "out")
        assert path == tmp_path / "out/model-step_000003"
        assert record.path == str(folder)
    assert exported == [(folder, path)]
