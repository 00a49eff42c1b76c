"""Which model is evaluated: a HF directory, or a checkpoint that one is made of first."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from megatron_rapo import file_sums
from megatron_rapo.convert.to_hf import convert_to_hf
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import ModelRecord
from megatron_rapo.fingerprint import weights_fingerprint
from megatron_rapo.weights.megatron_files import find_checkpoint, is_checkpoint


def default_name(model: Path) -> str:
    """What the evaluation of a model is called where nothing else is said."""
    run, step = _origin(model)
    return model.resolve().name if run is None else f"{Path(run).name}_step_{step:06d}"


def open_model(model: Path, directory: Path) -> tuple[Path, ModelRecord]:
    """The model as a HF directory, and where it came from.

    Args:
        model: a HF directory, a run's directory (its newest checkpoint), or a Megatron checkpoint.
        directory: of the evaluation; a checkpoint is exported into it.

    Raises:
        RapoError: it is none of these, or the checkpoint cannot be exported.
    """
    hf = model
    if not (model / "config.json").is_file() or is_checkpoint(model):
        if not model.is_dir():
            raise RapoError(f"model {model} does not exist; name a HF directory, a checkpoint or a run")
        checkpoint = find_checkpoint(model)
        hf = directory / f"model-{checkpoint.name}"  # what an interrupted evaluation left is taken up again
        if not hf.is_dir():
            convert_to_hf(checkpoint, hf)
    file_sums.check(hf, "model")
    run, step = _origin(model)
    return hf, ModelRecord(path=str(model), run=run, step=step, fingerprint=weights_fingerprint(hf))


def recorded_configuration(model: Path) -> Path | None:
    """The configuration of the run that a model, checkpoint or run directory is of, where it can be told."""
    run, _ = _origin(model)
    file = Path(run or model) / "config.toml"
    return file if file.is_file() else None


def _origin(model: Path) -> tuple[str | None, int | None]:
    """The run and step of a checkpoint or a run's final model, where they can be told."""
    if (model.parent / "config.toml").is_file() and model.name == "model":
        options = tomllib.loads((model.parent / "config.toml").read_text(encoding="utf-8"))
        return str(model.parent), int(options["run"]["steps"])
    if (model / "config.json").is_file() or not is_checkpoint(model):
        return None, None
    checkpoint = find_checkpoint(model)
    try:
        record = json.loads((checkpoint / "run.json").read_text())
        return str(checkpoint.parent.parent), int(record["state"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None  # of another trainer
