"""What responses earn: the built-in verifiers and rewards by name, and what a run's options come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_rapo.errors import RapoError

VERIFIERS = {
    "math": "megatron_rapo.reward.math_answers:is_correct",
    "countdown": "megatron_rapo.data.tasks.countdown:is_correct",
    "integer": "megatron_rapo.data.tasks.arithmetic:is_correct",
}
"""Name (`reward.verifier`) to the `module:function` that decides; function(response, answer) → bool.

A module may also have `final_answer(response)` → the answer as it reads it, or None, and `stating(answer)`
→ a response that gives this answer, by which the golds of files are judged when they are loaded.

Addresses, not functions: only verifier processes import them, each the one that it needs.
"""

REWARDS = {
    "format": "megatron_rapo.reward.format:score",
    "reasoning_gym": "megatron_rapo.reward.gym:score",
}
"""Name (`use` of `reward.functions`) to a function(response, problem, **options) → number, as users write."""

if TYPE_CHECKING:
    VerifierName = str
else:
    VerifierName = Literal[tuple(VERIFIERS)]


@dataclass(frozen=True)
class RewardPart:
    """One function whose values make a reward.

    Attributes:
        address: its `module:name`.
        option: that names it, as errors call it.
        name: the metric of its values is `reward/<name>`; None: it has none, as the reward is its value.
        verifies: whether it is function(response, answer) → bool.
        options: further arguments, by name.
    """

    address: str
    option: str
    name: str | None = None
    weight: float = 1.0
    verifies: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        names = {address: name for name, address in (VERIFIERS | REWARDS).items()}
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return names.get(self.address, self.address) + (f"({options})" if options else "")


@dataclass(frozen=True)
class RewardPlan:
    """How the responses to a data set's problems are rewarded: by the weighted sum of its parts.

    `str()` tells plans apart, and names them in evaluations.

    Attributes:
        correct_at: the reward from which on a response counts as correct.
        code: folders of the user's own modules.
    """

    parts: tuple[RewardPart, ...]
    correct_at: float = 1.0
    code: tuple[Path, ...] = ()

    @property
    def needs_answers(self) -> bool:
        """Whether problems must have gold answers."""
        return any(part.verifies for part in self.parts)

    @property
    def is_verifier(self) -> bool:
        """Whether one built-in verifier decides alone."""
        return len(self.parts) == 1 and self.parts[0].verifies and self.parts[0].name is None

    def __str__(self) -> str:
        if self.parts[0].name is None:
            text = str(self.parts[0])
        else:
            text = " + ".join(f"{part.weight:g} {part}" for part in self.parts)
        return text if self.correct_at == 1.0 else f"{text}, correct at {self.correct_at:g}"


def built_in(name: str) -> RewardPlan:
    """The plan of a verifier, or of a built-in reward, alone.

    Raises:
        RapoError: there is none of this name.
    """
    if name in REWARDS:
        return RewardPlan((RewardPart(REWARDS[name], "data.source"),))
    if name not in VERIFIERS:
        raise RapoError(f'reward.verifier = "{name}" does not exist; choose one of {", ".join(VERIFIERS)}')
    return RewardPlan((RewardPart(VERIFIERS[name], "reward.verifier", verifies=True),))
