"""The teacher: a frozen model of any architecture with the policy's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.config import Model
from megatron_rapo.config import Teacher as Options
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.frozen import FrozenModel


class Teacher(FrozenModel):
    """The weights of `[teacher]`, whose whole distribution the loss compares with the policy's."""

    name = "teacher"
    option = "teacher.in_host_memory"

    def __init__(
        self,
        teacher: Options,
        architecture: Architecture,
        model: Model,
        policy: Architecture,
        placement: Placement,
    ) -> None:
        """Builds the model with as many rows of the vocabulary as the policy's.

        Models of one tokenizer may have other numbers of spare rows, and TP cuts heads into equal parts. So
        rows that only the teacher has are left out (no token is theirs), and those that it lacks are 0: then
        a rank's rows are the same tokens' in both.

        Args:
            teacher: its options.
            architecture: of the teacher.
            model: the policy's options, of which it has type and padding.
            policy: the policy's architecture.
            placement: this rank's.

        Raises:
            RapoError: the weights do not load, or `teacher.in_host_memory` has no effect.
        """
        rows = policy.padded_vocabulary(model.vocabulary_multiple, placement.layout.tensor_parallel)
        chunks = self.loaded(architecture, model, teacher.checkpoint or teacher.path, placement, rows)
        super().__init__(chunks, placement, in_host_memory=teacher.in_host_memory)

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Leaves hidden states."""
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]
        for microbatch, hidden in zip(microbatches, self._hidden_states(microbatches), strict=False):
            microbatch.teacher_hidden = hidden

    def states(self, microbatch: Microbatch) -> HeadStates:
        """The teacher at a microbatch's response tokens, from the annotation."""
        return self._at_responses(microbatch.teacher_hidden, microbatch)
