"""What a HF model directory is made of, written file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_rapo.file_sums import FILE

INDEX = "model.safetensors.index.json"
# What stands beside weights is configuration, tokenizer and chat templates: text in files of these kinds. A
# list of names would forget those of the next tokenizer.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges*")
TEMPLATES = "additional_chat_templates"  # transformers' folder of templates for special uses
# Of the weights, not beside them: indices, and what checkpoint and checksums say of themselves.
NOT_COMPANIONS = ("*.index.json", "metadata.json", "run.json", FILE)


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
    """Carries configuration, tokenizer, chat templates and generation files over from `companions_of`.

    With `weight_map`, the index that says which file holds which tensor is written as well.
    """
    if weight_map is not None:
        index = {"metadata": {}, "weight_map": dict(weight_map)}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    for file in sorted(companions_of.iterdir()):
        if file.is_file() and _is_companion(file.name) and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)
    if (companions_of / TEMPLATES).is_dir():
        shutil.copytree(companions_of / TEMPLATES, directory / TEMPLATES, dirs_exist_ok=True)


def _is_companion(name: str) -> bool:
    return any(fnmatch(name, kind) for kind in COMPANIONS) and not any(
        fnmatch(name, kind) for kind in NOT_COMPANIONS
    )
