"""A Megatron checkpoint of any layout into a HF model directory."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

from torch import Tensor

from megatron_rapo import file_sums
from megatron_rapo.convert.destination import new_directory
from megatron_rapo.convert.progress import Progress
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.adapter_files import MergedTensors, open_checkpoint
from megatron_rapo.weights.hf_directory import save_tensors, write_companions
from megatron_rapo.weights.megatron_files import MegatronTensors, find_checkpoint
from megatron_rapo.weights.stored_parameters import StoredParameter


def convert_to_hf(source: Path, destination: Path, model: Path | None = None) -> None:
    """Writes the model of a Megatron checkpoint as transformers and SGLang load it, a file a layer.

    Of a checkpoint that holds adapters it is the model that they make of the run's.

    Args:
        source: a checkpoint, or a folder of them: a run's directory, or one that Megatron-LM saved to.
        destination: the directory to make.
        model: HF directory whose config.json, tokenizer and generation files are carried over. Default: those
            that `convert_to_megatron` left beside the checkpoint, or of the model that the run started from.

    Raises:
        RapoError: nothing is written, and the message says why.
    """
    checkpoint = find_checkpoint(source)
    file_sums.check(checkpoint, "checkpoint")
    companions = _companions(checkpoint, model)
    tensors = open_checkpoint(checkpoint, read_architecture(companions))
    sizes = [_bytes(parameter, tensors) for parameter in tensors.parameters]
    progress = Progress(sum(sizes))
    # The embedding, each layer, and what follows the last make a file each.
    parts = [list(group) for _, group in itertools.groupby(tensors.parameters, key=lambda p: p.layer)]
    weight_map: dict[str, str] = {}
    with new_directory(destination, sum(sizes)) as directory:
        for number, parameters in enumerate(parts, start=1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            layer: dict[str, Tensor] = {
                name: tensors.read(name, None, 0, 0).contiguous()
                for parameter in parameters
                for name in parameter.rule.hf
            }
            save_tensors(layer, directory / file)
            weight_map.update(dict.fromkeys(layer, file))
            progress.add(sum(tensor.nbytes for tensor in layer.values()))
        write_companions(directory, companions, weight_map)
        file_sums.write_sums(directory)


def _bytes(parameter: StoredParameter, tensors: MegatronTensors | MergedTensors) -> int:
    return math.prod(parameter.shape) * tensors.dtype(parameter).itemsize


def _companions(checkpoint: Path, model: Path | None) -> Path:
    if model is not None:
        return model
    if (checkpoint / "config.json").is_file():
        return checkpoint
    try:
        path = Path(json.loads((checkpoint / "run.json").read_text())["model_path"])
    except (OSError, ValueError, KeyError, TypeError):
        path = None
    if path is None or not (path / "config.json").is_file():
        gone = f" (the run's, {path}, is not there)" if path is not None else ""
        raise RapoError(
            f"checkpoint {checkpoint} does not tell its model's configuration and tokenizer{gone}; name the "
            "HF directory that it was trained from with --model"
        )
    return path
