"""A rank's model chunks with parameters alone: to load and send weights without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.rules import Rule
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.load import load_weights
from megatron_rapo.weights.parameter_map import local_name


def empty_chunks(architecture: Architecture, place: Placement) -> list[Any]:
    """As much of a rank's model chunks as holds their parameters, all NaN."""
    layout, family = place.layout, family_of(architecture)
    ranks, stages, turns = (
        layout.tensor_parallel,
        layout.pipeline_parallel,
        layout.virtual_pipeline_parallel or 1,
    )
    embedding, *ends = family.ends(architecture)
    if architecture.tied and stages == 1:
        ends.pop()  # the head is the embedding

    experts = list(range(architecture.experts.count)) if architecture.experts else []
    local = len(experts) // layout.expert_parallel
    first_expert = place.rank // layout.expert_tensor_parallel % layout.expert_parallel * local
    here = experts[first_expert : first_expert + local]

    def parameter(rule: Rule) -> torch.nn.Parameter:
        shapes = list(rule.hf.values())
        shape = [sum(rows for rows, *_ in shapes), *shapes[0][1:]]
        if rule.vocabulary:
            shape[0] = architecture.padded_vocabulary(1, ranks)
        if rule.cut is not None:
            shape[rule.cut] //= ranks if rule.expert is None else layout.expert_tensor_parallel
        return torch.nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)

    def name(rule: Rule) -> str:
        if rule.expert is None:
            return local_name(rule)
        number = f"local_experts.{here.index(rule.expert)}."
        return rule.megatron.replace(f"experts.{rule.expert}.", f"experts.{number}")

    per_chunk = architecture.layers // (stages * turns)
    chunks = []
    for turn in range(turns):
        first = (turn * stages + place.pipeline_rank) * per_chunk
        named = {
            f"decoder.layers.{index}.{name(rule)}": parameter(rule)
            for index in range(per_chunk)
            for rule in family.layer(architecture)
            if rule.expert is None or rule.expert in here
        }
        if first == 0:
            named[embedding.megatron] = parameter(embedding)
        if first + per_chunk == architecture.layers:
            named |= {rule.megatron: parameter(rule) for rule in ends}
        mlp = SimpleNamespace(local_expert_indices=here)
        layers = [SimpleNamespace(layer_number=first + index + 1, mlp=mlp) for index in range(per_chunk)]
        chunks.append(
            SimpleNamespace(named_parameters=named.items, decoder=SimpleNamespace(layers=layers), named=named)
        )
    return chunks


def loaded_chunks(model: Path, place: Placement) -> list[Any]:
    """A rank's chunks with the weights of a HF model directory."""
    architecture = read_architecture(model)
    chunks = empty_chunks(architecture, place)
    load_weights(chunks, architecture, model, place.tensor_rank, place.expert_tensor_rank)
    return chunks
