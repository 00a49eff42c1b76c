"""vLLM servers as a run starts them, and what stands in them before vLLM's own routes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.cli import main
from megatron_rapo.engines.vllm.flags import BACKEND, FLAGS, PATH, command
from megatron_rapo.engines.vllm.kind import VLLM
from megatron_rapo.engines.vllm.launcher import VLLMLauncher
from megatron_rapo.vllm_worker.guard import Guard
from megatron_rapo.wire.access import API_KEY_VARIABLE

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("megatron-rapo")


def test_a_server_is_told_model_address_gpus_and_what_a_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    launcher = VLLMLauncher(Path("/models/m"), "bfloat16", "p", 2, gpus=[4, 5, 6, 7], arguments=["--x"])
    launch = launcher.launch(1, 7000, socket_fd=9)
    assert launch.inherited_socket is None
    tether = [sys.executable, "-P", "-m", "megatron_rapo.engines.tether", str(os.getpid())]
    server = ["p", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/m"]
    address = ["--host", "127.0.0.1", "--port", "7000", "--dtype", "bfloat16"]
    size = ["--tensor-parallel-size", "2"]
    assert launch.arguments == [*tether, *server, *address, *size, *FLAGS, "--x"]
    assert launch.environment == {
        "PYTHONSAFEPATH": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": f"{PATH}:/users/own",
        "CUDA_VISIBLE_DEVICES": "6,7",
    }


def test_the_command_by_hand_has_no_word_that_a_shell_would_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "vllm", "--python", "/opt/vllm/bin/python"]) == 0
    words = capsys.readouterr().out.split()
    server = ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words == ["env", "VLLM_SERVER_DEV_MODE=1", f"PYTHONPATH={PATH}", *server, *FLAGS]


@pytest.mark.parametrize(("gpus", "size"), [(0, []), (8, ["--tensor-parallel-size", "4"])])
def test_a_job_starts_servers_alike(gpus: int, size: list[str]) -> None:
    """The script's own lines, with the command that the package has."""
    set_up = f"RAPO=({COMMAND}) ENGINE_PYTHON=p MODEL='a model' GPUS_PER_NODE={gpus} GPUS_PER_ENGINE=4"
    script = f"set -euo pipefail\n{set_up}\n{VLLM.bash}\nprintf '%s\\n' \"${{command[@]}}\""
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == [*command("p"), "--model", "a model", *size], ended.stderr


def test_the_backend_has_one_name_on_both_sides() -> None:
    extension = (ROOT / "megatron_rapo/vllm_worker/extension.py").read_text()
    assert f'BACKEND = "{BACKEND}"' in extension
    assert json.loads(FLAGS[FLAGS.index("--weight-transfer-config") + 1]) == {"backend": BACKEND}


def test_the_folder_on_the_path_brings_the_package_and_nothing_beside_it(tmp_path: Path) -> None:
    """vLLM's environment must not see the trainer's: `-S` leaves this one's packages out."""
    code = """
import importlib.util
try:
    import rapo_vllm
except ModuleNotFoundError as error:
    assert error.name == "vllm", error
import megatron_rapo, megatron_rapo.wire.access
print(megatron_rapo.__file__)
assert importlib.util.find_spec("httpx") is None
"""
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(PATH)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.strip() == str(ROOT / "megatron_rapo/__init__.py"), ended.stderr


def answer(guard: Guard, path: str, key: str | None = None, client: Any = ("127.0.0.1", 1)) -> int:
    """The status that a request gets."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", key.encode())] if key else []
    scope = {"type": "http", "path": path, "headers": headers, "client": client}
    asyncio.run(guard(scope, None, send))
    return int(sent[0]["status"])


async def vllm(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


@pytest.mark.parametrize("path", ["/update_weights", "/collective_rpc", "/v1/models", "/pause"])
def test_every_route_but_health_wants_the_key(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    guard = Guard(vllm)
    assert answer(guard, path, "Bearer secret") == 200
    assert answer(guard, path) == answer(guard, path, "Bearer other") == answer(guard, path, "secret") == 401
    assert answer(guard, "/health") == 200


def test_without_a_key_this_machine_alone_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    guard = Guard(vllm)
    assert answer(guard, "/update_weights") == answer(guard, "/pause", client=None) == 200
    assert answer(guard, "/update_weights", client=("10.0.0.9", 1)) == 401
