"""The verifiers by name: the one place where a verifier is entered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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

if TYPE_CHECKING:
    VerifierName = str
else:
    VerifierName = Literal[tuple(VERIFIERS)]


def verifier_address(name: str) -> str:
    """The `module:function` of a verifier.

    Raises:
        RapoError: there is none of this name.
    """
    if name not in VERIFIERS:
        raise RapoError(f'reward.verifier = "{name}" does not exist; choose one of {", ".join(VERIFIERS)}')
    return VERIFIERS[name]
