"""Weights by handle: CUDA IPC on GPUs, shared memory on CPU. For engines on the trainer's own machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.parallel.device import device
from megatron_rapo.weights.buckets import Bucket
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.stream import Wait, device_memory
from megatron_rapo.weights.transports.bucketed import TIMEOUT_S, BucketTransport, Send

SHARED_MEMORY = Path("/dev/shm")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class TensorTransport(BucketTransport):
    """Each bucket stays where the main rank packed it; the engines get a handle, and copy out of that memory.

    Its stream must pack into `handle_memory`. An engine on another GPU of the machine reads it over NVLink:
    it must see the same GPUs under the same numbers as the trainer.
    """

    def _prepare(self, engines: Engines) -> Send:
        for url in engines.urls:
            if urlsplit(url).hostname not in LOOPBACK:
                raise RapoError(
                    f'weights.transport = "tensor" cannot reach {url}: memory is shared on one machine only; '
                    'use "distributed"'
                )
        engines.begin_update()
        ranks = engines.tensor_parallel()

        def send(bucket: Bucket, flat: Tensor, version: int | None) -> Wait:
            if flat.is_cuda:
                torch.cuda.current_stream().synchronize()  # the reader knows nothing of our streams
            named = [(tensor.name, view) for tensor, view in bucket.views(flat)]
            answers = engines.each(
                lambda engine, size: engine.receive_handles(named, size, version, timeout=TIMEOUT_S), ranks
            )

            def wait() -> None:
                answers.result()

            return wait

        return send

    def _discard(self) -> None:
        """Nothing is spoilt: the memory is this process's own."""


def handle_memory(nbytes: int) -> Tensor:
    """`[nbytes]` uint8 that another process can open: on the GPU, or in the machine's shared memory.

    Raises:
        RapoError: the machine's shared memory is too small.
    """
    if device().type == "cuda":
        return device_memory(nbytes)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < nbytes:
        raise RapoError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left, a bucket of weights needs "
            f"{nbytes / 2**20:.0f}: enlarge it (docker run --shm-size), or lower weights.bucket_bytes"
        )
    # By a file's name, not a descriptor: the engine is no child of this process, which could inherit one.
    storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
