"""The tokens of a minibatch, with what is known of them before the step's first update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Annotated:
    """A minibatch's response tokens as this rank has them, `[tokens]` each; none, on some ranks.

    Attributes:
        weights: in the loss, as they stand; 0 where a token is masked out.
        advantages, phi: of the method.
        positions: int64, of the token in its response.
        engine_log_probs: as sampled, in nats.
        old_log_probs, old_entropies: of the policy that starts the step, in nats.
        reference_log_probs: None where no term needs them, or its whole distribution.
        of_all_ranks: gathers values `[tokens]` of all ranks that share the minibatch, in an order that
            depends on the layout: for quantiles and means. All of them must call it alike.
    """

    weights: Tensor
    advantages: Tensor
    phi: Tensor
    positions: Tensor
    engine_log_probs: Tensor
    old_log_probs: Tensor
    old_entropies: Tensor
    reference_log_probs: Tensor | None
    of_all_ranks: Callable[[Tensor], Tensor]
