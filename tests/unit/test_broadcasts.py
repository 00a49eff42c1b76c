"""What the embedded server takes from a broadcast: one message of bytes, or one for each tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rapo.embedded_server import broadcast
from megatron_rapo.embedded_server.broadcast import UpdateGroups
from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import lay_out
from tests.ports import free_port

SENT = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}


@pytest.mark.parametrize("flattened", [True, False])
def test_tensors_arrive_by_name_in_shape_and_type(monkeypatch: pytest.MonkeyPatch, flattened: bool) -> None:
    parts = [values.contiguous().flatten().view(torch.uint8) for values in SENT.values()]
    messages = iter([torch.cat(parts)] if flattened else list(SENT.values()))

    def receive(buffer: torch.Tensor, **_: Any) -> Any:
        message = next(messages)
        assert (buffer.shape, buffer.dtype) == (message.shape, message.dtype)
        buffer.copy_(message)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(broadcast.dist, "broadcast", receive)
    groups = UpdateGroups()
    groups._groups["g"] = object()  # type: ignore[assignment]
    layout = lay_out(list(SENT), [v.dtype for v in SENT.values()], [list(v.shape) for v in SENT.values()])
    found = groups.receive("g", layout, flattened=flattened, device=torch.device("cpu"))
    assert [name for name, _ in found] == list(SENT)
    assert all(torch.equal(values, SENT[name]) for name, values in found)
    assert next(messages, None) is None


def test_a_group_of_before_keeps_no_threads() -> None:
    """A server outlives many of them: with every engine that is lost the trainer makes a new one."""
    groups, layout = UpdateGroups(), lay_out(["a"], [torch.float32], [[2, 3]])
    before, held = gloo_threads(), []
    for number in range(4):
        groups.join(f"weights-{number}", "127.0.0.1", free_port(), 0, 1, "gloo")
        groups.receive(f"weights-{number}", layout, flattened=True, device=torch.device("cpu"))
        held.append(settled(lambda: gloo_threads() - before))
    assert held[0] and len(held[3]) <= len(held[0]) + 1
    with pytest.raises(RapoError, match=r"no group 'weights-2' \(there are: \['weights-3'\]\)"):
        groups.check("weights-2")
    groups.leave("weights-3")


def gloo_threads() -> set[str]:
    """The ids of the threads that gloo started; a thread takes its name a moment after its start."""
    return {
        name.parent.name
        for name in Path("/proc/self/task").glob("*/comm")
        if name.read_text() == "gloo_tcp_loop\n"
    }


def settled(look: Callable[[], set[str]], seconds: float = 20.0) -> set[str]:
    """What `look` finds once it finds something, the same twice, a moment apart."""
    found, end = look(), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        before, found = found, look()
        if found and found == before:
            break
    return found
