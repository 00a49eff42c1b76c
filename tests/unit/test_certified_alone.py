"""What learns from a teacher or from given texts, certified on one rank: models and all, in fp64 and fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rapo.certify.cases import Case
from megatron_rapo.certify.certificate import DEFAULT, configuration, write_models
from megatron_rapo.certify.measure import Result, compare
from megatron_rapo.config import Parallel
from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.policy.teacher import Teacher
from tests.unit.one_rank import one_placement

ALONE = (
    Case("alone", Parallel()),
    Case("alone, unpacked, permuted", Parallel(), token_budget=None, permuted=True),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("certified")
    write_models(directory, DEFAULT)
    with one_placement():
        yield directory


def certified(models: Path, method: str, **options: Any) -> list[Result]:
    chosen = METHODS[method].Options(method=method, **{**METHODS[method].example, **options})
    return compare(configuration(models, chosen), ALONE, is_main=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("distill", {"divergence": "forward"}),
        ("distill", {"divergence": "reverse", "policy_coefficient": 0.5, "clip_high": 0.3}),
        ("distill", {"divergence": "jensen_shannon", "mixture": 0.2, "learns_from": "solutions"}),
        ("sft", {"loss_aggregation": "sequence_mean"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_loss_and_gradient_are_plain_pytorchs(models: Path, method: str, options: dict[str, Any]) -> None:
    results = certified(models, method, **options)
    assert len(results) == 4
    assert all(result.passed for result in results), results


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_certified(models: Path, name: str) -> None:
    results = certified(models, name)
    assert all(result.passed for result in results), results


def test_a_loss_of_0_is_no_certificate(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Method, groups: Sequence[Group]) -> list[list[float]]:
        return [[0.0] * len(group.episodes) for group in groups]

    monkeypatch.setattr(METHODS["dr_grpo"], "advantages", none)
    with pytest.raises(RapoError, match='method "dr_grpo" has a loss of 0 at every token'):
        certified(models, "dr_grpo")


def test_a_teacher_of_other_states_is_reported(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the token before, as a mask that is shifted by one gives."""
    hidden_states = Teacher._hidden_states

    def shifted(self: Teacher, microbatches: Any) -> list[torch.Tensor]:
        return [hidden.roll(1, dims=0) for hidden in hidden_states(self, microbatches)]

    monkeypatch.setattr(Teacher, "_hidden_states", shifted)
    assert not any(result.passed for result in certified(models, "distill"))
