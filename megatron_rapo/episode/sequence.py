"""Token sequences that carry what was sampled, with which probability, and by which weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.choices import Choices
from megatron_rapo.episode.facts import shown

_KINDS = {"token_ids": "iu", "sampled": "b", "log_probs": "f", "versions": "i"}
_KINDS_IN_WORDS = {"iu": "integers", "b": "booleans", "f": "floats", "i": "integers with a sign"}

TAUGHT = -2
"""The version of a token that was given, not sampled, and is trained on."""


@dataclass(frozen=True)
class Sequence:
    """One trainable sequence of tokens, in which one or several spans were sampled.

    Attributes:
        token_ids: `[tokens]` int32.
        sampled: `[tokens]` bool; False: prompt, what a tool answered, or a template's tokens.
        log_probs: `[tokens]` float32, the engine's, in nats, of the temperature-scaled distribution; NaN
            where not sampled.
        versions: `[tokens]` int32, of the weights that sampled the token; −1 where not sampled; `TAUGHT`
            where not sampled, but trained on.
        experts: `[tokens, layers, chosen]` (`ChoiceShape`), that the engine sent each token to in layers of a
            mixture; None where it was not asked.

    Raises:
        ValueError: the fields are no such arrays, or not of one length; a sampled token has no finite
            log-prob or no version; or the first token is sampled, which nothing predicts.
    """

    token_ids: npt.NDArray[np.int32]
    sampled: npt.NDArray[np.bool_]
    log_probs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    experts: Choices | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            field = getattr(self, name)
            if not isinstance(field, np.ndarray) or field.ndim != 1 or field.dtype.kind not in kinds:
                raise ValueError(
                    f"a sequence's {name} is {shown(field)}; give a NumPy array of one dimension, of "
                    f"{_KINDS_IN_WORDS[kinds]}"
                )
        lengths = {len(self.token_ids), len(self.sampled), len(self.log_probs), len(self.versions)}
        if len(lengths) > 1:
            raise ValueError(f"a sequence's fields have lengths {sorted(lengths)}; give each one a token")
        if self.experts is not None and len(self.experts) != len(self.token_ids):
            raise ValueError(
                f"a sequence of {len(self.token_ids)} tokens has choices of experts of {len(self.experts)}; "
                "give those of each, or None"
            )
        if not len(self.token_ids) or self.trained[0]:
            raise ValueError("a sequence must begin with a token that was given, not sampled")
        if not np.isfinite(self.log_probs[self.sampled]).all():
            raise ValueError("a sampled token has no finite log-prob; pass on what the engine returned")
        if (self.versions[self.sampled] < 0).any():
            raise ValueError(
                "a sampled token has no version of the weights; pass on what the engine returned"
            )

    @classmethod
    def of_response(
        cls,
        prompt: Iterable[int],
        token_ids: npt.NDArray[np.int32],
        log_probs: npt.NDArray[np.float32],
        version: int,
    ) -> Sequence:
        """A prompt and the one response that was sampled to it, by weights of one version."""
        given = np.fromiter(prompt, np.int32)
        lengths = [len(given), len(token_ids)]
        return cls(
            token_ids=np.concatenate([given, token_ids]),
            sampled=np.repeat([False, True], lengths),
            log_probs=np.concatenate([np.full(len(given), np.nan, np.float32), log_probs]),
            versions=np.repeat(np.array([-1, version], np.int32), lengths),
        )

    @classmethod
    def of_text(cls, prompt: Iterable[int], token_ids: Iterable[int]) -> Sequence:
        """A prompt and a response that was given, to be trained on."""
        given, response = np.fromiter(prompt, np.int32), np.fromiter(token_ids, np.int32)
        tokens = np.concatenate([given, response])
        return cls(
            token_ids=tokens,
            sampled=np.zeros(len(tokens), bool),
            log_probs=np.full(len(tokens), np.nan, np.float32),
            versions=np.repeat(np.array([-1, TAUGHT], np.int32), [len(given), len(response)]),
        )

    def under(self, prompt: Iterable[int], other: Iterable[int]) -> Sequence:
        """It with another prompt in place of the one that it begins with, after which no choices are known.

        Raises:
            ValueError: it does not begin with that prompt, all given.
        """
        old, new = np.fromiter(prompt, np.int32), np.fromiter(other, np.int32)
        size = len(old)
        if self.trained[:size].any() or not np.array_equal(self.token_ids[:size], old):
            raise ValueError(
                "a sequence does not begin with the prompt that its episode was given, so no other can take "
                "its place; begin each with the problem's token_ids"
            )
        return Sequence(
            token_ids=np.concatenate([new, self.token_ids[size:]]),
            sampled=np.concatenate([np.zeros(len(new), bool), self.sampled[size:]]),
            log_probs=np.concatenate([np.full(len(new), np.nan, np.float32), self.log_probs[size:]]),
            versions=np.concatenate([np.full(len(new), -1, np.int32), self.versions[size:]]),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens a loss may count."""
        return int(self.trained.sum())

    @property
    def sampled_tokens(self) -> int:
        """How many tokens were sampled."""
        return int(self.sampled.sum())

    @property
    def turns(self) -> tuple[int, ...]:
        """Tokens of each stretch that was sampled without a token given between."""
        edges = np.flatnonzero(np.diff(self.sampled, prepend=False, append=False))
        return tuple(int(length) for length in edges[1::2] - edges[::2])

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """`[tokens]`: those that a loss may count, sampled or taught."""
        return self.sampled | (self.versions == TAUGHT)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first sampled one; all, where none was sampled."""
        return int(self.sampled.argmax()) if self.sampled.any() else len(self)

    @property
    def oldest_version(self) -> int | None:
        """The lowest version of the weights that sampled a token; None where none was sampled."""
        return int(self.versions[self.sampled].min()) if self.sampled.any() else None

    @property
    def by_version(self) -> tuple[tuple[int, int], ...]:
        """Each version of the weights that sampled tokens, and how many; in order."""
        versions, counts = np.unique(self.versions[self.sampled], return_counts=True)
        return tuple(zip(versions.tolist(), counts.tolist(), strict=True))

    def leaves(self, vocabulary: int) -> bool:
        """Whether a sampled token is no token of a tokenizer of that size.

        Models' heads have spare rows, of tokens that do not exist; engines sample them, if hardly ever.
        """
        return bool((self.token_ids[self.sampled] >= vocabulary).any())

    def brief(self, beginnings: tuple[Beginning, ...] = ()) -> BriefSequence:
        """What planning needs of it, without the tokens; with what it begins with like others."""
        highest = int(self.token_ids[self.sampled].max(initial=-1))
        return BriefSequence(len(self), self.turns, highest, self.by_version, self.trained_tokens, beginnings)
