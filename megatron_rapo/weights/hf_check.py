"""Whether the tensors of a HF model directory are those that its config.json makes, from headers alone.

A tensor that the configuration calls redundant (the head of a tied model, buffers that are computed) is read
and compared with what stands in its place: to leave out another one would be to train another model.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.model.rules import EMBEDDING, HEAD
from megatron_rapo.weights.hf_files import HFTensors

TYPES = ("F64", "F32", "F16", "BF16")
BLOCK_ROWS = 4096  # of two tensors that are compared
# Older files hold the frequencies of rotary positions, which are computed from rope_theta.
_FREQUENCIES = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq")
_FREQUENCY_TOLERANCE = 1e-2  # relative: bfloat16 has 8 bits


def check_tensors(tensors: HFTensors, architecture: Architecture) -> None:
    """Refuses a directory that is no model of the architecture, or not it alone.

    Raises:
        RapoError: a tensor is missing, of another shape or type, without a place in the architecture, stored
            twice, or not what the configuration says that it equals.
    """
    tensors.check_index()
    expected = {name: shape for _, rule in model_rules(architecture) for name, shape in rule.hf.items()}
    for name, shape in expected.items():
        _check_form(tensors, name, shape, architecture)
    for name in sorted(tensors.names() - expected.keys()):
        if name == HEAD and architecture.tied:
            _check_form(tensors, name, expected[EMBEDDING], architecture)
            _check_tied(tensors)
        elif _FREQUENCIES.fullmatch(name) and architecture.rope.scaling is None:
            _check_frequencies(tensors, name, architecture)
        else:
            raise RapoError(
                f"model {tensors.directory} has tensor {name}, for which {architecture.family} has no place; "
                "is config.json that of its weights?"
            )


def _check_form(tensors: HFTensors, name: str, shape: tuple[int, ...], architecture: Architecture) -> None:
    if name == HEAD and name not in tensors.names():
        raise RapoError(
            f"model {tensors.directory} has no tensor {HEAD}; is config.json that of its weights? If the "
            "head is the embedding, set tie_word_embeddings = true there"
        )
    found = tensors.shape(name)
    if found != list(shape):
        raise RapoError(
            f"tensor {name} in {tensors.directory} has shape {found}, config.json makes it "
            f"{list(shape)}; is config.json that of its weights?"
        )
    if (kind := tensors.type_name(name)) not in TYPES:
        raise RapoError(
            f"tensor {name} in {tensors.directory} is of type {kind}, not one of {', '.join(TYPES)}: "
            "quantized weights cannot be trained; use the model they were made from"
        )


def _check_tied(tensors: HFTensors) -> None:
    """The head of a tied model, which its files need not hold, is the embedding."""
    rows = tensors.shape(EMBEDDING)[0]
    for start in range(0, rows, BLOCK_ROWS):
        embedding, head = (
            tensors.read(name, 0, start, min(start + BLOCK_ROWS, rows)) for name in (EMBEDDING, HEAD)
        )
        other = (embedding.double() != head.double()).any(dim=1)
        if other.any():
            raise RapoError(
                f"model {tensors.directory} has tie_word_embeddings = true in its config.json, but {HEAD} "
                f"is not {EMBEDDING} (row {start + int(other.nonzero()[0])} is the first that differs); set "
                f"tie_word_embeddings = false if the head was trained apart, or remove {HEAD} from the file"
            )


def _check_frequencies(tensors: HFTensors, name: str, architecture: Architecture) -> None:
    found = tensors.read(name, None, 0, 0).double()
    computed = _frequencies(architecture)
    if found.shape != computed.shape or not torch.allclose(
        found, computed, rtol=_FREQUENCY_TOLERANCE, atol=0
    ):
        raise RapoError(
            f"tensor {name} in {tensors.directory} is not what rope_theta = {architecture.rope.theta:g} of "
            "its config.json makes it; is config.json that of its weights?"
        )


def _frequencies(architecture: Architecture) -> Tensor:
    """`[rotated channels / 2]`."""
    return architecture.rope.frequencies(architecture.head_dim).double()
