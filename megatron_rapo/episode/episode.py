"""What an environment returns for one try at a problem, and what judging it came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.score import Score
from megatron_rapo.episode.sequence import Sequence


@dataclass(frozen=True)
class Episode:
    """One try at a problem.

    Attributes:
        sequences: what is trained on; all of them share the episode's reward.
        answer: the text that is judged, and that people are shown.
        score: the environment's own; None: the configured reward judges `answer`.
        truncated: whether a limit of tokens or turns cut it off.
        facts: named numbers that are logged as the mean of `environment/<name>`.
    """

    sequences: tuple[Sequence, ...]
    answer: str
    score: Score | None = None
    truncated: bool = False
    facts: Mapping[str, float] = field(default_factory=dict)

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

    @property
    def given_tokens(self) -> int:
        """Tokens that were given after the prompt: between turns, and as contexts of further sequences."""
        if not self.sequences:
            return 0
        return self.tokens - self.sampled_tokens - self.sequences[0].prompt_tokens

    def leaves(self, vocabulary: int) -> bool:
        """Whether a sampled token is no token of a tokenizer of that size."""
        return any(sequence.leaves(vocabulary) for sequence in self.sequences)

    def brief(self, beginnings: Iterable[tuple[Beginning, ...]]) -> BriefEpisode:
        """What planning needs of it, without tokens and text; `beginnings` are of each of its sequences."""
        pairs = zip(self.sequences, beginnings, strict=True)
        sequences = tuple(sequence.brief(shared) for sequence, shared in pairs)
        return BriefEpisode(sequences, self.score, self.truncated, self.facts)


@dataclass(frozen=True)
class ScoredEpisode:
    """An episode with what judging it came to; brief where all ranks have it (`episode.brief`).

    Attributes:
        guide: what it was given beside the problem's prompt (`Method.ask`).
    """

    episode: Episode | BriefEpisode
    verification: Verification
    guide: Guide = PLAIN

    @property
    def reward(self) -> float | None:
        """None where it is unknown."""
        return self.verification.reward

    def brief(self, beginnings: Iterable[tuple[Beginning, ...]]) -> ScoredEpisode:
        """It without tokens and text (`Episode.brief`)."""
        if isinstance(self.episode, BriefEpisode):
            return self
        return ScoredEpisode(self.episode.brief(beginnings), self.verification, self.guide)
