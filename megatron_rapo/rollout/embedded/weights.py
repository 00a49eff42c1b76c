"""Loading a checkpoint into a model that is in use: everything is checked before anything changes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rapo.errors import RapoError


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copies the safetensors checkpoint in the folder `path` into the model, converting to its type.

    Raises:
        RapoError: the checkpoint cannot be read, or its names or shapes are not the model's. The model then
            has the weights it had.
    """
    parameters = _parameters(model)
    with ExitStack() as opened:
        handles = {}
        for file in _files(path):
            try:
                handle = opened.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise RapoError(f"cannot read the weights in {file}: {error}; write them anew") from error
            handles.update(dict.fromkeys(handle.keys(), handle))
        found = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in handles.items()}
        _compare(found, {name: tuple(values.shape) for name, values in parameters.items()}, path)
        # Read before the first copy: a file that cannot be read to its end must not leave a mixture.
        loaded = {name: handle.get_tensor(name) for name, handle in handles.items()}
    with torch.no_grad():
        for name, values in loaded.items():
            parameters[name].copy_(values)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a tied matrix once, under its first name."""
    distinct: dict[int, tuple[str, torch.Tensor]] = {}
    for name, values in model.state_dict().items():
        distinct.setdefault(values.data_ptr(), (name, values))
    return dict(distinct.values())


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


def _compare(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
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
