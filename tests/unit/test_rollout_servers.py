"""Embedded servers as real processes: started, used, killed, orphaned."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.servers import EmbeddedServers
from tests.models import make_hf_model

MODULE = [sys.executable, "-m", "megatron_rapo.rollout.embedded"]
PROMPTS = [Prompt(i, "", (5 + i, 6, 7), "") for i in range(5)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_hf_model(root / str(seed), seed=seed, initializer_range=0.2) for seed in range(2)]


def start(model, logs, *, count=1, startup_timeout=300.0):
    return EmbeddedServers(
        model,
        count=count,
        device="cpu",
        dtype="float32",
        threads=1,
        log_directory=logs,
        startup_timeout=startup_timeout,
    )


def make_pool(servers, **options):
    defaults = {
        "vocab_size": 61,
        "prompts_per_request": 2,
        "request_timeout": 300,
        "diagnose": servers.diagnose,
    }
    return EnginePool(servers.urls, **{**defaults, **options})


def generate(pool, **options):
    defaults = {
        "responses_per_prompt": 4,
        "max_response_tokens": 16,
        "temperature": 1.0,
        "weight_version": 1,
        "seed": 0,
    }
    return pool.generate(PROMPTS, **{**defaults, **options})


def tokens(groups):
    return [[response.token_ids.tolist() for response in group.responses] for group in groups]


def processes():
    """The embedded servers that this process started."""
    return [
        p for p in psutil.Process().children() if "megatron_rapo.rollout.embedded" in " ".join(p.cmdline())
    ]


def test_two_servers_sample_as_one_from_the_published_weights(checkpoints, tmp_path):
    with start(checkpoints[0], tmp_path, count=2) as servers:
        with make_pool(servers) as pool:
            with pytest.raises(RapoError, match="version 'default' in place of 1"):
                generate(pool)
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


def test_a_server_killed_in_a_step_is_named_with_its_end(checkpoints, tmp_path):
    with start(checkpoints[0], tmp_path) as servers, make_pool(servers) as pool:
        pool.update_weights(checkpoints[0], 1)
        [process] = processes()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RapoError) as failed:
            generate(pool)
        assert "killed by SIGKILL" in str(failed.value)
        assert str(tmp_path / "engine-0.log") in str(failed.value)


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
    script = f"""
import time
from pathlib import Path
from megatron_rapo.rollout.servers import EmbeddedServers
with EmbeddedServers(Path({str(checkpoints[0])!r}), count=1, device="cpu", dtype="float32", threads=1,
                     log_directory=Path({str(tmp_path)!r}), startup_timeout=300) as servers:
    print(servers.urls[0], flush=True)
    time.sleep(120)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        url = parent.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        [server] = psutil.Process(parent.pid).children()
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
        with EnginePool([url], vocab_size=61, prompts_per_request=8, request_timeout=300) as pool:
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
