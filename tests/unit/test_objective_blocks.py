"""The objective's building blocks against enumeration over a toy vocabulary, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_rapo.loss.importance import importance_weight
from megatron_rapo.methods import advantages
from megatron_rapo.methods.aggregation import token_weights
from megatron_rapo.methods.overlong import overlong_penalty
from megatron_rapo.methods.terms.divergences import DIVERGENCES
from megatron_rapo.methods.terms.policy_gradient import clipped_surrogate, with_sequence_value
from megatron_rapo.methods.terms.term import AtToken

V = 5
unbounded = st.floats(-3.0, 3.0)
rows = st.lists(unbounded, min_size=V, max_size=V)


ADVANTAGES = {
    "standardised": advantages.standardised,
    "centred": advantages.centred,
    "over_batch_deviation": advantages.over_batch_deviation,
    "leave_one_out": advantages.leave_one_out,
    "weighted_by_difficulty": advantages.weighted_by_difficulty,
}


def at_token(log_policy, old, log_flattened, log_reference, chosen, phi=1.0) -> AtToken:
    """A token sampled as `chosen`, in each row; exact divergences by enumeration."""
    pick = chosen[:, None]
    return AtToken(
        log_prob=log_policy.gather(1, pick).squeeze(1),
        entropy=-(log_policy.exp() * log_policy).sum(-1),
        old_log_prob=old.gather(1, pick).squeeze(1),
        engine_log_prob=old.gather(1, pick).squeeze(1),
        advantage=torch.ones(len(chosen)),
        phi=torch.full((len(chosen),), phi, dtype=log_policy.dtype),
        position=torch.arange(len(chosen)),
        forward_kl=(log_flattened.exp() * (log_flattened - log_policy)).sum(-1),
        reverse_kl=(log_policy.exp() * (log_policy - log_reference)).sum(-1),
        flattened_log_prob=log_flattened.gather(1, pick).squeeze(1),
        reference_log_prob=log_reference.gather(1, pick).squeeze(1),
    )


def expected_gradient(mode, logits, old, log_reference, phi):
    """Gradient in the logits of the mode's value, in expectation over tokens sampled from the old policy."""
    logits = logits.detach().requires_grad_()
    log_policy = logits.log_softmax(-1)
    log_flattened = (phi * log_reference).log_softmax(-1)
    every = torch.arange(V)
    values = DIVERGENCES[mode][1](
        at_token(*(x.expand(V, V) for x in (log_policy, old, log_flattened, log_reference)), every)
    )
    (old.exp() * values).sum().backward()
    return logits.grad


def distributions(z, r):
    logits = torch.tensor(z, dtype=torch.float64)
    return logits, torch.tensor(r, dtype=torch.float64).log_softmax(-1)


@settings(max_examples=50, deadline=None)
@given(rows, rows, rows, st.floats(0.0, 1.0))
def test_the_sampled_forward_divergence_has_the_exact_gradient_in_expectation(z, r, o, phi):
    """Also off-policy: samples come from another policy than the one that is differentiated."""
    logits, log_reference = distributions(z, r)
    old = torch.tensor(o, dtype=torch.float64).log_softmax(-1)
    flattened = (phi * log_reference).log_softmax(-1)
    # Enumeration holds where no ratio is clamped.
    assume((flattened - logits.log_softmax(-1)).max() <= math.log(10.0))
    found = expected_gradient("forward_sampled", logits, old, log_reference, phi)
    torch.testing.assert_close(found, logits.softmax(-1) - flattened.exp(), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(rows, rows, st.floats(0.0, 1.0))
def test_the_printed_divergence_has_the_gradient_of_half_the_mean_square_log_ratio(z, r, phi):
    logits, log_reference = distributions(z, r)
    log_policy, flattened = logits.log_softmax(-1), (phi * log_reference).log_softmax(-1)
    assume((flattened - log_policy).max() <= math.log(10.0))
    found = expected_gradient("forward_printed", logits, log_policy, log_reference, phi)
    variable = logits.detach().requires_grad_()
    half = 0.5 * (flattened.exp() * (flattened - variable.log_softmax(-1)).square()).sum()
    half.backward()
    torch.testing.assert_close(found, variable.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "forward"),
    [("k3", True), ("k2", False)],
    ids=["k3 is the forward KL's", "k2 is the reverse KL's"],
)
def test_gradients_of_the_usual_estimates_on_policy(mode, forward):
    logits, log_reference = distributions([0.3, -1.0, 0.8, 0.0, 1.2], [0.1, 0.4, -0.7, 0.9, 0.2])
    log_policy = logits.log_softmax(-1)
    found = expected_gradient(mode, logits, log_policy, log_reference, 1.0)
    policy = log_policy.exp()
    reverse = (policy * (log_policy - log_reference)).sum()
    exact = policy * (log_policy - log_reference - reverse)
    expected = policy - log_reference.exp() if forward else exact
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows, rows, st.floats(0.0, 1.0))
def test_the_reverse_divergence_from_the_flattened_reference_is_exact(z, r, phi):
    """Whichever token was sampled."""
    logits, log_reference = distributions(z, r)
    variable = logits.requires_grad_()
    log_policy, log_flattened = variable.log_softmax(-1), (phi * log_reference).log_softmax(-1)
    rows_of = [x.expand(V, V) for x in (log_policy, log_policy, log_flattened, log_reference)]
    found = DIVERGENCES["reverse_flattened"][1](at_token(*rows_of, torch.arange(V), phi))
    expected = (log_policy.exp() * (log_policy - log_flattened)).sum()
    torch.testing.assert_close(found, expected.expand(V), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(found[0], variable, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, variable)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


def test_k1_pulls_nowhere_in_expectation():
    logits, log_reference = distributions([0.3, -1.0, 0.8, 0.0, 1.2], [0.1, 0.4, -0.7, 0.9, 0.2])
    found = expected_gradient("k1", logits, logits.log_softmax(-1), log_reference, 1.0)
    torch.testing.assert_close(found, torch.zeros(V, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows, st.floats(0.05, 1.0))
def test_flattening_raises_entropy_at_the_rate_of_the_variance(r, phi):
    """dH(p_φ)/dφ = −φ Var_{p_φ}(ℓ)."""
    log_reference = torch.tensor(r, dtype=torch.float64).log_softmax(-1)
    power = torch.tensor(phi, dtype=torch.float64, requires_grad=True)
    log_p = (power * log_reference).log_softmax(-1)
    (-(log_p.exp() * log_p).sum()).backward()
    p = log_p.detach().exp()
    variance = (p * log_reference.square()).sum() - (p * log_reference).sum() ** 2
    torch.testing.assert_close(power.grad, -power.detach() * variance, rtol=1e-8, atol=1e-10)


REWARDS = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_advantages_by_hand():
    first = {name: function(REWARDS)[0] for name, function in ADVANTAGES.items()}
    np.testing.assert_allclose(first["standardised"], [1.5, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(first["centred"], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(first["leave_one_out"], [1.0, -1 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(
        first["over_batch_deviation"], np.array([0.75, -0.25, -0.25, -0.25]) / REWARDS.std(ddof=1)
    )
    # Mean absolute deviations 3/8 and 1/2; weights e^(−1/8) and e^(−1/4) over their mean.
    easy, hard = math.exp(-1 / 4), math.exp(-1 / 8)
    np.testing.assert_allclose(
        first["weighted_by_difficulty"], np.array([2, -2 / 3, -2 / 3, -2 / 3]) * 2 * hard / (hard + easy)
    )


@settings(max_examples=200, deadline=None)
@given(st.floats(-1.0, 1.0), st.integers(2, 24), st.sampled_from(sorted(ADVANTAGES)), st.booleans())
def test_equal_rewards_have_no_advantage_whatever_their_rounding(reward, responses, name, beside_others):
    """A mean of equal numbers need not be that number: 2/3 three times, 0.1 + 0.2 beside 0.3."""
    equal = np.full((1, responses), reward)
    equal[0, 0] = (reward + 0.3) - 0.3  # the same, summed otherwise
    others = np.linspace(0.0, 1.0, responses)[None]
    rewards = np.concatenate([equal, others]) if beside_others else equal
    found = ADVANTAGES[name](rewards)
    assert (found[0] == 0.0).all()
    assert not beside_others or abs(found[1]).min() >= 0.0 < abs(found[1]).max()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_small_differences_are_differences(name):
    found = ADVANTAGES[name](np.array([[1.0, 1.0 - 1e-9, 1.0, 1.0]]))
    assert found[0, 1] < 0 < found[0, 0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_unknown_rewards_take_no_part(name):
    """As if these responses had not been sampled: the others' advantages are of what is known alone."""
    rewards = np.ma.array([[1.0, 0.0, 0.0, 1.0, 9.0], [0.0, 1.0, 0.0, 0.0, 7.0]])
    rewards[:, 4] = np.ma.masked
    found = ADVANTAGES[name](rewards)
    np.testing.assert_allclose(found[:, :4], ADVANTAGES[name](rewards.data[:, :4]))
    assert (found[:, 4] == 0.0).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_fewer_than_two_known_rewards_has_no_advantage(name):
    rewards = np.ma.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    rewards[0, 1:] = rewards[1] = np.ma.masked
    found = ADVANTAGES[name](rewards)
    assert (found[:2] == 0.0).all()
    np.testing.assert_allclose(found[2:], ADVANTAGES[name](rewards.data[2:]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_without_variance_have_no_advantage(name):
    assert not ADVANTAGES[name](REWARDS)[2:].any()
    assert not ADVANTAGES[name](np.zeros((2, 3))).any()


def test_the_overlong_penalty():
    lengths = np.array([10, 16, 18, 20, 23])
    np.testing.assert_allclose(overlong_penalty(lengths, 4, 20), [0.0, 0.0, -0.25, -0.5, -0.5])


def test_the_overlong_penalty_weighs_what_the_papers_does():
    """DAPO adds 0 … −1 to rewards of ±1; advantages know no scale, so they come to the same with {0, 1}."""
    lengths, correct = np.array([[3, 17, 20, 18]]), np.array([[1.0, 1.0, 1.0, 0.0]])
    papers = (2.0 * correct - 1.0) + np.array([[0.0, -0.25, -1.0, -0.5]])
    ours = correct + overlong_penalty(lengths, 4, 20)
    np.testing.assert_allclose(ADVANTAGES["standardised"](ours), ADVANTAGES["standardised"](papers))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_token_weights_add_up(lengths):
    tokens = np.array(lengths)
    assert (token_weights(lengths, "token_mean", 50) * tokens).sum() == pytest.approx(1.0)
    assert (token_weights(lengths, "sequence_mean", 50) * tokens) == pytest.approx(1.0 / len(lengths))
    assert token_weights(lengths, "constant", 50) == pytest.approx(1.0 / (50 * len(lengths)))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "dual", "value", "clipped"),
    [
        (0.0, 1.0, None, 1.0, False),
        (math.log(2.0), 1.0, None, 1.3, True),
        (math.log(0.5), 1.0, None, 0.5, False),
        (math.log(2.0), -1.0, None, -2.0, False),
        (math.log(0.5), -1.0, None, -0.8, True),
        (math.log(9.0), -1.0, 3.0, -3.0, True),
        (math.log(9.0), 1.0, 3.0, 1.3, True),
        (0.0, 0.5, 3.0, 0.5, False),
    ],
)
def test_the_clipped_surrogate(log_ratio, advantage, dual, value, clipped):
    found = clipped_surrogate(
        torch.tensor([log_ratio]), torch.tensor([advantage]), clip_low=0.2, clip_high=0.3, clip_dual=dual
    )
    assert found.value.item() == pytest.approx(value)
    assert found.clipped.item() is clipped


def test_a_sequence_ratio_has_the_gradient_of_the_mean():
    log_prob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -1.7, -0.6], dtype=torch.float64)
    mean = (log_prob - old).mean()
    mean.exp().backward()
    expected, log_prob.grad = log_prob.grad, None
    log_ratio = with_sequence_value(log_prob, mean.detach().expand(3))
    (log_ratio.exp() / 3).sum().backward()
    torch.testing.assert_close(log_prob.grad, expected)


def test_importance_weights():
    log_prob, engine = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -2.0, -1.0])
    ratio = math.e
    assert importance_weight(log_prob, engine, "off", 2.0).tolist() == [1.0, 1.0, 1.0]
    truncated = importance_weight(log_prob, engine, "truncated", 2.0).tolist()
    assert truncated == pytest.approx([1.0, 2.0, 1 / ratio])
    assert importance_weight(log_prob, engine, "masked", 2.0).tolist() == [1.0, 0.0, 0.0]
