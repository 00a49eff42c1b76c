"""One microbatch through the objective: what it reports, and what must not break it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.loss.mismatch import Mismatch
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.methods.gspo import GSPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.divergences import LOG_RATIO_BOUNDS
from megatron_rapo.methods.terms.policy_gradient import PolicyGradient
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.testing.ranks import on_ranks
from tests.methods import a_method
from tests.ranks import replica_of
from tests.unit.one_rank import one_rank

ROWS, VOCABULARY, HIDDEN, TEMPERATURE = 13, 11, 7, 0.9


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory):
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def sequence(random: np.random.Generator, prompt: int, response: int) -> Sequence:
    ids = random.integers(0, VOCABULARY, prompt + response).astype(np.int32)
    log_probs = random.normal(-2.0, 0.5, response).astype(np.float32)
    return Sequence.of_response(ids[:prompt], ids[prompt:], log_probs, version=0)


def microbatch(weights=(0.05, 0.1), responses=(6, 9), has_probability=(True, True), **context) -> Microbatch:
    random = np.random.default_rng(0)
    return pack(
        [
            Sample(
                sequence=sequence(random, prompt, response),
                phi=0.5 + 0.5 * number,
                advantage=float(random.normal()),
                token_weight=weight,
                has_probability=has_probability[number],
            )
            for number, (prompt, response, weight) in enumerate(
                [(2, responses[0], weights[0]), (3, responses[1], weights[1])]
            )
        ],
        sequence_multiple=4,
        **context,
    )


def states(tokens: int, seed: int) -> HeadStates:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)
    weight = torch.randn(ROWS, HIDDEN, generator=random, dtype=torch.float64) * 0.3
    return HeadStates(hidden.requires_grad_(seed == 0), weight.requires_grad_(seed == 0))


def objective(method: str = "rapo", **options: Any) -> Objective:
    return Objective(
        a_method(method, loss_chunk_tokens=4, **options),
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=torch.distributed.group.WORLD,
    )


def log_distribution(of: HeadStates) -> torch.Tensor:
    return ((of.hidden @ of.weight.T)[:, :VOCABULARY] / TEMPERATURE).log_softmax(-1).detach()


def test_the_audit_reports_bias_and_variance_of_the_estimators():
    batch, subject = microbatch(), objective(audit_estimators=True)
    chosen = batch.is_response
    policy, reference = states(int(chosen.sum()), 0), states(int(chosen.sum()), 1)
    _, sums, _ = subject(batch, policy, reference)
    metrics = subject.metrics(sums)

    phi = batch.phi[chosen].double()
    log_policy, log_reference = log_distribution(policy), log_distribution(reference)
    flattened = (phi[:, None] * log_reference).log_softmax(-1)
    exact_forward = (flattened.exp() * (flattened - log_policy)).sum(-1)
    exact_reverse = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    at = batch.targets[chosen][:, None]
    pick = {
        "reverse": (log_reference - log_policy).gather(1, at).squeeze(1).clamp(*LOG_RATIO_BOUNDS),
        "forward": (flattened - log_policy).gather(1, at).squeeze(1).clamp(*LOG_RATIO_BOUNDS),
    }
    rho = pick["forward"].exp()
    errors = {
        "k1": -pick["reverse"] - exact_reverse,
        "k2": pick["reverse"].square() / 2 - exact_reverse,
        "k3": pick["reverse"].exp() - pick["reverse"] - 1 - exact_reverse,
        "forward_printed": rho * pick["forward"] - rho + 1 - exact_forward,
    }
    assert metrics["audit/forward_kl"] == pytest.approx(float(exact_forward.mean()))
    assert metrics["audit/reverse_kl"] == pytest.approx(float(exact_reverse.mean()))
    for name, error in errors.items():
        bias = float(error.mean())
        assert metrics[f"audit/{name}_bias"] == pytest.approx(bias)
        variance = float((error - bias).square().mean())
        assert metrics[f"audit/{name}_variance"] == pytest.approx(variance)


def test_importance_is_reported_whether_or_not_it_is_corrected():
    batch = microbatch()
    chosen = batch.is_response
    policy = states(int(chosen.sum()), 0)
    ratio = (
        log_distribution(policy).gather(1, batch.targets[chosen][:, None]).squeeze(1)
        - batch.engine_log_probs[chosen]
    )
    for correction in ("off", "truncated", "masked"):
        options = {} if correction == "off" else {"importance_correction": correction, "importance_cap": 1.2}
        subject = objective("dapo", **options)
        metrics = subject.metrics(subject(batch, policy, None)[1])
        u = ratio.exp()
        assert metrics["importance/mean"] == pytest.approx(float(u.mean()))
        effective = float(u.mean()) ** 2 / float(u.square().mean())
        assert metrics["importance/effective_samples"] == pytest.approx(effective)
        touched = {"off": torch.zeros_like(u), "truncated": u > 1.2, "masked": (u > 1.2) | (u < 1 / 1.2)}
        assert metrics["importance/corrected"] == pytest.approx(float(touched[correction].double().mean()))


def test_the_ratio_may_be_over_the_policy_that_sampled():
    """Then what is reported of importance and mismatch is of the policy as it is, not of that ratio."""
    batch = microbatch()
    chosen = batch.is_response
    batch.old_log_probs = batch.engine_log_probs
    policy = states(int(chosen.sum()), 0)
    subject = objective("dapo", old_log_probs="engine")
    loss, sums, mismatch = subject(batch, policy, None)
    log_ratio = (
        log_distribution(policy).gather(1, batch.targets[chosen][:, None]).squeeze(1)
        - batch.engine_log_probs[chosen]
    )
    ratio, advantage = log_ratio.exp(), batch.advantages[chosen].double()
    options = subject.method.options
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    assert float(loss) == pytest.approx(-float((batch.weights[chosen] * surrogate).sum()), rel=1e-5)
    assert not torch.equal(ratio, clipped), "nothing was clipped"
    found = subject.metrics(sums)
    assert found["importance/mean"] == pytest.approx(float(ratio.mean()))
    assert mismatch.metrics()["mismatch/log_prob_mean"] == pytest.approx(float(log_ratio.abs().mean()))


def test_mismatch_is_that_of_the_policy_that_sampled_by_position_in_the_response():
    """Also where the policy has moved since; every chunk of the loss counts."""
    lengths = (70, 1100)
    batch = microbatch(responses=lengths)
    chosen = batch.is_response
    policy = states(int(chosen.sum()), 0)
    sampled = log_distribution(policy).gather(1, batch.targets[chosen][:, None]).squeeze(1).numpy()
    position = np.concatenate([np.arange(length) for length in lengths])
    engine = batch.engine_log_probs[chosen].double().numpy()
    for old in (None, sampled - 0.3 * np.sin(position)):
        if old is not None:
            batch.old_log_probs = torch.zeros(len(chosen), dtype=torch.float64)
            batch.old_log_probs[chosen] = torch.from_numpy(old)
        delta = (sampled if old is None else old) - engine
        expected = {}
        stretches = {"0_15": (0, 16), "16_63": (16, 64), "64_255": (64, 256), "256_1023": (256, 1024)}
        for name, (first, end) in {"": (0, 5000), **stretches, "1024_4095": (1024, 4096)}.items():
            at = (position >= first) & (position < end)
            where = f"/{name}" if name else ""
            expected[f"mismatch/log_prob_mean{where}"] = np.abs(delta[at]).mean()
            expected[f"mismatch/log_prob_max{where}"] = np.abs(delta[at]).max()
            k3 = np.exp(delta[at]) - 1 - delta[at]
            expected[f"mismatch/kl{where}"] = k3.mean()
        expected["mismatch/engine_log_prob"] = engine.mean()
        expected["mismatch/engine_log_prob_spread"] = np.ptp(engine)
        *_, mismatch = objective("dapo")(batch, policy, None)
        assert mismatch.metrics() == pytest.approx(expected, rel=1e-5)


def test_mismatches_add_up_in_any_order():
    random = np.random.default_rng(0)
    log_probs, engine = (torch.from_numpy(random.normal(-2.0, 1.0, 300)) for _ in range(2))
    positions = torch.from_numpy(random.integers(0, 100, 300))
    whole, parts = Mismatch(), [Mismatch(), Mismatch()]
    whole.add(log_probs, engine, positions)
    for part, rows in zip(parts, (slice(0, 100), slice(100, None)), strict=True):
        part.add(log_probs[rows], engine[rows], positions[rows])
    for first, second in ((0, 1), (1, 0)):
        both = Mismatch()
        both.merge(parts[first])
        both.merge(parts[second])
        assert both.metrics() == pytest.approx(whole.metrics())


def test_clamped_log_ratios_are_counted():
    batch, subject = microbatch(), objective("grpo", divergence_coefficient=1.0)
    tokens = int(batch.is_response.sum())
    policy = states(tokens, 0)
    log_prob = log_distribution(policy).gather(1, batch.targets[batch.is_response][:, None]).squeeze(1)
    batch.reference_log_probs = log_prob.clone()
    batch.reference_log_probs[0] += math.log(10.0) + 1.0
    metrics = subject.metrics(subject(batch, policy, None)[1])
    assert metrics["loss/log_ratio_clamped"] == pytest.approx(1 / tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_counted(value):
    batch, subject = microbatch(), objective("dapo")
    policy = states(int(batch.is_response.sum()), 0)
    with torch.no_grad():
        policy.hidden[3] = value
    _, sums, _ = subject(batch, policy, None)
    assert subject.metrics(sums)["loss/not_finite"] > 0


def test_a_microbatch_without_response_tokens_has_no_loss_and_no_gradient():
    batch = microbatch(weights=(0.0, 0.0), has_probability=(False, False))
    subject = objective()
    policy, reference = states(0, 0), states(0, 1)
    loss, sums, mismatch = subject(batch, policy, reference)
    loss.backward()
    assert loss.item() == 0.0
    assert not policy.weight.grad.any()
    assert all(math.isfinite(value) for value in subject.metrics(sums).values())
    assert dict(mismatch.metrics()) == {
        f"mismatch/{name}": 0.0 for name in ("log_prob_mean", "log_prob_max", "kl")
    }


def test_what_is_masked_out_of_the_loss_is_measured_and_teaches_nothing():
    batch = microbatch(weights=(0.0, 0.1))
    subject = objective("grpo", divergence="k2", divergence_coefficient=1.0)
    chosen = batch.is_response
    assert int(chosen.sum()) == 6 + 9
    policy = states(15, 0)
    batch.reference_log_probs = torch.linspace(-3.0, -1.0, 15, dtype=torch.float64)
    loss, sums, _ = subject(batch, policy, None)
    loss.backward()
    assert not policy.hidden.grad[:6].any()
    assert policy.hidden.grad[6:].any()
    metrics = subject.metrics(sums)
    assert metrics["loss/tokens"] == 9
    log_policy = log_distribution(policy)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    assert metrics["loss/entropy"] == pytest.approx(float(entropy.mean()))


def test_metrics_of_several_updates_are_means_over_their_tokens_and_the_mean_loss():
    subject, parts = objective("dapo"), []
    for responses in ((6, 9), (1, 2)):
        batch = microbatch(responses=responses)
        parts.append(subject(batch, states(sum(responses), 0), None)[1])
    one, other = (subject.metrics(part) for part in parts)
    both = subject.metrics(parts[0] + parts[1], updates=2)
    assert both["loss/total"] == pytest.approx((one["loss/total"] + other["loss/total"]) / 2)
    assert both["loss/entropy"] == pytest.approx((15 * one["loss/entropy"] + 3 * other["loss/entropy"]) / 18)


def printed_loss(
    batch: Microbatch, policy: HeadStates, old: torch.Tensor | None, correction: str, *, sequence: bool
) -> torch.Tensor:
    """Σ −weight u min(w A, clip(w) A) in fp64, response by response, of full logits and for autograd."""
    chosen = batch.is_response
    log_distribution = ((policy.hidden @ policy.weight.T)[:, :VOCABULARY] / TEMPERATURE).log_softmax(-1)
    log_prob = log_distribution.gather(1, batch.targets[chosen][:, None]).squeeze(1)
    old = log_prob.detach() if old is None else old
    u = (old - batch.engine_log_probs[chosen]).exp()
    weight = {
        "off": torch.ones_like(u),
        "truncated": u.clamp(max=1.3),
        "masked": ((u <= 1.3) & (u >= 1 / 1.3)).double(),
    }[correction]
    assert weight.unique().numel() > 1 or correction == "off"
    loss = torch.zeros((), dtype=torch.float64)
    for number in batch.sequences[chosen].unique():
        rows = batch.sequences[chosen] == number
        log_ratio = (log_prob - old)[rows]
        if sequence:
            log_ratio = log_ratio.mean().expand(len(log_ratio))
        advantage = batch.advantages[chosen][rows].double()
        bounded = log_ratio.exp().clamp(1 - 0.2, 1 + 0.5) * advantage
        surrogate = torch.minimum(log_ratio.exp() * advantage, bounded)
        loss = loss - (batch.weights[chosen][rows] * weight[rows] * surrogate).sum()
    return loss


def printed_options(correction: str) -> dict[str, Any]:
    options = {"clip_low": 0.2, "clip_high": 0.5}
    corrected = {"importance_correction": correction, "importance_cap": 1.3}
    return options if correction == "off" else options | corrected


def old_log_probs(batch: Microbatch, policy: HeadStates) -> torch.Tensor:
    """Of the response tokens, under a policy that has moved since."""
    of_policy = log_distribution(policy).gather(1, batch.targets[batch.is_response][:, None]).squeeze(1)
    return of_policy + 0.2 * torch.sin(torch.arange(len(of_policy), dtype=torch.float64))


def with_old(batch: Microbatch, old: torch.Tensor) -> Microbatch:
    batch.old_log_probs = torch.zeros(len(batch.is_response), dtype=torch.float64)
    batch.old_log_probs[batch.is_response] = old
    return batch


def assert_gradients_of(loss: torch.Tensor, found: HeadStates, expected: torch.Tensor, plain: HeadStates):
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(found.hidden.grad, plain.hidden.grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.weight.grad, plain.weight.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("method", ["dapo", "gspo"])
@pytest.mark.parametrize("correction", ["off", "truncated", "masked"])
def test_the_gradient_is_that_of_the_printed_loss(correction, method, moved):
    """Also where the policy has moved since it sampled."""
    batch, policy, plain = microbatch(), states(15, 0), states(15, 0)
    old = old_log_probs(batch, plain) if moved else None
    if old is not None:
        with_old(batch, old)
    loss, *_ = objective(method, **printed_options(correction))(batch, policy, None)
    expected = printed_loss(batch, plain, old, correction, sequence=method == "gspo")
    assert_gradients_of(loss, policy, expected, plain)


@dataclass(frozen=True)
class OfTokens(PolicyGradient):
    """Reports nothing, for the names are the other term's."""

    def __call__(self, token: AtToken) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return super().__call__(token)[0], {}


class OfBoth(GSPO):
    """Ratios of responses and, with half the weight, of tokens."""

    def terms(self) -> list[tuple[float, Term]]:
        return [*super().terms(), (0.5, OfTokens(self.options.clip_low, self.options.clip_high))]


def test_terms_of_tokens_and_of_responses_have_importance_weights_of_their_own():
    batch, policy, plain = microbatch(), states(15, 0), states(15, 0)
    old = old_log_probs(batch, plain)
    options = OfBoth.Options(loss_chunk_tokens=4, **printed_options("truncated"))
    subject = Objective(
        OfBoth(options, Sampling(1.0, 4, 10)),
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=torch.distributed.group.WORLD,
    )
    loss, *_ = subject(with_old(batch, old), policy, None)
    expected = printed_loss(batch, plain, old, "truncated", sequence=True)
    expected = expected + 0.5 * printed_loss(batch, plain, old, "truncated", sequence=False)
    assert_gradients_of(loss, policy, expected, plain)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("correction", ["off", "truncated", "masked"])
def test_ranks_that_share_sequences_have_the_loss_of_whole_ones(correction, moved):
    """Each sums over the tokens that it has; a response's means are over those of both."""
    whole, policy, plain = microbatch(), states(15, 0), states(15, 0)
    old = old_log_probs(whole, policy) if moved else None
    # A response token is known by its response and its place there.
    places = list(
        zip(
            *(x[whole.is_response].tolist() for x in (whole.sequences, whole.response_positions)), strict=True
        )
    )

    def run(batch, group=None):
        chosen = batch.is_response
        mine = list(
            zip(*(x[chosen].tolist() for x in (batch.sequences, batch.response_positions)), strict=True)
        )
        rows = torch.tensor([places.index(place) for place in mine])
        if old is not None:
            with_old(batch, old[rows])
        own = HeadStates(
            policy.hidden.detach()[rows].requires_grad_(), policy.weight.detach().requires_grad_()
        )
        subject = objective("gspo", **printed_options(correction))
        subject.context_group = group
        loss, sums, _ = subject(batch, own, None)
        loss.backward()
        hidden = torch.zeros_like(policy.hidden).index_add(0, rows, own.hidden.grad)
        return loss.detach(), hidden, own.weight.grad, sums

    *_, sums = run(microbatch())
    expected = printed_loss(whole, plain, old, correction, sequence=True)
    expected.backward()
    parts = on_ranks(2, lambda g: run(microbatch(context_rank=g.rank(), context_ranks=2), g))
    assert all(part[1].any() for part in parts)
    for found, value in zip(
        zip(*parts, strict=True), (expected, plain.hidden.grad, plain.weight.grad, sums), strict=True
    ):
        torch.testing.assert_close(found[0] + found[1], value, rtol=1e-7, atol=1e-12)


def test_ranks_that_share_the_vocabulary_have_the_loss_of_the_whole():
    """Also with the reference's distribution, whose head is shared alike."""
    batch, tokens = microbatch(), 15
    policy, reference = states(tokens, 0), states(tokens, 1)

    def run(group=None):
        rows = slice(None) if group is None else slice(group.rank() * 7, group.rank() * 7 + 7)
        padded = [
            torch.cat([x.weight.detach(), torch.ones(1, HIDDEN).double()])[rows] for x in (policy, reference)
        ]
        hidden = policy.hidden.detach().clone().requires_grad_()
        subject = objective(audit_estimators=True)
        if group is not None:
            subject.group = group
        loss, sums, _ = subject(batch, HeadStates(hidden, padded[0]), HeadStates(reference.hidden, padded[1]))
        loss.backward()
        return loss.detach(), sums, hidden.grad

    loss, sums, gradient = run()
    parts = on_ranks(2, run)
    for part in parts:
        torch.testing.assert_close(part[0], loss)
        torch.testing.assert_close(part[1], sums)
    torch.testing.assert_close(parts[0][2] + parts[1][2], gradient)


def test_mismatches_of_replicas_add_up():
    random = np.random.default_rng(0)
    log_probs, engine = (torch.from_numpy(random.normal(-2.0, 1.0, 300)) for _ in range(2))
    positions = torch.from_numpy(random.integers(0, 5000, 300))
    whole = Mismatch()
    whole.add(log_probs, engine, positions)

    def reduced(group):
        rows = slice(0, 100) if group.rank() else slice(100, None)
        mine = Mismatch()
        mine.add(log_probs[rows], engine[rows], positions[rows])
        mine.reduce(replica_of(group))
        return dict(mine.metrics())

    assert on_ranks(2, reduced) == [pytest.approx(dict(whole.metrics()))] * 2
