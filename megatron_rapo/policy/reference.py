"""The reference: what the policy is kept near to, or explores beyond; of the policy's own architecture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rapo.config import Model
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.model.adapters import without_adapters
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.frozen import FrozenModel


class Reference(FrozenModel):
    """The weights of `model.reference_path`, or those that the policy starts at."""

    name = "reference"
    option = "model.reference_in_host_memory"

    def __init__(self, model: Model, architecture: Architecture, placement: Placement) -> None:
        """As `FrozenModel`.

        Raises:
            RapoError: the weights do not load, or `model.reference_in_host_memory` has no effect.
        """
        weights = model.reference_path or model.checkpoint or model.path
        chunks = self.loaded(architecture, model, weights, placement)
        super().__init__(chunks, placement, in_host_memory=model.reference_in_host_memory)

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Leaves hidden states where the loss needs the whole distribution, else log-probs alone."""
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]
        for microbatch, hidden in zip(microbatches, self._hidden_states(microbatches), strict=False):
            microbatch.reference_hidden = hidden
            if not objective.wants_reference_hidden:
                plain, flattened = objective.reference_log_probs(self.states(microbatch), microbatch)
                microbatch.reference_log_probs, microbatch.flattened_log_probs = plain, flattened
                microbatch.reference_hidden = None

    def states(self, microbatch: Microbatch) -> HeadStates:
        """The reference at a microbatch's response tokens, from the annotation."""
        return self._at_responses(microbatch.reference_hidden, microbatch)


class PolicyWithoutAdapters(Reference):
    """The weights that a policy with adapters starts at, which are the policy's own: no second model."""

    def __init__(self, chunks: Sequence[Body], placement: Placement) -> None:
        """`chunks` are the policy's."""
        FrozenModel.__init__(self, chunks, placement)

    def _hidden_states(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        with without_adapters(self.chunks):
            return super()._hidden_states(microbatches)
