"""SGLang's real router before real engines: who gets prompts, who gets weights, what a failure costs."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.router import SGLangRouter
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.rollout import pool as pools
from megatron_rapo.rollout.revival import Reviver
from tests.engines.servers import ROOT, SGLANG_PYTHON
from tests.models import make_hf_model
from tests.pools import generate_groups
from tests.ports import free_ports
from tests.stand_in import stand_ins

SITE_PACKAGES = SGLANG_PYTHON.parents[1] / "lib"
NOBODY = "http://127.0.0.1:9"
SOON = 60.0  # seconds, on a machine that is busy

pytestmark = pytest.mark.skipif(
    not list(SITE_PACKAGES.glob("python*/site-packages/sglang_router")),
    reason="SGLang's router is not installed (make sglang)",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf_model(tmp_path_factory.mktemp("model"), seed=0)


@contextmanager
def running_router(log: Path):
    ports = list(map(str, free_ports(2)))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SGLANG_PYTHON, ROOT / "tests/engines/router.py", *ports],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_for(lambda: answers(url), log)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url):
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200


def wait_for(condition, log=None):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, log and log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)


def workers(router):
    return sorted(w["url"] for w in httpx.get(f"{router}/workers", trust_env=False).json()["workers"])


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    with running_router(tmp_path_factory.mktemp("router") / "router.log") as url:
        yield url


@pytest.fixture
def empty(router):
    """The router without workers."""
    yield router
    for worker in httpx.get(f"{router}/workers", trust_env=False).json()["workers"]:
        httpx.delete(f"{router}/workers/{worker['id']}", trust_env=False)
    wait_for(lambda: not workers(router))


def make_pool(urls, router, model=None, **options):
    reviver = None
    if model is not None:
        reviver = Reviver(None, read_architecture(model), restarts=3, startup_timeout=SOON)
    defaults = {"vocab_size": 61, "prompts_per_request": 64, "request_timeout": SOON}
    through = None if router is None else partial(SGLangRouter, url=router)
    return pools.EnginePool(urls, SGLangClient, router=through, reviver=reviver, **{**defaults, **options})


def generate(pool, count=6, version=3, tokens=8):
    prompts = [Prompt(100 + i, "", (i, 7), "", draw=i) for i in range(count)]
    return generate_groups(
        pool,
        prompts,
        responses_per_prompt=3,
        max_response_tokens=tokens,
        temperature=0.5,
        weight_version=version,
        seed=11,
    )


def content(groups):
    return [
        (group.prompt.index, [(r.token_ids.tolist(), r.weight_version) for r in group.responses])
        for group in groups
    ]


def generated(stand_in):
    return [body for path, body in stand_in.asked if path == "/generate"]


def test_embedded_servers_behind_it_get_prompts_through_it_and_weights_past_it(empty, model, tmp_path):
    launcher = EmbeddedLauncher(model, "cpu", "float32", threads=1)
    with LocalServers(
        launcher, EmbeddedClient, count=2, log_directory=tmp_path, startup_timeout=SOON
    ) as servers:
        urls = servers.urls
        with make_pool(urls, None) as direct:
            direct.update_weights(model, 3)
            expected = content(generate(direct))
        with make_pool(urls, empty, model, health_interval=2.0) as pool:
            pool.wait_until_healthy(SOON)
            assert workers(empty) == [], "nothing is registered before it has the run's weights"
            pool.update_weights(model, 3)
            assert workers(empty) == sorted(urls)
            assert content(generate(pool)) == expected
            # One dies in the middle: its work is done by the other, and the router no longer has it.
            pids = {server.url: server.process.pid for server in servers._servers.values()}
            killer = threading.Timer(0.3, os.kill, (pids[urls[0]], signal.SIGKILL))
            killer.start()
            many = generate(pool, count=60, tokens=40)
            assert not killer.is_alive(), "it was killed meanwhile"
            assert [group.prompt.index for group in many] == list(range(100, 160))
            assert all(len(group.responses) == 3 for group in many)
            wait_for(lambda: pool.urls == urls[1:] and workers(empty) == urls[1:])
            assert content(generate(pool)) == expected
            other = make_hf_model(tmp_path / "other", seed=7)
            pool.update_weights(other, 4)
            changed = content(generate(pool, version=4))
            assert [v for _, rs in changed for _, v in rs] == [4] * 18
            assert [[t for t, _ in rs] for _, rs in changed] != [[t for t, _ in rs] for _, rs in expected]


def test_each_response_is_a_request_with_its_own_seed(empty, model):
    with stand_ins(2) as (servers, urls), stand_ins(2) as (_, plain), make_pool(plain, None) as direct:
        with make_pool(urls, empty) as pool:
            pool.update_weights(model, 3)
            assert content(generate(pool)) == content(generate(direct))
        counts = [len(generated(server)) for server in servers]
        assert sum(counts) == 18 and min(counts) > 0
        seeds = [body["sampling_params"]["sampling_seed"] for server in servers for body in generated(server)]
        assert len(set(seeds)) == 18


def test_an_engine_with_other_weights_is_found_and_removed(empty, model):
    with stand_ins(2) as (servers, urls), make_pool(urls, empty) as pool:
        pool.update_weights(model, 3)
        expected = content(generate(pool))
        servers[0].version = "2"  # started anew, say
        assert content(generate(pool)) == expected
        assert pool.urls == urls[1:] == workers(empty)
        assert "version '2' in place of 3" in pool.failures[urls[0]]
        asked = len(generated(servers[0]))
        assert content(generate(pool)) == expected
        assert len(generated(servers[0])) == asked


def test_work_of_an_engine_that_hangs_is_sent_again(empty, model):
    with stand_ins(2) as (servers, urls), make_pool(urls, empty, health_interval=1.0) as pool:
        pool.update_weights(model, 3)
        expected = content(generate(pool))
        servers[0].go_on.clear()
        assert content(generate(pool)) == expected
        assert pool.urls == urls[1:] == workers(empty)
        assert pool.resent > 0


def test_one_that_comes_back_serves_once_it_has_the_weights(empty, tmp_path, model):
    with stand_ins(2) as (servers, urls), make_pool(urls, empty, model) as pool:
        pool.update_weights(model, 3)
        servers[0].version = "2"
        generate(pool)
        assert workers(empty) == urls[1:]
        pool.revive()
        wait_for(lambda: pool.revive() or len(pool.urls) == 2)
        assert workers(empty) == urls[1:], "it has not got the weights yet"
        pool.update_weights(model, 4)
        assert workers(empty) == sorted(urls)
        before = len(generated(servers[0]))
        generate(pool, version=4)
        assert len(generated(servers[0])) > before


def test_a_router_with_other_workers_is_refused_by_name(empty, model):
    with stand_ins(2) as (servers, urls), make_pool(urls[:1], empty) as pool:
        httpx.post(f"{empty}/workers", json={"url": urls[1]}, trust_env=False)
        wait_for(lambda: workers(empty) == urls[1:])
        with pytest.raises(RapoError, match=f"no engines of this run.*{urls[1]}; remove them"):
            pool.wait_until_healthy(SOON)
        with pytest.raises(RapoError, match="no engines of this run"):
            pool.update_weights(model, 3)
        assert not generated(servers[1])


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (False, r"rollout.engine.router cannot be used: .*127.0.0.1:9.*launch_router"),
        (True, "answers no list of HTTP workers"),
    ],
)
def test_what_is_no_router_is_named(there, message):
    with (
        stand_ins(2) as (_, (engine, other)),
        make_pool([engine], other if there else NOBODY) as pool,
        pytest.raises(RapoError, match=message),
    ):
        pool.wait_until_healthy(SOON)


def test_a_failure_with_no_engine_to_blame_ends_the_run(empty, model):
    with stand_ins(1) as ([server], urls), make_pool(urls, empty) as pool:
        pool.update_weights(model, 3)
        server.answers["/generate"] = (500, b"out of memory")
        with pytest.raises(RapoError, match="though every engine answers and has version 3"):
            generate(pool, count=1)
        assert pool.urls == urls
