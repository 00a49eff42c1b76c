"""The greedy probe: the policy's log-probs of what engines continued, against transformers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rapo.config import Model, Optimizer, Parallel
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.engine import Generated, Generation
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.chunked import Head
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish import proof
from megatron_rapo.publish.proof import TOKENS, Continuation, check_policy, compare, mean_differences, probe
from megatron_rapo.weights.engines import Engines
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement

VOCABULARY = 61
PROMPTS = [Prompt(0, "", (5, 9, 23, 17), ""), Prompt(1, "", (40,), ""), Prompt(2, "", (31, 2, 7), "")]


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as alone:
        yield alone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proof") / "model"
    return make_hf_model(path, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=2)


@pytest.fixture
def policy(model: Path, placement: Placement) -> Policy:
    """With rows of padding in its head."""
    options = Model(path=model, dtype="float32", vocabulary_multiple=16)
    return Policy(options, Optimizer(), read_architecture(model), placement, total_updates=1)


def continuation(url: str, prompt: Prompt, seed: int, log_probs: Any = 0.0) -> Continuation:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, TOKENS).astype(np.int32)
    return Continuation(url, prompt, tokens, np.broadcast_to(np.float32(log_probs), TOKENS))


def by_transformers(model: Path, found: Continuation) -> np.ndarray:
    """The log-probs of the continuation's tokens."""
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        rows = causal(torch.tensor([found.sequence])).logits[0].double().log_softmax(-1)
    start = len(found.prompt.token_ids)
    return np.array([rows[start + i - 1, token].item() for i, token in enumerate(found.token_ids)])


@pytest.mark.parametrize("sequence_multiple", [1, 8])
def test_differences_are_means_over_an_engines_tokens_from_the_policys(
    sequence_multiple: int, model: Path, policy: Policy, placement: Placement
) -> None:
    """Engines may continue the same prompt alike or otherwise; each is compared with its own tokens."""
    offsets = {"a": [0.0, 0.5, -0.25], "b": [-1.0, 0.0, 0.75]}
    found = []
    for url, values in offsets.items():
        for number, (prompt, offset) in enumerate(zip(PROMPTS, values, strict=True)):
            seed = number if number else ord(url)
            exact = by_transformers(model, continuation(url, prompt, seed))
            half = np.array([offset, -offset] * (TOKENS // 2))
            found.append(continuation(url, prompt, seed, exact + half))
    differences = mean_differences(policy, placement, found, sequence_multiple)
    assert differences == pytest.approx({"a": 0.25, "b": 1.75 / 3}, abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_that_cannot_be_computed_is_told_before_engines_are_asked(
    value: float, policy: Policy, placement: Placement
) -> None:
    check_policy(policy, placement, PROMPTS, 3, 1)
    with torch.no_grad():  # met by the last prompt alone
        policy.chunks[0].embedding.word_embeddings.weight[31, 5] = value
    check_policy(policy, placement, PROMPTS[:2], 3, 1)
    with pytest.raises(RapoError, match="policy of version 3 gives NaN or infinite log-probs"):
        check_policy(policy, placement, PROMPTS, 3, 1)


class Counting:
    """A policy whose log-prob is the number of the sequence, thousandfold, and the position."""

    architecture = SimpleNamespace(vocabulary=VOCABULARY)

    def __init__(self, *, last_stage: bool = True) -> None:
        self._last_stage = last_stage
        self.asked: list[tuple[Sequence[Microbatch], Callable[[Tensor], Head]]] = []

    def log_probs(self, microbatches: Sequence[Microbatch], head: Callable[[Tensor], Head]) -> list[Tensor]:
        self.asked.append((microbatches, head))
        if not self._last_stage:
            return []
        return [1000.0 * each.sequences + each.position_ids for each in microbatches]


def log_probs(policy: Counting, placement: Placement, multiple: int = 1) -> np.ndarray:
    found = [continuation("", prompt, 0) for prompt in PROMPTS]
    return proof._trainer_log_probs(cast(Any, policy), placement, found, multiple)


# A token is predicted at the position before it.
COUNTED = np.array(
    [[1000.0 * n + len(p.token_ids) - 1 + i for i in range(TOKENS)] for n, p in enumerate(PROMPTS)]
)


def test_each_token_has_the_log_prob_of_the_position_before_it(placement: Placement) -> None:
    policy = Counting()
    assert np.array_equal(log_probs(policy, placement), COUNTED)
    [(microbatches, head)] = policy.asked
    assert len(microbatches) == 1
    read = head(torch.zeros(64, 4))
    assert (read.temperature, read.shard.start, read.shard.real) == (1.0, 0, VOCABULARY)
    assert read.weight.shape == (64, 4)


def test_context_parallel_ranks_have_a_part_each(placement: Placement) -> None:
    halves = [
        log_probs(
            Counting(), replace(placement, layout=Parallel(context_parallel=2), context_rank=rank), multiple=4
        )
        for rank in range(2)
    ]
    assert np.array_equal(sum(halves), COUNTED)
    assert all(np.any(half) for half in halves)


@pytest.mark.parametrize("other", [{"tensor_rank": 1}, {"data_rank": 1}, {"tensor_rank": 1, "data_rank": 1}])
def test_ranks_that_have_the_same_add_nothing(placement: Placement, other: dict[str, int]) -> None:
    assert not log_probs(Counting(), replace(placement, **other)).any()


def test_stages_before_the_last_add_nothing(placement: Placement) -> None:
    assert not log_probs(Counting(last_stage=False), placement).any()


@pytest.mark.parametrize(("virtual", "copies"), [(None, 1), (2, 3)])
def test_interleaved_schedules_get_a_microbatch_a_stage(
    placement: Placement, virtual: int | None, copies: int
) -> None:
    policy = Counting()
    layout = Parallel(pipeline_parallel=3, virtual_pipeline_parallel=virtual)
    assert np.array_equal(log_probs(policy, replace(placement, layout=layout)), COUNTED)
    assert len(policy.asked[0][0]) == copies


# What engines are asked


def answers(version: int) -> list[Any]:
    """Of one engine: a prompt's tokens begin with the prompt's number."""
    log_probs = np.array([-0.5 * i for i in range(TOKENS)], np.float32)
    return [
        Generated(np.arange(n, n + TOKENS), log_probs, (str(version),), "length") for n in range(len(PROMPTS))
    ]


class Asked:
    """Two engines that note what they are asked."""

    def __init__(self, *versions: int) -> None:
        self.urls = [f"http://{number}" for number in range(len(versions))]
        self._versions = versions
        self.asked: list[Any] = []

    def each(self, ask: Any, parts: Sequence[Any]) -> Future[list[Any]]:
        assert list(parts) == self.urls
        answered: Future[list[Any]] = Future()
        engines = [AskedOne(self.asked, version) for version in self._versions]
        answered.set_result(
            [asyncio.run(ask(engine, part)) for engine, part in zip(engines, parts, strict=True)]
        )
        return answered


class AskedOne:
    """One of them."""

    def __init__(self, asked: list[Any], version: int) -> None:
        self._asked = asked
        self._version = version

    async def generate(self, wanted: list[Generation], *, timeout: float) -> list[Generated]:
        assert timeout == proof.TIMEOUT_S
        self._asked.append(wanted)
        return answers(self._version)


def test_every_engine_continues_every_prompt_greedily_to_a_fixed_length() -> None:
    engines = Asked(4, 4)
    found = probe(cast(Engines, engines), PROMPTS, 4, VOCABULARY)
    wanted = [Generation(ids, 8, 0.0, ignore_eos=True) for ids in ((5, 9, 23, 17), (40,), (31, 2, 7))]
    assert engines.asked == [wanted, wanted]
    assert [(each.url, each.prompt) for each in found] == [
        (url, prompt) for url in engines.urls for prompt in PROMPTS
    ]
    for number, each in enumerate(found):
        first = number % len(PROMPTS)
        assert each.token_ids.tolist() == list(range(first, first + TOKENS))
        assert each.log_probs.tolist() == [-0.5 * i for i in range(TOKENS)]
        assert each.sequence == (*each.prompt.token_ids, *range(first, first + TOKENS))


def test_continuations_of_other_weights_or_of_tokens_that_are_none_are_refused() -> None:
    with pytest.raises(RapoError, match="http://1"):
        probe(cast(Engines, Asked(4, 3)), PROMPTS, 4, VOCABULARY)
    with pytest.raises(RapoError):
        probe(cast(Engines, Asked(4, 4)), PROMPTS, 4, vocabulary=TOKENS)


def test_only_tensors_that_both_sides_know_are_compared() -> None:
    compare("http://a", {"x": 1, "y": 2}, {"y": 2, "slice": 3})
    sent = dict.fromkeys("edcbaz", 0)
    arrived = dict.fromkeys("edcba", 1) | {"other": 9}
    with pytest.raises(RapoError, match=r"5 of 6 tensors arrived at http://a .* \(a, b, c\)"):
        compare("http://a", sent, arrived)
