"""Episodes without tokens and texts: what every rank has of all of them, and plans with.

A step's tokens are many: they go from the rank that sampled them to those that train on them alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError

_OF_TOKENS = ("token_ids", "sampled", "log_probs", "versions", "experts")


@dataclass(frozen=True)
class BriefSequence:
    """A `Sequence` without its tokens; to read `token_ids`, `sampled`, `log_probs` or `versions` is an error.

    Attributes:
        tokens: how many it has (`len`).
        turns: tokens of each stretch that was sampled without a token given between.
        highest_sampled: the highest id of a sampled token; −1 where none was.
        by_version: each version of the weights that sampled tokens, and how many; in order.
        trained_tokens: how many a loss may count: those sampled, and those taught.
        beginnings: what it begins with like others of its group (`beginnings`).
    """

    tokens: int
    turns: tuple[int, ...]
    highest_sampled: int
    by_version: tuple[tuple[int, int], ...]
    trained_tokens: int
    beginnings: tuple[Beginning, ...] = ()

    def __len__(self) -> int:
        return self.tokens

    @property
    def sampled_tokens(self) -> int:
        """How many of its tokens were sampled."""
        return sum(self.turns)

    @property
    def oldest_version(self) -> int | None:
        """The lowest version of the weights that sampled a token; None where none was."""
        return min((version for version, _ in self.by_version), default=None)

    def leaves(self, vocabulary: int) -> bool:
        """See `Sequence.leaves`."""
        return self.highest_sampled >= vocabulary

    def __getattr__(self, name: str) -> Any:
        raise _elsewhere(name) if name in _OF_TOKENS else AttributeError(name)


@dataclass(frozen=True)
class BriefEpisode:
    """An `Episode` without tokens and text; to read `answer` is an error."""

    sequences: tuple[BriefSequence, ...]
    score: Score | None
    truncated: bool
    facts: Mapping[str, float]

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were sampled, of all sequences."""
        return sum(sequence.sampled_tokens for sequence in self.sequences)

    @property
    def trained_tokens(self) -> int:
        """Tokens that a loss may count, of all sequences."""
        return sum(sequence.trained_tokens for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens that the trainer sees."""
        return sum(len(sequence) for sequence in self.sequences)

    def leaves(self, vocabulary: int) -> bool:
        """See `Episode.leaves`."""
        return any(sequence.leaves(vocabulary) for sequence in self.sequences)

    def __getattr__(self, name: str) -> Any:
        raise _elsewhere(name) if name == "answer" else AttributeError(name)


def _elsewhere(name: str) -> RapoError:
    """The error of a line that reads what is on another rank."""
    reader = sys._getframe(2)  # that line: between are this function and `__getattr__`
    return RapoError(
        f"{reader.f_code.co_filename}, line {reader.f_lineno}, reads `{name}` of a response, which only the "
        "ranks that train on it have; a method that reads tokens or texts of responses says so by "
        "`reads_responses = True` in its class, and all ranks have them (docs/methods.md)"
    )
