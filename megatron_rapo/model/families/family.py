"""What a model family is to this package: one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, plain
from megatron_rapo.model.rules import Rule


@dataclass(frozen=True)
class Family:
    """A model family. What a record leaves out is as Llama has it (`families/dense.py`, `families/plain.py`).

    Attributes:
        name: HF's `model_type`.
        refused: of a HF configuration, what is in it that this package cannot train, as text for the user.
        read: a HF configuration, of which nothing is refused, as an architecture.
        written: the options of a HF configuration that `read` makes an architecture of.
        layer: the parameters of a layer.
        ends: those before the first layer, and after the last one.
        transformer: the fields of Megatron's `TransformerConfig` that say what a layer computes.
        plain: logits `[tokens, vocabulary]` of one sequence `[tokens]` in plain PyTorch, from weights by HF
            name and in any float type: what certificates compare with. It shares no code with the models.
    """

    name: str
    refused: Callable[[Any], Iterable[str]] = dense.refused
    read: Callable[[Any], Architecture] = dense.read
    written: Callable[[Architecture], Mapping[str, Any]] = dense.written
    layer: Callable[[Architecture], Iterable[Rule]] = dense.layer
    ends: Callable[[Architecture], Iterable[Rule]] = dense.ends
    transformer: Callable[[Architecture], Mapping[str, Any]] = dense.transformer
    plain: Callable[[Mapping[str, Tensor], Architecture, Tensor], Tensor] = plain.logits
