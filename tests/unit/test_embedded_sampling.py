"""Each row's draws: of the right distribution, and its own."""

import math

import pytest
import torch

from megatron_rapo.embedded_server.sampling import Truncation, draw, uniforms


def splitmix64(state: int) -> int:
    """The published reference (Vigna, splitmix64.c) in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_uniforms_are_the_top_bits_of_splitmix64():
    seeds = [0, 1, 2**31 - 1, 2**62 + 12345]
    golden = 0x9E3779B97F4A7C15
    for step in (0, 1, 7, 100_000):
        # The stream's start is mix(seed), and the reference adds one golden ratio before it mixes.
        starts = [splitmix64((seed - golden) % 2**64) for seed in seeds]
        expected = [(splitmix64((start + step * golden) % 2**64) >> 40) / 2**24 for start in starts]
        assert uniforms(torch.tensor(seeds), step).tolist() == expected


def test_uniforms_of_a_row_do_not_depend_on_the_batch():
    seeds = torch.arange(100)
    assert torch.equal(uniforms(seeds, 3)[[7, 42]], uniforms(torch.tensor([7, 42]), 3))


@pytest.mark.parametrize("values", ["of neighbouring seeds", "of neighbouring steps"])
def test_uniforms_are_uniform(values):
    if values == "of neighbouring seeds":
        sample = uniforms(torch.arange(20_000), 5)
    else:
        sample = torch.cat([uniforms(torch.tensor([123]), step) for step in range(20_000)])
    assert sample.min() >= 0 and sample.max() < 1
    counts = torch.histc(sample, bins=100, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 148.2  # chi-square, 99 degrees of freedom, p = 0.001
    correlation = torch.corrcoef(torch.stack([sample[:-1], sample[1:]]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(sample))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator) * 2
    rows = 30_000
    tokens, log_probs = draw(
        logits.expand(rows, -1), torch.full((rows,), temperature), uniforms(torch.arange(rows), 0)
    )
    expected = torch.softmax(logits.double() / temperature, dim=-1)
    counts = torch.bincount(tokens, minlength=12)
    assert ((counts - rows * expected) ** 2 / (rows * expected)).sum() < 31.3  # 11 degrees, p = 0.001
    torch.testing.assert_close(log_probs, expected.log()[tokens].float())


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    extremes = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24])
    for shift in torch.linspace(-3, 3, 200):  # many roundings of the total
        tokens, log_probs = draw(
            (logits + torch.tensor([0, 0, 0, shift, 0])).expand(5, -1), torch.ones(5), extremes
        )
        assert set(tokens.tolist()) <= {1, 3}
        assert torch.isfinite(log_probs).all()


def test_temperature_zero_is_greedy_row_by_row():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    temperatures = torch.tensor([0.0, 1.0]).repeat(25)
    tokens, log_probs = draw(logits, temperatures, torch.full((50,), 0.999))
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))
    torch.testing.assert_close(log_probs[::2], logits[::2].log_softmax(-1).max(-1).values)


def test_nan_logits_give_nan_log_probs():
    tokens, log_probs = draw(torch.full((3, 5), torch.nan), torch.ones(3), torch.tensor([0.0, 0.5, 0.9]))
    assert torch.isnan(log_probs).all() and (tokens < 5).all()


def nucleus(probs: list[float], top_p: float, top_k: int) -> set[int]:
    """Written down plainly: the k likeliest tokens, then as few of them as hold top_p of their mass."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[:top_k]
    mass, kept = 0.0, set()
    for token in order:
        if kept and mass >= top_p * sum(probs[t] for t in order):
            break
        kept.add(token)
        mass += probs[token]
    return kept


def test_truncated_draws_follow_the_distribution_of_the_tokens_that_are_kept():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    probs = torch.softmax(logits.double(), dim=-1)
    rows = 10_000
    limits = [(0.9, 12), (1.0, 3), (0.7, 5), (0.01, 12), (1.0, 2**62)]
    for top_p, top_k in limits:
        truncation = Truncation(torch.full((rows,), top_p), torch.full((rows,), top_k))
        tokens, log_probs = draw(
            logits.expand(rows, -1), torch.ones(rows), uniforms(torch.arange(rows), 0), truncation
        )
        kept = sorted(nucleus(probs.tolist(), top_p, top_k))
        assert set(tokens.tolist()) == set(kept)
        expected = probs[kept] / probs[kept].sum()
        counts = torch.bincount(tokens, minlength=12)[kept]
        assert ((counts - rows * expected) ** 2 / (rows * expected)).sum() < 31.3
        # Of the distribution that was not truncated.
        torch.testing.assert_close(log_probs, probs.log()[tokens].float())


def test_truncation_is_each_rows_own():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(300, -1)
    truncation = Truncation(torch.ones(300), torch.tensor([1, 3]).repeat(150))
    uniform = uniforms(torch.arange(300), 0)
    tokens, _ = draw(logits, torch.ones(300), uniform, truncation)
    free, _ = draw(logits, torch.ones(300), uniform)
    assert set(tokens[::2].tolist()) == {2}
    assert torch.equal(tokens[1::2].bincount(), free[1::2].bincount())


def kept(probs: torch.Tensor, top_p: float, top_k: int) -> list[int]:
    found = Truncation(torch.tensor([top_p]), torch.tensor([top_k])).apply(probs[None])[0]
    assert torch.equal(found[found > 0], probs[found > 0]), "not renormalised"
    return found.nonzero().squeeze(1).tolist()


def test_of_tokens_alike_the_first_are_kept():
    assert kept(torch.full((4096,), 2.0**-12), 1.0, 3) == [0, 1, 2]


def test_the_tokens_that_just_reach_top_p_are_enough():
    probs = torch.tensor([0.25, 0.5, 0.125, 0.125])  # sums without rounding
    assert kept(probs, 0.5, 4) == [1]
    assert kept(probs, 0.75, 4) == [0, 1]
    assert kept(probs, 0.751, 4) == [0, 1, 2]
    assert kept(probs, 0.6, 2) == [1]  # of the 0.75 that the two likeliest have
    assert kept(probs, 0.7, 2) == [0, 1]


def test_without_a_limit_every_token_stays_however_sums_are_rounded():
    """Added up, so many small numbers come to more than their sum: the last would be beyond it."""
    for seed in range(20):
        probs = torch.rand(20_000, generator=torch.Generator().manual_seed(seed)) ** 8 + 1e-12
        probs /= probs.sum()
        assert kept(probs, 1.0, 2**62) == list(range(20_000))
