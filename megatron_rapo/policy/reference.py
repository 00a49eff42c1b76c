"""The frozen reference: it runs once per rollout batch and leaves annotations for the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rapo.config import Model
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import build_chunks
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.finite import check_finite, named_parameters
from megatron_rapo.policy.hidden_states import whole_tokens
from megatron_rapo.policy.pipeline import run_forward
from megatron_rapo.weights.load import load_weights


class Reference:
    """A frozen model under the policy's layout.

    Its body makes final hidden states; logits, which are V / hidden times larger, are made of them only for
    the tokens and at the moment that the loss needs them. The body may wait in host memory meanwhile.
    """

    def __init__(self, model: Model, architecture: Architecture, placement: Placement) -> None:
        """Builds the model and loads `model.reference_path` (default: what the policy starts at).

        Raises:
            RapoError: the weights do not load, or `model.reference_in_host_memory` has no effect.
        """
        self.placement = placement
        self._in_host_memory = model.reference_in_host_memory
        if self._in_host_memory and device().type == "cpu":
            raise RapoError(
                "model.reference_in_host_memory = true has no effect where the trainer computes on the CPU; "
                "remove it"
            )
        self.chunks = build_chunks(architecture, model, placement.layout)
        weights = model.reference_path or model.checkpoint or model.path
        load_weights(self.chunks, architecture, weights, placement.tensor_rank)
        what = f"the reference's weights of {weights}"
        check_finite(what, dict(named_parameters(self.chunks)), placement, "take an undamaged copy")
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        # The head is needed in every update, so it stays on the device even while the body is away.
        self._head = self.chunks[-1].head_weight.detach() if placement.is_last_stage else None
        self._leave_device()

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Leaves on the last stage's microbatches what the objective wants of the reference."""
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]
        for chunk in self.chunks:
            chunk.to(device())
        hidden_states = run_forward(self.chunks, microbatches, lambda _, hidden: self._kept(hidden))
        self._leave_device()
        for microbatch, hidden in zip(microbatches, hidden_states, strict=False):
            microbatch.reference_hidden = hidden
            if not objective.wants_reference_hidden:
                plain, flattened = objective.reference_log_probs(self.states(microbatch), microbatch)
                microbatch.reference_log_probs, microbatch.flattened_log_probs = plain, flattened
                microbatch.reference_hidden = None

    def states(self, microbatch: Microbatch) -> HeadStates:
        """The reference at a microbatch's response tokens, from the annotation."""
        assert microbatch.reference_hidden is not None, "annotate the batch with the reference first"
        assert self._head is not None, "only the last pipeline stage has the head"
        hidden = whole_tokens(microbatch.reference_hidden.to(device()), self.placement)
        return HeadStates(hidden[microbatch.is_response], self._head)

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden.cpu() if self._in_host_memory else hidden

    def _leave_device(self) -> None:
        if self._in_host_memory:
            for chunk in self.chunks:
                chunk.to("cpu")
