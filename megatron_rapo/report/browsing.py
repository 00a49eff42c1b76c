"""The response browser's contents: of evaluations and runs, with names of models and data, and tokenizers."""

from __future__ import annotations

from pathlib import Path

from megatron_rapo.data.token_texts import TokenTexts, find_token_texts
from megatron_rapo.evaluation.manifest import ModelRecord
from megatron_rapo.report.responses import Browser, EvaluatedSamples, Sampled, browse
from megatron_rapo.report.sources import Sources, benchmark_name
from megatron_rapo.report.trained import trained_samples


def browser_of(sources: Sources) -> tuple[Browser | None, tuple[str, ...]]:
    """What the browser holds, and what it could not show; nothing where nothing was kept."""
    parts, notes = [], []
    for model in sources.models:
        evaluation = model.evaluation
        token_texts = _token_texts(evaluation.manifest.model)
        if token_texts is None:
            notes.append(
                f"Tokens of {model.label} are not coloured: {evaluation.manifest.model.path} has no "
                "tokenizer on this machine."
            )
        for data, setting in evaluation:
            name = benchmark_name(evaluation, data, setting)
            samples = evaluation.samples(data, setting)
            parts.append(Sampled(model.label, name, EvaluatedSamples(samples), token_texts))
    parts += trained_samples(sources.runs)
    return browse(parts) if parts else None, tuple(notes)


def _token_texts(model: ModelRecord) -> TokenTexts | None:
    return find_token_texts([Path(model.path), *([Path(model.run)] if model.run else [])])
