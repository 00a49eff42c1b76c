"""Choices of experts that engines tell: asked for, checked, carried to the rows of their tokens, or refused.

That they reach the ranks that need them is in test_delivery.py.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.config import Model, Optimizer
from megatron_rapo.data.batching import OwnChoices, Sample, pack
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.protocol import GenerateRequest, SamplingParams, to_answer, to_samples
from megatron_rapo.engines.engine import Generated
from megatron_rapo.engines.sglang.answers import to_generated
from megatron_rapo.environments.generating import Generating
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.routing_replay import Replay, Routing
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.preflight import planned_architecture
from megatron_rapo.rollout.response import Response
from megatron_rapo.rollout.responses import to_response
from tests.models import load_reference, make_hf_model
from tests.unit.one_rank import one_placement
from tests.unit.test_routing_replay import best, configured, objective, samples


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as own:
        yield own


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("told") / "model", family="qwen3_moe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rollout": {"replay": "/recorded"}},
            'rollout.replay = "/recorded": recorded samples have no choices',
        ),
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness = 1: batches that a checkpoint keeps"),
        ({"algorithm": {"share_prompts": True}}, "algorithm.share_prompts = true: a prompt that is computed"),
        (
            {"rollout": {"engine": {"urls": ["http://a:1"], "kind": "embedded", "router": "http://r:1"}}},
            'rollout.engine.router = "http://r:1": through the router',
        ),
    ],
)
def test_what_choices_of_engines_do_not_go_with_is_refused(options: dict[str, Any], message: str) -> None:
    engine = {"routing_replay": "engine", "minibatch_prompts": 4}
    configured(algorithm=engine)
    with pytest.raises(RapoError, match=re.escape(f"does not go with {message}")):
        configured(**{**options, "algorithm": {**engine, **options.get("algorithm", {})}})


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("sglang", "is not asked for them: what its return_routed_experts tells is not tested here"),
        ("embedded", None),
    ],
)
def test_engines_that_do_not_tell_their_choices_are_refused(kind: str, why: str | None, path: Path) -> None:
    options: dict[str, Any] = {
        "model": {"path": str(path)},
        "algorithm": {"routing_replay": "engine"},
        "rollout": {"engine": {"kind": kind, "urls": ["http://a:1"]}},
    }
    if why is None:
        planned_architecture(configured(**options))
        return
    with pytest.raises(
        RapoError, match=re.escape(f'rollout.engine.kind = "{kind}" {why}; choose "embedded"')
    ):
        planned_architecture(configured(**options))


SHAPE = ChoiceShape(layers=2, experts=4, chosen=2)


def generated(tokens: int, experts: Any) -> Generated:
    ids = np.arange(2, 2 + tokens)
    told = None if experts is None else np.array(experts, np.int32)
    return Generated(ids, np.full(tokens, -1.0, np.float32), ("3",), "stop", told)


def responded(experts: Any, tokens: int = 2) -> Response:
    return to_response(
        generated(tokens, experts),
        weight_version=3,
        vocab_size=59,
        max_tokens=9,
        source="http://a:1",
        given=1,
        experts=SHAPE,
    )


def test_what_an_engine_tells_has_the_shape_of_all_tokens_but_the_last() -> None:
    found = responded([0, 3, 2, 1, 1, 0, 3, 2]).experts
    assert found is not None and found.dtype == np.uint8
    assert found.tolist() == [[[0, 3], [2, 1]], [[1, 0], [3, 2]]]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "http://a:1 does not tell the experts that its routers chose"),
        ([0, 1, 2, 3], "told 4 experts of 2 tokens, where 2 in each of 2 layers were expected"),
        ([0, 3, 2, 1, 1, 0, 3, 4], "told choices that are none: each is of 2 different experts from 0 to 3"),
        ([0, 3, 2, 1, 1, -1, 3, 2], "told choices that are none"),
        ([0, 3, 2, 1, 1, 1, 3, 2], "told choices that are none"),
    ],
)
def test_other_tales_of_an_engine_are_refused(experts: Any, message: str) -> None:
    with pytest.raises(RapoError, match=re.escape(message)):
        responded(experts)


def test_rows_have_the_choices_of_their_tokens_wherever_they_are() -> None:
    """Under CP and sequence parallelism; what nobody told, and padding, is unknown."""
    shape = ChoiceShape(layers=4, experts=200, chosen=1)
    told = samples(0)
    told = [
        replace(one, sequence=replace(one.sequence, experts=_numbered(n, len(one.sequence), shape)))
        for n, one in enumerate(told)
    ]
    told[1] = replace(told[1], sequence=replace(told[1].sequence, experts=None))
    for context in (1, 2):
        for tensor in (1, 2):
            for rank in range(context * tensor):
                own = OwnChoices(shape, [0, 1, 2, 3], rank % tensor, tensor)
                microbatch = pack(
                    told,
                    sequence_multiple=2 * context * tensor,
                    total_tokens=80,
                    context_rank=rank // tensor,
                    context_ranks=context,
                    choices=own,
                )
                assert microbatch.experts is not None and list(microbatch.experts) == [1, 2, 3, 4]
                rows = len(microbatch.token_ids) // tensor
                here = slice(rank % tensor * rows, (rank % tensor + 1) * rows)
                places = zip(microbatch.sequences[here], microbatch.position_ids[here], strict=True)
                for row, (number, place) in enumerate(places):
                    known = number in (0, 2) and place < len(told[number].sequence)
                    for layer, found in microbatch.experts.items():
                        expected = told[number].sequence.experts[place, layer - 1] if known else [255]
                        assert found[row].tolist() == list(expected)


def _numbered(number: int, tokens: int, shape: ChoiceShape) -> np.ndarray:
    """Of each token and layer another number."""
    found = 100 * (number // 2) + np.arange(tokens * shape.layers * shape.chosen)
    return (found % 200).astype(shape.dtype).reshape(tokens, shape.layers, shape.chosen)


def test_unknown_choices_are_the_routers_own() -> None:
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    taken = torch.tensor([[0, 1], [255, 255], [2, 3]], dtype=torch.uint8)
    replay = Replay(4)
    replay.layer, replay.routing = 1, Routing({1: taken}, recorded=False)
    _, found = replay.get_replay_topk(scores, 2, default_compute_topk=best)
    assert found.tolist() == [[0, 1], scores[1].topk(2).indices.tolist(), [2, 3]]


def test_turns_tell_each_token_as_it_was_first_computed() -> None:
    """A second turn goes on from the first; a third one had another past, which no longer holds after it."""
    generate = Generating.__new__(Generating)
    shape = ChoiceShape(layers=1, experts=9, chosen=1)

    def told(value: int, tokens: int) -> np.ndarray:
        return np.full((tokens, 1, 1), value, np.uint8)

    generate._told = [
        (np.array([5, 6, 7], np.int32), told(1, 2)),
        (np.array([5, 6, 7, 8, 9], np.int32), told(2, 4)),
        (np.array([5, 6, 7, 8, 4, 9], np.int32), told(3, 5)),
    ]
    sequence = Sequence.of_response([5], np.array([6, 7, 8, 9, 2], np.int32), np.zeros(5, np.float32), 0)
    found = generate.with_experts(sequence, shape).experts
    assert found is not None
    assert found.flatten().tolist() == [1, 1, 2, 2, 255, 255]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_embedded_server_tells_what_transformers_chooses(tmp_path: Path, family: str) -> None:
    """Of prompts of several lengths, one of them twice, and rows that end before others."""
    path = make_hf_model(tmp_path, family=family, initializer_range=0.2)
    engine, reference = Engine(path, "cpu", "float32"), load_reference(path)
    prompts = [(5, 6, 7), (9,), (20, 21, 22, 23, 24), (5, 6, 7)]
    asked = GenerateRequest(
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params=[SamplingParams(max_new_tokens=n, sampling_seed=n) for n in (12, 3, 6, 9)],
        return_logprob=True,
        return_routed_experts=True,
    )
    wanted = to_samples(asked, engine)
    answers: Any = to_answer(asked, wanted, engine.generate(wanted, threading.Event()), "3", engine)
    shape = ChoiceShape(4, 4, 2)
    for prompt, answer in zip(prompts, answers, strict=True):
        found = to_response(
            to_generated(answer, "x"),
            weight_version=3,
            vocab_size=61,
            max_tokens=12,
            source="x",
            given=len(prompt),
            experts=shape,
        )
        ids = torch.tensor([[*prompt, *found.token_ids.tolist()]])
        with torch.no_grad():
            logits = torch.stack(reference(ids, output_router_logits=True).router_logits)
        expected = logits[:, :-1].topk(2).indices.transpose(0, 1)
        assert found.experts is not None
        assert found.experts.tolist() == expected.tolist()


def test_a_dense_model_tells_no_choices(tmp_path: Path) -> None:
    engine = Engine(make_hf_model(tmp_path), "cpu", "float32")
    with pytest.raises(RapoError, match="has no experts; do not ask for return_routed_experts"):
        to_samples(GenerateRequest(input_ids=[2], return_routed_experts=True), engine)


@pytest.mark.parametrize("fault", [None, "another token's", "another layer's"])
def test_the_trainer_would_choose_what_the_engine_chose(
    path: Path, placement: Placement, fault: str | None
) -> None:
    """Both compute the same, so that no choice differs; with those of other tokens or layers many do."""
    engine, shape = Engine(path, "cpu", "float32"), ChoiceShape(4, 4, 2)
    prompts = [(5, 6, 7), (20, 21, 22, 23, 24)]
    asked = GenerateRequest(
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params=[SamplingParams(max_new_tokens=n, sampling_seed=n, ignore_eos=True) for n in (9, 6)],
        return_logprob=True,
        return_routed_experts=True,
    )
    wanted = to_samples(asked, engine)
    answers: Any = to_answer(asked, wanted, engine.generate(wanted, threading.Event()), "0", engine)
    trained = []
    for prompt, answer in zip(prompts, answers, strict=True):
        one = to_response(
            to_generated(answer, "x"),
            weight_version=0,
            vocab_size=61,
            max_tokens=9,
            source="x",
            given=len(prompt),
            experts=shape,
        )
        assert one.experts is not None
        told = np.concatenate([one.experts, shape.untold(1)])
        if fault is not None:
            told[:-1] = np.roll(told[:-1], 1, axis=0 if fault == "another token's" else 1)
        sequence = Sequence.of_response(prompt, one.token_ids, one.log_probs, 0)
        trained.append(Sample(replace(sequence, experts=told), 1.0, 1.0, 0.05))
    microbatch = pack(trained, sequence_multiple=4, choices=OwnChoices(shape, range(4)))
    policy = Policy(
        Model(path=path, dtype="float32"), Optimizer(distributed=False), read_architecture(path), placement, 1
    )
    own = objective(placement, "engine", vocabulary=61)  # all that the engine samples
    policy.annotate([[microbatch]], own)
    metrics = policy.update([[microbatch]], own, None)
    policy.close()
    if fault is None:
        assert metrics["router/replay_changed"] == 0.0
        assert metrics["mismatch/log_prob_max"] < 1e-4
    else:
        assert metrics["router/replay_changed"] > 0.3
        assert metrics["mismatch/log_prob_max"] > 1e-3
