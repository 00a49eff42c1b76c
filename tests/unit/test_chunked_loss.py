"""The chunked loss against autograd over full logits, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss, chunked_statistics
from megatron_rapo.loss.rows import Pull
from megatron_rapo.loss.statistics import ChunkDistribution, Upstream
from megatron_rapo.loss.vocabulary import VocabularyShard
from megatron_rapo.testing.ranks import on_ranks
from tests.unit.one_rank import one_rank

TOKENS, HIDDEN, ROWS, VOCABULARY, TEMPERATURE = 11, 6, 23, 19, 0.7
FIELDS = ("log_prob", "entropy", "forward_kl", "reverse_kl", "jensen_shannon")
SHARE = 0.3  # of the reference in the mixture


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory):
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    reference = ReferenceStates(
        torch.randn(TOKENS, HIDDEN, dtype=dtype),
        torch.randn(ROWS, HIDDEN, dtype=dtype),
        torch.rand(TOKENS, dtype=dtype),
        forward=True,
        reverse=True,
        mixture=SHARE,
    )
    coefficients = torch.randn(len(FIELDS), TOKENS, dtype=dtype)
    return hidden, weight, targets, reference, coefficients


def head_of(weight, chunk_tokens=4):
    shard = VocabularyShard.of(ROWS, VOCABULARY, torch.distributed.group.WORLD)
    return Head(weight, shard, TEMPERATURE, chunk_tokens)


def plain(hidden, weight, targets, reference, vocabulary=VOCABULARY):
    log_policy, log_reference = (
        ((states @ rows.T)[:, :vocabulary] / TEMPERATURE).log_softmax(-1)
        for states, rows in ((hidden, weight), (reference.hidden, reference.weight))
    )
    flattened = (reference.flattening[:, None] * log_reference).log_softmax(-1)
    at = targets[:, None]
    return {
        "jensen_shannon": jensen_shannon(log_policy, log_reference),
        "log_prob": log_policy.gather(1, at).squeeze(1),
        "entropy": -(log_policy.exp() * log_policy).sum(-1),
        "forward_kl": (flattened.exp() * (flattened - log_policy)).sum(-1),
        "reverse_kl": (log_policy.exp() * (log_policy - log_reference)).sum(-1),
        "flattened_log_prob": flattened.gather(1, at).squeeze(1),
        "reference_log_prob": log_reference.gather(1, at).squeeze(1),
    }


def jensen_shannon(log_policy, log_reference):
    """(1 − β) KL(π ‖ M) + β KL(q ‖ M), M = (1 − β) π + β q (arXiv 2306.13649, eq. 2)."""
    mixture = torch.logaddexp(log_policy + math.log(1 - SHARE), log_reference + math.log(SHARE))
    shares = ((1 - SHARE, log_policy), (SHARE, log_reference))
    return sum(share * (own.exp() * (own - mixture).nan_to_num(0.0)).sum(-1) for share, own in shares)


def test_statistics_equal_full_logits():
    hidden, weight, targets, reference, _ = inputs()
    found = chunked_statistics(hidden, targets, head_of(weight), reference)
    for name, expected in plain(hidden, weight, targets, reference).items():
        torch.testing.assert_close(getattr(found, name), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "used", [FIELDS[:1], FIELDS[1:2], FIELDS[2:3], FIELDS[3:4], FIELDS[4:], FIELDS[:3], FIELDS]
)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_gradients_equal_autograd(used, chunk_tokens):
    hidden, weight, targets, reference, coefficients = inputs()

    def total(values, rows):
        return sum(
            (coefficients[i, rows] * values[name] ** 2 for i, name in enumerate(FIELDS) if name in used),
            torch.zeros((), dtype=torch.float64),
        )

    loss = chunked_loss(
        hidden, targets, head_of(weight, chunk_tokens), lambda s, rows: total(s._asdict(), rows), reference
    )
    (3.0 * loss).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = total(plain(hidden, weight, targets, reference), slice(None)).sum()
    (3.0 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["large", "equal", "masked", "one real token"])
def test_extreme_logits_are_finite_and_right(kind):
    torch.manual_seed(1)
    logits = torch.randn(3, ROWS, dtype=torch.float64)
    reference_logits = torch.randn(3, ROWS, dtype=torch.float64)
    if kind == "large":
        logits, reference_logits = 1e4 * logits.sign(), 1e4 * reference_logits.sign()
    if kind == "equal":
        logits, reference_logits = torch.full_like(logits, 7.0), torch.full_like(logits, -3.0)
    vocabulary = 1 if kind == "one real token" else VOCABULARY
    phi = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    shard = VocabularyShard.of(ROWS, vocabulary, torch.distributed.group.WORLD)
    targets = torch.zeros(3, dtype=torch.int64)
    if kind == "masked":
        logits[:, 3], reference_logits[:, 3] = -torch.inf, -torch.inf
        phi = phi.clamp(min=0.5)
    pull = Pull(reference_logits.clone(), phi, forward=True, reverse=True, mixture=SHARE)
    chunk = ChunkDistribution(logits.clone(), targets, shard, 1.0, pull)

    log_policy = logits[:, :vocabulary].log_softmax(-1)
    log_reference = reference_logits[:, :vocabulary].log_softmax(-1)
    flattened = (phi[:, None] * log_reference).log_softmax(-1)
    differences = (flattened - log_policy).nan_to_num(0.0), (log_policy - log_reference).nan_to_num(0.0)
    expected = {
        "log_prob": log_policy[:, 0],
        "entropy": -(log_policy.exp() * log_policy.clamp(min=-1e30)).sum(-1),
        "forward_kl": (flattened.exp() * differences[0]).sum(-1),
        "reverse_kl": (log_policy.exp() * differences[1]).sum(-1),
        "jensen_shannon": jensen_shannon(log_policy, log_reference),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(chunk.statistics, name), value, rtol=1e-9, atol=1e-9)
    ones = torch.ones(3, dtype=torch.float64)
    gradient = chunk.gradient(Upstream(ones, ones, ones, ones, ones))
    assert gradient.isfinite().all()
    assert not gradient[:, vocabulary:].any()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [12, 8, 6], ids=["2 ranks", "3 ranks", "4, of which one has padding alone"])
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["", "far apart"])
def test_a_vocabulary_over_several_ranks_is_one_vocabulary(rows, scale):
    """Each rank's maxima, sums and targets are others'; `far apart`, most have no share in the softmax."""
    ranks, vocabulary = 24 // rows, 13 if rows == 6 else VOCABULARY
    torch.manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    weight, other = (scale * torch.randn(ranks * rows, HIDDEN, dtype=torch.float64) for _ in "ab")
    reference = ReferenceStates(
        *(torch.randn(TOKENS, HIDDEN, dtype=torch.float64), other, torch.rand(TOKENS).double()),
        forward=True,
        reverse=True,
        mixture=SHARE,
    )
    targets = torch.arange(TOKENS) % vocabulary
    coefficients = torch.randn(len(FIELDS), TOKENS, dtype=torch.float64)

    def total(values, chosen):
        return sum(coefficients[i, chosen] * values[name] for i, name in enumerate(FIELDS))

    def share(group):
        mine = slice(group.rank() * rows, (group.rank() + 1) * rows)
        states, part = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
        head = Head(part, VocabularyShard.of(rows, vocabulary, group), TEMPERATURE, 4)
        pull = replace(reference, weight=other[mine])
        statistics = chunked_statistics(states, targets, head, pull)
        loss = chunked_loss(states, targets, head, lambda s, chosen: total(s._asdict(), chosen), pull)
        loss.backward()
        return statistics, loss, states.grad, part.grad

    statistics, losses, hidden_grads, weight_grads = zip(*on_ranks(ranks, share), strict=True)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = plain(hidden, weight, targets, reference, vocabulary)
    loss = total(expected, slice(None)).sum()
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-9 * scale}
    for found, of_rank in zip(statistics, losses, strict=True):
        torch.testing.assert_close(of_rank, loss, **close)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(found, name), value.detach(), **close)
    torch.testing.assert_close(sum(hidden_grads), hidden.grad, **close)
    torch.testing.assert_close(torch.cat(weight_grads), weight.grad, **close)


def test_no_tokens_at_all():
    hidden, weight, targets, _, _ = inputs()
    empty = hidden.detach()[:0].requires_grad_()
    loss = chunked_loss(empty, targets[:0], head_of(weight), lambda s, rows: s.log_prob)
    loss.backward()
    assert loss.item() == 0.0
    assert empty.grad.shape == (0, HIDDEN)
    assert not weight.grad.any()
    assert chunked_statistics(empty, targets[:0], head_of(weight)).log_prob.shape == (0,)


def test_bfloat16_statistics_are_computed_in_fp32():
    hidden, weight, targets, *_ = inputs(torch.bfloat16)
    found = chunked_statistics(hidden, targets, head_of(weight))
    assert found.log_prob.dtype is torch.float32
    logits = (hidden @ weight.T)[:, :VOCABULARY].float() / TEMPERATURE
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.log_prob, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused():
    """The gradient is scaled in place: given twice, it would be scaled twice."""
    hidden, weight, targets, *_ = inputs()
    loss = chunked_loss(hidden, targets, head_of(weight), lambda s, rows: s.log_prob)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_the_gradient_is_the_loss_s_slope():
    """gradcheck's central difference; gradcheck itself goes backward twice."""
    hidden, weight, targets, reference, coefficients = inputs()

    def loss(hidden, weight):
        def token_loss(s, rows):
            values = s._asdict()
            return sum(coefficients[i, rows] * values[name] for i, name in enumerate(FIELDS))

        return chunked_loss(hidden, targets, head_of(weight), token_loss, reference)

    loss(hidden, weight).backward()
    along, step = [torch.randn_like(hidden), torch.randn_like(weight)], 1e-6
    with torch.no_grad():
        ahead, behind = (
            loss(hidden + sign * step * along[0], weight + sign * step * along[1]) for sign in (1, -1)
        )
        slope = (hidden.grad * along[0]).sum() + (weight.grad * along[1]).sum()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-7, atol=1e-9)
