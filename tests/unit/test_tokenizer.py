"""The tokenizer of a model directory, and which rows of the head are its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.errors import RapoError
from tests.models import EOS, make_hf_model, make_tokenizer


def sparse_tokenizer(*, eos: int) -> PreTrainedTokenizerFast:
    """Three tokens, with ids 2, 5 and `eos`."""
    vocabulary = {"a": 2, "b": 5, "<eos>": eos}
    model = models.BPE(vocab=vocabulary, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>")


def test_a_vocabulary_without_holes_is_its_tokens() -> None:
    assert vocabulary_size(make_tokenizer(61), rows=64) == 61


def test_added_tokens_belong_to_it() -> None:
    tokenizer = make_tokenizer(61)
    tokenizer.add_tokens(["<think>"])
    assert vocabulary_size(tokenizer, rows=64) == 62


def test_it_reaches_to_the_highest_id_where_ids_have_holes() -> None:
    tokenizer = sparse_tokenizer(eos=57)
    assert len(tokenizer) == 3
    assert vocabulary_size(tokenizer, rows=61) == 58


def test_it_has_no_more_rows_than_the_head() -> None:
    assert vocabulary_size(make_tokenizer(61), rows=32) == 32


def test_a_head_without_the_token_that_ends_a_response_is_refused() -> None:
    with pytest.raises(
        RapoError, match=r"ends texts with token id 57, but the model's head has 57 rows; use"
    ):
        vocabulary_size(sparse_tokenizer(eos=57), rows=57)


def test_the_tokenizer_beside_the_weights_is_loaded(tmp_path: Path) -> None:
    assert load_tokenizer(make_hf_model(tmp_path, num_hidden_layers=1)).eos_token_id == EOS


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"has no tokenizer \(none of tokenizer.json, .*; copy the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", "\xff"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, file: str, content: str) -> None:
    model = make_hf_model(tmp_path, num_hidden_layers=1)
    (model / file).write_text(content, encoding="latin-1")
    with pytest.raises(RapoError, match=r"no tokenizer that transformers loads .*; copy the tokenizer files"):
        load_tokenizer(model)
