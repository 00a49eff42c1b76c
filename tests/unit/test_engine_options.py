"""The options of rollouts reach the servers that a run starts, and the pool that asks them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.config import validate
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.kind import Served
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.launcher import SGLangLauncher
from megatron_rapo.engines.sglang.router import SGLangRouter
from megatron_rapo.engines.vllm.client import VLLMClient
from megatron_rapo.engines.vllm.launcher import VLLMLauncher
from megatron_rapo.experience import engines
from megatron_rapo.experience.engines import open_own_engines

ARCHITECTURE = SimpleNamespace(vocabulary=61)
OWN = ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"]


class Opened:
    """Stands for servers and pool, and notes what they were made with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launcher: Any = None
        self.connects: list[Any] = []
        self.servers: dict[str, Any] = {}
        self.pool: dict[str, Any] = {}
        self.reviver: dict[str, Any] = {}
        self.urls: list[str] = []
        self.waited_s = 0.0
        monkeypatch.setattr(engines, "LocalServers", self._servers)
        monkeypatch.setattr(engines, "EnginePool", self._pool)
        monkeypatch.setattr(engines, "Reviver", self._reviver)
        monkeypatch.setattr(engines, "check_distinct", lambda urls: None)

    @contextmanager
    def _servers(self, launcher: Any, connect: Any, **options: Any) -> Iterator[Any]:
        self.launcher, self.servers, self.connects = launcher, options, [connect]
        yield SimpleNamespace(urls=OWN, diagnose=None)

    @contextmanager
    def _pool(self, urls: list[str], connect: Any, **options: Any) -> Iterator[Any]:
        self.urls, self.pool = urls, options
        self.connects.append(connect)
        yield self

    def _reviver(self, *_: Any, **options: Any) -> None:
        self.reviver = options

    def wait_until_healthy(self, timeout: float) -> None:
        self.waited_s = timeout


def opened(monkeypatch: pytest.MonkeyPatch, **rollout: Any) -> Opened:
    options = {
        "run": {"directory": "run", "steps": 1},
        "model": {"path": "models/m", "dtype": "float32"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 8, **rollout},
    }
    notes = Opened(monkeypatch)
    with open_own_engines(validate(options, source="test"), ARCHITECTURE):  # type: ignore[arg-type]
        pass
    return notes


def test_embedded_servers_are_as_many_and_where_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = opened(monkeypatch, engine={"servers": 3, "device": "cuda", "threads": 5}, startup_timeout_s=7.0)
    assert notes.connects == [EmbeddedClient] * 2
    assert notes.launcher == EmbeddedLauncher(Path("models/m"), device="cuda", dtype="float32", threads=5)
    assert notes.servers == {"count": 3, "log_directory": Path("run/engines"), "startup_timeout": 7.0}
    assert (notes.urls, notes.waited_s) == (OWN, 7.0)


def test_sglang_servers_are_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = opened(
        monkeypatch,
        engine={
            "kind": "sglang",
            "servers": 2,
            "tensor_parallel": 4,
            "gpus": [*range(8, 16)],
            "python": "p",
            "arguments": ["--x"],
        },
    )
    assert notes.servers["count"] == 2
    assert notes.connects == [SGLangClient] * 2
    expected = SGLangLauncher(
        Path("models/m"), "float32", "p", tensor_parallel=4, gpus=[*range(8, 16)], arguments=["--x"]
    )
    assert notes.launcher == expected


def test_vllm_servers_are_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"servers": 2, "tensor_parallel": 2, "gpus": [0, 1, 2, 3], "python": "p", "arguments": ["--x"]}
    notes = opened(monkeypatch, engine={"kind": "vllm", **options}, max_prompt_tokens=24)
    assert notes.servers["count"] == 2
    assert notes.connects == [VLLMClient] * 2
    assert notes.launcher == VLLMLauncher(Path("models/m"), "float32", "p", 2, [0, 1, 2, 3], ["--x"])
    assert notes.reviver["longest"] == 24 + 8


@pytest.mark.parametrize(
    ("kind", "argument"), [("sglang", "--enable-memory-saver"), ("vllm", "--enable-sleep-mode")]
)
def test_colocated_servers_can_give_memory_back(kind: str, argument: str) -> None:
    options = {
        "run": {"directory": "run", "steps": 1},
        "model": {"path": "models/m"},
        "data": {"source": "countdown"},
        "rollout": {
            "prompts_per_step": 8,
            "max_response_tokens": 8,
            "colocated": True,
            "engine": {"kind": kind},
        },
        "weights": {"transport": "tensor"},
    }
    config = validate(options, source="test")
    served = Served(config.model.path, config.model.dtype, config.rollout.colocated)
    launcher = config.engine_kind.launcher(served)
    assert isinstance(launcher, SGLangLauncher | VLLMLauncher)
    assert launcher.arguments == [argument]


def test_given_servers_are_asked_and_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = opened(
        monkeypatch,
        engine={"kind": "sglang", "urls": ["http://a:1", "http://b:1"], "router": "http://r:1"},
        minimum_engines=2,
        restarts=9,
        requests_per_engine=11,
        request_timeout_s=13.0,
        health_interval_s=17.0,
    )
    assert notes.launcher is None
    assert notes.urls == ["http://a:1", "http://b:1"]
    wanted = {
        "vocab_size": 61,
        "minimum_engines": 2,
        "requests_per_engine": 11,
        "request_timeout": 13.0,
        "health_interval": 17.0,
        "head": 0,
    }
    assert {name: notes.pool[name] for name in wanted} == wanted
    router = notes.pool["router"](SimpleNamespace(headers={"authorization": "Bearer k"}), timeout=3.0)
    assert (type(router), router.url) == (SGLangRouter, "http://r:1")
    assert notes.connects == [SGLangClient]
    assert notes.reviver == {"restarts": 9, "startup_timeout": 600.0, "longest": 1024 + 8}


def test_requests_hold_as_many_prompts_as_the_option_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch, prompts_per_request=19).pool["prompts_per_request"] == 19
