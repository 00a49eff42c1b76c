"""One prompt, one response: what is judged is its text."""

from __future__ import annotations

from megatron_rapo.episode.environment import Generate, Transcript
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem


class SingleTurn:
    """The default: the policy answers, and the configured reward judges the answer."""

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """One response to the problem's prompt."""
        del seed  # it draws nothing of its own
        transcript = Transcript(problem.token_ids)
        turn = await generate(transcript.token_ids)
        transcript.add_turn(turn)
        return Episode((transcript.sequence(),), answer=turn.text, truncated=turn.truncated)
