"""Tensors in memory that another process opens, by a description in JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from megatron_rapo.wire.memory import share

READER = """
import json, sys
import torch
from megatron_rapo.wire.memory import open_shared
for shared in json.loads(sys.stdin.read()):
    for name, tensor in open_shared(shared):
        print(name, str(tensor.dtype), list(tensor.shape), tensor.double().flatten().tolist(), flush=True)
        tensor.fill_(7)
"""


def test_another_process_reads_and_writes_the_same_memory() -> None:
    flat = torch.zeros(64, dtype=torch.uint8)
    first = flat[:24].view(torch.float32).view(2, 3).copy_(torch.arange(6.0).view(2, 3))
    second = flat[32:40].view(torch.bfloat16).copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    alone = torch.tensor([5, 6])
    told = share([("first", first), ("second", second), ("alone", alone)])
    assert [len(one["tensors"]) for one in told] == [2, 1], "one description a storage"
    read = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(told), capture_output=True, text=True, timeout=60
    )
    assert read.stdout.splitlines() == [
        "first torch.float32 [2, 3] [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]",
        "second torch.bfloat16 [4] [1.0, 2.0, 3.0, 4.0]",
        "alone torch.int64 [2] [5.0, 6.0]",
    ], read.stderr
    assert first.flatten().tolist() == [7.0] * 6 and alone.tolist() == [7, 7]
    assert flat[24:32].tolist() == [0] * 8
