"""The hypotheses, in the order in which one that holds spoils the tests of those behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_rapo.doctor import remedies
from megatron_rapo.doctor.evidence import Evidence
from megatron_rapo.doctor.finding import Finding, Verdict
from megatron_rapo.doctor.inference import Reading, drawn_from, explains, gap, reported_of
from megatron_rapo.doctor.readings import Array
from megatron_rapo.loss.mismatch import STRETCHES

NOT_SAMPLED = "no sampled response has only tokens of the tokenizer"

# Verdict, figures and remedy.
Outcome = tuple[Verdict, str, str]


def judge(evidence: Evidence) -> list[Finding]:
    """A finding a hypothesis."""
    outcomes = {cause: test(evidence) for cause, test in HYPOTHESES.items()}
    return [Finding(cause, *outcome, evidence.url) for cause, outcome in outcomes.items()]


def _weights(e: Evidence) -> Outcome:
    shaken, earlier = e.shaken.cold.greedy_gap, e.shaken_by_fresh.greedy_gap
    if shaken > e.tolerance and earlier < shaken:
        figures = (
            f"sent other weights, it answers {_nats(shaken)} off them and {_nats(earlier)} off the run's"
        )
        return "FOUND", figures, remedies.NOT_LOADED
    if max(shaken, earlier) <= e.tolerance:
        return "not judged", "other weights, sent on purpose, make no difference to speak of", ""
    fresh = e.fresh.cold.greedy_gap
    figures = f"{_nats(fresh)} off after a publication"
    if e.found is None:
        return "ok", figures, ""
    found = e.found.cold.greedy_gap
    figures = f"version {e.found_version} as found: {_nats(found)} off; {figures} of version {e.version}"
    if explains(fresh, found, e.tolerance):
        return "FOUND", figures, remedies.OTHER_WEIGHTS
    return "ok", figures, ""


def _cache(e: Evidence) -> Outcome:
    for stage in e.stages:
        warm, cold = stage.warm.greedy_gap, stage.cold.greedy_gap
        if explains(cold, warm, e.tolerance):
            figures = f"{stage.name}: {_nats(warm)} off with what was cached, {_nats(cold)} once flushed"
            return "FOUND", figures, remedies.STALE_CACHE
    warm, cold = e.fresh.warm.greedy_gap, e.fresh.cold.greedy_gap
    continued = e.continued.greedy_gap
    figures = f"{_nats(warm)} off with a cache, {_nats(cold)} without, {_nats(continued)} from a cached start"
    if explains(cold, continued, e.tolerance):
        return "FOUND", figures, remedies.SHARED_BEGINNINGS
    return "ok", figures, ""


def _vocabulary(e: Evidence) -> Outcome:
    cold, foreign = e.fresh.cold, e.sampled.foreign + e.fresh.cold.foreign
    figures, spare = f"{foreign} tokens that the tokenizer has not", False
    if cold.answers:
        readings, reported = cold.joined, cold.reported
        masked, whole = gap(readings.unscaled, reported), gap(readings.over_all_rows, reported)
        figures += f"; {_nats(masked)} off without the head's spare rows, {_nats(whole)} with them"
        spare = explains(whole, masked, e.tolerance)
    return ("FOUND", figures, remedies.VOCABULARY) if foreign or spare else ("ok", figures, "")


def _truncation(e: Evidence) -> Outcome:
    if reason := _unjudged(e):
        return "not judged", reason, ""
    drawn, reported = _readings(e)
    tokens = len(e.sampled.reported)
    cut = [reading for reading in (drawn, reported) if reading.kind in ("top_p", "top_k", "min_p")]
    if not cut:
        return "ok", f"{tokens} sampled tokens reach as far into the tail as they should", ""
    figures = f"none of {tokens} sampled tokens is outside {cut[0].kind} = {cut[0].parameter:g}"
    if reported in cut:
        figures += ", and log-probs are renormalised for it"
    return "FOUND", figures, remedies.TRUNCATION


def _temperature(e: Evidence) -> Outcome:
    if reason := _unjudged(e):
        return "not judged", reason, ""
    drawn, reported = _readings(e)
    figures = (
        f"asked for {e.temperature:g}: tokens are drawn at {_temperature_of(drawn, e)}, log-probs are of "
        f"{_temperature_of(reported, e)}"
    )
    if drawn.kind == "temperature":
        return "FOUND", figures, remedies.OTHER_TEMPERATURE
    if reported.kind == "temperature":
        return "FOUND", figures, remedies.REPORTED_TEMPERATURE
    return "ok", figures, ""


def _kernels(e: Evidence) -> Outcome:
    if not e.agrees and _weights(e)[0] == "FOUND":
        return "not judged", "the engine has other weights", ""
    if not e.sampled.answers:
        return "not judged", NOT_SAMPLED, ""
    sampled, (_, reported) = e.sampled, _readings(e)
    differences = np.abs(reported.log_probs - sampled.reported)
    mean, largest = float(differences.mean()), float(differences.max())
    figures = (
        f"what remains: mean {_nats(mean)}, largest {_nats(largest)} ({_profile(differences, e)}); rounding "
        f"may make {_nats(e.tolerance)} in the mean"
    )
    # Beside another temperature, one of a grid, what remains is the grid's.
    off = max(e.fresh.cold.greedy_gap, mean if reported.kind == "asked" else 0.0)
    decoding_alone = False
    if e.prefilled is not None:
        prefilled = gap(sampled.joined.unscaled, np.concatenate(list(e.prefilled)))
        decoding_alone = explains(prefilled, off, e.tolerance)
        figures += f"; read in one go {_nats(prefilled)}"
        figures += ": decoding alone is off" if decoding_alone else ""
    if off > e.tolerance:
        return "FOUND", figures, remedies.DECODING if decoding_alone else remedies.KERNELS
    return "ok", figures, ""


HYPOTHESES: dict[str, Callable[[Evidence], Outcome]] = {
    "weights": _weights,
    "stale cache": _cache,
    "vocabulary, spare rows": _vocabulary,
    "truncated sampling": _truncation,
    "temperature": _temperature,
    "kernels, precision": _kernels,
}


def _readings(e: Evidence) -> tuple[Reading, Reading]:
    """How the sampled tokens were drawn, and what their log-probs are of."""
    readings, reported = e.sampled.joined, e.sampled.reported
    return drawn_from(readings, e.temperature), reported_of(readings, reported, e.temperature, e.tolerance)


def _unjudged(e: Evidence) -> str | None:
    """Why sampled tokens tell nothing; None if they do."""
    if not e.agrees:
        return f"greedy answers are already {_nats(e.fresh.cold.greedy_gap)} off"
    return None if e.sampled.answers else NOT_SAMPLED


def _temperature_of(reading: Reading, e: Evidence) -> str:
    return f"{reading.parameter if reading.kind == 'temperature' else e.temperature:.2g}"


def _profile(differences: Array, e: Evidence) -> str:
    """Means by position in the response: `from 0: 1.0e-06, from 16: 2.0e-06`."""
    stretch = np.digitize(e.sampled.positions, STRETCHES[1:])
    parts = [(first, differences[stretch == i]) for i, first in enumerate(STRETCHES)]
    return ", ".join(f"from {first}: {values.mean():.1e}" for first, values in parts if len(values))


def _nats(value: float) -> str:
    return f"{value:.1e} nats"
