"""Exploration diagnostics as `megatron-rapo compare --diagnose` left them beside a model's evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.report.contents import Diagnosis, Tile
from megatron_rapo.report.drawing import Line, Plot
from megatron_rapo.report.figures import PageFigure, figure
from megatron_rapo.report.sources import EvaluatedModel, benchmark_name, file_name
from megatron_rapo.report.theme import series_colour

FILE = Path("comparison/diagnostics.json")


def diagnoses_of(models: Sequence[EvaluatedModel]) -> list[Diagnosis]:
    """The diagnostics that there are, of every model but the base.

    Raises:
        RapoError: a file of diagnostics is damaged.
    """
    found = []
    for place, model in enumerate(models[1:]):
        path = model.evaluation.directory / FILE
        if not path.exists():
            continue
        try:
            for entry in json.loads(path.read_text(encoding="utf-8")):
                if entry["diagnostics"] is not None:
                    found.append(_diagnosis(model, entry, series_colour(place)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RapoError(
                f"{path} is no file of diagnostics ({error!r}); write it again with `megatron-rapo compare "
                "--diagnose`, or remove it"
            ) from error
    return found


def _diagnosis(model: EvaluatedModel, entry: Mapping[str, Any], colour: str) -> Diagnosis:
    measured = entry["diagnostics"]
    name = benchmark_name(model.evaluation, entry["data"], entry["setting"])
    return Diagnosis(
        benchmark=name,
        model=model.label,
        figures=tuple(_figures(f"{file_name(name)}_{file_name(model.label)}", model.label, measured, colour)),
        facts=tuple(_facts(measured, entry["diversity"], entry["floor"])),
        by_position=measured,
    )


def _facts(measured: Mapping[str, Any], diversity: Mapping[str, Any], floor: float) -> list[Tile]:
    responses = measured["responses"]
    under_base, under_model = (sum(measured[f"{who}_log_prob"]) / responses for who in ("base", "model"))
    base, own = diversity["base"], diversity["model"]
    return [
        Tile(
            "log-prob under the base",
            f"{under_base:.1f} nats".replace("-", "−"),
            f"under the model {under_model:.1f} · mean of {responses:,} correct responses".replace("-", "−"),
        ),
        Tile(
            "responses off the base's support",
            f"{measured['responses_below_floor']:.1%}",
            f"with a token of less than {math.exp(floor):.4g} under the base · "
            f"{measured['tokens_below_floor']:.2%} of tokens",
        ),
        Tile(
            "distinct solution forms",
            f"{own['forms']:.2f}",
            f"base {base['forms']:.2f} · among 4 correct responses to a problem",
        ),
        Tile("distinct answers", f"{own['answers']:.2f}", f"base {base['answers']:.2f} · likewise"),
    ]


def _figures(name: str, label: str, measured: Mapping[str, Any], colour: str) -> list[PageFigure]:
    positions = list(range(1, len(measured["reaching"]) + 1))

    def line(text: str, shade: str, values: str, *, dashed: bool = False) -> Line:
        return Line(text, shade, positions, measured[values], dashed=dashed)

    plots = [
        Plot(
            f"diagnostics_kl_{name}",
            "divergence from the base, nats per token",
            "Exact KL at each position, mean over correct responses that reach it.",
            "position in the response",
            "",
            (line("KL(base ‖ model)", colour, "forward_kl"), line("KL(model ‖ base)", "base", "reverse_kl")),
        ),
        Plot(
            f"diagnostics_entropy_{name}",
            "entropy, nats per token",
            "Entropy of base and model at each position of the model's correct responses.",
            "position in the response",
            "",
            (line("base", "base", "base_entropy", dashed=True), line(label, colour, "model_entropy")),
        ),
        Plot(
            f"diagnostics_reaching_{name}",
            "responses that reach a position",
            "What the means of the other two figures are over: few responses make them noisy.",
            "position in the response",
            "",
            (line("responses", colour, "reaching"),),
        ),
    ]
    return [figure(plot) for plot in plots]
