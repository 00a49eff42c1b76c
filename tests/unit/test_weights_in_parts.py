"""Weights in parts, without a server: when they are whole, what they are called, which slices there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.weights import Weights, _some
from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import lay_out, views
from megatron_rapo.wire.slices import CHECKSUM_BYTES, message_bytes, unpack

SHAPES = {"embed": (5, 4), "bias": (3,), "scale": (2,)}


class Model(torch.nn.Module):
    """Two parameters, one of which has two names, and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(5, 4))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.head = self.embed
        self.register_buffer("scale", torch.zeros(2))


def filled(value: float, *names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(SHAPES["embed" if name == "head" else name], value)) for name in names]


@pytest.fixture
def weights() -> Weights:
    return Weights(Model())


def values(weights: Weights) -> dict[str, set[float]]:
    return {name: set(tensor.flatten().tolist()) for name, tensor in weights._tensors.items()}


def all_are(value: float) -> dict[str, set[float]]:
    return {name: {value} for name in SHAPES}


def test_an_update_is_whole_once_every_tensor_has_come(weights: Weights) -> None:
    assert (weights.version, weights.problem()) == ("default", None)
    weights.begin()
    weights.write(filled(1, "embed"), "1")
    assert weights.version == "default"
    assert "not whole: 2 of 3 tensors have not come (bias, scale)" in str(weights.problem())
    weights.write(filled(1, "bias"), None)
    assert "1 of 3 tensors have not come (scale)" in str(weights.problem())
    weights.write(filled(1, "scale"), None)
    assert (weights.version, weights.problem()) == ("1", None)
    weights.end()
    assert values(weights) == all_are(1.0)
    weights.rename("one")
    assert weights.version == "one"


@pytest.mark.parametrize("when", ["first", "last", "later"])
def test_the_version_is_the_last_that_was_told_whenever_it_was(weights: Weights, when: str) -> None:
    weights.begin()
    weights.write(filled(1, "embed", "bias"), "7" if when == "first" else None)
    weights.write(filled(1, "scale"), "7" if when == "last" else None)
    weights.write([], "7" if when == "later" else None)
    weights.end()
    assert weights.version == "7"
    weights.begin()  # what was told before is not the next update's
    weights.write(filled(2, *SHAPES), None)
    weights.end()
    assert weights.version == "7"


def test_a_version_that_was_told_in_vain_is_forgotten(weights: Weights) -> None:
    weights.begin()
    weights.write(filled(1, "embed"), "in vain")
    with pytest.raises(RapoError, match="the update has ended, but the weights are not whole"):
        weights.end()
    with pytest.raises(RapoError, match="not whole"):
        weights.rename("x")
    weights.begin()
    weights.write(filled(2, "bias", "scale"), None)
    assert "1 of 3 tensors have not come (embed)" in str(weights.problem()), "all must come anew"
    weights.write(filled(2, "embed"), None)
    weights.end()
    assert (weights.version, weights.problem()) == ("default", None)
    assert values(weights) == all_are(2.0)


def test_a_tied_matrix_comes_once_under_either_name(weights: Weights) -> None:
    weights.begin()
    weights.write(filled(1, "head", "bias", "scale"), "1")
    weights.end()
    assert weights.version == "1"
    assert values(weights) == all_are(1.0)
    found = weights.checksums()
    assert found == {name: tensor_checksum(torch.ones(shape)) for name, shape in SHAPES.items()}


def test_sessions_follow_one_another(weights: Weights) -> None:
    for refused in (weights.end, lambda: weights.check({}), lambda: weights.write(filled(1, "bias"), "1")):
        with pytest.raises(RapoError, match=r"no update is under way|between /begin_weight_update"):
            refused()
    weights.begin()
    weights.check({})
    with pytest.raises(RapoError, match="an update is under way"):
        weights.begin()
    weights.end()
    with pytest.raises(RapoError, match="no update is under way"):
        weights.end()
    assert values(weights) == all_are(0.0)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"extra": [1]}, "1 of 1 tensors are not this model's: extra is not in the model"),
        ({"bias": [4], "embed": [5, 4]}, r"1 of 2 .*: bias has shape \[4\] in place of \[3\];"),
        ({"head": [4, 5]}, r"head has shape \[4, 5\] in place of \[5, 4\]"),
        ({f"x{n}": [1] for n in range(7)}, r"7 of 7 tensors .*x4 is not in the model; send"),
    ],
)
def test_a_tensor_of_another_model_is_named(
    weights: Weights, shapes: dict[str, list[int]], named: str
) -> None:
    weights.begin()
    with pytest.raises(RapoError, match=named):
        weights.check(shapes)
    with pytest.raises(RapoError, match=named):
        weights.write([(name, torch.ones(shape)) for name, shape in shapes.items()], "1")
    assert weights.problem() is None and values(weights) == all_are(0.0)
    weights.check({name: list(shape) for name, shape in SHAPES.items()})


def test_released_weights_must_come_as_a_whole(weights: Weights, tmp_path: Path) -> None:
    weights.resume()  # nothing is released
    assert weights.problem() is None
    weights.release()
    assert sum(tensor.numel() for tensor in weights._tensors.values()) == 0
    weights.begin()
    for refused in (
        lambda: weights.check({}),
        weights.checksums,
        lambda: weights.load_checkpoint(tmp_path, "1"),
        lambda: weights.rename("1"),
    ):
        with pytest.raises(RapoError, match="memory of the weights is released"):
            refused()
    weights.resume()
    assert "3 of 3 tensors have not come (bias, embed, scale)" in str(weights.problem())
    assert {name: tuple(tensor.shape) for name, tensor in weights._tensors.items()} == SHAPES
    weights.write(filled(3, *SHAPES), "3")
    weights.end()
    assert (weights.version, values(weights)) == ("3", all_are(3.0))


@pytest.mark.parametrize(("version", "called"), [("9", "9"), (None, "default")])
def test_a_checkpoint_is_a_whole_update(weights: Weights, tmp_path: Path, version: Any, called: str) -> None:
    weights.begin()
    weights.write(filled(1, "bias"), None)
    weights._in_session = False
    save_file(dict(filled(4, *SHAPES)), tmp_path / "model.safetensors")
    weights.load_checkpoint(tmp_path, version)
    assert (weights.version, weights.problem()) == (called, None)
    assert values(weights) == all_are(4.0)


# Slices


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (("embed", None, 0, 0), (5, 4)),
        (("head", 0, 0, 5), (5, 4)),
        (("embed", 0, 1, 3), (2, 4)),
        (("embed", 1, 3, 4), (5, 1)),
        (("bias", 0, 0, 1), (1,)),
    ],
)
def test_a_slice_has_its_place(weights: Weights, one: Any, shape: tuple[int, ...]) -> None:
    weights.begin()
    place = weights.place(one)
    assert tuple(place.shape) == shape
    with torch.no_grad():
        place.fill_(1.0)
    expected = torch.zeros(SHAPES["embed" if one[0] == "head" else one[0]])
    name, dimension, start, stop = one
    index: list[Any] = [slice(None)] * expected.dim()
    if dimension is not None:
        index[dimension] = slice(start, stop)
    expected[tuple(index)] = 1.0
    assert torch.equal(weights._tensors[weights._canonical[name]].detach(), expected)


@pytest.mark.parametrize(
    ("one", "named"),
    [
        (("extra", None, 0, 1), "extra is not in the model"),
        (("embed", 2, 0, 1), "0:1 of dimension 2 is no slice of embed"),
        (("embed", -1, 0, 1), "dimension -1"),
        (("bias", 1, 0, 1), "dimension 1"),
        (("embed", 0, -1, 1), "-1:1"),
        (("embed", 0, 2, 2), "2:2"),
        (("embed", 0, 3, 2), "3:2"),
        (("embed", 0, 4, 6), "4:6"),
        (("embed", 1, 0, 5), "0:5"),
    ],
)
def test_what_is_no_slice_of_this_model_is_refused(weights: Weights, one: Any, named: str) -> None:
    with pytest.raises(RapoError, match="between /begin_weight_update"):
        weights.place(one)
    weights.begin()
    with pytest.raises(RapoError, match=named):
        weights.place(one)


def test_slices_make_a_tensor_whole_number_by_number(weights: Weights) -> None:
    weights.begin()
    weights.write(filled(1, "bias", "scale"), None)
    parts: list[tuple[Any, float]] = [
        (("embed", 0, 0, 2), 1.0),
        (("head", 0, 2, 4), 2.0),
        (("embed", 0, 4, 5), 3.0),
    ]
    for number, (one, value) in enumerate(parts):
        assert "(embed)" in str(weights.problem())
        last = number == len(parts) - 1
        weights.write_slices([one], [torch.full((one[3] - one[2], 4), value)], "5" if last else None)
    assert (weights.version, weights.problem()) == ("5", None)
    assert weights._tensors["embed"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0]
    weights.end()


@pytest.mark.parametrize(
    ("names", "shown"),
    [("", ""), ("a", "a"), ("cab", "a, b, c"), ("dcab", "a, b, c, …"), ("edcab", "a, b, c, …")],
)
def test_of_many_names_the_first_are_shown(names: str, shown: str) -> None:
    assert _some(iter(names)) == shown


# Messages and buckets


def packed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = torch.cat([part.flatten() for part in parts])
    checksum = torch.tensor(list(tensor_checksum(flat).to_bytes(CHECKSUM_BYTES, "little")), dtype=torch.uint8)
    return torch.cat([flat.view(torch.uint8), checksum])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_message_holds_its_slices_and_their_checksum(dtype: torch.dtype) -> None:
    parts = [torch.arange(6).view(2, 3).to(dtype), torch.ones(4, dtype=dtype), torch.zeros(1, 1, dtype=dtype)]
    places = [torch.empty(part.shape) for part in parts]  # of another type
    flat = packed(parts)
    assert message_bytes(places, dtype) == len(flat) == 11 * dtype.itemsize + 8
    for part, found in zip(parts, unpack(flat, places, dtype), strict=True):
        assert torch.equal(part, found)
    for damaged in (0, len(flat) - 1):
        other = flat.clone()
        other[damaged] += 1
        with pytest.raises(RapoError, match="a message of weights has checksum"):
            unpack(other, places, dtype)


def test_tensors_of_a_bucket_lie_one_behind_the_other() -> None:
    named = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.tensor(7.0, dtype=torch.float32),
        "c": torch.arange(4, dtype=torch.bfloat16),
    }
    layout = lay_out(list(named), [t.dtype for t in named.values()], [list(t.shape) for t in named.values()])
    assert [(t.start_idx, t.end_idx, t.numel) for t in layout] == [(0, 24, 24), (24, 28, 4), (28, 36, 8)]
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in named.values()])
    found = views(flat, layout)
    assert [name for name, _ in found] == list(named)
    assert all(torch.equal(tensor, named[name]) for name, tensor in found)
    assert found[0][1].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    with pytest.raises(
        RapoError, match=r"c \[4\] torch.bfloat16 does not fit bytes 28 to 36 of a bucket of 35"
    ):
        views(flat[:-1], layout)


# The tokens that end a response


@pytest.mark.parametrize(
    ("config", "generation", "declared"),
    [
        (1, None, {1}),
        (None, [2, 3], {2, 3}),
        (1, 2, {1, 2}),
        ([1, 4], [4], {1, 4}),
        (None, None, set()),
        (0, None, {0}),
    ],
)
@pytest.mark.parametrize("tokenizer", [None, 0, 1, 5])
def test_all_ends_that_a_model_and_its_tokenizer_declare_count(
    config: Any, generation: Any, declared: set[int], tokenizer: int | None
) -> None:
    engine: Any = Engine.__new__(Engine)
    engine._model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=config),
        generation_config=SimpleNamespace(eos_token_id=generation),
    )
    engine.tokenizer = None
    assert engine._eos_ids() == declared
    engine.tokenizer = SimpleNamespace(eos_token_id=tokenizer)
    assert engine._eos_ids() == (declared if tokenizer is None else declared | {tokenizer})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_given_back_and_taken_by_name(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's goes back to others with its cache, and a sender's may be used anew once it was read."""
    told: list[str] = []
    engine: Any = Engine.__new__(Engine)
    engine.weights = SimpleNamespace(
        release=lambda: told.append("release"),
        resume=lambda: told.append("resume"),
        write=lambda named, version: told.append(f"write {named} {version}"),
    )
    engine._model = SimpleNamespace(device=SimpleNamespace(type=device))
    engine._released = set()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    on_gpu = device == "cuda"
    for work, released, expected in [
        (lambda: engine.release(["kv_cache"]), {"kv_cache"}, ["empty"] * on_gpu),
        (lambda: engine.release(["weights"]), {"kv_cache", "weights"}, ["release", *["empty"] * on_gpu]),
        (lambda: engine.resume(["kv_cache"]), {"weights"}, []),
        (lambda: engine.resume(["weights"]), set(), ["resume"]),
        (lambda: engine.write_weights([], "7"), set(), ["write [] 7", *["synchronize"] * on_gpu]),
    ]:
        work()
        assert (engine._released, told) == (released, expected)
        told.clear()
