"""How the routers of a mixture of experts choose in a step's updates, and what they are charged for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import Model, RunConfig
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body
from megatron_rapo.model.router import BALANCE, CHANGED, ENTROPY, SUMS, Router, Z
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement


class ExpertRouting:
    """The routers of this rank's chunks; none of a dense model, of which nothing is told."""

    def __init__(
        self, chunks: Sequence[Body], architecture: Architecture, model: Model, placement: Placement
    ) -> None:
        self._chunks = chunks
        self._architecture = architecture
        self._model = model
        self._placement = placement

    def begin_step(self) -> None:
        """Nothing is measured yet."""
        for _, router in self._routers():
            router.measured.zero_()

    def begin_update(self, minibatch: Sequence[Microbatch]) -> None:
        """Charges each token its share of a mean over the minibatch, padding included; all ranks call it."""
        if self._architecture.experts is None:
            return
        tokens = torch.tensor(float(sum(len(each.token_ids) for each in minibatch)), device=device())
        dist.all_reduce(tokens, group=self._placement.gradient_group)
        for _, router in self._routers():
            router.balance = self._model.balance_coefficient / float(tokens)
            router.z = self._model.router_z_coefficient / float(tokens)

    def metrics(self, *, replays: bool) -> Mapping[str, float]:
        """Of the tokens of the step's updates, the same on all ranks, which call it together.

        `replays` says whether routers took choices that were made before.
        """
        experts = self._architecture.experts
        if experts is None:
            return {}
        measured = torch.zeros(self._architecture.layers, experts.count + SUMS, dtype=torch.float64)
        for layer, router in self._routers():
            measured[layer] += router.measured.cpu()
        dist.all_reduce(measured, group=self._placement.host_group)
        return summarise(measured, experts.chosen, replays=replays)

    def _routers(self) -> Iterator[tuple[int, Router]]:
        """Each with the number of its layer, from 0."""
        for chunk in self._chunks:
            for module in chunk.modules():
                if isinstance(module, Router):
                    yield module.layer_number - 1, module


def told_choices(config: RunConfig, architecture: Architecture) -> ChoiceShape | None:
    """Of the choices that engines tell with what they sample; None where none are replayed."""
    experts = architecture.experts
    if experts is None or config.algorithm.routing_replay != "engine":
        return None
    return ChoiceShape(architecture.layers, experts.count, experts.chosen)


def summarise(measured: Tensor, chosen: int, *, replays: bool) -> dict[str, float]:
    """Metrics of what all ranks' routers measured, `[layers, experts + SUMS]` (`Router.measured`).

    Args:
        measured: of each layer.
        chosen: experts of a token.
        replays: whether routers took choices that were made before.
    """
    picks = measured[:, :-SUMS]
    tokens = picks.sum(1, keepdim=True) / chosen  # of a layer; each layer has all
    load = picks / picks.mean(1, keepdim=True)
    means = measured[:, -SUMS:] / tokens
    return {
        "router/load_max": float(load.max()),
        "router/load_min": float(load.min()),
        "router/idle_experts": float((picks == 0).double().mean()),
        "router/entropy": float(means[:, ENTROPY].mean()) / math.log(picks.size(1)),
        "router/balance_loss": float(means[:, BALANCE].mean()),
        "router/z_loss": float(means[:, Z].mean()),
        **({"router/replay_changed": float(means[:, CHANGED].mean())} if replays else {}),
    }
