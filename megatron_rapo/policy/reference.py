"""The frozen reference: it runs once per rollout batch and leaves annotations for the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rapo.config import Model
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import build_chunks
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.pipeline import run_forward
from megatron_rapo.weights.load import load_weights


class _HeadAside(torch.nn.Module):
    """Stands in for the output layer: hands hidden states through, and keeps the head's weight for later."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return hidden, None


class Reference:
    """A frozen model under the policy's layout.

    Its body makes final hidden states; logits, which are V / hidden times larger, are made of them only for
    the tokens and at the moment that the loss needs them.
    """

    def __init__(self, model: Model, architecture: Architecture, placement: Placement) -> None:
        """Builds the model and loads `model.reference_path` (default `model.path`)."""
        self.placement = placement
        self.chunks = build_chunks(architecture, model, placement.layout)
        load_weights(self.chunks, architecture, model.reference_path or model.path, placement.tensor_rank)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        last = self.chunks[-1]
        if last.post_process:
            tied = last.share_embeddings_and_output_weights
            self._head = (
                last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
            ).detach()
            last.output_layer = _HeadAside(self._head)

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Leaves on the last stage's microbatches what the objective wants of the reference."""
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]
        hidden_states = run_forward(self.chunks, microbatches, lambda _, hidden: hidden)
        for microbatch, hidden in zip(microbatches, hidden_states, strict=False):
            if objective.wants_reference_logits:
                microbatch.reference_hidden = hidden
            else:
                logits = self._logits(self._gathered(hidden))
                microbatch.reference_log_probs = objective.statistics(logits, microbatch.targets).log_prob

    def response_logits(self, microbatch: Microbatch) -> Tensor:
        """`[response tokens, vocabulary / TP]`, from the annotation."""
        assert microbatch.reference_hidden is not None, "annotate the batch with the reference first"
        return self._logits(self._gathered(microbatch.reference_hidden)[microbatch.is_response])

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self._head)

    @torch.no_grad()
    def _gathered(self, hidden: Tensor) -> Tensor:
        """All of a context-parallel rank's tokens, which sequence parallelism shards over TP."""
        if not self.placement.layout.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, group=self.placement.tensor_group)
