"""The text of each token of a response, so that tokens can be coloured by their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what a tokenizer writes for part of a character
_LONGEST_CHARACTER = 8  # tokens, generously: UTF-8 has four bytes


class TokenTexts:
    """Splits responses into the texts of their tokens, special ones included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str] | None:
        """`[tokens]` texts that join to the whole; a character of several tokens stands at its first.

        None where tokens' texts do not join to the text of the whole, as some tokenizers have it.
        """
        whole = self._decode(tuple(token_ids))
        for texts in (self._alone(token_ids), self._after_another(token_ids)):
            if "".join(texts) == whole:
                return texts
        return None

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
