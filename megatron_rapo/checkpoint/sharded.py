"""What of a policy a checkpoint holds, as Megatron's dist_checkpointing takes it: all that training changes.

Of a policy with adapters that is the adapters, each matrix under its HF name, and their optimizer's state.
Its weights are those of the model that the run names, of which a fingerprint is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

from megatron_rapo.checkpoint.writing import SHARDING
from megatron_rapo.policy.policy import Policy
from megatron_rapo.weights.adapter_files import KEY
from megatron_rapo.weights.parameter_map import MappedParameter, mapped_parameters

ADAPTERS = "adapters"


def sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """The policy's trained parameters and its optimizer, each with its place. All ranks must call it."""
    metadata = {**SHARDING, "dp_cp_group": policy.placement.gradient_group}
    state: dict[str, Any]
    if policy.adapter is None:
        chunks = zip(_chunk_keys(policy), policy.chunks, strict=True)
        state = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in chunks}
    else:
        state = {ADAPTERS: {_name(one): _sharded(one, policy) for one in _adapters(policy)}}
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=metadata
    )
    return state


@torch.no_grad()
def take_up(policy: Policy, loaded: Mapping[str, Any]) -> None:
    """Fills the policy with what was loaded in place of `sharded_state`."""
    if policy.adapter is None:
        for key, chunk in zip(_chunk_keys(policy), policy.chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=True)
    else:
        for mapped in _adapters(policy):
            mapped.parameter.copy_(loaded[ADAPTERS][_name(mapped)])
    policy.optimizer.load_state_dict(loaded["optimizer"])


def _chunk_keys(policy: Policy) -> list[str]:
    count = len(policy.chunks)
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def _adapters(policy: Policy) -> list[MappedParameter]:
    return list(mapped_parameters(policy.chunks, policy.architecture, policy.adapter))


def _name(mapped: MappedParameter) -> str:
    (name,) = mapped.rule.hf
    return name


def _sharded(mapped: MappedParameter, policy: Policy) -> Any:
    """One matrix of an adapter, whole or cut over tensor parallelism."""
    cut = mapped.rule.cut
    whole = make_sharded_tensor_for_checkpoint
    make = whole if cut is None else partial(make_tp_sharded_tensor_for_checkpoint, tp_axis=cut)
    groups = {"tp_group": policy.placement.tensor_group, "dp_cp_group": policy.placement.gradient_group}
    if mapped.rule.expert is not None:
        copies = parallel_state.get_expert_data_parallel_group()
        groups = {"tp_group": policy.placement.expert_tensor_group, "dp_cp_group": copies}
    return make(mapped.parameter, KEY + _name(mapped), **groups)
