"""Numbers that a method makes of responses and of tokens for its terms: made, spread, read, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.data.batching import pack
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.dapo import DAPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.likelihood import Likelihood
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.policy.weighing import mark
from megatron_rapo.testing import check_method
from megatron_rapo.testing.ranks import on_ranks
from tests.ranks import replica_of
from tests.unit.one_rank import one_rank
from tests.unit.test_batch import responses
from tests.unit.test_methods import C, W
from tests.unit.test_objective import TEMPERATURE, VOCABULARY, log_distribution, states
from tests.unit.test_weighing import TOKENS, microbatches

GROUPS = [responses((2, C), (3, W)), responses((1, W), (2, C))]


class Learnt(DAPO):
    """Adds the likelihood of what is marked: the first response by 1, its group's others token by token."""

    def mark_responses(self, groups: Any) -> Any:
        own = [
            [
                1.0 if not number else -np.arange(one.episode.sampled_tokens)
                for number, one in enumerate(g.episodes)
            ]
            for g in groups
        ]
        return {"learnt": own}

    def terms(self) -> Any:
        return [(2.0, Likelihood("learnt"))]


class Surprise(Learnt):
    """Marks a token by how it stands to the mean of all."""

    def mark_responses(self, groups: Any) -> Any:
        return {}

    def mark_tokens(self, tokens: Annotated) -> Any:
        return {"learnt": tokens.old_entropies - tokens.of_all_ranks(tokens.old_entropies).mean()}


def a(method: type[DAPO]) -> DAPO:
    return method(DAPO.Options(), Sampling(1.0, 2, 64))


def an_objective(method: DAPO) -> Objective:
    return Objective(
        method,
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=dist.group.WORLD,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def loss_of(method: DAPO) -> tuple[Any, Any, torch.Tensor]:
    """Of GROUPS' eight tokens in one microbatch: loss, what it measured, and the policy's log-probs."""
    (samples,) = make_samples(GROUPS, method, VOCABULARY, len(GROUPS))
    batch = pack(samples, sequence_multiple=1, mark_names=samples[0].marks)
    policy, objective = states(8, 0), an_objective(method)
    loss, sums, mismatch = objective(batch, policy, None)
    log_probs = log_distribution(policy).gather(1, batch.targets[batch.is_response][:, None]).squeeze(1)
    return loss.detach(), {**objective.metrics(sums), **mismatch.metrics()}, log_probs


def test_marks_of_responses_and_of_their_tokens_reach_the_terms() -> None:
    loss, measured, log_probs = loss_of(a(Learnt))
    marks = torch.tensor([1, 1, 0, -1, -2, 1, 0, -1])
    assert float(loss) == pytest.approx(float((-2.0 * marks * log_probs / 8).sum()))
    assert measured["loss/learnt"] == pytest.approx(float((-marks * log_probs).mean()))


def test_a_mark_that_nobody_gives_is_told() -> None:
    class Forgetful(Learnt):
        def mark_responses(self, groups: Any) -> Any:
            return {"lernt": [[0.0, 0.0]] * 2}

    with pytest.raises(
        RapoError, match="read the marks learnt, which neither mark_responses nor mark_tokens"
    ):
        loss_of(a(Forgetful))


@pytest.mark.parametrize("mark", [np.ones(5), "much", float("nan")])
def test_what_is_no_number_of_a_response_is_told(mark: Any) -> None:
    class Wrong(Learnt):
        def mark_responses(self, groups: Any) -> Any:
            return {"learnt": [[mark, 0.0], [0.0, 0.0]]}

    with pytest.raises(
        RapoError, match=r"mark_responses, of 'learnt' of method .* of 2 trained tokens; return"
    ):
        make_samples(GROUPS, a(Wrong), VOCABULARY, 2)


def test_engine_log_probs_of_another_distribution_are_not_compared() -> None:
    """All have −1 here; those of the first responses are not the policy's."""

    class Guided(DAPO):
        def off_policy(self, groups: Any) -> Any:
            return [[True, False] for _ in groups]

    _, measured, log_probs = loss_of(a(Guided))
    own = log_probs[[2, 3, 4, 6, 7]] + 1.0
    assert measured["mismatch/log_prob_mean"] == pytest.approx(float(own.abs().mean()))
    assert measured["importance/mean"] == pytest.approx(float((own.exp().sum() + 3) / 8))


def test_marks_of_tokens_do_not_depend_on_who_has_which_token() -> None:
    """As weights do not (test_weighing): two microbatches on one rank, or on three ranks."""

    def marks_of(minibatch: Any) -> dict[tuple[int, int], float]:
        found = {}
        for one in minibatch:
            at = one.is_response
            assert (one.marks["learnt"][~at] == 0).all()
            names = zip(one.targets[at].tolist(), one.response_positions[at].tolist(), strict=True)
            found |= dict(zip(names, one.marks["learnt"][at].tolist(), strict=True))
        return found

    def on_rank(group: dist.ProcessGroup, *which: list[int]) -> Any:
        minibatch = microbatches(*which)
        mark(minibatch, a(Surprise), replica_of(group))
        return marks_of(minibatch)

    (alone,) = on_ranks(1, lambda group: on_rank(group, [0, 1], [2, 3]))
    first, second, third = on_ranks(3, lambda group: on_rank(group, [[3, 1], [], [0, 2]][group.rank()]))
    assert second == {} and len(alone) == TOKENS
    assert first | third == pytest.approx(alone, abs=1e-6)
    assert sum(alone.values()) == pytest.approx(0.0, abs=1e-5)
    assert max(alone.values()) > 0.1


@pytest.mark.parametrize(
    ("marks", "told"),
    [
        (lambda t: t.weights[:2], r"'learnt' returned \(2,\), for 11 tokens; return a tensor of one number"),
        (lambda t: t.weights / 0.0, r"'learnt' returned \(11,\), some of which are not finite"),
        (lambda t: 0.5, r"'learnt' returned float, for 11 tokens"),
    ],
)
def test_what_are_no_marks_ends_the_run(marks: Any, told: str) -> None:
    class Wrong(Learnt):
        def mark_tokens(self, tokens: Annotated) -> Any:
            return {"learnt": marks(tokens)}

    with pytest.raises(RapoError, match=told):
        on_ranks(1, lambda group: mark(microbatches([0, 1]), a(Wrong), replica_of(group)))


@pytest.mark.parametrize("method", [Learnt, Surprise])
def test_methods_with_marks_are_sound(method: Any) -> None:
    check_method(method)


def test_marks_of_one_ranks_tokens_alone_are_not_sound() -> None:
    class Alone(Surprise):
        def mark_tokens(self, tokens: Annotated) -> Any:
            return {"learnt": tokens.old_entropies - tokens.old_entropies.mean()}

    with pytest.raises(AssertionError, match="on 2 context-parallel ranks: "):
        check_method(Alone)


def test_what_a_method_hears_must_be_in_its_state() -> None:
    class Controlled(Learnt):
        coefficient = 1.0

        def learn(self, measured: Any) -> None:
            self.coefficient += measured["loss/entropy"]

        def terms(self) -> Any:
            return [(self.coefficient, Likelihood("learnt"))]

    with pytest.raises(AssertionError, match=r"terms of the step after restore: \(1\.5, .*, but \(2\.5,"):
        check_method(Controlled)
