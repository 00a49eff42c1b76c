"""The tokens of a minibatch, with what is known of them before an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        tempered_log_probs: of that policy at the temperature `Method.tempered`; None where it has none.
        reference_log_probs: None where no term needs them, or its whole distribution.
        marks: of `Method.mark_responses`, by name.
        log_probs, entropies: of the policy as it now is, which an update before this one may have moved;
            in `weigh`, and where the method does not set `follows_policy`, the old ones.
        of_all_ranks: gathers values `[any]` of all ranks that share the minibatch, one rank's after the
            other's, in an order that depends on the layout: for quantiles and means. All of them must call it
            alike.
    """

    weights: Tensor
    advantages: Tensor
    phi: Tensor
    positions: Tensor
    engine_log_probs: Tensor
    old_log_probs: Tensor
    old_entropies: Tensor
    tempered_log_probs: Tensor | None
    reference_log_probs: Tensor | None
    marks: Mapping[str, Tensor]
    log_probs: Tensor
    entropies: Tensor
    of_all_ranks: Callable[[Tensor], Tensor]
