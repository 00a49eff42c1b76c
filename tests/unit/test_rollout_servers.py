"""Embedded servers as real processes: started, used, killed, orphaned."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.launching import Launch
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.revival import Reviver
from tests.leftovers import nothing_left
from tests.models import make_hf_model
from tests.pools import generate_groups

MODULE = [sys.executable, "-m", "megatron_rapo.embedded_server"]
PROMPTS = [Prompt(i, "", (5 + i, 6, 7), "") for i in range(5)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_hf_model(root / str(seed), seed=seed, initializer_range=0.2) for seed in range(2)]


def start(model, logs, *, count=1, startup_timeout=300.0):
    launcher = EmbeddedLauncher(model, device="cpu", dtype="float32", threads=1)
    return LocalServers(
        launcher, EmbeddedClient, count=count, log_directory=logs, startup_timeout=startup_timeout
    )


def make_pool(servers, **options):
    defaults = {
        "vocab_size": 61,
        "prompts_per_request": 2,
        "request_timeout": 300,
        "diagnose": servers.diagnose,
    }
    return EnginePool(servers.urls, EmbeddedClient, **{**defaults, **options})


def generate(pool, **options):
    defaults = {
        "responses_per_prompt": 4,
        "max_response_tokens": 16,
        "temperature": 1.0,
        "weight_version": 1,
        "seed": 0,
    }
    return generate_groups(pool, PROMPTS, **{**defaults, **options})


def tokens(groups):
    return [[response.token_ids.tolist() for response in group.responses] for group in groups]


def processes():
    """The embedded servers that this process started."""
    running = (p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE)
    return [p for p in running if "megatron_rapo.embedded_server" in " ".join(p.cmdline())]


def test_two_servers_sample_as_one_from_the_published_weights(checkpoints, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "queue.py").write_text("raise RuntimeError('a file of the user is taken for a library')")
    monkeypatch.chdir(here)
    with start(checkpoints[0], tmp_path, count=2) as servers:
        with make_pool(servers) as pool:
            pool.update_weights(checkpoints[1], 1)
            groups = generate(pool)
            assert tokens(generate(pool)) == tokens(groups)
            assert tokens(generate(pool, seed=1)) != tokens(groups)
        with make_pool(servers, prompts_per_request=5, head=1) as pool:
            assert tokens(generate(pool)) == tokens(groups)
        assert len(processes()) == 2
    assert processes() == []

    assert [group.prompt for group in groups] == PROMPTS
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[1], dtype=torch.float32)
    for group in groups:
        for response in group.responses:
            assert response.weight_version == 1
            ids = torch.tensor([[*group.prompt.token_ids, *response.token_ids.tolist()]])
            with torch.inference_mode():
                expected = reference(ids).logits[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(response.log_probs), expected, atol=1e-4, rtol=0)


@contextmanager
def revived_pool(model, logs, **options):
    """Two servers and a pool that brings them back, with the weights as version 1; and its reviver."""
    with start(model, logs, count=2) as servers:
        reviver = Reviver(servers, read_architecture(model), restarts=3, startup_timeout=300)
        with make_pool(servers, prompts_per_request=1, reviver=reviver, **options) as pool:
            pool.wait_until_healthy(300)
            pool.update_weights(model, 1)
            yield pool, reviver


def server_at(url):
    """The process that listens there."""
    port = int(url.rsplit(":", 1)[1])
    [found] = [p for p in processes() if any(c.laddr.port == port for c in p.net_connections())]
    return found


def until_two_are_live(pool):
    deadline = time.monotonic() + 120
    while len(pool.urls) < 2:
        assert time.monotonic() < deadline, pool.failures
        pool.revive()
        time.sleep(0.1)


def test_killed_and_hung_servers_change_no_response_and_come_back(checkpoints, tmp_path):
    with nothing_left(), revived_pool(checkpoints[0], tmp_path, health_interval=1.0) as (pool, reviver):
        expected = tokens(generate(pool, responses_per_prompt=64))
        first, second = pool.urls

        # While it generates: the requests that it has are sent again.
        threading.Timer(0.05, os.kill, (server_at(first).pid, signal.SIGKILL)).start()
        assert tokens(generate(pool, responses_per_prompt=64)) == expected
        generate(pool)  # so that it is asked, should it have been killed too late
        assert pool.urls == [second]
        assert "killed by SIGKILL" in pool.failures[first]
        assert str(tmp_path / "engine-0.log") in pool.failures[first]
        until_two_are_live(pool)
        assert pool.urls[1] == second and first not in pool.urls

        # While it loads weights: the other one has them, and this one when it is back.
        victim = server_at(second)
        victim.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, victim.send_signal, (signal.SIGKILL,)).start()
        pool.update_weights(checkpoints[1], 2)
        assert second not in pool.urls and len(pool.urls) == 1
        until_two_are_live(pool)
        pool.update_weights(checkpoints[0], 1)
        assert tokens(generate(pool, responses_per_prompt=64)) == expected

        # It stops to answer: noticed long before its request is late.
        hung = pool.urls[0]
        server_at(hung).send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert tokens(generate(pool, responses_per_prompt=64)) == expected
        assert time.monotonic() - began < 60
        assert "silent 3 times in a row" in pool.failures[hung]
        until_two_are_live(pool)
        assert reviver.returned == 3


def test_a_server_that_finds_its_port_taken_tries_another(checkpoints, tmp_path):
    class Unlucky(EmbeddedLauncher):
        """Its servers bind their ports themselves; the first ones too late."""

        def launch(self, number, port, socket_fd):
            usual = super().launch(number, port, socket_fd).arguments
            place = usual.index("--socket-fd")
            asked.append(taken.getsockname()[1] if len(asked) < late else port)
            return Launch([*usual[:place], "--port", str(asked[-1]), *usual[place + 2 :]])

    launcher = Unlucky(checkpoints[0], device="cpu", dtype="float32", threads=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        late, asked = 1, []
        with LocalServers(
            launcher, EmbeddedClient, count=1, log_directory=tmp_path, startup_timeout=300
        ) as servers:
            assert len(asked) == 2
            assert servers.urls == [f"http://127.0.0.1:{asked[1]}"]
        late, asked = 9, []
        with (
            pytest.raises(
                RapoError, match="embedded server 0 found its port taken by another process, 3 times"
            ),
            LocalServers(launcher, EmbeddedClient, count=1, log_directory=tmp_path, startup_timeout=300),
        ):
            pass
        assert len(asked) == 3
    assert processes() == []


def test_a_server_that_cannot_start_is_named_with_its_log(tmp_path):
    started = time.monotonic()
    with pytest.raises(RapoError) as failed, start(tmp_path / "nowhere", tmp_path):
        pass
    assert time.monotonic() - started < 250  # it did not wait for the whole time
    assert "exit code 1" in str(failed.value)
    assert "nowhere has no config.json" in str(failed.value)
    assert processes() == []


def test_a_server_that_starts_too_slowly_is_ended(checkpoints, tmp_path):
    with (
        pytest.raises(RapoError, match=r"not ready within 0.1 s.*startup_timeout_s"),
        start(checkpoints[0], tmp_path, startup_timeout=0.1),
    ):
        pass
    assert processes() == []


def test_servers_end_when_their_parent_is_killed(checkpoints, tmp_path):
    """Also one that is stopped, or hangs, and cannot look for its parent."""
    script = f"""
import time
from pathlib import Path
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.servers import LocalServers
launcher = EmbeddedLauncher(Path({str(checkpoints[0])!r}), device="cpu", dtype="float32", threads=1)
logs = Path({str(tmp_path)!r})
with LocalServers(launcher, EmbeddedClient, count=1, log_directory=logs, startup_timeout=300) as servers:
    print(servers.urls[0], flush=True)
    time.sleep(120)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        url = parent.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        [server] = psutil.Process(parent.pid).children()
        server.suspend()
        parent.kill()
        parent.wait(60)
        server.wait(60)
    finally:
        parent.kill()
        parent.stdout.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_beyond_loopback_a_key_is_demanded(checkpoints, host):
    environment = {k: v for k, v in os.environ.items() if k != "RAPO_ENGINE_API_KEY"}
    ended = subprocess.run(
        [*MODULE, "--model", str(checkpoints[0]), "--host", host],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1
    assert f"--host {host}" in ended.stderr and "RAPO_ENGINE_API_KEY" in ended.stderr


def test_by_hand_it_tells_its_address_and_ends_on_a_signal(checkpoints):
    process = subprocess.Popen(
        [*MODULE, "--model", str(checkpoints[0]), "--dtype", "float32"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert str(checkpoints[0]) in line
        url = line.split()[-1]
        with EnginePool(
            [url], EmbeddedClient, vocab_size=61, prompts_per_request=8, request_timeout=300
        ) as pool:
            pool.wait_until_healthy(300)
            pool.update_weights(Path(checkpoints[1]), 1)
            assert len(generate(pool)) == len(PROMPTS)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_taken_port_is_named(checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [*MODULE, "--model", str(checkpoints[0]), "--port", port],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr
