"""The trainer's side of weight updates, as plainly as can be: what the engines are measured against."""

from __future__ import annotations

import base64
import itertools
import pickle
import sys
import threading
import types
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import lay_out
from megatron_rapo.wire.group import Meeting
from tests.ports import free_port

TIMEOUT = timedelta(seconds=60)
_numbers = itertools.count()


class _Meeting:
    """A process group of this process and one engine, made as SGLang's `init_custom_process_group` does."""

    def _meet(self, name, invite):
        port = free_port()
        with meanwhile(lambda: invite(port)):
            store, _, _ = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=TIMEOUT))
            store.set_timeout(TIMEOUT)
            self.group, _ = c10d._new_process_group_helper(
                2,
                0,
                [],
                c10d.Backend("gloo"),
                c10d.PrefixStore(name, store),
                group_name=name,
                timeout=TIMEOUT,
            )
            c10d._world.pg_group_ranks[self.group] = {0: 0, 1: 1}


class Broadcasting(_Meeting):
    """Buckets to one engine of any kind, told of them by a run's own operations."""

    def __init__(self, engine):
        self.engine, self.name = engine, f"weights-{next(_numbers)}"
        meeting = partial(Meeting, "127.0.0.1", name=self.name, backend="gloo", trainer_ranks=1)
        self._meet(
            self.name,
            lambda port: engine.ask(
                lambda client: client.join_group(meeting(port, engine_ranks=(1,)), 1, timeout=60)
            ),
        )

    def send(self, tensors, version, *, patiently=True):
        """Broadcasts tensors as one bucket; without patience it does not wait for who refuses before."""
        values = list(tensors.values())
        layout = lay_out(list(tensors), [t.dtype for t in values], [t.shape for t in values])
        flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in values])
        with meanwhile(
            lambda: self.engine.ask(
                lambda client: client.receive_bucket(layout, self.name, version, timeout=60)
            )
        ):
            work = dist.broadcast(flat, src=0, group=self.group, async_op=True)
            if patiently:
                work.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        dist.destroy_process_group(self.group)


class Group(_Meeting):
    """Tensors to an engine that speaks SGLang's contract, by its routes."""

    def __init__(self, engine, name):
        self.engine, self.name = engine, name
        body = {
            "master_address": "127.0.0.1",
            "rank_offset": 1,
            "world_size": 2,
            "group_name": name,
            "backend": "gloo",
        }
        self._meet(
            name, lambda port: _post(engine, "/init_weights_update_group", {**body, "master_port": port})
        )

    def send(self, tensors, *, flattened, shapes=None, **fields):
        """Broadcasts named tensors while the engine is asked to receive them, as of these shapes."""
        body = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": shapes or [list(t.shape) for t in tensors.values()],
            "group_name": self.name,
            "flush_cache": False,
            **({"load_format": "flattened_bucket"} if flattened else {}),
            **fields,
        }
        buffers = list(tensors.values())
        if flattened:
            buffers = [torch.cat([t.flatten().view(torch.uint8) for t in buffers])]
        with meanwhile(lambda: _post(self.engine, "/update_weights_from_distributed", body)):
            for buffer in buffers:
                dist.broadcast(buffer, src=0, group=self.group)

    def close(self):
        """Leaves it."""
        _post(self.engine, "/destroy_weights_update_group", {"group_name": self.name})
        dist.destroy_process_group(self.group)


def _post(engine, path, body):
    return engine.ask(lambda client: client.post(path, body))


@contextmanager
def meanwhile(work):
    """Does this in a thread during the block, and raises at its end what the work has raised."""
    failures = []

    def run():
        try:
            work()
        except RapoError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


@dataclass
class _Metadata:
    """Pickles under SGLang's name of it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


SGLANG_MODULE = "sglang.srt.weight_sync.tensor_bucket"


def pickled(tensors, way):
    """The fields of `/update_weights_from_tensor` for these tensors."""
    if way == "bucket":
        return {
            "serialized_named_tensors": [_encoded(pickle.dumps(_bucket(tensors)))],
            "load_format": "flattened_bucket",
        }
    if way == "in-band":
        return {"serialized_named_tensors": [_encoded(pickle.dumps(list(tensors.items())))]}
    assert way == "shared memory"
    return {"serialized_named_tensors": [_encoded(bytes(ForkingPickler.dumps(list(tensors.items()))))]}


def _encoded(data):
    return base64.b64encode(data).decode()


def _bucket(tensors):
    metadata, start = [], 0
    for name, tensor in tensors.items():
        metadata.append(
            _Metadata(name, tensor.shape, tensor.dtype, start, start + tensor.nbytes, tensor.nbytes)
        )
        start += tensor.nbytes
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    return {"flattened_tensor": flat, "metadata": metadata}


@contextmanager
def sglangs_names():
    """While it lasts, metadata of buckets pickle as SGLang's own class does, without SGLang."""
    module = types.ModuleType(SGLANG_MODULE)
    module.FlattenedTensorMetadata = _Metadata
    _Metadata.__module__, _Metadata.__qualname__ = SGLANG_MODULE, "FlattenedTensorMetadata"
    parents = ["sglang", "sglang.srt", "sglang.srt.weight_sync"]
    added = {name: types.ModuleType(name) for name in parents} | {SGLANG_MODULE: module}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
