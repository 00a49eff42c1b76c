"""Methods against their papers: loss and gradient in fp64, with each option, and with faults planted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.options import Options
from tests.papers import EPISODES, PAPERS, a_case, by_group, copg, sums
from tests.zoo import LIMIT, Case, One, a_method_of, loss_of, with_fault

BAR = 1e-10


def subject(name: str, options: Mapping[str, Any], kind: type[Method] | None = None) -> Method:
    """The method, which has heard what it must of earlier steps."""
    paper = PAPERS[name]
    method = a_method_of(kind or METHODS[name], {**paper.base, **options}, name=name)
    for measured in paper.heard:
        method.learn(measured)
    return method


def agree(name: str, options: Mapping[str, Any], kind: type[Method] | None = None) -> bool:
    """Whether loss and gradient in the logits are the formula's."""
    case, paper = a_case(), PAPERS[name]
    method = subject(name, options, kind)
    found, expected = loss_of(method, case), paper.formula(case, method.options, *paper.known)
    apart = case.gradient(found) - case.gradient(expected)
    return bool(abs(float((found - expected).detach())) <= BAR and float(apart.abs().max()) <= BAR)


def differ(case: Case, one: Tensor, other: Tensor) -> bool:
    """Whether two losses have different gradients."""
    return float((case.gradient(one) - case.gradient(other)).abs().max()) > 1e-6


@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_gradient_are_the_papers(name: str) -> None:
    assert agree(name, {})


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, paper in PAPERS.items() for options in paper.options],
    ids=str,
)
def test_each_option_changes_the_loss_as_the_paper_says(name: str, options: dict[str, Any]) -> None:
    assert agree(name, options)
    case = a_case()
    plain, changed = (loss_of(subject(name, own), case) for own in ({}, options))
    assert differ(case, plain, changed), "the option changes nothing on this case"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [(name, *fault) for name, paper in PAPERS.items() for fault in paper.faults],
)
def test_a_fault_in_the_formula_is_found(name: str, before: str, after: str) -> None:
    """By one of the settings at least."""
    settings = [{}, *PAPERS[name].options]
    sound = with_fault(name, before, after, lambda kind: all(agree(name, own, kind) for own in settings))
    assert not sound


@pytest.mark.parametrize("name", PAPERS)
def test_it_is_not_grpo(name: str) -> None:
    """Neither with its divergence nor without, over tokens or over responses."""
    for coefficient in (0.04, 0.0):
        for aggregation in ("token_mean", "sequence_mean"):
            case, paper = a_case(), PAPERS[name]
            options = {"divergence_coefficient": coefficient, "loss_aggregation": aggregation}
            plain = loss_of(a_method_of(METHODS["grpo"], options), case)
            method = subject(name, {})
            expected = paper.formula(case, method.options, *paper.known)
            assert differ(case, plain, expected)


@pytest.mark.parametrize("name", PAPERS)
def test_no_option_is_left_out(name: str) -> None:
    declared = {option for option in METHODS[name].Options.model_fields if option not in Options.model_fields}
    own = vars(METHODS[name].Options).get("__annotations__", {}).keys() - {"method"}
    settings = {option for options in PAPERS[name].options for option in options}
    assert (declared | own) - set(ELSEWHERE.get(name, ())) <= settings


# Tested below.
ELSEWHERE = {
    "riskpo": ["quantile_rate"],
    "matched_entropy": ["entropy_of"],
}


def advantages_of(method: Method, *rewards: list[float | None], calls: int = 0) -> list[Any]:
    case = Case(
        [
            [One(reward, [[2]], str(n), {"calls": float(calls + n)}) for n, reward in enumerate(own)]
            for own in rewards
        ]
    )
    return np.asarray(method.advantages(case.groups)).tolist()


def test_riskpo_tracks_quantiles_from_step_to_step() -> None:
    """They begin at the first step's, and move by how far the step's share below them is from their level."""
    options = {"bundle_prompts": 1, "lower_level": 0.25, "quantile_rate": 0.5}
    method: Any = a_method_of(METHODS["riskpo"], options, responses=5)
    advantages_of(method, [0.0, 1.0, 2.0, 3.0, 4.0])
    low, high = 1.0 + 0.5 * (0.25 - 2 / 5), 3.2 + 0.5 * (0.8 - 4 / 5)
    assert method.quantiles == pytest.approx([low, high])
    assert method.metrics() == pytest.approx({"lower_quantile": low, "upper_quantile": high})
    gains = [-0.5 * max(low - r, 0) - max(high - r, 0) for r in (0.0, 1.0, 2.0, 5.0, 5.0)]
    expected = [gain - sum(gains) / 5 for gain in gains]
    assert advantages_of(method, [0.0, 1.0, 2.0, 5.0, 5.0])[0] == pytest.approx(expected)


def test_otc_remembers_the_fewest_calls_of_a_right_response() -> None:
    method: Any = a_method_of(METHODS["otc"], {}, responses=2)
    advantages_of(method, [0.0, 1.0], calls=2)
    assert method.state() == {"/p0": 3}
    advantages_of(method, [0.0, 0.0], calls=1)  # none is right
    assert method.state() == {"/p0": 3}
    advantages_of(method, [1.0, 0.0], calls=1)
    assert method.state() == {"/p0": 1}
    advantages_of(method, [1.0, 0.0], calls=4)
    assert method.state() == {"/p0": 1}


def test_matched_entropy_follows_another_run(tmp_path: Path) -> None:
    """Step by step, and its last step from then on."""
    lines = [{"step": 0}, {"step": 1, "loss/entropy": 2.0}, {"step": 2, "loss/entropy": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"entropy_of": str(tmp_path), "entropy_coefficient": 0.05}
    method: Any = a_method_of(METHODS["matched_entropy"], options)
    for measured, target in ((1.5, 2.0), (1.5, 1.0), (1.5, 1.0)):
        before = method.coefficient
        method.learn({"loss/entropy": measured})
        assert method.coefficient == pytest.approx(before + 0.01 * (target - measured))
        assert method.metrics() == {"entropy_coefficient": method.coefficient, "target_entropy": target}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("matched_entropy", {}, "target_entropy and entropy_of: give one of them"),
        ("matched_entropy", {"target_entropy": 1.0, "entropy_of": "/"}, "give one of them"),
        (
            "matched_entropy",
            {"entropy_of": "/nowhere"},
            "entropy_of = '/nowhere' has no readable",
        ),
        ("riskpo", {"lower_level": 0.9}, r"lower_level = 0\.9 is not below upper_level = 0\.8; lower it"),
        (
            "bapo",
            {"highest_ratio": 4.0},
            r"highest_ratio = 4\.0 is above highest_ratio_limit",
        ),
        ("bapo", {"lowest_ratio": 0.95}, r"lowest_ratio = 0\.95 is above lowest_ratio_limit"),
        (
            "polychromic",
            {"set_size": 4},
            r"set_size = 4 of rollout\.responses_per_prompt = 4 leaves no other set",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_told(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        a_method_of(METHODS[name], options)


def test_too_many_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set_size = 8 of .* = 32 are 10,518,300 sets"):
        a_method_of(METHODS["polychromic"], {"set_size": 8}, responses=32)


def test_a_run_without_entropies_cannot_be_followed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}')
    with pytest.raises(ValueError, match="has no loss/entropy; give the directory of a run"):
        a_method_of(METHODS["matched_entropy"], {"entropy_of": str(tmp_path)})


def test_a_base_success_that_is_no_number_is_told() -> None:
    method = a_method_of(METHODS["dph_rl"], {})
    assert method.columns == ("base_success",)
    with pytest.raises(RapoError, match=r'base_success_column = "base_success": problem p0 has no number'):
        method.advantages(Case(EPISODES).groups)


def test_contrasts_are_the_gradient_of_squared_differences() -> None:
    """CoPG's own statement: over all pairs of a group, −(R_β(y_i) − R_β(y_j))² / 2β."""
    case, options = a_case(), SimpleNamespace(beta=0.3)
    found = copg(case, options) * (len(case.flat) * LIMIT)
    squares = torch.zeros((), dtype=torch.float64)
    ratios = sums(case, case.log_prob - case.reference_log_prob)
    for rewards, ratio in zip(by_group(case, case.rewards), ratios, strict=True):  # type: ignore[arg-type]
        shaped = rewards - options.beta * ratio
        for i, j in combinations(range(len(rewards)), 2):
            squares = squares + (shaped[i] - shaped[j]) ** 2 / (len(rewards) - 1)
    apart = case.gradient(found) - case.gradient(squares / (2 * options.beta))
    assert float(apart.abs().max()) < BAR
