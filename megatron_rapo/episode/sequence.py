"""Token sequences that carry what was sampled, with which probability, and by which weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.brief import BriefSequence


@dataclass(frozen=True)
class Sequence:
    """One trainable sequence of tokens, in which one or several spans were sampled.

    Attributes:
        token_ids: `[tokens]` int32.
        sampled: `[tokens]` bool; False: prompt, what a tool answered, or a template's tokens.
        log_probs: `[tokens]` float32, the engine's, in nats, of the temperature-scaled distribution; NaN
            where not sampled.
        versions: `[tokens]` int32, of the weights that sampled the token; −1 where not sampled.

    Raises:
        ValueError: the fields are not of one length, a sampled token has no finite log-prob or no version, or
            the first token is sampled, which nothing predicts.
    """

    token_ids: npt.NDArray[np.int32]
    sampled: npt.NDArray[np.bool_]
    log_probs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.sampled), len(self.log_probs), len(self.versions)}
        if len(lengths) > 1:
            raise ValueError(f"a sequence's fields have lengths {sorted(lengths)}; give each one a token")
        if not len(self.token_ids) or self.sampled[0]:
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

    def __len__(self) -> int:
        return len(self.token_ids)

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
    def oldest_version(self) -> int | None:
        """The lowest version of the weights that sampled a token; None where none was sampled."""
        return int(self.versions[self.sampled].min()) if self.sampled.any() else None

    def leaves(self, vocabulary: int) -> bool:
        """Whether a sampled token is no token of a tokenizer of that size.

        Models' heads have spare rows, of tokens that do not exist; engines sample them, if hardly ever.
        """
        return bool((self.token_ids[self.sampled] >= vocabulary).any())

    def brief(self) -> BriefSequence:
        """What planning needs of it, without the tokens."""
        highest = int(self.token_ids[self.sampled].max(initial=-1))
        return BriefSequence(len(self), self.turns, highest, self.oldest_version)
