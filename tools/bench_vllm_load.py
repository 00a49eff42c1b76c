"""Where a vLLM on CPUs spends an update: our backend, vLLM's own reload from disk, and plain copies.

    python tools/bench_vllm_load.py                    # 0.34B parameters in bfloat16: 0.69 GB

Processor seconds of one thread, without any server, so that a busy machine changes little; medians of rounds
after a first one. `packing` is what of an update vLLM needs to lay weights out for oneDNN, which GPUs do not
know; `floor` copies the same bytes into shared memory and out of it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 3
PIECE = 256 * 2**20  # bytes of one copy of the floor
ALONE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    """In either environment."""
    if len(sys.argv) == 3 and sys.argv[1] == "--inside":
        measure(Path(sys.argv[2]))
    else:
        measure_in_vllm()


def measure_in_vllm() -> None:
    """Makes the model, and runs this file in vLLM's environment."""
    from cpu_servers import VLLM_ENVIRONMENT, VLLM_PYTHON
    from random_model import add_size_options, make_random_model

    from megatron_rapo.engines.vllm.flags import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_size_options(parser)
    parser.set_defaults(hidden=1024, feed_forward=3072)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_random_model(model, options)
        inside = [str(VLLM_PYTHON), __file__, "--inside", str(model)]
        variables = {**os.environ, **VLLM_ENVIRONMENT, **environment(None), **ALONE}
        subprocess.run(inside, env=variables, check=True)


def measure(model: Path) -> None:
    """In vLLM's environment: each way in turn."""
    import torch
    from vllm import LLM

    importlib.import_module("rapo_vllm")  # by which it finds this package
    share = importlib.import_module("megatron_rapo.wire.memory").share
    torch.set_num_threads(1)
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        worker_extension_cls="rapo_vllm.Extension",
        weight_transfer_config={"backend": "rapo"},
    )
    worker: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    packing = timed_packing()
    bucket = in_shared_memory(model)
    nbytes = sum(tensor.nbytes for _, tensor in bucket)
    receiver = worker.weight_transfer_engine

    def update() -> None:
        receiver.start_weight_update()
        receiver.update_weights({"shared": share(bucket)})
        receiver.finish_weight_update()

    ways: dict[str, Callable[[], object]] = {
        "update": update,
        "vLLM's own reload": lambda: worker.reload_weights(weights_path=str(model)),
        "floor": floor(nbytes),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            packing.clear()
            began = time.process_time()
            way()
            found[name].append((time.process_time() - began, sum(packing)))
    print(f"{nbytes / 1e9:.2f} GB in bfloat16, processor seconds, medians of {ROUNDS}")
    for name, rounds in found.items():
        whole, packed = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
        print(f"{name:18} {whole:6.2f} s, of which packing {packed:6.2f} s")


def timed_packing() -> list[float]:
    """Has vLLM note the seconds of each of its packings."""
    from vllm import _custom_ops as ops

    seconds: list[float] = []
    pack = ops.create_onednn_mm

    def timed(*arguments: Any) -> Any:
        began = time.process_time()
        try:
            return pack(*arguments)
        finally:
            seconds.append(time.process_time() - began)

    ops.create_onednn_mm = timed
    return seconds


def in_shared_memory(model: Path) -> list[tuple[str, Any]]:
    """The model's tensors by name, one behind the other as in a bucket."""
    import torch
    from safetensors.torch import load_file

    tensors = {
        name: tensor
        for file in sorted(model.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    sizes = [tensor.nbytes for tensor in tensors.values()]
    flat = torch.empty(sum(sizes), dtype=torch.uint8).share_memory_()
    views = [
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        for part, tensor in zip(flat.split(sizes), tensors.values(), strict=True)
    ]
    return list(zip(tensors, views, strict=True))


def floor(nbytes: int) -> Callable[[], None]:
    """A copy in and a copy out."""
    import torch

    size = min(nbytes, PIECE)
    source, shared, sink = (torch.ones(size, dtype=torch.uint8) for _ in range(3))
    shared.share_memory_()

    def copy() -> None:
        for _ in range(nbytes // size):
            shared.copy_(source)
            sink.copy_(shared)

    return copy


if __name__ == "__main__":
    main()
