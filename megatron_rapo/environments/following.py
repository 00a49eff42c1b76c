"""Episodes that begin as another one of their group did (`Guide.after`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rapo.environments.generating import Played
from megatron_rapo.episode.environment import Turn
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Followed:
    """What an episode begins with.

    Attributes:
        turns: of the other one, as they were.
        context: the tokens before its next turn.
        origin: number of the episode whose draws and answers of code outside it shares.
    """

    turns: tuple[Played, ...]
    context: tuple[int, ...]
    origin: int


def follow(
    before: Sequence[ScoredEpisode], after: tuple[int, int], decode: Callable[[Sequence[int]], str]
) -> Followed:
    """The first turns of one of a group's episodes.

    Args:
        before: the group's episodes so far, with tokens.
        after: number of one of them, and how many turns.
        decode: tokens as text.

    Raises:
        RapoError: there is no such episode, or it has not so many turns and one more.
    """
    number, count = after
    found = before[number] if 0 <= number < len(before) else None
    turns = [] if found is None else played_turns(found.episode, decode)
    if found is None or not 0 <= count < len(turns):
        has = "no such episode" if found is None else f"{len(turns)} turns, of which one must be left"
        raise RapoError(
            f"a guide's after = {after} asks for {count} turns of episode {number}, but there is {has}; ask "
            "for turns that it has"
        )
    if found.guide.question is not None or found.guide.begins:
        raise RapoError(
            f"a guide's after = {after} asks for turns of an episode that a guide's own question or begins "
            "asked for; ask for those of one with the problem's prompt"
        )
    origin = number
    while (earlier := before[origin].guide.after) is not None:
        origin = earlier[0]
    return Followed(tuple(turns[:count]), tuple(turns[count][0]), origin)


def played_turns(episode: object, decode: Callable[[Sequence[int]], str]) -> list[Played]:
    """An episode's turns, with the tokens that each continues; none of one whose tokens are elsewhere."""
    if not isinstance(episode, Episode):
        return []
    found = [turn for sequence in episode.sequences for turn in _turns_of(sequence, decode)]
    if found and episode.truncated:
        given, last = found[-1]
        found[-1] = given, Turn(last.token_ids, last.log_probs, last.versions, "length", last.text)
    return found


def _turns_of(sequence: TokenSequence, decode: Callable[[Sequence[int]], str]) -> list[Played]:
    edges = np.flatnonzero(np.diff(sequence.sampled, prepend=False, append=False))
    ids = sequence.token_ids.tolist()
    return [
        (
            ids[:start],
            Turn(
                sequence.token_ids[start:end],
                sequence.log_probs[start:end],
                sequence.versions[start:end],
                "stop",
                decode(ids[start:end]),
            ),
        )
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
