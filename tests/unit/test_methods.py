"""The named methods against their papers: what they make of a step's groups, and their losses, in numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.data.batching import pack
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.advantages import varies
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.term import AtToken, Need
from megatron_rapo.policy.batch import make_samples
from tests.episodes import group_of, scored_response
from tests.methods import a_method
from tests.unit.one_rank import one_rank
from tests.unit.test_batch import responses
from tests.unit.test_objective import TEMPERATURE, VOCABULARY, log_distribution, states

C, W, T = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT
LIMIT = 10
# Two of four right, one of four, none: of different lengths, one cut.
GROUPS = [
    responses((3, C), (10, W), (2, C), (4, W), truncated=[1]),
    responses((1, W), (2, C), (5, W), (3, W)),
    responses((2, W), (2, W), (6, W), (1, W)),
]
REWARDS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], float)
LENGTHS = np.array([[3, 10, 2, 4], [1, 2, 5, 3], [2, 2, 6, 1]], float)
CENTRED = REWARDS - REWARDS.mean(1, keepdims=True)
STANDARDISED = np.array([[1, -1, 1, -1], [-1, 3, -1, -1], [0, 0, 0, 0]]) * np.array([[0.75**0.5], [0.5], [0]])


def of_difficulty() -> np.ndarray:
    """Mean absolute deviations ½ and 3/8; weights e^(−1/4) and e^(−1/8) over their mean."""
    easy, hard = math.exp(-1 / 4), math.exp(-1 / 8)
    weights = 2 * np.array([[easy], [hard], [0.0]]) / (easy + hard)
    return CENTRED / np.array([[1 / 2], [3 / 8], [1.0]]) * weights


# What the paper says: advantages, who is in the loss, and the weight of a token of a response of that length
# where n responses of N tokens are in it.
EVERY = np.ones((3, 4), bool)
PAPERS: dict[str, tuple[np.ndarray, np.ndarray, Any]] = {
    "rapo": (STANDARDISED, EVERY, lambda length, n, N: 1 / N),
    "grpo": (STANDARDISED, EVERY, lambda length, n, N: 1 / (n * length)),
    "dapo": (STANDARDISED, (LENGTHS < 10), lambda length, n, N: 1 / N),
    "dr_grpo": (CENTRED, EVERY, lambda length, n, N: 1 / (n * LIMIT)),
    "gspo": (STANDARDISED, EVERY, lambda length, n, N: 1 / (n * length)),
    "lite_ppo": (CENTRED / REWARDS.std(ddof=1), EVERY, lambda length, n, N: 1 / N),
    "rloo": (CENTRED * 4 / 3, EVERY, lambda length, n, N: 1 / (n * LIMIT)),
    "dgpo": (of_difficulty(), EVERY & [[True], [True], [False]], lambda length, n, N: 1 / N),
    "distill": (STANDARDISED, EVERY, lambda length, n, N: 1 / N),
    "sft": (np.zeros((3, 4)), EVERY, lambda length, n, N: 1 / N),
}


@pytest.mark.parametrize("name", PAPERS)
def test_what_a_method_makes_of_groups_is_its_papers(name: str) -> None:
    advantages, in_loss, weight = PAPERS[name]
    (samples,) = make_samples(GROUPS, a_method(name), VOCABULARY, len(GROUPS))
    assert np.array([s.advantage for s in samples]).reshape(3, 4) == pytest.approx(advantages)
    tokens, count = LENGTHS[in_loss].sum(), in_loss.sum()
    expected = np.where(in_loss, weight(LENGTHS, count, tokens), 0.0)
    assert np.array([s.token_weight for s in samples]).reshape(3, 4) == pytest.approx(expected)
    phi = np.where(REWARDS == 1, 1.0, 0.5) if name == "rapo" else np.ones((3, 4))
    assert np.array([s.phi for s in samples]).reshape(3, 4) == pytest.approx(phi)


RANDOM = np.random.default_rng(0)
LOG_RATIO = np.array([0.5, -0.5, 0.1, -0.1, 2e-4, -2e-4, 5e-4, 0.0])
ADVANTAGE = np.array([1.0, -1.0, -2.0, 0.5, 1.0, -1.0, 1.0, 0.0])
LOG_PROB, ENTROPY = -RANDOM.uniform(0.1, 2.0, 8), RANDOM.uniform(0.0, 2.0, 8)
REFERENCE, KL = -RANDOM.uniform(0.1, 3.0, 8), RANDOM.uniform(0.0, 1.0, 8)


def clipped(low: float, high: float) -> np.ndarray:
    ratio = np.exp(LOG_RATIO)
    return -np.minimum(ratio * ADVANTAGE, ratio.clip(1 - low, 1 + high) * ADVANTAGE)


K3 = np.exp(REFERENCE - LOG_PROB) - (REFERENCE - LOG_PROB) - 1
LOSSES = {
    "rapo": clipped(0.2, 0.2) + 5e-3 * KL - 1e-3 * ENTROPY,
    "grpo": clipped(0.2, 0.2) + 0.04 * K3,
    "dapo": clipped(0.2, 0.28),
    "dr_grpo": clipped(0.2, 0.2),
    "gspo": clipped(3e-4, 4e-4),
    "lite_ppo": clipped(0.2, 0.2),
    "rloo": clipped(0.2, 0.2),
    "dgpo": clipped(0.2, 0.2),
    "distill": KL,
    "sft": -LOG_PROB,
}


def loss_at(subject: Method) -> np.ndarray:
    """The method's loss at eight tokens, what each term reads being given and the rest not."""
    at = dict(zip(("log_prob", "entropy"), map(torch.from_numpy, (LOG_PROB, ENTROPY)), strict=True))
    needed = {
        Need.FORWARD_KL: KL,
        Need.REVERSE_KL: KL,
        Need.REFERENCE_LOG_PROB: REFERENCE,
        Need.FLATTENED_LOG_PROB: REFERENCE,
        Need.SEQUENCE_LOG_RATIO: LOG_RATIO,
        Need.IMPORTANCE: np.ones(8),
        Need.SEQUENCE_IMPORTANCE: np.ones(8),
        Need.TEACHER_REVERSE_KL: KL,
    }
    token = AtToken(
        **at,
        # Of a token whose response has the ratio, so that it is the response's that counts.
        old_log_prob=torch.from_numpy(LOG_PROB - LOG_RATIO),
        engine_log_prob=torch.from_numpy(LOG_PROB),
        advantage=torch.from_numpy(ADVANTAGE),
        phi=torch.ones(8),
        position=torch.arange(8),
        **{need.value: torch.from_numpy(needed[need]) for need in subject.needs},
    )
    return np.sum([coefficient * term(token)[0].numpy() for coefficient, term in subject.terms()], axis=0)


@pytest.mark.parametrize("name", PAPERS)
def test_a_methods_loss_is_its_papers(name: str) -> None:
    assert loss_at(a_method(name)) == pytest.approx(LOSSES[name])


@pytest.mark.parametrize(
    ("subject", "loss"),
    [
        (
            a_method(
                "rapo", divergence_coefficient=0.5, entropy_coefficient=0.25, clip_low=0.1, clip_high=0.3
            ),
            clipped(0.1, 0.3) + 0.5 * KL - 0.25 * ENTROPY,
        ),
        (
            a_method("grpo", divergence="k2", divergence_coefficient=0.5, entropy_coefficient=0.25),
            clipped(0.2, 0.2) + 0.25 * (REFERENCE - LOG_PROB) ** 2 - 0.25 * ENTROPY,
        ),
        (a_method("grpo", divergence="reverse_exact"), clipped(0.2, 0.2) + 0.04 * KL),
        (a_method("dapo", clip_high=0.05), clipped(0.2, 0.05)),
        (a_method("gspo", clip_low=0.1, clip_high=0.1), clipped(0.1, 0.1)),
        (
            a_method("dr_grpo", clip_dual=1.5),
            np.where(ADVANTAGE < 0, np.minimum(clipped(0.2, 0.2), -1.5 * ADVANTAGE), clipped(0.2, 0.2)),
        ),
    ],
    ids=lambda value: value.options.method if isinstance(value, Method) else "",
)
def test_options_are_the_losss_numbers(subject: Method, loss: np.ndarray) -> None:
    assert loss_at(subject) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("subject", "weight"),
    [
        (a_method("rapo", loss_aggregation="sequence_mean"), 1 / (12 * LENGTHS)),
        (a_method("rapo", loss_aggregation="constant"), np.full((3, 4), 1 / 120)),
        (a_method("grpo", loss_aggregation="token_mean"), np.full((3, 4), 1 / 41)),
        (a_method("dapo", mask_truncated=False), np.full((3, 4), 1 / 41)),
        (a_method("distill", loss_aggregation="constant"), np.full((3, 4), 1 / 120)),
        (a_method("sft", loss_aggregation="constant"), np.full((3, 4), 1 / 120)),
        (a_method("dgpo", groups_without_variance="keep"), np.full((3, 4), 1 / 41)),
    ],
    ids=lambda value: value.options.method if isinstance(value, Method) else "",
)
def test_options_weigh_tokens(subject: Method, weight: np.ndarray) -> None:
    (samples,) = make_samples(GROUPS, subject, VOCABULARY, len(GROUPS))
    assert np.array([s.token_weight for s in samples]).reshape(3, 4) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("name", "reference", "hidden"),
    [("rapo", True, True), ("grpo", True, False), ("dapo", False, False), ("gspo", False, False)],
)
def test_a_reference_is_there_where_a_term_reads_it(name: str, reference: bool, hidden: bool) -> None:
    subject = a_method(name)
    assert (subject.wants_reference, subject.wants_reference_hidden) == (reference, hidden)


@pytest.mark.parametrize("name", ["rapo", "grpo"])
def test_without_a_divergence_there_is_no_reference(name: str) -> None:
    assert not a_method(name, divergence_coefficient=0.0).wants_reference


def test_an_audit_reads_the_whole_reference_and_leaves_the_loss_as_it_is() -> None:
    audited = a_method("rapo", divergence="forward_sampled", audit_estimators=True)
    assert audited.wants_reference_hidden
    assert loss_at(audited) == pytest.approx(loss_at(a_method("rapo", divergence="forward_sampled")))


@pytest.mark.parametrize("divergence", ["forward_sampled", "forward_printed"])
def test_sampled_divergences_flatten_less(divergence: Any) -> None:
    for options, floor in (({}, 0.8), ({"flatten_floor": 0.6}, 0.6)):
        phi = a_method("rapo", divergence=divergence, **options).flatten(GROUPS)
        assert np.array(phi) == pytest.approx(np.where(REWARDS == 1, 1.0, floor))


def test_an_unknown_reward_flattens_as_a_failed_one() -> None:
    assert a_method("rapo").flatten([responses((2, C), (3, T))])[0].tolist() == [1.0, 0.5]


def test_phi_may_be_told_another_fact_than_the_reward() -> None:
    """Of the reward function before the environment's; what is outside [0, 1] is clipped."""

    def told(
        outcome: Outcome, of_reward: dict[str, float], of_environment: dict[str, float]
    ) -> ScoredEpisode:
        one = scored_response(outcome, [0])
        return replace(
            one,
            episode=replace(one.episode, facts=of_environment),
            verification=replace(one.verification, facts=of_reward),
        )

    subject = a_method("rapo", flatten_fact="progress", flatten_floor=0.2)
    group = group_of(
        told(C, {"progress": 0.25}, {"progress": 1.0}),
        told(W, {}, {"progress": 7.0}),
        told(T, {}, {}),
        number=5,
    )
    assert subject.flatten([group])[0].tolist() == pytest.approx([0.4, 1.0, 0.2])
    lacking = group_of(told(W, {"form": 1.0}, {}), number=5)
    message = r'flatten_fact = "progress": response 0 to problem 5 has no such fact, but form; name'
    with pytest.raises(RapoError, match=message):
        subject.flatten([lacking])


@pytest.mark.parametrize("name", PAPERS)
def test_entropy_and_mismatch_of_the_same_samples_are_the_same(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever weighs or masks tokens in the loss: plain means over all response tokens."""
    groups = [responses((3, C), (10, W), truncated=[1]), responses((1, C), (2, C))]
    subject = a_method(name)
    (samples,) = make_samples(groups, subject, VOCABULARY, len(groups))
    batch = pack(samples, sequence_multiple=1)
    policy, reference = states(16, 0), states(16, 1)
    with one_rank(tmp_path_factory.mktemp("store")):
        objective = Objective(
            subject,
            temperature=TEMPERATURE,
            vocabulary=VOCABULARY,
            group=torch.distributed.group.WORLD,  # type: ignore[arg-type]
        )
        if subject.wants_reference and not objective.wants_reference_hidden:
            plain, flattened = objective.reference_log_probs(reference, batch)
            batch.reference_log_probs, batch.flattened_log_probs = plain, flattened
        pull = reference if objective.wants_distribution else None
        _, sums, mismatch = objective(batch, policy, pull)
    log_policy = log_distribution(policy)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    assert objective.metrics(sums)["loss/entropy"] == pytest.approx(float(entropy.mean()))
    chosen = batch.is_response
    log_prob = log_policy.gather(1, batch.targets[chosen][:, None]).squeeze(1)
    apart = float((log_prob - batch.engine_log_probs[chosen]).abs().mean())
    assert mismatch.metrics()["mismatch/log_prob_mean"] == pytest.approx(apart)
    if name == "dapo":
        assert objective.metrics(sums)["loss/tokens"] == 6, "the truncated response is masked out of the loss"


def test_rewards_that_differ_by_rounding_alone_do_not_vary() -> None:
    rewards = np.array([[0.5, 0.5 + 5e-13], [0.5, 0.5 + 1.5e-12], [1e3, 1e3 + 5e-10], [1e3, 1e3 + 2e-9]])
    assert varies(rewards).tolist() == [False, True, False, True]
