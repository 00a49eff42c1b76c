"""The text of each token of a response, so that tokens can be coloured by their log-probs."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rapo.data.tokenizer import FILES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what a tokenizer writes for part of a character
_LONGEST_CHARACTER = 8  # tokens, generously: UTF-8 has four bytes
_STRETCH = 16  # tokens that are decoded together, at least


class TokenTexts:
    """Splits responses into the texts of their tokens, special ones included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """`[tokens]` texts that join to the text of the whole; a character of several tokens stands at its
        first.
        """
        ids = tuple(token_ids)
        whole = self._decode(ids)
        # Two quick ways, of which one fits most responses, and one that fits all.
        for texts in (self._alone(ids), self._after_another(ids)):
            if "".join(texts) == whole:
                return texts
        return self._by_growth(ids, whole)

    def _alone(self, ids: Sequence[int]) -> list[str]:
        texts: list[str] = []
        while len(texts) < len(ids):
            start = len(texts)
            for size in range(1, min(_LONGEST_CHARACTER, len(ids) - start) + 1):
                text = self._text(tuple(ids[start : start + size]))
                if _BROKEN not in text:
                    break
            else:
                size, text = 1, self._text((ids[start],))
            texts += [text] + [""] * (size - 1)
        return texts

    def _after_another(self, ids: Sequence[int]) -> list[str]:
        """Tokenizers that strip a text's leading space: the text is what a token adds to the one before."""
        texts = [self._text((ids[0],))] if len(ids) else []
        for before, token in pairwise(ids):
            texts.append(self._text((before, token)).removeprefix(self._text((before,))))
        return texts

    def _by_growth(self, ids: tuple[int, ...], whole: str) -> list[str]:
        """A token's text is what the decoded beginning has in common with the whole, and had not before."""
        texts = [""] * len(ids)
        told = 0  # characters of the whole that tokens have
        start = begun = 0  # the stretch that is decoded, and where its text begins in the whole
        context = 0  # the stretch is decoded behind this token: what its first one looks like hangs on it
        opened = None  # the token that a character which is not whole yet began with
        for place in range(len(ids)):
            text = self._decode(ids[context : place + 1])
            text = text.removeprefix(self._decode(ids[context:start]))
            known = max(told, begun + _common(text, whole[begun : begun + len(text)]))
            grown, told = whole[told:known], known
            is_clean = text == whole[begun:told]
            if opened is not None and grown:
                texts[opened], grown = grown[0], grown[1:]
                opened = None
            texts[place] += grown
            if not is_clean and opened is None:
                opened = place
            if is_clean and not text.endswith(_BROKEN) and place + 1 - start >= _STRETCH:
                start, begun = place + 1, told
                context = self._whole_character(ids, start)
        if ids:
            texts[-1] += whole[told:]
        return texts

    def _whole_character(self, ids: tuple[int, ...], end: int) -> int:
        """Where the last tokens before `end` begin that make whole characters."""
        for size in range(1, _LONGEST_CHARACTER):
            if _BROKEN not in self._decode(ids[end - size : end]):
                return end - size
        return end - _LONGEST_CHARACTER

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self._known:
            self._known[ids] = self._decode(ids)
        return self._known[ids]

    def _decode(self, ids: tuple[int, ...]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def find_token_texts(places: Sequence[Path]) -> TokenTexts | None:
    """Splits responses of a model by its tokenizer; None where that is not on this machine.

    Args:
        places: model directories and runs; of a run, its final model, or the one that it began with.

    Raises:
        RapoError: there is one, and it does not load.
    """
    for directory in _model_directories(places):
        if any((directory / name).is_file() for name in FILES):
            return TokenTexts(load_tokenizer(directory))
    return None


def _model_directories(places: Sequence[Path]) -> list[Path]:
    found = []
    for place in places:
        found += [place, place / "model"]
        config = place / "config.toml"
        if config.is_file():
            found.append(Path(tomllib.loads(config.read_text(encoding="utf-8"))["model"]["path"]))
    return found


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
