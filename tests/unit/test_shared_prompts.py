"""Sequences that begin alike, computed once: positions, masks and gradients as if each stood apart."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rapo.certify import measure
from megatron_rapo.certify.cases import Case
from megatron_rapo.certify.certificate import DEFAULT, configuration, write_models
from megatron_rapo.certify.measure import Result, compare
from megatron_rapo.config import Parallel
from megatron_rapo.data.batching import Microbatch, Sample, plan_microbatches
from megatron_rapo.data.trees import count_rows, pack_trees, plan_trees
from megatron_rapo.episode import beginnings as beginnings_module
from megatron_rapo.episode.beginnings import LEAST_SAVED, beginnings
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.methods.named import METHODS
from megatron_rapo.model import branches as branches_module
from megatron_rapo.model.branches import Branches, attend, branching
from megatron_rapo.policy import batch as batch_module
from tests.shared_past import deep_batch
from tests.unit.one_rank import one_placement

# Of two tokens, so that many begin alike; one may be the beginning of another, or the same.
sequences_of_tokens = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=7).map(lambda ids: np.array(ids, np.int32)),
    min_size=1,
    max_size=7,
)


@contextmanager
def every_branch() -> Iterator[None]:
    """Whatever little it saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings_module, "LEAST_SAVED", 1)
        yield


def samples_of(sequences: Sequence[np.ndarray], prompt: Sequence[int] = ()) -> list[Sample]:
    """All tokens but the first are sampled; log-probs tell where each is from."""
    with every_branch():
        shared = beginnings(sequences, prompt)
    return [
        Sample(
            TokenSequence.of_response(
                ids[:1], ids[1:], -100.0 * number - np.arange(1, len(ids), dtype=np.float32), version=0
            ),
            phi=1.0,
            advantage=float(number),
            token_weight=1.0,
            beginnings=own,
        )
        for number, (ids, own) in enumerate(zip(sequences, shared, strict=True))
    ]


# What they share


@given(sequences=sequences_of_tokens)
def test_beginnings_are_what_others_have_too(sequences: list[np.ndarray]) -> None:
    with every_branch():
        found = beginnings(sequences)
    for ids, own in zip(sequences, found, strict=True):
        assert list(own) == sorted(set(own))
        for beginning in own:
            who = [other for other, theirs in zip(sequences, found, strict=True) if beginning in theirs]
            assert len(who) > 1
            assert all(np.array_equal(other[: beginning[0]], ids[: beginning[0]]) for other in who)


@given(sequences=sequences_of_tokens)
def test_all_that_is_shared_is_found(sequences: list[np.ndarray]) -> None:
    """As many rows as there are beginnings of any length."""
    distinct = {tuple(ids[: end + 1].tolist()) for ids in sequences for end in range(len(ids))}
    assert count_rows(samples_of(sequences)) == len(distinct)


def test_a_branch_that_saves_little_is_none() -> None:
    """Neither is the prompt's, unless it is named, of which others may have more elsewhere."""
    one = np.arange(LEAST_SAVED, dtype=np.int32)
    same, longer = one.copy(), np.append(one, 7).astype(np.int32)
    assert [len(own) for own in beginnings([one, longer])] == [1, 1]
    assert beginnings([one[1:], same[1:]]) == [(), ()]
    assert [own[0][0] for own in beginnings([one[1:], same[1:]], prompt=(1, 2, 3))] == [3, 3]
    assert [len(own) for own in beginnings([one], prompt=(0, 1))] == [1]
    assert beginnings([one], prompt=(5,)) == [()]


def test_brief_groups_tell_what_whole_ones_do() -> None:
    group = deep_batch()[0]
    brief = group.brief()
    assert brief.beginnings() == group.beginnings()
    assert any(len(own) == 2 for episode in group.beginnings() for own in episode)
    assert brief.brief() == brief


# Rows, positions and masks


def seen(microbatch: Microbatch) -> list[np.ndarray]:
    """The rows that each row attends to, in order: a mask from the bottom right over each segment's keys."""
    assert microbatch.tree is not None
    keys = microbatch.tree.keys.split(microbatch.tree.key_lengths)
    return [
        own[: len(own) - length + place + 1].numpy()
        for own, length in zip(keys, microbatch.lengths, strict=True)
        for place in range(length)
    ]


@given(sequences=sequences_of_tokens, total=st.integers(0, 40), prompt=st.integers(0, 2))
def test_each_place_sees_its_sequence_and_nothing_else(
    sequences: list[np.ndarray], total: int, prompt: int
) -> None:
    samples = samples_of(sequences, sequences[0][:prompt].tolist())
    packed = pack_trees(samples, multiple=2, total_tokens=total)
    assert packed.sources is not None
    assert sum(packed.lengths) == len(packed.token_ids) == len(packed.position_ids)
    assert sum(packed.lengths) % 2 == 0
    assert sum(packed.lengths) >= max(total, count_rows(samples))
    visible, place = seen(packed), 0
    for number, ids in enumerate(sequences):
        for end in range(1, len(ids)):
            rows = visible[int(packed.sources[place])]
            assert packed.token_ids[rows].tolist() == ids[:end].tolist()
            assert packed.position_ids[rows].tolist() == list(range(end))
            assert int(packed.targets[place]) == ids[end]
            assert int(packed.sequences[place]) == number
            assert int(packed.response_positions[place]) == end - 1
            assert float(packed.engine_log_probs[place]) == -100.0 * number - end
            place += 1
    assert place == len(packed.targets) == len(packed.sources)


def test_a_prompt_is_one_segment_and_its_last_row_predicts_each_response() -> None:
    ids = [np.array([5, 6, 7, token, 9], np.int32) for token in (1, 2, 3)]
    samples = samples_of(ids, prompt=(5, 6, 7))
    samples = [replace(one, sequence=TokenSequence.of_response(i[:3], i[3:], np.zeros(2, np.float32), 0))
               for one, i in zip(samples, ids, strict=True)]  # fmt: skip
    packed = pack_trees(samples, multiple=1)
    assert packed.lengths == [3, 2, 2, 2]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert packed.sources is not None
    assert packed.sources.tolist() == [2, 3, 2, 5, 2, 7]
    assert packed.targets.tolist() == [1, 9, 2, 9, 3, 9]
    hidden = torch.arange(9.0)[:, None].requires_grad_()
    packed.at_responses(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0, 0, 3, 1, 0, 1, 0, 1, 0]


def test_what_does_not_begin_as_it_says_is_refused() -> None:
    one, other = samples_of([np.array([1, 2, 3], np.int32), np.array([1, 2, 4], np.int32)])
    wrong = TokenSequence.of_response([1], np.array([5, 3], np.int32), np.zeros(2, np.float32), 0)
    with pytest.raises(ValueError, match="does not begin as it says"):
        pack_trees([one, replace(other, sequence=wrong)], multiple=1)


def test_no_sample_at_all_makes_padding() -> None:
    packed = pack_trees([], multiple=4)
    assert (packed.lengths, len(packed.targets)) == ([4], 0)
    assert not packed.is_response.any()


# Plans


@given(
    groups=st.lists(sequences_of_tokens, min_size=1, max_size=4),
    replicas=st.integers(1, 3),
    multiple=st.integers(1, 2),
)
@settings(deadline=None)
def test_plans_hold_each_sequence_once_and_no_replica_has_more_than_without(
    groups: list[list[np.ndarray]], replicas: int, multiple: int
) -> None:
    samples = [sample for group in groups for sample in samples_of(group, group[0][:1].tolist())]
    budget = 9
    plan = plan_trees(samples, replicas=replicas, token_budget=budget, count_multiple=multiple)
    microbatches = [part for share in plan for part in share]
    assert sorted(number for part in microbatches for number in part) == list(range(len(samples)))
    assert {len(share) % multiple for share in plan} == {0}
    assert len({len(share) for share in plan}) == 1
    rows = [[count_rows(samples[number] for number in part) for part in share] for share in plan]
    assert max(map(max, rows)) <= budget
    lengths = [len(sample.sequence) for sample in samples]
    apart = plan_microbatches(lengths, replicas=replicas, token_budget=budget, count_multiple=multiple)
    assert max(map(sum, rows)) <= max(sum(lengths[n] for part in share for n in part) for share in apart)


def test_a_group_stays_together_where_it_can() -> None:
    group = [np.array([1, 2, 3, 4, token], np.int32) for token in range(4)]
    other = [ids + 10 for ids in group]
    samples = [*samples_of(group), *samples_of(other)]
    assert plan_trees(samples, replicas=1, token_budget=16) == [[[0, 1, 2, 3, 4, 5, 6, 7]]]
    assert plan_trees(samples, replicas=2, token_budget=16) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    # Cut in two, each part with the prompt, so that four replicas have something to do.
    four = [part for share in plan_trees(samples, replicas=4, token_budget=16) for part in share]
    assert sorted(four) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert {len(part) for part in plan_trees(samples, replicas=1, token_budget=6)[0]} == {2}


# Attention


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention of `[rows, heads, dim]` under a mask `[rows, rows]`, with a key head for two."""
    key, value = (each.repeat_interleave(query.size(1) // each.size(1), dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def tensors(rows: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value of 4 and 2 heads."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, heads, 3, generator=random, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]


def branches_of(packed: Microbatch) -> Branches:
    assert packed.tree is not None
    return Branches.of(packed.lengths, packed.tree.key_lengths, packed.tree.keys)


@given(sequences=sequences_of_tokens)
@settings(deadline=None, max_examples=40)
def test_attention_and_its_gradients_are_those_of_a_dense_mask(sequences: list[np.ndarray]) -> None:
    packed = pack_trees(samples_of(sequences), multiple=1)
    rows = sum(packed.lengths)
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for row, keys in enumerate(seen(packed)):
        mask[row, keys] = True
    inputs = tensors(rows)
    found = attend(*inputs, branches_of(packed), scale=0.7)
    expected = dense(*inputs, mask, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    of_found, of_expected = (torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-11, atol=1e-12)


def test_a_prompt_has_the_gradient_of_all_its_responses() -> None:
    """Of each sequence apart, with copies of the prompt, summed: fp64."""
    ids = [np.array([5, 6, 7, 8, *([token] * length)], np.int32) for token, length in enumerate((3, 1, 5))]
    packed = pack_trees(samples_of(ids, prompt=(5, 6, 7, 8)), multiple=1)
    inputs = tensors(sum(packed.lengths))
    found = attend(*inputs, branches_of(packed), scale=0.7)
    total = torch.zeros((), dtype=torch.float64)
    starts = np.cumsum([4, 3, 1])
    for start, length in zip(starts, (3, 1, 5), strict=True):
        path = torch.cat([torch.arange(4), torch.arange(start, start + length)])
        causal = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        apart = dense(*(each[path] for each in inputs), causal, 0.7)
        torch.testing.assert_close(found[path], apart, rtol=1e-12, atol=1e-12)
        total = total + apart.square().sum()
    copies = torch.tensor([3.0] * 4 + [1.0] * 9, dtype=torch.float64)[:, None]
    expected = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(
        torch.autograd.grad((found.square() * copies).sum(), inputs), expected, rtol=1e-11, atol=1e-12
    )


# The form of Transformer Engine


class PlainKernel(torch.nn.Module):
    """What `transformer_engine.pytorch.DotProductAttention` computes of packed sequences, by arguments."""

    def __init__(self, *_: Any, **made: Any) -> None:
        super().__init__()
        self.scale = made["softmax_scale"]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **asked: Any
    ) -> Tensor:
        assert asked["qkv_format"] == "thd"
        self.mask_type = asked["attn_mask_type"]
        assert asked["cu_seqlens_q"].dtype == asked["cu_seqlens_kv"].dtype == torch.int32
        lengths = [asked[f"cu_seqlens_{which}"].diff().tolist() for which in ("q", "kv")]
        assert [asked["max_seqlen_q"], asked["max_seqlen_kv"]] == [max(each) for each in lengths]
        found = []
        for one, (queries, keys) in enumerate(zip(*lengths, strict=True)):
            first = keys - queries if self.mask_type == "padding_causal_bottom_right" else 0
            mask = torch.arange(keys) <= torch.arange(queries)[:, None] + first
            parts = (
                each.split(sizes)[one]
                for each, sizes in zip((query, key, value), (lengths[0], *[lengths[1]] * 2), strict=True)
            )
            found.append(dense(*parts, mask, self.scale))
        return torch.cat(found)


def megatrons_wrapper() -> type:
    """Megatron's own wrapper of it, of the installed release, over the plain kernel."""
    module = importlib.import_module("megatron.core.extensions.transformer_engine")
    source = ast.parse(Path(module.__file__ or "").read_text())
    [definition] = [
        node
        for node in source.body
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    ]
    names = {
        **vars(module),
        "te": SimpleNamespace(pytorch=SimpleNamespace(DotProductAttention=PlainKernel)),
        "HAVE_TE": True,
        "is_te_min_version": lambda *_, **__: True,
        "get_te_version": lambda: module.PkgVersion("2.9.0"),
    }
    exec(compile(ast.Module([definition], []), module.__file__ or "", "exec"), names)
    found: type = names["TEDotProductAttention"]
    return found


def test_transformer_engine_is_asked_for_the_same(rank: None) -> None:
    """Keys gathered, causal from the bottom right over lengths of their own; without branches, as ever."""
    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=4, num_query_groups=2)
    core = branching(megatrons_wrapper())(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=0.7,
    )
    ids = [np.array([5, 6, 7, *([token] * length)], np.int32) for token, length in enumerate((3, 1, 5))]
    branches = branches_of(pack_trees(samples_of(ids, prompt=(5, 6, 7)), multiple=1))
    inputs = tensors(12)
    found = core(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=branches)
    assert core.mask_type == "padding_causal_bottom_right"
    torch.testing.assert_close(found, attend(*inputs, branches, scale=0.7), rtol=1e-12, atol=1e-12)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    plain = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=7, max_seqlen_kv=7
    )
    core(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=plain)
    assert core.mask_type == "padding_causal"


# The whole loss and gradient against plain PyTorch


@pytest.fixture(scope="module")
def rank() -> Iterator[None]:
    with one_placement():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, rank: None) -> Path:
    directory = tmp_path_factory.mktemp("certified")
    write_models(directory, DEFAULT)
    return directory


WHOLE = Case("shared prompts", Parallel(), share_prompts=True)
CUT = Case("shared prompts, cut, permuted", Parallel(), token_budget=64, permuted=True, share_prompts=True)


def certified(models: Path, *chosen: Case, method: str = "rapo") -> list[Result]:
    options = METHODS[method].Options(method=method)
    return compare(configuration(models, options), chosen, is_main=True)


@pytest.mark.parametrize("method", ["rapo", "gspo", "distill"])
def test_loss_and_gradient_are_plain_pytorchs(models: Path, method: str) -> None:
    """Ratios of whole responses, and a teacher, too."""
    results = certified(models, WHOLE, CUT, method=method)
    assert all(result.passed for result in results), results


def test_turns_share_their_past(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "batch_of", deep_batch)
    results = certified(models, WHOLE, CUT)
    assert all(result.passed for result in results), results


def sees_siblings(patch: pytest.MonkeyPatch) -> None:
    """A segment that goes on from another attends to all rows before it, so a response to its sibling."""
    right = Branches.of

    def all_before(queries: Sequence[int], keys: Sequence[int], rows: Tensor, *given: Any) -> Branches:
        ends = np.cumsum(queries).tolist()
        parts = [
            torch.arange(end) if len(own) > length else own
            for end, length, own in zip(ends, queries, rows.split(list(keys)), strict=True)
        ]
        return right(queries, [len(part) for part in parts], torch.cat(parts), *given)

    patch.setattr(Branches, "of", all_before)


def goes_on_from_siblings(patch: pytest.MonkeyPatch) -> None:
    """Positions do, as far as there are any."""

    def all_in_a_row(samples: Sequence[Sample], **options: Any) -> Microbatch:
        packed = pack_trees(samples, **options)
        last = int(packed.position_ids.max())
        return replace(packed, position_ids=torch.arange(len(packed.position_ids)).clamp(max=last))

    patch.setattr(batch_module, "pack_trees", all_in_a_row)


class _Once(torch.autograd.Function):
    """Gathers rows; the backward gives a row the gradient of one of its copies."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(rows)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        found = gradients[0].new_zeros(ctx.rows, *gradients[0].shape[index.dim() :])
        found[index.flatten()] = gradients[0].flatten(0, index.dim() - 1)
        return found, None


def counts_keys_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(branches_module, "gathered", _Once.apply)


def counts_the_last_row_once(patch: pytest.MonkeyPatch) -> None:
    def once(self: Microbatch, hidden: Tensor) -> Tensor:
        assert self.sources is not None
        found: Tensor = _Once.apply(hidden, self.sources[self.is_response])
        return found

    patch.setattr(Microbatch, "at_responses", once)


@pytest.mark.parametrize(
    ("fault", "loss_too"),
    [
        (sees_siblings, True),
        (goes_on_from_siblings, True),
        (counts_keys_once, False),
        (counts_the_last_row_once, False),
    ],
)
def test_a_planted_fault_is_reported(
    models: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, loss_too: bool
) -> None:
    fault(monkeypatch)
    for result in certified(models, WHOLE):
        assert result.gradient_error > 1e-3
        assert (result.loss_error > 1e-3) == loss_too
