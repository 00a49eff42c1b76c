"""SGLang servers that a run starts: their command line, and that the whole family ends with the run.

A stand-in for the package: one process that serves and one that it started, which asked politely stay.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.launcher import SGLangLauncher
from megatron_rapo.engines.tether import NOTE_S
from megatron_rapo.errors import RapoError
from tests.leftovers import nothing_left

STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time
if sys.argv[1] == "--child":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(120)
if "--fails" in sys.argv:
    sys.exit("no such model")
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"arguments": sys.argv[1:], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        said["environment"] = sorted(os.environ)
        said = json.dumps({**said, "pids": [os.getpid(), child.pid]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
shared = open(f"/dev/shm/sglang_loads_{os.getpid()}.shm", "wb")  # SGLang removes its own no more than this
child = subprocess.Popen([sys.executable, __file__, "--child"])
server.serve_forever()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes `python -m sglang.launch_server` the stand-in."""
    folder = tmp_path / "packages/sglang"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "launch_server.py").write_text(STAND_IN)
    paths = [str(folder.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def start(logs, *arguments, count=1, python=sys.executable, gpus=None, tensor_parallel=1):
    launcher = SGLangLauncher(
        Path("/models/seven"), "bfloat16", python, tensor_parallel, gpus=gpus, arguments=arguments
    )
    return LocalServers(launcher, SGLangClient, count=count, log_directory=logs, startup_timeout=60)


def ask(url):
    import httpx

    return httpx.get(f"{url}/health", timeout=10, trust_env=False).json()


def ended(pids, within=15.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        running = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not running:
            return True
        time.sleep(0.1)
    return False


@contextmanager
def a_stranger_first(monkeypatch, times):
    """Another engine takes the port, and answers there, before the server that it was chosen for."""
    strangers = []
    launch = SGLangLauncher.launch

    def take(port):
        while True:  # until whoever looked for a free port lets go of it
            with suppress(OSError):
                strangers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
                return strangers[-1].serve_forever()
            time.sleep(0.001)

    def launch_late(self, number, port, socket_fd):
        if len(threads) < times:
            threads.append(threading.Thread(target=take, args=(port,)))
            threads[-1].start()
        return launch(self, number, port, socket_fd)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    threads = []
    monkeypatch.setattr(SGLangLauncher, "launch", launch_late)
    try:
        yield strangers
    finally:
        for stranger in strangers:
            stranger.shutdown()
            stranger.server_close()


def test_another_engine_on_the_port_is_not_taken_for_its_own(package, tmp_path, monkeypatch):
    with nothing_left(), a_stranger_first(monkeypatch, times=1) as strangers, start(tmp_path) as servers:
        assert servers.urls != [f"http://127.0.0.1:{strangers[0].server_address[1]}"]
        assert ask(servers.urls[0])["pids"]
    with (
        nothing_left(),
        a_stranger_first(monkeypatch, times=9),
        pytest.raises(
            RapoError, match=r"found its port taken by another process, 3 times; .*(no process of|in use)"
        ),
        start(tmp_path),
    ):
        pass


def test_each_is_told_model_address_and_gpus(package, tmp_path, monkeypatch):
    # A rank's own place among the ranks: SGLang would take it for its own, and wait for peers.
    of_a_rank = [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ]
    for name in of_a_rank:
        monkeypatch.setenv(name, "1")
    with (
        nothing_left(),
        start(
            tmp_path, "--mem-fraction-static", "0.5", count=2, gpus=[4, 5, 6, 7], tensor_parallel=2
        ) as servers,
    ):
        for number, url in enumerate(servers.urls):
            said = ask(url)
            port = url.rsplit(":", 1)[1]
            expected = ["--model-path", "/models/seven", "--host", "127.0.0.1", "--port", port]
            expected += ["--dtype", "bfloat16", "--tp-size", "2", "--mem-fraction-static", "0.5"]
            assert said["arguments"] == expected
            assert said["gpus"] == ["4,5", "6,7"][number]
            assert not set(of_a_rank) & set(said["environment"])


@pytest.mark.parametrize("manner", [[], ["--stubborn"]])
def test_the_family_ends_with_the_block(package, tmp_path, manner):
    with nothing_left(), start(tmp_path, *manner) as servers:
        pids = ask(servers.urls[0])["pids"]
    assert ended(pids)


def test_a_killed_server_takes_its_family_along_and_is_named(package, tmp_path):
    with nothing_left(), start(tmp_path) as servers:
        [url] = servers.urls
        server, child = ask(url)["pids"]
        time.sleep(2 * NOTE_S)
        os.kill(server, signal.SIGKILL)
        assert ended([server, child])
        deadline = time.monotonic() + 15
        while (reason := servers.diagnose(url)) is None:
            assert time.monotonic() < deadline
        assert "the SGLang server was killed by SIGKILL; its log" in reason


@pytest.mark.parametrize("killed", ["owner", "tether"])
def test_kill_9_of_whoever_watches_leaves_no_server(package, tmp_path, killed):
    script = f"""
import json, sys, time, httpx
from pathlib import Path
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.launcher import SGLangLauncher
from megatron_rapo.engines.servers import LocalServers
launcher = SGLangLauncher(Path("/models/seven"), "bfloat16", sys.executable, 1, gpus=None, arguments=[])
logs = Path({str(tmp_path)!r})
with LocalServers(launcher, SGLangClient, count=1, log_directory=logs, startup_timeout=60) as servers:
    said = httpx.get(servers.urls[0] + "/health", trust_env=False).json()
    print(json.dumps(said["pids"]), flush=True)
    time.sleep(120)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        server, child = json.loads(owner.stdout.readline())
        [tether] = psutil.Process(owner.pid).children()
        (owner if killed == "owner" else tether).kill()
        # SGLang's own children end by themselves when the server does; the stand-in's does not.
        assert ended([server] if killed == "tether" else [server, child, tether.pid])
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


def test_a_server_that_cannot_start_is_named_with_its_log(package, tmp_path):
    with nothing_left(), pytest.raises(RapoError) as failed, start(tmp_path, "--fails"):
        pass
    assert "the SGLang server ended with exit code 1" in str(failed.value)
    assert "no such model" in str(failed.value)


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    with (
        nothing_left(),
        pytest.raises(RapoError, match="nowhere/python"),
        start(tmp_path, python="/nowhere/python"),
    ):
        pass
