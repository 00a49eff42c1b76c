"""Servers that a run starts, process by process: how each is begun, found, asked to end, and diagnosed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.engines import servers as module
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.launching import Launch
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.launcher import SGLangLauncher
from megatron_rapo.errors import RapoError

SOON = 20.0
TELLS = """
import json, os, socket, sys
fd = int(sys.argv[1])
try:
    address = socket.socket(fileno=fd).getsockname()[1]
except OSError:
    address = None
read = sys.stdin.read()
print(json.dumps([address, read, os.getsid(0) == os.getpid(), dict(os.environ)]), flush=True)
print("to stderr", file=sys.stderr, flush=True)
"""


class Runs:
    """A launcher of Python code, which is told the number of the socket."""

    name = "small server"

    def __init__(self, code: str, *, inherits: bool = True, **environment: str) -> None:
        self.code, self.inherits, self.environment = code, inherits, environment
        self.asked: list[tuple[int, int, int]] = []

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        self.asked.append((number, port, socket_fd))
        return Launch(
            [sys.executable, "-c", self.code, str(socket_fd)],
            inherited_socket=socket_fd if self.inherits else None,
            environment=self.environment,
        )


def servers_of(launcher: Any, logs: Path, **options: Any) -> LocalServers:
    logs.mkdir(exist_ok=True)
    return LocalServers(
        launcher, SGLangClient, **{"count": 1, "log_directory": logs, "startup_timeout": 5.0, **options}
    )


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("inherits", [True, False])
def test_a_server_has_its_socket_a_session_of_its_own_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherits: bool, started: Any
) -> None:
    of_a_rank = ["RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    of_a_rank += ["ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    of_a_rank += ["CUDA_DEVICE_MAX_CONNECTIONS"]
    kept = ["MY_RANK", "RANKS", "MASTER_KEY", "CUDA_VISIBLE_DEVICES"]
    for name in of_a_rank + kept:
        monkeypatch.setenv(name, "7")
    launcher = Runs(TELLS, inherits=inherits, CUDA_VISIBLE_DEVICES="3", MORE="x")
    log = tmp_path / "engine-4.log"
    log.write_text("of a server before\n")
    server = servers_of(launcher, tmp_path)._spawn(4)
    started.append(server.process)
    server.process.wait(SOON)
    [(number, port, _)] = launcher.asked
    assert (number, server.url, server.log) == (4, f"http://127.0.0.1:{port}", log)
    before, *lines = log.read_text().splitlines()
    assert before == "of a server before" and server.log_start == len(before) + 1
    assert lines[1:] == ["to stderr"]
    address, read, own_session, environment = json.loads(lines[0])
    assert (address, read, own_session) == (port if inherits else None, "", True)
    assert not environment.keys() & set(of_a_rank)
    told = {name: environment[name] for name in [*kept, "MORE"]}
    assert told == {**dict.fromkeys(kept, "7"), "CUDA_VISIBLE_DEVICES": "3", "MORE": "x"}


def a_server(process: Any, log: Path, url: str = "http://127.0.0.1:1", log_start: int = 0) -> Any:
    return SimpleNamespace(url=url, process=process, log=log, log_start=log_start)


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("raise SystemExit(0)", "ended with exit code 0"),
        ("raise SystemExit(1)", "ended with exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGUSR1)", "was killed by SIGUSR1"),
    ],
)
def test_how_a_server_ended_is_told_with_the_end_of_its_log(
    tmp_path: Path, code: str, how: str, started: Any
) -> None:
    servers = servers_of(Runs(""), tmp_path)
    log = tmp_path / "engine.log"
    log.write_text("".join(f"line {number} {'x' * 400}  \n" for number in range(20)))
    started.append(subprocess.Popen([sys.executable, "-c", code]))
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started.append(running)
    servers._servers = {
        0: a_server(running, log, "http://127.0.0.1:1"),
        1: a_server(started[0], log, "http://127.0.0.1:2"),
    }
    started[0].wait(SOON)
    tail = [f"line {number} {'x' * 400}"[:300] for number in range(5, 20)]
    assert servers.diagnose("http://127.0.0.1:2") == "\n".join(
        [f"the small server {how}; its log {log} ends with:", *tail]
    )
    assert servers.diagnose("http://127.0.0.1:1") is None
    assert servers.diagnose("http://127.0.0.1:3") is None
    assert servers.urls == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    servers._servers = dict(reversed(servers._servers.items()))
    assert servers.urls == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    running.communicate(b"\n", timeout=SOON)


STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
POLITE = "import signal, time; signal.signal(15, lambda *_: exit(3)); print(flush=True); time.sleep(60)"


def test_all_are_asked_to_end_together_and_those_that_stay_are_killed(
    monkeypatch: pytest.MonkeyPatch, started: Any
) -> None:
    monkeypatch.setattr(module, "TERMINATE_WAIT_S", 1.0)
    for code in (STUBBORN, POLITE, STUBBORN, STUBBORN):
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    for process in started:
        process.stdout.readline()
    began = time.monotonic()
    module._end(started)
    took = time.monotonic() - began
    assert [process.returncode for process in started] == [-9, 3, -9, -9]
    assert 1.0 <= took < 2.9, "one wait for all"
    for process in started:
        process.stdout.close()


def test_a_polite_server_is_not_waited_for_longer_than_it_takes(started: Any) -> None:
    started.append(subprocess.Popen([sys.executable, "-c", POLITE], stdout=subprocess.PIPE))
    started[0].stdout.readline()
    began = time.monotonic()
    module._end(started)
    assert started[0].returncode == 3
    assert time.monotonic() - began < module.TERMINATE_WAIT_S
    started[0].stdout.close()


LISTENS = """
import socket, subprocess, sys, time
if sys.argv[1] == "child":
    subprocess.Popen([sys.executable, "-c", {code!r}, "itself", *sys.argv[2:]])
elif sys.argv[1] == "itself":
    listening = socket.create_server(("127.0.0.1", int(sys.argv[2])))
    to_another = socket.create_connection(("127.0.0.1", int(sys.argv[3])))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("who", "own"), [("itself", True), ("child", True), ("nobody", False)])
def test_whose_port_it_is(who: str, own: bool, tmp_path: Path, started: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as other:
        port, another = listening.getsockname()[1], other.getsockname()[1]
        if who != "nobody":
            listening.close()
        code = LISTENS.format(code=LISTENS.format(code=""))
        command = [sys.executable, "-c", code, who, str(port), str(another)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        for _ in range(2 if who == "child" else 1):
            process.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        assert module._listens(a_server(process, tmp_path, url)) == own
        # A port that it has a connection to is not one that it listens on.
        assert not module._listens(a_server(process, tmp_path, f"http://127.0.0.1:{another}"))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(SOON)
        assert not module._listens(a_server(process, tmp_path, url))
        process.stdout.close()


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("OSError: [Errno 98] Address already in use", True),
        (
            "[errno 98] error while attempting to bind on address ('127.0.0.1', 7): address already in use",
            True,
        ),
        ("Port 30000 is already in use by another process", True),
        ("port 5 is not available", True),
        ("port is not available", False),
        ("out of memory", False),
    ],
)
def test_a_port_that_was_taken_is_read_out_of_the_log(text: str, taken: bool, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    before = b"Address already in use\xff\n"
    log.write_bytes(before + text.encode() + b"\xff\n")
    ended, running = (SimpleNamespace(poll=lambda found=found: found) for found in (1, None))
    assert module._port_was_taken(a_server(ended, log, log_start=len(before))) == taken
    assert module._port_was_taken(a_server(ended, log, log_start=0))
    assert not module._port_was_taken(a_server(running, log, log_start=0))


# What is started, in place of processes


class Ends:
    """A client of a server that is ready, or not, as a test says."""

    problems: list[Exception | None]

    def __init__(self, http: Any, url: str, *, timeout: float, diagnose: Any) -> None:
        self.timeout = timeout

    async def until_healthy(self, timeout: float) -> None:
        assert timeout == self.timeout == 5.0
        found = self.problems.pop(0)
        if found is not None:
            raise found


@pytest.mark.parametrize(
    ("problems", "own", "taken", "starts", "ends"),
    [
        ([None], [True], [], 1, None),
        ([RapoError("it ended")], [], [False], 1, "^it ended$"),
        ([RapoError("it ended"), None], [True], [True], 2, None),
        ([None, None], [False, True], [], 2, None),
        (
            [RapoError("a"), None, RapoError("c")],
            [False],
            [True, True],
            3,
            r"7 found its port taken .*, 3 times; .* c$",
        ),
        ([None] * 3, [False] * 3, [], 3, r"times; .* What answers at .*:3 is no process of this run$"),
        ([RapoError("a"), RapoError("no model")], [], [True, False], 2, "^no model$"),
    ],
)
def test_a_server_is_started_until_the_port_is_its_own(
    problems: Any, own: Any, taken: Any, starts: int, ends: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    spawned: list[int] = []
    ended: list[Any] = []

    def spawn(number: int) -> Any:
        spawned.append(number)
        return a_server(f"process {len(spawned)}", tmp_path, f"http://127.0.0.1:{len(spawned)}")

    servers = servers_of(Runs(""), tmp_path)
    monkeypatch.setattr(servers, "_spawn", spawn)
    monkeypatch.setattr(servers, "_connect", Ends)
    monkeypatch.setattr(Ends, "problems", problems, raising=False)
    monkeypatch.setattr(module, "_listens", lambda server: own.pop(0))
    monkeypatch.setattr(module, "_port_was_taken", lambda server: taken.pop(0))
    monkeypatch.setattr(module, "_end", lambda processes: ended.extend(processes))
    not_own = sum(not found for found in own)
    if ends is None:
        assert asyncio.run(servers._start(7)) == f"http://127.0.0.1:{starts}"
        assert servers.urls == [f"http://127.0.0.1:{starts}"]
    else:
        with pytest.raises(RapoError, match=ends):
            asyncio.run(servers._start(7))
    assert spawned == [7] * starts
    assert len(ended) == not_own
    assert own == taken == []


def test_one_that_fails_ends_all_that_were_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[int] = []
    ended: list[Any] = []
    servers = servers_of(Runs(""), tmp_path / "logs", count=3)

    async def start(number: int) -> str:
        servers._servers[number] = a_server(f"process {number}", tmp_path)
        await asyncio.sleep(0)
        if number == 1:
            raise RapoError("it ended")
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return ""

    monkeypatch.setattr(servers, "_start", start)
    monkeypatch.setattr(module, "_end", lambda processes: ended.extend(processes))
    with pytest.raises(RapoError, match="it ended"), servers:
        pass
    assert sorted(cancelled) == [0, 2]
    assert ended == ["process 0", "process 1", "process 2"]
    assert servers.urls == []


def test_a_restart_ends_the_server_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = servers_of(Runs(""), tmp_path)
    servers._servers = {n: a_server(f"process {n}", tmp_path) for n in range(3)}
    told: list[Any] = []

    async def start(number: int) -> str:
        told.append(number)
        return "http://new:1"

    monkeypatch.setattr(servers, "_start", start)
    monkeypatch.setattr(module, "_end", lambda processes: told.extend(processes))
    assert asyncio.run(servers.restart(1)) == "http://new:1"
    assert told == ["process 1", 1]


@pytest.mark.parametrize(
    ("gpus", "number", "mine"), [(None, 0, None), ([4, 5, 6, 7], 0, "4,5"), ([4, 5, 6, 7], 1, "6,7")]
)
def test_the_command_line_of_an_sglang_server(gpus: Any, number: int, mine: str | None) -> None:
    launch = SGLangLauncher(Path("m"), "bfloat16", "py", 2, gpus, ["--x"]).launch(number, 8000, 9)
    tether = [sys.executable, "-P", "-m", "megatron_rapo.engines.tether", str(os.getpid())]
    command = [
        "py",
        "-m",
        "sglang.launch_server",
        "--model-path",
        "m",
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
    ]
    assert launch.arguments == [*tether, *command, "--dtype", "bfloat16", "--tp-size", "2", "--x"]
    assert launch.environment.pop("PYTHONSAFEPATH") == "1"
    assert launch.environment == ({} if mine is None else {"CUDA_VISIBLE_DEVICES": mine})
    assert launch.inherited_socket is None


def test_the_command_line_of_an_embedded_server() -> None:
    launch = EmbeddedLauncher(Path("m"), "cpu", "float32", threads=3).launch(1, 8000, 9)
    command = [sys.executable, "-P", "-m", "megatron_rapo.embedded_server", "--model", "m", "--device", "cpu"]
    command += ["--dtype", "float32", "--threads", "3", "--socket-fd", "9", "--parent-pid", str(os.getpid())]
    assert launch == Launch(command, inherited_socket=9, environment={})
