"""Distillation from a teacher: the loss against full logits and autograd, and which teachers are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.data.batching import Microbatch, pack
from megatron_rapo.data.tokenizer import require_same_tokens
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.chunked import ReferenceStates
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.loss.trial import reported_names
from megatron_rapo.methods.distill import Distill
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms import distillation
from megatron_rapo.methods.terms.distillation import Distillation
from megatron_rapo.methods.terms.term import Need, Term
from megatron_rapo.policy.batch import make_samples
from tests.methods import a_method
from tests.models import make_tokenizer
from tests.unit.one_rank import one_rank
from tests.unit.test_batch import responses
from tests.unit.test_objective import ROWS, TEMPERATURE, VOCABULARY, states

LENGTHS, LIMIT = [3, 5, 2, 4], 10
ADVANTAGES = np.array([1, -1, 1, -1]) * 0.75**0.5
GROUP = responses(*zip(LENGTHS, [Outcome.CORRECT, Outcome.WRONG] * 2, strict=True))
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def of_method(vocabulary: int = VOCABULARY, **options: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, and gradients of hidden states and head, by the product."""
    subject = a_method("distill", loss_chunk_tokens=4, **options)
    [samples] = make_samples([GROUP], subject, VOCABULARY, 1)
    batch = pack(samples, sequence_multiple=4)
    batch.old_log_probs = torch.full((len(batch.targets),), -2.0, dtype=torch.float64)
    objective = Objective(
        subject,
        temperature=TEMPERATURE,
        vocabulary=vocabulary,
        group=torch.distributed.group.WORLD,  # type: ignore[arg-type]
    )
    policy, teacher = states(TOKENS, 0), of_teacher()
    loss, sums, _ = objective(batch, policy, teacher)
    loss.backward()
    assert policy.hidden.grad is not None and policy.weight.grad is not None
    assert objective.metrics(sums)["loss/distillation"] > 0
    return loss.item(), policy.hidden.grad, policy.weight.grad


def of_teacher() -> HeadStates:
    """Of another width than the policy."""
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, 4, generator=random, dtype=torch.float64)
    return HeadStates(hidden, torch.randn(ROWS, 4, generator=random, dtype=torch.float64))


def in_full(
    divergence: str = "reverse",
    mixture: float = 0.5,
    divergence_coefficient: float = 1.0,
    policy_coefficient: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_aggregation: str = "token_mean",
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The same by the papers' formulas, of full distributions and by autograd."""
    policy, teacher = states(TOKENS, 0), of_teacher()
    pi, tau = (
        torch.softmax((of.hidden @ of.weight.T)[:, :VOCABULARY] / TEMPERATURE, -1) for of in (policy, teacher)
    )
    if divergence == "reverse":
        apart = (pi * (pi / tau).log()).sum(-1)
    elif divergence == "forward":
        apart = (tau * (tau / pi).log()).sum(-1)
    else:
        mixed = mixture * tau + (1 - mixture) * pi
        apart = mixture * (tau * (tau / mixed).log()).sum(-1)
        apart = apart + (1 - mixture) * (pi * (pi / mixed).log()).sum(-1)
    chosen = torch.tensor([token for one in GROUP.episodes for token in targets_of(one)])
    ratio = (pi.gather(1, chosen[:, None]).squeeze(1).log() + 2.0).exp()
    advantages = torch.from_numpy(np.repeat(ADVANTAGES, LENGTHS).astype(np.float32)).double()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    lengths = np.array(LENGTHS, float)
    weight = {
        "token_mean": np.full(4, 1 / TOKENS),
        "sequence_mean": 1 / (4 * lengths),
        "constant": np.full(4, 1 / (4 * LIMIT)),
    }[loss_aggregation]
    weights = torch.from_numpy(np.repeat(weight, LENGTHS).astype(np.float32)).double()
    loss = (weights * (divergence_coefficient * apart - policy_coefficient * surrogate)).sum()
    loss.backward()
    assert policy.hidden.grad is not None and policy.weight.grad is not None
    return loss.item(), policy.hidden.grad, policy.weight.grad


def targets_of(one: Any) -> list[int]:
    [sequence] = one.episode.sequences
    return sequence.token_ids[sequence.sampled].tolist()


def difference(found: tuple[Any, ...], expected: tuple[Any, ...]) -> float:
    """The largest, relative to the largest number of loss and gradients each."""
    pairs = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"divergence": "forward"},
    {"divergence": "jensen_shannon"},
    {"divergence": "jensen_shannon", "mixture": 0.2},
    {"divergence_coefficient": 0.3},
    {"policy_coefficient": 0.7},
    {"policy_coefficient": 0.7, "clip_low": 0.6, "clip_high": 0.9},
    {"loss_aggregation": "sequence_mean"},
    {"loss_aggregation": "constant"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient_are_the_papers(options: dict[str, Any]) -> None:
    assert difference(of_method(**options), in_full(**options)) < 1e-10


def test_each_option_is_another_loss() -> None:
    losses = [of_method(**options)[0] for options in OPTIONS]
    assert len({round(loss, 9) for loss in losses}) == len(OPTIONS)


def _swap(patch: pytest.MonkeyPatch) -> None:
    swapped = {"forward": Need.TEACHER_REVERSE_KL, "reverse": Need.TEACHER_FORWARD_KL}
    patch.setattr(distillation, "_NEEDS", swapped)


def _other_temperature(patch: pytest.MonkeyPatch) -> None:
    pull = ReferenceStates.pull
    patch.setattr(
        ReferenceStates,
        "pull",
        lambda self, rows: (whole := pull(self, rows))._replace(logits=TEMPERATURE * whole.logits),
    )


def _shifted_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Microbatch, "is_response", property(lambda self: (self.response_positions >= 0).roll(1)))


@pytest.mark.parametrize("fault", [_swap, _other_temperature, _shifted_mask])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: Any, divergence: str) -> None:
    fault(monkeypatch)
    options: dict[str, Any] = {"divergence": divergence, "policy_coefficient": 0.7}
    assert difference(of_method(**options), in_full(**options)) > 1e-3


def test_spare_rows_that_had_a_probability_would_be_seen() -> None:
    assert difference(of_method(vocabulary=ROWS), in_full()) > 1e-3


class OfBoth(RAPO):
    """Whole distributions of two other models."""

    def terms(self) -> list[tuple[float, Term]]:
        return [*super().terms(), (1.0, Distillation("forward"))]


class Tilted(Distill):
    def __init__(self, options: Distill.Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.mixture = 1.0


@pytest.mark.parametrize(
    ("method", "wrong"),
    [(OfBoth, "whole distributions of both teacher and reference"), (Tilted, "mixture = 1.0; let it be")],
)
def test_what_a_loss_cannot_hold_is_refused(method: Any, wrong: str) -> None:
    options = method.Options(method="mine")
    with pytest.raises(RapoError, match=wrong):
        reported_names(method(options, Sampling(1.0, 4, 10)))


def test_a_teacher_beside_a_reference_at_the_sampled_token() -> None:
    """The one's statistics are never taken for the other's."""

    class Both(Distill):
        def terms(self) -> list[tuple[float, Term]]:
            return [*super().terms(), (0.5, OfReference())]

    class OfReference(Term):
        needs = frozenset({Need.REFERENCE_LOG_PROB})

        def __call__(self, token: Any) -> Any:
            return token.reference_log_prob.to(token.log_prob), {"reference": token.reference_log_prob}

    subject = Both(Both.Options(method="mine"), Sampling(1.0, 4, LIMIT))
    [samples] = make_samples([GROUP], subject, VOCABULARY, 1)
    batch = pack(samples, sequence_multiple=4)
    batch.reference_log_probs = torch.linspace(-3.0, -1.0, TOKENS, dtype=torch.float64)
    objective = Objective(
        subject,
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=torch.distributed.group.WORLD,  # type: ignore[arg-type]
    )
    assert (objective.wants_distribution, objective.wants_reference_hidden) == (True, False)
    _, sums, _ = objective(batch, states(TOKENS, 0), of_teacher())
    assert objective.metrics(sums)["loss/reference"] == pytest.approx(-2.0)


def test_a_teacher_of_the_same_tokens_is_taken() -> None:
    policy, teacher = make_tokenizer(61), make_tokenizer(61)
    teacher.eos_token = "<|endoftext|>"
    require_same_tokens(policy, teacher, rows=64)
    with pytest.raises(RapoError, match="a head of 60 rows, none for token id 60"):
        require_same_tokens(policy, teacher, rows=60)


def test_a_teacher_of_other_tokens_is_named_with_the_first_that_differs() -> None:
    policy, teacher = make_tokenizer(61), make_tokenizer(59)
    with pytest.raises(
        RapoError, match=r"id 59 is the policy's '.' and the teacher's nothing, and 1 more differ"
    ):
        require_same_tokens(policy, teacher, rows=64)
    longer = make_tokenizer(61)
    longer.add_tokens(["<think>"])
    with pytest.raises(RapoError, match=r"id 61 is the policy's nothing and the teacher's '<think>'; choose"):
        require_same_tokens(policy, longer, rows=64)
