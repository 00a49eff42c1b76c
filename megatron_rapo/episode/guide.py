"""How an episode is asked for where it is not by the problem's prompt alone: hints, given texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guide:
    """What an episode is given beside, or in place of, the problem's prompt.

    Attributes:
        question: asked in place of the problem's, in the same template. None: the problem's own.
        begins: text that the response begins with; it is given, not sampled, and not trained on.
        response: a whole response that is given, not sampled, and trained on: a solution, or a teacher's.
        keeps_prompt: whether the episode is trained on under the prompt that it was sampled under. If not,
            it is under the problem's own: what was sampled is then off-policy.
        name: what the method calls it.
    """

    question: str | None = None
    begins: str = ""
    response: str | None = None
    keeps_prompt: bool = False
    name: str = ""

    @property
    def is_off_policy(self) -> bool:
        """Whether the tokens that are trained on were sampled under another prompt, or not at all."""
        return self.response is not None or (self.question is not None and not self.keeps_prompt)


PLAIN = Guide()
"""The problem's prompt, and nothing else."""
