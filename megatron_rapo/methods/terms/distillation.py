"""What pulls the policy towards a teacher: an exact divergence over the whole vocabulary, a value a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rapo.methods.terms.term import AtToken, Need, Term, present

if TYPE_CHECKING:
    from torch import Tensor

TeacherDivergence = Literal["forward", "reverse", "jensen_shannon"]

_NEEDS: Mapping[TeacherDivergence, Need] = {
    "forward": Need.TEACHER_FORWARD_KL,
    "reverse": Need.TEACHER_REVERSE_KL,
    "jensen_shannon": Need.TEACHER_JENSEN_SHANNON,
}


@dataclass(frozen=True)
class Distillation(Term):
    """With τ the teacher: KL(τ ‖ π), KL(π ‖ τ), or between both the Jensen–Shannon divergence."""

    kind: TeacherDivergence

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the kind reads of the teacher."""
        return frozenset({_NEEDS[self.kind]})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `distillation`."""
        divergence = present(getattr(token, _NEEDS[self.kind].value))
        return divergence, {"distillation": divergence}
