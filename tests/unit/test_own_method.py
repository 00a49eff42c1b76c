"""A method of the user's own: found, checked before anything starts, and its gradient."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import megatron_rapo
from megatron_rapo.ahead.batches import Batches
from megatron_rapo.config import RunConfig, to_toml
from megatron_rapo.config.load import load_config
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.course import Known, Wanted
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.job import Job
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.state import restore_state, saved_state
from megatron_rapo.methods.terms.term import Need
from megatron_rapo.methods.told import told_by
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.preflight import check_method
from tests.own_method import ADDRESS, write_method
from tests.unit.one_rank import one_rank
from tests.unit.test_batch import responses
from tests.unit.test_objective import VOCABULARY, microbatch, states

C, W, T = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT
CONFIG = """
[run]
directory = "runs/mine"
steps = 2
[model]
path = "model"
[data]
source = "arithmetic"
[rollout]
prompts_per_step = 4
max_response_tokens = 10
[algorithm]
method = "my_method:RunningBaseline"
penalty = 0.5
"""


def configured(folder: Path, *changes: tuple[str, str], settings: tuple[str, ...] = ()) -> RunConfig:
    write_method(folder, *changes)
    (folder / "run.toml").write_text(CONFIG)
    return load_config([folder / "run.toml"], settings)


def test_its_options_are_its_own_and_the_common_ones(tmp_path: Path) -> None:
    config = configured(tmp_path, settings=("algorithm.memory=0.5", "algorithm.minibatch_prompts=2"))
    algorithm: Any = config.algorithm
    assert (algorithm.memory, algorithm.penalty, algorithm.bound) == (0.5, 0.5, 0.9)
    assert config.minibatch_prompts == 2
    (tmp_path / "elsewhere").mkdir()
    written = tmp_path / "elsewhere" / "config.toml"
    written.write_text(to_toml(config))
    assert load_config([written]) == config


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("memory=1.0", r"algorithm\.memory = 1\.0: must be less than 1"),
        ("memori=0.5", r'of method = "my_method:RunningBaseline"; did you mean algorithm\.memory'),
        ("flatten_floor=0.5", r'is not an option of method = "my_method:RunningBaseline"; rapo has it'),
        (
            "method=my_method:RuningBaseline",
            r'has no RuningBaseline; did you mean "my_method:RunningBaseline"',
        ),
        ("method=my_method:Overconfidence", r"my_method\.py:10\) is no class that inherits from mega"),
    ],
)
def test_a_wrong_option_is_told(tmp_path: Path, setting: str, told: str) -> None:
    with pytest.raises(RapoError, match=told):
        configured(tmp_path, settings=(f"algorithm.{setting}",))


def test_a_correction_that_no_term_reads_is_refused(tmp_path: Path) -> None:
    correction = ("algorithm.importance_correction=masked",)
    configured(tmp_path, settings=correction)
    sys.modules.pop("my_method")
    with pytest.raises(RapoError, match=r"would have no effect: no term of method my_method:RunningBaseline"):
        configured(tmp_path, ("PolicyGradient(0.2, 0.2)", "Overconfidence(0.2)"), settings=correction)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            "class Options(Method.Options)",
            "class Options",
            r"Options that do not inherit from Method\.Options",
        ),
        ("def terms", "def my_terms", r"has no terms, which no method can do without; write it"),
        ("def restore", "def my_restore", r"has state, but no restore; write both, or none"),
        (
            "o.bound)",
            "o.bond)",
            r"(?s)fails when made, or asked for its terms; mend it:.*my_method\.py.*bond",
        ),
    ],
)
def test_a_class_that_is_no_method_is_told_with_the_configuration(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    with pytest.raises(RapoError, match=told):
        configured(tmp_path, (before, after))


STATE = '{"baseline": self.baseline}'


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("over.square(), {", "over.sum(), {", r"Overconfidence of .* its value as \(\) for 3 tokens; return"),
        ("over > 0}", "0.5}", r"returned overconfident as float for 3 tokens"),
        ('"overconfident":', '"entropy":', r"reports 'entropy', which is taken"),
        (
            '"overconfident":',
            '"too sure":',
            r"reports 'loss/too sure', which cannot be logged; give",
        ),
        ('"overconfident":', '"Mine/sure":', r"reports 'Mine/sure', which cannot be logged"),
        ('"overconfident":', '"mine/":', r"reports 'mine/', which cannot be logged"),
        ('"overconfident":', '"reward/mean":', r"reports 'reward/mean', which is another metric; give it"),
        ('"overconfident":', '"loss/total":', r"reports 'loss/total', which is another metric"),
        ('"overconfident":', '"loss/policy":', r"reports 'loss/policy', which is another metric"),
        ("token.log_prob", "token.reference_log_prob", r"fails on 3 tokens: TypeError.*needs nothing"),
        (STATE, "{1: 0.5}", r"would not come back .* as it was: \{1: 0\.5\} as \{'1': 0\.5\}"),
        (STATE, "self.configured", r"cannot be saved with a checkpoint: .*Sampling is not"),
        (STATE, "1 / 0", r"(?s)state of method .* fails; mend it.*ZeroDivisionError"),
        ("self.baseline = 0.0", 'self.baseline = float("nan")', r"cannot be saved .*JSON compliant"),
        (
            'state["baseline"]',
            'state["base"]',
            r"(?s)restore of .* does not take the state.*KeyError: 'base'",
        ),
    ],
)
def test_terms_and_state_that_do_not_work_are_told_before_anything_starts(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    config = configured(tmp_path, (before, after))
    with pytest.raises(RapoError, match=told):
        check_method(config)


@pytest.mark.parametrize("name", ["overconfident", "mine/Over-confident", "loss/over/0.9"])
def test_what_works_passes(tmp_path: Path, name: str) -> None:
    check_method(configured(tmp_path, ('"overconfident":', f'"{name}":')))


@pytest.mark.parametrize(
    ("advantages", "told"),
    [
        ("rewards[:1]", r"advantages of method .* returned 1 groups of \[4\] values, for 2 groups of \[4\]"),
        ("rewards * math.nan", r"returned .*nan.* for an episode of 3 trained tokens; return a finite"),
        ("[[[1.0]] * 4] * 2", r"returned \[1\.0\] for an episode of 3 trained tokens"),
        ("[['good'] * 4] * 2", r"returned 'good' for an episode of 3 trained tokens"),
    ],
)
def test_advantages_that_are_none_end_the_run(tmp_path: Path, advantages: str, told: str) -> None:
    method = configured(tmp_path, ("return rewards - before", f"return {advantages}")).new_method()
    with pytest.raises(RapoError, match=told):
        make_samples(GROUPS, method, VOCABULARY, 2)


def test_a_negative_power_of_the_reference_ends_the_run(tmp_path: Path) -> None:
    flatten = "    def flatten(self, groups):\n        return [[-1] * 4] * 2\n\n    def terms"
    method = configured(tmp_path, ("    def terms", flatten)).new_method()
    with pytest.raises(
        RapoError, match=r"flatten of method .* returned -1; return a finite number that is not"
    ):
        make_samples(GROUPS, method, VOCABULARY, 2)


def test_advantages_may_be_of_each_token(tmp_path: Path) -> None:
    each = "[[list(range(e.episode.sampled_tokens)) for e in g.episodes] for g in groups]"
    method = configured(tmp_path, ("return rewards - before", f"return {each}")).new_method()
    (samples,) = make_samples(GROUPS, method, VOCABULARY, 2)
    assert [np.array(sample.advantage).tolist() for sample in samples[:4]] == [
        [0, 1, 2],
        [0, 1],
        [0, 1, 2, 3],
        0,
    ]


GROUPS: list[Group] = [responses((3, C), (2, W), (4, W), (1, T)), responses((1, C), (2, C), (5, W), (3, C))]


def test_its_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Known rewards are 1, 0, 0 and 1, 1, 0, 1: the baseline moves by a tenth of their mean a step."""
    config = configured(tmp_path)
    method = config.new_method()

    def step() -> list[Any]:
        (samples,) = make_samples(GROUPS, method, VOCABULARY, 2)
        return [sample.advantage for sample in samples]

    first, second, state = step(), step(), saved_state(method)
    assert first == pytest.approx([1, 0, 0, 0, 1, 1, 0, 1])
    mean = 4 / 7
    assert second == pytest.approx(np.array(first) - np.array([1, 1, 1, 0, 1, 1, 1, 1]) * 0.1 * mean)
    assert state == {"baseline": pytest.approx(0.1 * mean + 0.09 * mean)}
    third = step()
    method = config.new_method()
    restore_state(method, state)
    assert step() == third


def test_it_tells_numbers_of_the_step(tmp_path: Path) -> None:
    """Those that its state has then; a method without the hook tells none."""
    method = configured(tmp_path).new_method()
    make_samples(GROUPS, method, VOCABULARY, 2)
    assert told_by(method) == {"method/baseline": pytest.approx(0.1 * 4 / 7)}
    sys.modules.pop("my_method")
    silent = configured(tmp_path / "silent", ("def metrics", "def my_metrics")).new_method()
    assert told_by(silent) == {}


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("None", r"returned the metrics None \(NoneType\); give a dict of numbers by name"),
        ('{"a b": 1.0}', r"by the name 'a b', which cannot be logged as method/a b; give it another name"),
        (
            '{"x": float("nan")}',
            r"returned the metric 'x' = nan \(float\); give a finite number, or leave it",
        ),
        ('{"x": self.options}', r"returned the metric 'x' = Options"),
        ('{"x": 1 / 0}', r"(?s)fails; mend it:.*my_method\.py.*ZeroDivisionError"),
    ],
)
def test_numbers_that_cannot_be_logged_end_the_run(tmp_path: Path, returned: str, told: str) -> None:
    tells = ('return {"baseline": self.baseline}\n\n    def state', f"return {returned}\n\n    def state")
    method = configured(tmp_path, tells).new_method()
    with pytest.raises(RapoError, match=told) as failure:
        told_by(method)
    assert 'metrics of method "my_method:RunningBaseline" (' in str(failure.value)


def test_its_gradient_is_that_of_finite_differences(tmp_path: Path) -> None:
    method = configured(tmp_path).new_method()
    batch = microbatch()
    tokens = int(batch.is_response.sum())
    batch.old_log_probs = torch.full((len(batch.is_response),), -2.2, dtype=torch.float64)
    policy = states(tokens, 0)
    with torch.no_grad():
        policy.weight.mul_(8.0)  # so that some tokens are above the bound, and some ratios clipped
    with one_rank(tmp_path):
        objective = Objective(
            method,
            temperature=0.9,
            vocabulary=VOCABULARY,
            group=torch.distributed.group.WORLD,  # type: ignore[arg-type]
        )
        loss, sums, _ = objective(batch, policy, None)
        loss.backward()
        assert 0 < objective.metrics(sums)["loss/overconfident"] < 1

        def loss_at(moved: torch.Tensor) -> float:
            return objective(batch, HeadStates(moved, policy.weight.detach()), None)[0].item()

        hidden, gradient = policy.hidden.detach(), policy.hidden.grad
        assert gradient is not None
        for direction in torch.randn(6, *hidden.shape, generator=torch.Generator().manual_seed(3)).double():
            found = (loss_at(hidden + 1e-6 * direction) - loss_at(hidden - 1e-6 * direction)) / 2e-6
            assert found == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-9)


def test_a_term_may_ask_for_the_reference(tmp_path: Path) -> None:
    """And a reference is then loaded: a method whose terms need none has none."""
    method = configured(tmp_path).new_method()
    assert method.needs == {Need.IMPORTANCE}
    assert not method.wants_reference
    sys.modules.pop("my_method")
    needs = "\n    needs = frozenset({Need.REVERSE_KL})\n\n    def __init__(self, bound"
    imports = ("import AtToken, Method", "import AtToken, Need, Method")
    asks = configured(tmp_path, ("\n    def __init__(self, bound", needs), imports)
    assert asks.new_method().wants_reference_hidden


class Step:
    """Stands for what a step is collected of: it notes how responses are sampled."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.method = config, config.new_method()
        self.asked: list[Any] = []
        prompts: Any = SimpleNamespace(size=100, position=0, draw=lambda count: [None] * count)
        self.batches = Batches(
            config,
            self.method,
            prompts,
            self,
            phase=lambda name: nullcontext(),
            check=lambda step, sampled: None,
            answers=lambda step: None,
        )
        self.objective = SimpleNamespace(temperature=None)
        self.guards = SimpleNamespace(begin_step=lambda step: None)

    def _finish_checkpoint(self, *, wait: bool) -> None:
        pass

    def begin(
        self, wanted: Wanted, *, chosen: Any, weight_version: int, whole: bool = False, **_: Any
    ) -> Known:
        self.whole = whole
        self.asked.append((len(wanted.prompts), chosen))
        return Known(weight_version, lambda phase: Shared([GROUPS[0]] * len(wanted.prompts)))

    def collect(self, number: int = 1) -> Batch:
        return Job.collect(cast(Any, self), number)


def of_step(body: str) -> tuple[str, str]:
    return ("    def terms", f"    {body}\n\n    def terms")


def test_it_may_say_how_a_step_is_sampled(tmp_path: Path) -> None:
    body = "def sampling(self):\n        return type(self.configured)(0.5 + self.baseline, 6, 7)"
    step: Any = Step(configured(tmp_path, of_step(body)))
    for number, temperature in ((1, 0.5), (2, 0.75)):
        step.collect(number)
        assert step.asked.pop() == (4, Sampling(temperature, 6, 7))
        assert step.objective.temperature == temperature, "the loss is of another temperature"
        step.method.baseline = 0.25


READS = "lengths = [[len(one.episode.answer) for one in group.episodes] for group in groups]"


def test_it_may_read_responses_if_it_says_so(tmp_path: Path) -> None:
    step: Any = Step(configured(tmp_path, ("rewards, before", f"{READS}\n        rewards, before")))
    step.collect()
    assert not step.whole
    brief = [group.brief() for group in GROUPS]
    with pytest.raises(RapoError, match=r"my_method\.py, line \d+, reads `answer` .*reads_responses = True"):
        make_samples(brief, step.method, VOCABULARY, 2)
    make_samples(GROUPS, step.method, VOCABULARY, 2)


def test_all_ranks_have_the_responses_that_it_reads(tmp_path: Path) -> None:
    step: Any = Step(configured(tmp_path, of_step("reads_responses = True")))
    step.collect()
    assert step.whole


def test_a_run_is_sampled_as_configured_by_default(tmp_path: Path) -> None:
    step: Any = Step(
        configured(tmp_path, settings=("rollout.temperature=0.6", "rollout.responses_per_prompt=5"))
    )
    step.collect()
    assert step.asked == [(4, Sampling(0.6, 5, 10))]
    assert step.objective.temperature == 0.6


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("0.0, 4, 7", r"temperature = 0\.0 is no positive number"),
        ("1.0, 1, 7", r"responses_per_prompt = 1 leaves nothing"),
        ("1.0, 4, 11", r"max_response_tokens = 11 is not from 1 to rollout\.max_response_tokens = 10"),
        ("1.0, 4, 0", r"max_response_tokens = 0 is not from 1"),
    ],
)
def test_sampling_that_cannot_be_ends_the_run(tmp_path: Path, values: str, told: str) -> None:
    body = f"def sampling(self):\n        return type(self.configured)({values})"
    step: Any = Step(configured(tmp_path, of_step(body)))
    with pytest.raises(RapoError, match=told):
        step.collect()


def test_it_may_say_which_groups_dynamic_sampling_replaces(tmp_path: Path) -> None:
    """By default those whose known rewards are all the same; these are not."""
    settings = ("rollout.dynamic_sampling.over_sampling=1.0",)
    step: Any = Step(configured(tmp_path, settings=settings))
    assert step.collect().rounds == 1
    sys.modules.pop("my_method")
    never = of_step("def teaches(self, group):\n        return False")
    step = Step(configured(tmp_path / "never", never, settings=settings))
    found = step.collect()
    assert (found.rounds, len(found.drawn), found.metrics()["sampling/filled_up"]) == (4, 16, 4)


def test_the_package_has_what_users_import() -> None:
    assert {"Method", "Options", "Term", "AtToken", "Need"} <= set(megatron_rapo._PUBLIC)
    for name, module in megatron_rapo._PUBLIC.items():
        assert getattr(megatron_rapo, name).__module__ == module
    with pytest.raises(AttributeError, match="no attribute 'Methode'"):
        _ = megatron_rapo.Methode  # type: ignore[attr-defined]


def test_the_pages_address_is_that_of_the_example() -> None:
    assert ADDRESS in CONFIG
