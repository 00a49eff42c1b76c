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
        after: number of an episode of the group, and how many of its turns this one begins with, as they
            were; what follows is sampled anew, or is `response`.
        temperature: at which it is sampled. None: the rollouts'.
        keeps_prompt: whether the episode is trained on under the prompt that it was sampled under. If not,
            it is under the problem's own: what was sampled is then off-policy.
        name: what the method calls it.
    """

    question: str | None = None
    begins: str = ""
    response: str | None = None
    after: tuple[int, int] | None = None
    temperature: float | None = None
    keeps_prompt: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.after is not None and (self.question is not None or self.begins):
            raise ValueError("after: what goes on from an episode has its prompt; give no question or begins")
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} is no positive number")

    @property
    def is_off_policy(self) -> bool:
        """Whether the tokens that are trained on were sampled otherwise than the policy would, or not at all.

        Under another prompt, or at another temperature.
        """
        asked_otherwise = self.question is not None and not self.keeps_prompt
        return self.response is not None or self.temperature is not None or asked_otherwise


PLAIN = Guide()
"""The problem's prompt, and nothing else."""
