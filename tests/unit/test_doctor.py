"""What the doctor reads off tokens and log-probs, on distributions that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rapo.doctor.finding import Finding
from megatron_rapo.doctor.inference import Reading, drawn_from, reported_of
from megatron_rapo.doctor.readings import FACTORS, MIN_P, TOP_K, TOP_P, Readings, read
from megatron_rapo.doctor.table import table

TOKENS, ROWS, VOCABULARY, TEMPERATURE = 1500, 70, 60, 0.8
TOLERANCE = 1e-3


def logits(seed: int = 0) -> np.ndarray:
    """Of many kinds of positions, from peaked to nearly flat."""
    random = np.random.default_rng(seed)
    return random.normal(size=(TOKENS, ROWS)) * random.uniform(0.5, 4.0, size=(TOKENS, 1))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def drawn(probs: np.ndarray, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.array([random.choice(len(row), p=row / row.sum()) for row in probs])


def at(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return values[np.arange(len(tokens)), tokens]


def readings(scores: np.ndarray, tokens: np.ndarray) -> Readings:
    columns = read(torch.tensor(scores).float(), torch.tensor(tokens), VOCABULARY, TEMPERATURE)
    return Readings.of_columns(columns.numpy())


def cut_by_top_p(probs: np.ndarray, top_p: float) -> np.ndarray:
    cut = np.zeros_like(probs)
    for row, out in zip(probs, cut, strict=True):
        total = 0.0
        for token in np.argsort(-row):
            if total >= top_p:
                break
            out[token] = row[token]
            total += row[token]
    return cut


def cut_by_top_k(probs: np.ndarray, top_k: int) -> np.ndarray:
    threshold = np.sort(probs, axis=1)[:, -top_k, None]
    return np.where(probs >= threshold, probs, 0.0)


def cut_by_min_p(probs: np.ndarray, min_p: float) -> np.ndarray:
    return np.where(probs >= min_p * probs.max(1, keepdims=True), probs, 0.0)


def test_readings_equal_their_definitions() -> None:
    scores = logits()
    real = scores[:, :VOCABULARY]
    probs = softmax(real / TEMPERATURE)
    tokens = drawn(probs)
    found = readings(scores, tokens)
    for factor in (FACTORS[0], 1.0, FACTORS[-1]):
        expected = np.log(at(softmax(real / (TEMPERATURE * factor)), tokens))
        np.testing.assert_allclose(found.scaled[:, FACTORS.index(factor)], expected, atol=1e-4)
    np.testing.assert_allclose(found.unscaled, np.log(at(softmax(real), tokens)), atol=1e-4)
    expected = np.log(at(softmax(scores / TEMPERATURE), tokens))
    np.testing.assert_allclose(found.over_all_rows, expected, atol=1e-4)
    likelier = probs > at(probs, tokens)[:, None]
    np.testing.assert_allclose(found.above, (probs * likelier).sum(1), atol=1e-5)
    assert found.rank.tolist() == likelier.sum(1).tolist()
    np.testing.assert_allclose(found.share, at(probs, tokens) / probs.max(1), atol=1e-5)
    kept = cut_by_top_k(probs, 5).sum(1)
    np.testing.assert_allclose(found.kept_by_k[:, TOP_K.index(5)], kept, atol=1e-5)
    loose = cut_by_min_p(probs, 0.1 * 0.9).sum(1)
    np.testing.assert_allclose(found.kept_by_min_p[:, MIN_P.index(0.1)], loose, atol=1e-5)
    loose = cut_by_top_p(probs, 0.9 + 0.01).sum(1)
    np.testing.assert_allclose(found.kept_by_p[:, TOP_P.index(0.9)], loose, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_sound_tokens_are_taken_for_sound(seed: int) -> None:
    scores = logits(seed)
    tokens = drawn(softmax(scores[:, :VOCABULARY] / TEMPERATURE), seed)
    assert drawn_from(readings(scores, tokens), TEMPERATURE).kind == "asked"


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        ("top_p", 0.95),
        ("top_p", 0.8),
        ("top_k", 20),
        ("top_k", 1),
        ("min_p", 0.05),
        ("temperature", 1.0),
        ("temperature", 0.64),
    ],
)
def test_how_tokens_were_drawn_is_found(kind: str, parameter: float) -> None:
    scores = logits()
    probs = softmax(scores[:, :VOCABULARY] / TEMPERATURE)
    cuts = {"top_p": cut_by_top_p, "top_k": cut_by_top_k, "min_p": cut_by_min_p}
    if kind == "temperature":
        probs = softmax(scores[:, :VOCABULARY] / parameter)
    else:
        probs = cuts[kind](probs, parameter)  # type: ignore[operator]
    found = drawn_from(readings(scores, drawn(probs)), TEMPERATURE)
    assert (found.kind, found.parameter) == (kind, pytest.approx(parameter, rel=0.1))


def reported(scores: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray) -> Reading:
    rounded = log_probs + np.random.default_rng(3).normal(0, TOLERANCE / 2, len(tokens))
    return reported_of(readings(scores, tokens), rounded, TEMPERATURE, TOLERANCE)


def test_what_log_probs_are_of_is_found() -> None:
    scores = logits()
    real = scores[:, :VOCABULARY]
    probs = softmax(real / TEMPERATURE)
    tokens = drawn(probs)
    assert reported(scores, tokens, np.log(at(probs, tokens))).kind == "asked"
    unscaled = reported(scores, tokens, np.log(at(softmax(real), tokens)))
    assert (unscaled.kind, unscaled.parameter) == ("temperature", 1.0)
    spare = reported(scores, tokens, np.log(at(softmax(scores / TEMPERATURE), tokens)))
    assert spare.kind == "all_rows"


def test_renormalised_log_probs_are_found() -> None:
    scores = logits()
    cut = cut_by_top_k(softmax(scores[:, :VOCABULARY] / TEMPERATURE), 5)
    tokens = drawn(cut)
    found = reported(scores, tokens, np.log(at(cut / cut.sum(1, keepdims=True), tokens)))
    assert (found.kind, found.parameter) == ("top_k", 5)


def test_a_difference_that_nothing_explains_is_left() -> None:
    scores = logits()
    tokens = drawn(softmax(scores[:, :VOCABULARY] / TEMPERATURE))
    expected = np.log(at(softmax(scores[:, :VOCABULARY] / TEMPERATURE), tokens))
    noise = np.random.default_rng(2).normal(0, 0.2, TOKENS)
    assert reported(scores, tokens, expected + noise).kind == "asked"


def test_the_table_shows_the_engine_that_is_at_fault() -> None:
    def finding(url: str, verdict: str) -> Finding:
        remedy = "mend it" if verdict == "FOUND" else ""
        return Finding("temperature", verdict, "0.1 nats", remedy, url)  # type: ignore[arg-type]

    text = table([finding("http://a:1", "ok"), finding("http://b:1", "FOUND"), finding("http://c:1", "ok")])
    assert "temperature  FOUND" in text
    assert "http://b:1: 0.1 nats" in text
    assert text.endswith("temperature: http://b:1\n  mend it")
    assert table([finding("http://a:1", "ok")]).endswith("nothing found")
    assert table([finding("http://a:1", "not judged")]).endswith("not all could be judged")
