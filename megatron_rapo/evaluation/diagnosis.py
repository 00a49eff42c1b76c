"""Diagnostics of a stored evaluation: finds the models, computes, writes, says."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.diagnostics import FLOOR, Diagnostics, Pair, diagnose
from megatron_rapo.evaluation.diversity import DRAWN, Diversity, diversity
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.evaluation.subject import open_model


def run(base: Evaluation, model: Evaluation, *, limit: int, directory: Path) -> str:
    """Diagnoses at most `limit` correct responses of each data set and setting; what to print.

    Writes `directory`/diagnostics.json.

    Raises:
        RapoError: the weights that were evaluated are not there any more.
    """
    found: list[dict[str, Any]] = []
    blocks: list[str] = []
    settings = {setting.name: setting for setting in model.manifest.settings}
    with tempfile.TemporaryDirectory(prefix="rapo-diagnose-") as scratch:
        pair = Pair(_weights(base, Path(scratch) / "base"), _weights(model, Path(scratch) / "model"))
        for data, setting in [both for both in model if both in set(base)]:
            store = model.samples(data, setting)
            forms = diversity(base.samples(data, setting)), diversity(store)
            one = diagnose(store, settings[setting], pair, limit=limit)
            blocks.append("\n".join([f"{data} {setting}", *_lines(one, *forms)]))
            found.append(
                {
                    "data": data,
                    "setting": setting,
                    "floor": FLOOR,
                    "diagnostics": None if one is None else asdict(one),
                    "diversity": {"base": asdict(forms[0]), "model": asdict(forms[1])},
                }
            )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "diagnostics.json").write_text(json.dumps(found, indent=1))
    return "\n\n".join(blocks)


def _lines(found: Diagnostics | None, base: Diversity, model: Diversity) -> list[str]:
    if found is None:
        return ["  the model has no correct response"]
    forward, reverse, base_entropy, entropy = (
        _per_token(values, found.reaching)
        for values in (found.forward_kl, found.reverse_kl, found.base_entropy, found.model_entropy)
    )
    return [
        f"  {found.responses} correct responses of the model, mean log-prob under the base "
        f"{np.mean(found.base_log_prob):.1f}, under the model {np.mean(found.model_log_prob):.1f} nats",
        f"  below {np.exp(FLOOR):g} under the base: {found.tokens_below_floor:.2%} of tokens; "
        f"{found.responses_below_floor:.1%} of responses have such a token",
        f"  a token: KL(base ‖ model) {forward:.4f}, KL(model ‖ base) {reverse:.4f}, entropy of the base "
        f"{base_entropy:.3f}, of the model {entropy:.3f} nats",
        f"  forms among {DRAWN} correct responses: base {base.forms:.2f} ({base.problems} problems), "
        f"model {model.forms:.2f} ({model.problems})",
    ]


def _per_token(values: Sequence[float], reaching: Sequence[int]) -> float:
    return float(np.average(values, weights=reaching))


def _weights(evaluation: Evaluation, scratch: Path) -> Path:
    """The HF directory of what was evaluated, exported into `scratch` if need be."""
    record = evaluation.manifest.model
    path = Path(record.path)
    if record.fingerprint is None and record.run is not None and record.step:
        # During training weights went from memory to the engines; a checkpoint of the step has them, too.
        path = Path(record.run) / "checkpoints" / f"step_{record.step:06d}"
    if not path.is_dir():
        raise RapoError(
            f"the weights of {evaluation.directory} are not at {path} any more; diagnostics need them: put "
            "them back, or evaluate a model that is there"
        )
    hf, found = open_model(path, scratch)
    if record.fingerprint is not None and found.fingerprint != record.fingerprint:
        raise RapoError(
            f"{path} has other weights than {evaluation.directory} was sampled from (fingerprint "
            f"{found.fingerprint}, then {record.fingerprint}); put those back, or evaluate again"
        )
    return hf
