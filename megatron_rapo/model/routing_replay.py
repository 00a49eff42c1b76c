"""The experts that a microbatch's rows chose, recorded in one pass and used again in later ones.

Megatron's routers ask an object (`RouterReplay`) for the best experts of rows. Megatron's own holds the
choices of one microbatch, and finds those of a recomputation by the order of backward passes. Here choices
come with the microbatch itself, by way of what describes its sequences: so each pass over it, a recomputed
layer's too, has its own, whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

Choices = dict[int, Tensor]
"""By number of the layer, from 1: `[rows, experts of a token]` uint8, or uint16 from 256 experts on.

The type's highest number is no expert's: a row of it is one whose choice is not known."""

_Best = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Routing:
    """What becomes of a microbatch's choices in a pass.

    Attributes:
        choices: of this rank's layers and rows.
        recorded: whether the pass chooses, and records them; else it takes them, where they are known.
    """

    choices: Choices
    recorded: bool


@dataclass
class Packed(PackedSeqParams):
    """What Megatron hands on to each layer.

    Attributes:
        routing: of its router; None: it chooses by itself.
    """

    routing: Routing | None = None


def compact(experts: int) -> torch.dtype:
    """The smallest type that has the numbers of so many experts, and one more."""
    return torch.uint8 if experts < 256 else torch.uint16


class Replay(RouterReplay):
    """What one layer's router asks for the experts of rows.

    Attributes:
        layer: its number, from 1.
        routing: of the pass that the layer is in; None: the router chooses by itself.
        changed: how many rows of the last one would have gone to other experts than those that were taken.
    """

    def __init__(self, experts: int) -> None:
        # Not Megatron's own beginning, by which a list of the process would keep each router alive.
        self.layer = 0
        self.routing: Routing | None = None
        self.changed: Tensor | None = None
        self._type = compact(experts)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: _Best | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts of each row, `[rows, topk]` both; the scores are differentiable.

        Args:
            scores: `[rows, experts]`.
            topk: experts of a row.
            num_groups, group_topk: Megatron's limits of a choice.
            default_compute_topk: that makes one.

        Raises:
            ValueError: the choices that are to be taken are of other rows.
        """
        assert default_compute_topk is not None
        routing, self.changed = self.routing, None
        if routing is None or routing.recorded:
            found, own = default_compute_topk(scores, topk, num_groups, group_topk)
            if routing is not None:
                routing.choices[self.layer] = own.to(self._type)
            return found, own
        kept = routing.choices[self.layer]
        taken = kept.long()
        if taken.shape != (len(scores), topk):
            raise ValueError(f"layer {self.layer} has {len(scores)} rows, and choices {tuple(taken.shape)}")
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups, group_topk)
            taken = torch.where(taken == torch.iinfo(kept.dtype).max, own, taken)
            self.changed = (own.sort(1).values != taken.sort(1).values).any(1).sum()
        return scores.gather(1, taken), taken


def hand_on(chunk: torch.nn.Module) -> None:
    """Lets each layer with a router tell it of the pass that it is in, a recomputed one's as well."""
    for layer in chunk.modules():
        router = getattr(getattr(layer, "mlp", None), "router", None)
        if isinstance(layer, TransformerLayer) and router is not None:
            layer.register_forward_pre_hook(_told, with_kwargs=True)


def _told(layer: Any, _: tuple[Any, ...], options: dict[str, Any]) -> None:
    packed = options.get("packed_seq_params")
    replay = layer.mlp.router.router_replay
    replay.layer = layer.layer_number
    replay.routing = packed.routing if isinstance(packed, Packed) else None
