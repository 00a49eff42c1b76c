"""The certificate passes for every objective, and reports planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.certify import measure as certificates
from megatron_rapo.certify.cases import CASES, CASES_OF_EXPERTS, RANKS, Case
from megatron_rapo.certify.certificate import DEFAULT, as_json, certify, configuration, table, write_models
from megatron_rapo.certify.measure import Result, compare
from megatron_rapo.config import Adapter, Parallel
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.model import adapters
from megatron_rapo.model.adapters import LowRank
from megatron_rapo.model.architecture import Experts
from megatron_rapo.model.families import gemma3, glm, olmo2
from megatron_rapo.model.features import Window
from megatron_rapo.model.rope import Linear, Rope, Yarn
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.policy import gradients, reference
from megatron_rapo.policy.teacher import Teacher
from tests.distributed.jobs import run_job
from tests.shared_past import deep_batch

FEW = tuple(
    case for case in CASES if case.name in ("TP 2, sequence parallel", "CP 4", "TP 2, PP 2", "PP 2, VPP 2")
)
GEMMA3 = replace(
    DEFAULT,
    family="gemma3_text",
    attention_bias=False,
    query_key_norm="head",
    norms=gemma3.NORMS,
    tied=True,
    activation="gelu_tanh",
    embedding_scale=34.0,
    attention_scale=0.1,
    rope=Rope(1e6, scaling=Linear(8.0)),
)
MODELS = {
    "qwen3": replace(DEFAULT, family="qwen3", attention_bias=False, query_key_norm="head", tied=True),
    "smollm3": replace(DEFAULT, family="smollm3", attention_bias=False, layers_without_rope=(3,)),
    "gemma3_text": replace(
        GEMMA3, window=Window(512, tuple(n for n in range(26) if n % 6 != 5), Rope(1e4)), layers=26
    ),
    "olmo3": replace(
        DEFAULT,
        family="olmo3",
        attention_bias=False,
        query_key_norm="heads",
        norms=olmo2.NORMS,
        rope=Rope(1e4, scaling=Yarn(4.0, 16, 1.2, 3.0)),
        window=Window(4096, (0, 1, 2), Rope(1e4)),
    ),
    "glm4": replace(DEFAULT, family="glm4", norms=glm.SANDWICH, rope=Rope(1e4, share=0.5, interleaved=True)),
    "qwen3_moe": replace(
        DEFAULT,
        family="qwen3_moe",
        attention_bias=False,
        query_key_norm="head",
        experts=Experts(128, 8, renormalised=True),
    ),
    "qwen2_moe": replace(DEFAULT, family="qwen2_moe", experts=Experts(60, 4, renormalised=False, shared=96)),
}
EXPERTS = {case.name: case for case in CASES_OF_EXPERTS}
# Tokens of a minibatch on several ranks, and on the last of two stages.
SPREAD = tuple(case for case in CASES if case.name in ("CP 2", "TP 2, PP 2"))
SHARED = tuple(case for case in CASES if case.name == "TP 2, PP 2, shared prompts")
TENSOR = tuple(case for case in CASES if case.name in ("DP 4", "TP 2"))


def test_rapo_is_certified_at_every_layout() -> None:
    results = certify(RAPO.Options())
    assert len(results) == 2 * len(CASES)
    assert all(result.passed for result in results), table(results)
    assert '"passed": true' in as_json(results)


# Other methods and models, and planted faults, in one launch.


@contextmanager
def plain_collective() -> Iterator[None]:
    """Hands hidden states on as they are, as a plain all-reduce under autograd would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "shared_tokens", lambda hidden, placement: hidden)
        yield


@contextmanager
def short_normaliser() -> Iterator[None]:
    """On the last rank, the last response's tokens are not counted."""
    whole = RAPO.aggregate

    def short(method: RAPO, response_tokens: list[int]) -> np.ndarray:
        weights = whole(method, response_tokens)
        if torch.distributed.get_rank() == 3:
            weights *= sum(response_tokens) / sum(response_tokens[:-1])
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RAPO, "aggregate", short)
        yield


@contextmanager
def rows_of_its_own() -> Iterator[None]:
    """The teacher's head is cut by its own number of rows, so that a rank's are not the policy's tokens."""
    own = Teacher.loaded

    def cut(*given: Any) -> Any:
        *others, rows = given
        return own(*others, rows + 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "loaded", staticmethod(cut))
        yield


@contextmanager
def adapters_left_on() -> Iterator[None]:
    """The reference is computed with the policy's adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "without_adapters", lambda chunks: nullcontext())
        yield


@contextmanager
def adapters_apart() -> Iterator[None]:
    """What a rank's rows of B say of A's gradient is not summed over ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "copy_to_tensor_model_parallel_region", lambda hidden, group: hidden)
        yield


@contextmanager
def tokens_apart() -> Iterator[None]:
    """Under sequence parallelism, nor is what a rank's tokens say of it."""
    make = LowRank._parameter

    def unmarked(self: LowRank, *given: Any) -> Any:
        parameter = make(self, *given)
        parameter.sequence_parallel = False
        return parameter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "_parameter", unmarked)
        yield


@contextmanager
def deep() -> Iterator[None]:
    """No fault: a batch of episodes that share a turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "batch_of", deep_batch)
        yield


@dataclass(frozen=True)
class Certified:
    """What is certified, on which model, at which layouts, with which fault, and of which adapter."""

    options: dict[str, Any]
    model: str
    cases: tuple[Case, ...] = FEW
    fault: Callable[[], AbstractContextManager[None]] = nullcontext
    adapter: Adapter | None = None


OBJECTIVES = {
    "gspo": Certified({"method": "gspo", "clip_low": 0.2, "clip_high": 0.2}, "qwen3"),
    "reverse_exact": Certified({"method": "grpo", "divergence": "reverse_exact", "clip_dual": 1.5}, "qwen3"),
    "forward_sampled": Certified(
        {"method": "rapo", "divergence": "forward_sampled", "audit_estimators": True}, "smollm3"
    ),
    "distill": Certified(
        {"method": "distill", "divergence": "jensen_shannon", "mixture": 0.3, "policy_coefficient": 0.5},
        "qwen3",
    ),
    "distill_reverse": Certified({"method": "distill"}, "smollm3"),
    "sft": Certified({"method": "sft"}, "smollm3"),
    "shared past": Certified({"method": "grpo"}, "smollm3", SHARED, deep),
    "k2": Certified({"method": "grpo", "divergence": "k2", "loss_aggregation": "constant"}, "smollm3"),
}
# Of each method with a term, a weight or marks of its own; tests/unit/test_certified_alone.py has all methods
# on one rank.
OF_METHODS = {
    name: Certified({"method": name, **options}, "qwen3", SPREAD[: 2 if name == "copg" else 1])
    for name, options in {
        "bapo": {},
        "hapo": {},
        "d3s": {},
        "capo": {},
        "dcpo": {},
        "copg": {},
        "zero_success": {"penalty": 1.0},
        "epo": {},
        "igpo": {},
        "dph_rl": {"divergence_coefficient": 0.5, "divergence": "jensen_shannon"},
        "sage": {"entropy_threshold": 0.0},
        "mara": {"beta": 0.5},
        "matched_entropy": {"target_entropy": 1.0},
        "matched_kl": {"direction": "reverse"},
    }.items()
}
# One of each kind of them, and others where there is time.
OBJECTIVES |= {
    name: OF_METHODS.pop(name) for name in ("bapo", "dcpo", "copg", "dph_rl", "mara", "matched_entropy")
}
# Windows, norms and rotary positions of other families, also where beginnings are shared.
OBJECTIVES |= {
    name: Certified({"method": "rapo"}, name, (*FEW, *SHARED)) for name in ("gemma3_text", "olmo3", "glm4")
}
OBJECTIVES |= {
    "experts": Certified({"method": "rapo"}, "qwen3_moe", (EXPERTS["TP 2, EP 2"], EXPERTS["CP 2, EP 4"])),
    "shared expert": Certified(
        {"method": "grpo"},
        "qwen2_moe",
        (EXPERTS["TP 2, EP 2, experts' TP 2"], EXPERTS["PP 2, VPP 2, EP 2"]),
    ),
}
CUT_EXPERTS = (EXPERTS["TP 2, EP 2, experts' TP 2"],)
ALL, OF_ATTENTION = Adapter(rank=3, alpha=5.0), Adapter(rank=2, targets=["q_proj", "v_proj"])
OF_MLP = Adapter(rank=2, targets=["gate_proj", "up_proj", "down_proj"])
OBJECTIVES |= {
    "adapters": Certified({"method": "rapo"}, "qwen3", (*FEW, *SHARED), adapter=ALL),
    "adapters of attention": Certified({"method": "rapo"}, "smollm3", SPREAD, adapter=OF_ATTENTION),
    "adapters and a teacher": Certified({"method": "distill"}, "qwen3", SPREAD[1:], adapter=ALL),
}
FAULTS = {
    "adapters left on": Certified({"method": "rapo"}, "qwen3", TENSOR, adapters_left_on, ALL),
    "adapters apart": Certified({"method": "rapo"}, "qwen3", TENSOR, adapters_apart, ALL),
    "tokens apart": Certified({"method": "rapo"}, "qwen3", FEW[:2], tokens_apart, ALL),
    "plain collective": Certified({"method": "rapo"}, "qwen3", TENSOR, plain_collective),
    "teacher's own rows": Certified({"method": "distill"}, "qwen3", TENSOR, rows_of_its_own),
    "short normaliser": Certified({"method": "rapo"}, "qwen3", TENSOR, short_normaliser),
}


# Further methods; and matrices of single experts, whose gradients test_adapters.py compares as well.
SLOW = OF_METHODS | {
    "adapters of experts": Certified(
        {"method": "rapo"}, "qwen3_moe", (EXPERTS["TP 2, EP 2"], EXPERTS["CP 2, EP 4"]), adapter=ALL
    ),
    "adapters of experts that TP cuts": Certified({"method": "rapo"}, "qwen2_moe", CUT_EXPERTS, adapter=ALL),
}
SLOW_FAULTS = {
    "experts' adapters apart": Certified(
        {"method": "rapo"}, "qwen3_moe", CUT_EXPERTS, adapters_apart, OF_MLP
    ),
}


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Results of each objective and each fault."""
    return _certified(tmp_path_factory.mktemp("certified"), OBJECTIVES | FAULTS)


@pytest.fixture(scope="module")
def certified_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Likewise, of those that are slow."""
    return _certified(tmp_path_factory.mktemp("certified"), SLOW | SLOW_FAULTS)


def _certified(base: Path, which: Mapping[str, Certified]) -> dict[str, list[Result]]:
    for name, architecture in MODELS.items():
        write_models(base / name, architecture)
    found = run_job(measure, base, list(which), directory=base, world_size=RANKS)
    return {name: [Result(**result) for result in results] for name, results in found.items()}


def measure(base: Path, names: list[str], report: Path) -> None:
    """In each rank."""
    every = OBJECTIVES | FAULTS | SLOW | SLOW_FAULTS
    found = {}
    with process_groups(Parallel(data_parallel=RANKS), seed=1) as everyone:
        for name in names:
            one = every[name]
            options = METHODS[one.options["method"]].Options(**one.options)
            with one.fault():
                config = configuration(base / one.model, options, one.adapter)
                results = compare(config, one.cases, is_main=everyone.is_main)
            found[name] = [asdict(result) for result in results]
        if everyone.is_main:
            report.write_text(json.dumps(found))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SLOW)
def test_further_methods_and_adapters_of_experts_are_certified(
    certified_slowly: dict[str, list[Result]], name: str
) -> None:
    assert len(certified_slowly[name]) == 2 * len(SLOW[name].cases)
    assert all(result.passed for result in certified_slowly[name]), table(certified_slowly[name])


@pytest.mark.exhaustive
def test_gradients_of_experts_adapters_that_are_not_summed_are_reported(
    certified_slowly: dict[str, list[Result]],
) -> None:
    assert not any(result.passed for result in certified_slowly["experts' adapters apart"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives_and_families_are_certified(certified: dict[str, list[Result]], name: str) -> None:
    assert len(certified[name]) == 2 * len(OBJECTIVES[name].cases)
    assert all(result.passed for result in certified[name]), table(certified[name])


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        # Without its own backward, hidden states' gradients lack the other ranks' vocabulary.
        ("plain collective", {"TP 2"}),
        ("short normaliser", {"DP 4", "TP 2"}),
        ("teacher's own rows", {"TP 2"}),
        ("adapters left on", {"DP 4", "TP 2"}),
        ("adapters apart", {"TP 2"}),
        ("tokens apart", {"TP 2, sequence parallel"}),
    ],
)
def test_a_planted_fault_is_reported(
    certified: dict[str, list[Result]], fault: str, failing: set[str]
) -> None:
    assert len(certified[fault]) == 2 * len(FAULTS[fault].cases)
    assert {result.case for result in certified[fault] if not result.passed} == failing
