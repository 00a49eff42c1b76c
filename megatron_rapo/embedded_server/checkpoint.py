"""A safetensors checkpoint, read whole and checked before anything is done with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rapo.errors import RapoError


def read_checkpoint(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint in the folder `path`.

    Args:
        expected: shape of each tensor that it must have, and no others.

    Raises:
        RapoError: it cannot be read, or its names or shapes are others.
    """
    with ExitStack() as opened:
        handles = {}
        for file in _files(path):
            try:
                handle = opened.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise RapoError(f"cannot read the weights in {file}: {error}; write them anew") from error
            handles.update(dict.fromkeys(handle.keys(), handle))
        found = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in handles.items()}
        _compare(found, expected, path)
        return {name: handle.get_tensor(name) for name, handle in handles.items()}


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    single = path / "model.safetensors"
    if not single.is_file():
        raise RapoError(
            f"{path} holds neither {single.name} nor {index.name}; save the weights as safetensors"
        )
    return [single]


def _compare(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(found[name])} in place of {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise RapoError(
            f"the weights in {path} are not this model's ({len(problems)} differences: {shown}); "
            "publish weights of the architecture that the server was started with"
        )
