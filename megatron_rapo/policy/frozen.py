"""Frozen models beside the policy: they run once per rollout batch and leave annotations for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_rapo.config import Model
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body, build_chunks
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.finite import check_finite, named_parameters
from megatron_rapo.policy.hidden_states import whole_tokens
from megatron_rapo.policy.pipeline import run_forward
from megatron_rapo.weights.load import load_weights


class FrozenModel:
    """A frozen model under the policy's layout.

    Its body makes final hidden states; logits, which are V / hidden times larger, are made of them only for
    the tokens and at the moment that the loss needs them. The body may wait in host memory meanwhile.

    Attributes:
        name: what errors call it.
        option: that puts its body into host memory.
        chunks: this rank's model chunks.
    """

    name: str
    option: str

    def __init__(self, chunks: Sequence[Body], placement: Placement, *, in_host_memory: bool = False) -> None:
        """
        Args:
            chunks: this rank's, filled.
            placement: this rank's.
            in_host_memory: whether body and hidden states wait there.

        Raises:
            RapoError: to keep it in host memory has no effect.
        """
        self.chunks = chunks
        self.placement = placement
        self._in_host_memory = in_host_memory
        if self._in_host_memory and device().type == "cpu":
            raise RapoError(
                f"{self.option} = true has no effect where the trainer computes on the CPU; remove it"
            )
        # The head is needed in every update, so it stays on the device even while the body is away.
        self._head = self.chunks[-1].head_weight.detach() if placement.is_last_stage else None
        self._leave_device()

    @classmethod
    def loaded(
        cls,
        architecture: Architecture,
        model: Model,
        weights: Path,
        placement: Placement,
        vocabulary_rows: int | None = None,
    ) -> list[Body]:
        """This rank's chunks of a model of its own, filled and frozen.

        Args:
            architecture: of the model.
            model: the policy's options, of which it has type and padding.
            weights: a HF model directory or a Megatron checkpoint.
            placement: this rank's.
            vocabulary_rows: of its head over all TP ranks; default: its own, padded.

        Raises:
            RapoError: the weights do not load.
        """
        chunks = build_chunks(architecture, model, placement.layout, vocabulary_rows)
        load_weights(chunks, architecture, weights, placement.tensor_rank, placement.expert_tensor_rank)
        what = f"the {cls.name}'s weights of {weights}"
        check_finite(what, dict(named_parameters(chunks)), placement, "take an undamaged copy")
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        return chunks

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Leaves on the last stage's microbatches what the objective wants of it."""
        raise NotImplementedError

    def states(self, microbatch: Microbatch) -> HeadStates:
        """The model at a microbatch's response tokens, from the annotation."""
        raise NotImplementedError

    def _hidden_states(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Final hidden states of each microbatch, where they wait; on the last stage, nothing elsewhere."""
        for chunk in self.chunks:
            chunk.to(device())
        hidden_states = run_forward(self.chunks, microbatches, lambda _, hidden: self._kept(hidden))
        self._leave_device()
        return hidden_states

    def _at_responses(self, hidden: Tensor | None, microbatch: Microbatch) -> HeadStates:
        assert hidden is not None, f"annotate the batch with the {self.name} first"
        assert self._head is not None, "only the last pipeline stage has the head"
        states = whole_tokens(hidden.to(device()), self.placement)
        return HeadStates(microbatch.at_responses(states), self._head)

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden.cpu() if self._in_host_memory else hidden

    def _leave_device(self) -> None:
        if self._in_host_memory:
            for chunk in self.chunks:
                chunk.to("cpu")
