"""The frozen models that a run has beside its policy."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.config import RunConfig
from megatron_rapo.methods.method import Method
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.frozen import FrozenModel
from megatron_rapo.policy.reference import PolicyWithoutAdapters, Reference
from megatron_rapo.policy.teacher import Teacher


def open_frozen(
    config: RunConfig,
    architecture: Architecture,
    method: Method,
    placement: Placement,
    chunks: Sequence[Body],
) -> list[FrozenModel]:
    """The reference and the teacher, as far as the method reads them; the teacher comes last.

    Args:
        config: of the run.
        architecture: of the policy.
        method: whose terms say what there is.
        placement: this rank's.
        chunks: this rank's of the policy, which without its adapters may be the reference.

    Raises:
        RapoError: their weights do not load, or an option of theirs has no effect.
    """
    frozen: list[FrozenModel] = []
    if method.wants_reference and config.adapter is not None and config.model.reference_path is None:
        frozen.append(PolicyWithoutAdapters(chunks, placement))
    elif method.wants_reference:
        frozen.append(Reference(config.model, architecture, placement))
    if config.teacher is not None:
        its = read_architecture(config.teacher.path)
        frozen.append(Teacher(config.teacher, its, config.model, architecture, placement))
    return frozen
