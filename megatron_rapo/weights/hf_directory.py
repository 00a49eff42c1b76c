"""What a HF model directory is made of, written file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes one safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except Exception as error:  # safetensors reports a full disk as its own error type
        raise OSError(None, str(error)) from error


def write_companions(
    directory: Path, companions_of: Path, weight_map: Mapping[str, str] | None = None
) -> None:
    """Carries configuration, tokenizer and generation files over from `companions_of`.

    With `weight_map`, the index that says which file holds which tensor is written as well.
    """
    if weight_map is not None:
        index = {"metadata": {}, "weight_map": dict(weight_map)}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    for name in COMPANIONS:
        if (companions_of / name).is_file():
            shutil.copyfile(companions_of / name, directory / name)
