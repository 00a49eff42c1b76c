"""What a HF config.json says of a model."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import FAMILIES, REASONS


def read_architecture(path: Path) -> Architecture:
    """Reads a HF model directory's config.json, or a config.json itself.

    Raises:
        RapoError: it is missing or malformed, of a family that there is not, or uses a feature that has no
            counterpart.
    """
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise RapoError(f"model {path} has no config.json; name a HF model directory in model.path")
    from transformers import AutoConfig

    try:
        model_type = str(json.loads(file.read_text())["model_type"])
        config = AutoConfig.from_pretrained(file) if model_type in FAMILIES else None
    except Exception as error:  # what a malformed file runs into inside transformers is not foreseeable
        raise RapoError(
            f"model configuration {file} cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from error
    if config is None:
        reason = f", {REASONS[model_type]}" if model_type in REASONS else ""
        raise RapoError(
            f"model {path} is of the family {model_type!r} (model_type in its config.json){reason}; "
            f"there are {', '.join(FAMILIES)}; docs/families.md says how to add one"
        )
    family = FAMILIES[model_type]
    try:
        for feature in family.refused(config):
            raise RapoError(
                f"model {path} has {feature} in its config.json, which is not supported; choose another model"
            )
        architecture = family.read(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RapoError(f"model configuration {file} has a wrong value ({error}); copy it again") from error
    _check_sizes(architecture, file)
    return architecture


def _check_sizes(architecture: Architecture, file: Path) -> None:
    sizes = {
        "num_hidden_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate_size": architecture.feed_forward,
        "vocab_size": architecture.vocabulary,
        "max_position_embeddings": architecture.max_positions,
    }
    if (experts := architecture.experts) is not None:
        sizes |= {"num_experts": experts.count, "num_experts_per_tok": experts.chosen}
        if experts.shared is not None:
            sizes["shared_expert_intermediate_size"] = experts.shared
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise RapoError(f"model configuration {file} has {name} = {size!r}, no size; copy it again")
    if experts is not None and experts.chosen > experts.count:
        raise RapoError(
            f"model configuration {file} has num_experts_per_tok = {experts.chosen}, more than its "
            f"{experts.count} experts; copy it again"
        )
    if architecture.heads % architecture.kv_heads:
        raise RapoError(
            f"model configuration {file} has num_attention_heads = {architecture.heads}, no multiple of "
            f"num_key_value_heads = {architecture.kv_heads}; copy it again"
        )
