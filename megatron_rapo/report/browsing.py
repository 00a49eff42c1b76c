"""The response browser's contents from evaluations: names of models and data, and their tokenizers."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.evaluate.manifest import ModelRecord
from megatron_rapo.report.responses import Browser, Sampled, browse
from megatron_rapo.report.sources import EvaluatedModel, benchmark_name
from megatron_rapo.report.tokens import TokenTexts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def browser_of(models: Sequence[EvaluatedModel]) -> tuple[Browser | None, tuple[str, ...]]:
    """What the browser holds, and what it could not show; nothing without evaluations."""
    if not models:
        return None, ()
    parts, notes = [], []
    for model in models:
        evaluation = model.evaluation
        token_texts = _token_texts(evaluation.manifest.model)
        if token_texts is None:
            notes.append(
                f"Tokens of {model.label} are not coloured: {evaluation.manifest.model.path} has no "
                "tokenizer on this machine."
            )
        for data, setting in evaluation:
            name = benchmark_name(evaluation, data, setting)
            parts.append(Sampled(model.label, name, evaluation.samples(data, setting), token_texts))
    return browse(parts), tuple(notes)


def _token_texts(model: ModelRecord) -> TokenTexts | None:
    from transformers import AutoTokenizer  # late: it takes seconds, which a wrong RUN must not cost

    for directory in _candidates(model):
        if any((directory / name).is_file() for name in TOKENIZER_FILES):
            return TokenTexts(AutoTokenizer.from_pretrained(directory))
    return None


def _candidates(model: ModelRecord) -> list[Path]:
    """Where the tokenizer may be: beside the weights, or in the model that the run began with."""
    path = Path(model.path)
    found = [path, path / "model"]
    for run in (path, *([Path(model.run)] if model.run else [])):
        config = run / "config.toml"
        if config.is_file():
            found.append(Path(tomllib.loads(config.read_text(encoding="utf-8"))["model"]["path"]))
    return found
