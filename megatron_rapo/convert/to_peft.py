"""The adapters in a run's checkpoint into a PEFT directory."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_rapo import file_sums
from megatron_rapo.convert.destination import new_directory
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.adapter_files import AdapterRecord, AdapterTensors
from megatron_rapo.weights.megatron_files import find_checkpoint
from megatron_rapo.weights.peft_directory import write_peft_files


def convert_to_peft(source: Path, destination: Path, model: Path | None = None) -> None:
    """Writes the adapters of a checkpoint as `peft.PeftModel.from_pretrained` loads them.

    Args:
        source: a checkpoint, or a run's directory: its newest one.
        destination: the directory to make.
        model: HF directory of the model that they are adapters of. Default: that of the run.

    Raises:
        RapoError: nothing is written, and the message says why.
    """
    checkpoint = find_checkpoint(source)
    file_sums.check(checkpoint, "checkpoint")
    record = AdapterRecord.of(checkpoint)
    if record is None:
        raise RapoError(
            f"checkpoint {checkpoint} holds whole weights, and no adapters; convert it by "
            "`megatron-rapo convert to-hf`"
        )
    base = model or record.base
    if not (base / "config.json").is_file():
        raise RapoError(
            f"checkpoint {checkpoint} holds adapters of {base}, which has no config.json; name the HF "
            "directory of the model with --model"
        )
    architecture = read_architecture(base)
    adapters = AdapterTensors(checkpoint, architecture, record.adapter)
    nbytes = sum(math.prod(shape) for shape in adapters.shapes.values()) * record.dtype.itemsize
    with new_directory(destination, nbytes) as directory:
        tensors = {name: adapters.read(name) for name in adapters.shapes}
        write_peft_files(tensors, architecture, record.adapter, directory, base)
