"""Requests of the embedded server as they are read, and its answers: defaults, bounds, shapes; no model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_rapo.embedded_server import protocol, weight_requests
from megatron_rapo.embedded_server.decode import Completion, Sample
from megatron_rapo.embedded_server.protocol import GenerateRequest, SamplingParams, to_answer, to_samples
from megatron_rapo.errors import RapoError

EOS, VOCAB, CONTEXT = 9, 50, 64
GROUP = {"group_name": "weight_update_group"}
UPDATE = {"weight_version": None, "flush_cache": True, "abort_all_requests": False}
BROADCAST = {"load_format": None, "selector": "all"}
JOIN = {"master_address": "host", "master_port": 29500, "rank_offset": 1, "world_size": 2}
SLICES = [("a", None, 0, 1)]


class Tokenizer:
    """A letter a token; the end of a sequence is shown unless special tokens are skipped."""

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - ord("a") + 10 for letter in text] for text in texts]}

    def batch_decode(self, responses: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        shown = [[token for token in ids if not (skip_special_tokens and token == EOS)] for ids in responses]
        return [
            "".join("<eos>" if token == EOS else chr(token - 10 + ord("a")) for token in ids) for ids in shown
        ]


def engine(*, tokenizer: Any = None) -> Any:
    return SimpleNamespace(
        eos_ids=frozenset({EOS}),
        vocab_size=VOCAB,
        context_length=CONTEXT,
        tokenizer=tokenizer,
        model_path=Path("models/m"),
    )


def made(name: str) -> Any:
    return getattr(protocol, name, None) or getattr(weight_requests, name)


# What a request says that does not say it


@pytest.mark.parametrize(
    ("name", "given", "otherwise"),
    [
        (
            "SamplingParams",
            {},
            {
                "max_new_tokens": 128,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "n": 1,
                "stop_token_ids": [],
                "ignore_eos": False,
                "sampling_seed": None,
            },
        ),
        (
            "GenerateRequest",
            {"sampling_params": []},
            {
                **dict.fromkeys(["text", "input_ids", "rid", "model"]),
                **dict.fromkeys(["return_logprob", "no_logs", "stream", "background"], False),
                **dict.fromkeys(["return_text_in_logprobs", "return_hidden_states"], False),
                **dict.fromkeys(["return_entropy", "return_bytes", "return_routed_experts"], False),
                "log_metrics": True,
            },
        ),
        ("PauseRequest", {}, {"mode": "abort"}),
        ("ContinueRequest", {}, {"torch_empty_cache": True}),
        ("AbortRequest", {}, {"rid": None, "abort_all": False}),
        ("UpdateFromDiskRequest", {"model_path": "m"}, UPDATE),
        (
            "UpdateFromDistributedRequest",
            {"names": [], "dtypes": [], "shapes": []},
            {**UPDATE, **GROUP, **BROADCAST},
        ),
        ("UpdateFromTensorRequest", {"serialized_named_tensors": ["x"]}, {**UPDATE, **BROADCAST}),
        ("UpdateFromShardsRequest", {"dtype": "float32", "messages": []}, {**UPDATE, **GROUP}),
        ("SliceMessage", {"source": 3, "slices": SLICES}, {"engine_rank": 0}),
        ("InitGroupRequest", JOIN, {**GROUP, "backend": "nccl"}),
        ("DestroyGroupRequest", {}, GROUP),
        ("BeginUpdateRequest", {}, {"selector": "all"}),
        ("EndUpdateRequest", {}, {}),
        ("RenameRequest", {"new_version": "7"}, {"abort_all_requests": True}),
        ("MemoryRequest", {}, {"tags": None}),
    ],
)
def test_what_is_not_said_is_as_in_sglang(
    name: str, given: dict[str, Any], otherwise: dict[str, Any]
) -> None:
    request = made(name).model_validate(given)
    assert request.model_dump() == {**given, **otherwise}
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        made(name).model_validate({**given, "bogus": 1})
    for field in otherwise:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(request, field, None)


@pytest.mark.parametrize(
    ("name", "field", "taken", "refused"),
    [
        ("SamplingParams", "max_new_tokens", [1, 10**6], [0]),
        ("SamplingParams", "temperature", [0, 0.5, 7.0], [-1e-9, float("inf"), float("nan")]),
        ("SamplingParams", "top_p", [1e-9, 0.5, 1], [0, 1.001, 2]),
        ("SamplingParams", "top_k", [-1, 0, 1, 10**9], [-2]),
        ("SamplingParams", "n", [1, 2], [0]),
        ("SamplingParams", "sampling_seed", [None, 0, 1, 2**63 - 1], [-1, 2**63]),
        *[
            ("GenerateRequest", option, [False], [True])
            for option in ("stream", "background", "return_hidden_states", "return_entropy", "return_bytes")
        ],
        ("GenerateRequest", "return_text_in_logprobs", [False], [True]),
        ("GenerateRequest", "model", [None], ["m"]),
        ("PauseRequest", "mode", ["abort", "retract", "in_place"], ["stop"]),
        ("UpdateFromTensorRequest", "serialized_named_tensors", [["x"]], [[], ["x", "y"]]),
        ("UpdateFromTensorRequest", "load_format", [None, "flattened_bucket"], ["other"]),
        ("UpdateFromShardsRequest", "dtype", ["float64", "bfloat16"], ["int8", "torch.float32"]),
        ("SliceMessage", "source", [0, 1, 7], [-1]),
        ("SliceMessage", "engine_rank", [0], [1]),
        ("SliceMessage", "slices", [SLICES, SLICES * 3], [[]]),
        ("InitGroupRequest", "master_port", [1, 2**16 - 1], [0, 2**16]),
        ("InitGroupRequest", "rank_offset", [1, 2], [0]),
        ("InitGroupRequest", "world_size", [2, 3], [1]),
        ("InitGroupRequest", "group_name", ["g"], [""]),
        ("InitGroupRequest", "backend", ["nccl", "gloo"], ["mpi"]),
        ("MemoryRequest", "tags", [None, [], ["weights"], ["kv_cache", "weights"]], [["cache"]]),
    ],
)
def test_values_are_taken_up_to_their_bounds(
    name: str, field: str, taken: list[Any], refused: list[Any]
) -> None:
    needed: dict[str, dict[str, Any]] = {
        "UpdateFromTensorRequest": {"serialized_named_tensors": ["x"]},
        "UpdateFromShardsRequest": {"dtype": "float32", "messages": []},
        "SliceMessage": {"source": 3, "slices": SLICES},
        "InitGroupRequest": JOIN,
    }
    for value in taken:
        request = made(name).model_validate({**needed.get(name, {}), field: value})
        assert getattr(request, field) == value
    for value in refused:
        with pytest.raises(ValidationError) as error:
            made(name).model_validate({**needed.get(name, {}), field: value})
        assert error.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("names", "dtypes", "shapes", "named"),
    [
        (["a", "b"], ["float32", "bfloat16"], [[1], [2, 3]], None),
        ([], [], [], None),
        (["a"], ["float32", "float32"], [[1], [1]], "1 names, 2 dtypes, 2 shapes"),
        (["a", "b"], ["float32"], [[1], [1]], "2 names, 1 dtypes, 2 shapes"),
        (["a", "b"], ["float32", "float32"], [[1]], "2 names, 2 dtypes, 1 shapes"),
        (["a", "a"], ["float32", "float32"], [[1], [1]], "a name stands there twice"),
        (
            ["a", "b"],
            ["float32", "int8"],
            [[1], [1]],
            "'int8' is none of float64, float32, float16, bfloat16",
        ),
    ],
)
def test_each_tensor_of_a_broadcast_has_a_name_a_type_and_a_shape(
    names: list[str], dtypes: list[str], shapes: list[list[int]], named: str | None
) -> None:
    def request() -> weight_requests.UpdateFromDistributedRequest:
        return weight_requests.UpdateFromDistributedRequest(names=names, dtypes=dtypes, shapes=shapes)

    if named is None:
        assert (request().names, request().dtypes, request().shapes) == (names, dtypes, shapes)
    else:
        with pytest.raises(ValidationError, match=named):
            request()


@pytest.mark.parametrize(
    ("tags", "meant"),
    [(None, ["weights", "kv_cache"]), ([], ["weights", "kv_cache"]), (["kv_cache"], ["kv_cache"])],
)
def test_memory_that_is_not_named_is_all(tags: Any, meant: list[str]) -> None:
    assert weight_requests.MemoryRequest(tags=tags).named == meant


# Samples of a request


def sample(prompt: tuple[int, ...], **fields: Any) -> Sample:
    defaults = {"max_new_tokens": 5, "temperature": 0.5, "stop_ids": frozenset({EOS}), "seed": 3}
    return Sample(prompt, **{**defaults, **fields})


def params(**fields: Any) -> dict[str, Any]:
    return {"max_new_tokens": 5, "temperature": 0.5, "sampling_seed": 3, **fields}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input_ids": [5, 6], "sampling_params": params()}, [sample((5, 6))]),
        ({"text": "ab", "sampling_params": params()}, [sample((10, 11))]),
        ({"text": ["ab", "c"], "sampling_params": params()}, [sample((10, 11)), sample((12,))]),
        (
            {"input_ids": [[5], [6, 7]], "sampling_params": [params(), params(temperature=0.0)]},
            [sample((5,)), sample((6, 7), temperature=0.0)],
        ),
        (
            {"input_ids": [5], "sampling_params": params(n=3, sampling_seed=2**63 - 2)},
            [sample((5,), seed=seed) for seed in (2**63 - 2, 2**63 - 1, 0)],
        ),
        (
            {"input_ids": [[5], [6]], "sampling_params": params(n=2, top_p=0.25)},
            [sample((token,), seed=seed, top_p=0.25) for token in (5, 6) for seed in (3, 4)],
        ),
        *[
            ({"input_ids": [5], "sampling_params": params(top_k=k)}, [sample((5,), top_k=limit)])
            for k, limit in ((-1, None), (1, 1), (2, 2))
        ],
        (
            {"input_ids": [5], "sampling_params": params(stop_token_ids=[7, 8])},
            [sample((5,), stop_ids=frozenset({7, 8, EOS}))],
        ),
        (
            {"input_ids": [5], "sampling_params": params(stop_token_ids=[7], ignore_eos=True)},
            [sample((5,), stop_ids=frozenset())],
        ),
        ({"input_ids": [0, VOCAB - 1], "sampling_params": params()}, [sample((0, VOCAB - 1))]),
        (
            {"input_ids": [5, 6], "sampling_params": params(max_new_tokens=CONTEXT - 2)},
            [sample((5, 6), max_new_tokens=CONTEXT - 2)],
        ),
    ],
)
def test_a_request_is_so_many_samples(body: dict[str, Any], expected: list[Sample]) -> None:
    assert to_samples(GenerateRequest(**body), engine(tokenizer=Tokenizer())) == expected


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "send either text or input_ids"),
        ({"text": "a", "input_ids": [5]}, "send either text or input_ids"),
        ({"text": []}, "there is no prompt"),
        ({"text": "a"}, r"models/m has no tokenizer; send input_ids"),
        ({"input_ids": []}, "a prompt is empty"),
        ({"input_ids": [[5], []], "sampling_params": params()}, "a prompt is empty"),
        ({"input_ids": [5, VOCAB, 6]}, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ({"input_ids": [5, -1, 6]}, "token id -1"),
        (
            {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": CONTEXT - 1}},
            f"a prompt of 2 tokens and max_new_tokens = {CONTEXT - 1} exceed the context of {CONTEXT}",
        ),
        (
            {"input_ids": [5], "sampling_params": {"top_k": 0, "max_new_tokens": 1}},
            "top_k = 0 leaves no token",
        ),
        ({"input_ids": [[5], [6]], "sampling_params": [params()]}, "1 entries for 2 prompts"),
        ({"input_ids": [5], "sampling_params": [params()] * 2}, "2 entries for 1 prompts"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(body: dict[str, Any], named: str) -> None:
    with pytest.raises(RapoError, match=named):
        to_samples(GenerateRequest(**body), engine())


def test_without_a_seed_each_request_has_another() -> None:
    request = GenerateRequest(input_ids=[5], sampling_params=SamplingParams(n=2, max_new_tokens=1))
    drawn = [to_samples(request, engine()) for _ in range(50)]
    assert len({first.seed for first, _ in drawn}) == 50
    assert all(0 <= one.seed < 2**63 for pair in drawn for one in pair)
    assert all(second.seed == (first.seed + 1) % 2**63 for first, second in drawn)


# Answers


ANSWERED = [
    (sample((5, 6)), Completion([10, EOS, 11], [-1.0, -2.0, -3.0], "length")),
    (sample((5,)), Completion([12, 13, EOS], [-1.0, -2.0, -3.0], "stop")),
    (sample((5,)), Completion([14], [-0.5], "abort")),
]
REASONS = [
    {"type": "length", "length": 5},
    {"type": "stop", "matched": EOS},
    {"type": "abort", "message": "aborted on request"},
]


def answered(body: dict[str, Any], count: int, **of_engine: Any) -> Any:
    pairs = ANSWERED[:count]
    request = GenerateRequest(**body)
    samples, completions = [one for one, _ in pairs], [completion for _, completion in pairs]
    return to_answer(request, samples, completions, "8", engine(**of_engine))


def test_an_answer_tells_what_sglang_tells() -> None:
    found = answered({"input_ids": [[5, 6], [5], [5]], "rid": "r"}, 3, tokenizer=Tokenizer())
    for number, (answer, (one, completion)) in enumerate(zip(found, ANSWERED, strict=True)):
        assert answer["output_ids"] == completion.token_ids
        assert answer["meta_info"] == {
            "id": f"r_{number}",
            "finish_reason": REASONS[number],
            "prompt_tokens": len(one.prompt),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": 0,
            "weight_version": "8",
        }
    # Without the token that stopped it, and without special tokens anywhere.
    assert [answer["text"] for answer in found] == ["ab", "cd", "e"]


def test_log_probs_stand_with_their_tokens() -> None:
    found = answered({"input_ids": [5, 6], "return_logprob": True}, 1)
    assert found["meta_info"]["output_token_logprobs"] == [
        [-1.0, 10, None],
        [-2.0, EOS, None],
        [-3.0, 11, None],
    ]
    assert found["text"] == "", "a model without a tokenizer has no text"


@pytest.mark.parametrize(
    ("body", "count", "listed"),
    [
        ({"input_ids": [5]}, 1, False),
        ({"text": "a"}, 1, False),
        ({"input_ids": [[5]]}, 1, True),
        ({"text": ["a"]}, 1, True),
        ({"input_ids": [5, 6]}, 2, True),  # n = 2
        ({"text": "a"}, 2, True),
    ],
)
def test_one_response_to_one_prompt_is_an_object_and_all_else_a_list(
    body: dict[str, Any], count: int, listed: bool
) -> None:
    found = answered({**body, "rid": "r"}, count, tokenizer=Tokenizer())
    assert isinstance(found, list) == listed
    ids = [answer["meta_info"]["id"] for answer in (found if listed else [found])]
    assert ids == (["r"] if count == 1 else [f"r_{number}" for number in range(count)])


def test_an_answer_whose_request_had_no_id_gets_one_of_its_own() -> None:
    ids = {answered({"input_ids": [5]}, 1)["meta_info"]["id"] for _ in range(50)}
    assert len(ids) == 50
    assert {len(one) for one in ids} == {32}
