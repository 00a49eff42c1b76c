"""What passed the gateway in an episode, as the sequences that are trained on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_rapo.episode.environment import Transcript, Turn
from megatron_rapo.episode.sequence import Sequence as TokenSequence


class Record:
    """Turns, joined where a prompt goes on from what was sampled.

    A prompt that begins with all tokens of a sequence, what was sampled last included, continues it: what it
    has besides was given. Any other prompt begins a sequence of its own, in which all of it is given: so each
    token is trained on once, where it was sampled, whatever a program makes of its context.

    Attributes:
        last: the last turn that was sampled.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, list[Transcript]] = {}
        self.last: Turn | None = None

    def add(self, session: str, prompt: Sequence[int], turn: Turn) -> None:
        """Appends a turn.

        Args:
            session: of the agent within the episode that asked; sequences of two are never joined.
            prompt: that it continued.
            turn: what was sampled.
        """
        known = self._sessions.setdefault(session, [])
        continued = [one for one in known if one.token_ids == list(prompt[: len(one.token_ids)])]
        if continued:
            transcript = max(continued, key=lambda one: len(one.token_ids))
            transcript.add_given(prompt[len(transcript.token_ids) :])
        else:
            transcript = Transcript(prompt)
            known.append(transcript)
        transcript.add_turn(turn)
        self.last = turn

    def sequences(self, sessions: Collection[str] | None = None) -> tuple[TokenSequence, ...]:
        """Of these sessions, or of all."""
        return tuple(
            transcript.sequence()
            for session, transcripts in self._sessions.items()
            if sessions is None or session in sessions
            for transcript in transcripts
        )

    @property
    def sessions(self) -> list[str]:
        """Those that asked for a turn."""
        return list(self._sessions)
