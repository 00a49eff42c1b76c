"""The client of SGLang's router before a stand-in of it: whom it sends to, and what is refused.

tests/engines has the real router.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from megatron_rapo.background import BackgroundLoop
from megatron_rapo.engines.engine import Generation
from megatron_rapo.engines.sglang import router as module
from megatron_rapo.engines.sglang.router import SGLangRouter
from megatron_rapo.errors import EngineLost, RapoError

ROUTER = "http://127.0.0.1:7000"
ONE, TWO, OTHER = (f"http://127.0.0.1:{port}" for port in (7001, 7002, 7003))


class StandInRouter:
    """Workers are listed a look after they were added, and healthy later: the real router asks them first."""

    def __init__(self, *urls: str) -> None:
        self.workers = dict.fromkeys(urls, True)
        self.asked: list[tuple[str, str, Any]] = []
        self.accepted: list[str] = []
        self.takes = True
        self.removes = True
        self.slow = 1  # looks until one is healthy
        self.answer: Any = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        path = request.url.path
        self.asked.append((request.method, path, body))
        if path == "/generate":
            return httpx.Response(200, json=self.answer or echo(body))
        if request.method == "POST":
            if self.takes:
                self.accepted.append(body["url"])
            return httpx.Response(202, json={})
        if request.method == "DELETE":
            url = path.removeprefix("/workers/id of ")
            if url not in self.workers:
                return httpx.Response(404)
            if self.removes:
                del self.workers[url]
                self.accepted = [other for other in self.accepted if other != url]
            return httpx.Response(202, json={})
        if self.answer is not None:
            return httpx.Response(200, json=self.answer)
        listed = [{"id": f"id of {url}", "url": url, "is_healthy": ok} for url, ok in self.workers.items()]
        self.workers |= dict.fromkeys(self.accepted, False)
        self.slow -= 1
        if self.slow <= 0:
            self.workers = dict.fromkeys(self.workers, True)
        return httpx.Response(200, json={"workers": listed})

    def told(self, method: str) -> list[Any]:
        return [body or path for how, path, body in self.asked if how == method]


def echo(body: Any) -> Any:
    """The prompt as the response, the seed as the version."""
    meta = {"finish_reason": {"type": "stop"}, "weight_version": body["sampling_params"]["sampling_seed"]}
    meta["output_token_logprobs"] = [[-0.5, token, None] for token in body["input_ids"]]
    return {"output_ids": body["input_ids"], "meta_info": meta}


def run(router: StandInRouter, work: Callable[[SGLangRouter], Coroutine[Any, Any, Any]]) -> Any:
    async def with_client() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(router)) as http:
            return await work(SGLangRouter(http, ROUTER, timeout=20))

    loop = BackgroundLoop("test")
    try:
        return loop.run(with_client())
    finally:
        loop.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.delenv("RAPO_ENGINE_API_KEY", raising=False)


def test_the_engines_become_its_only_workers() -> None:
    router = StandInRouter(ONE, OTHER)
    run(router, lambda client: client.serve_with([ONE, TWO], {ONE, TWO, OTHER}, timeout=20))
    assert set(router.workers) == {ONE, TWO}
    assert router.told("POST") == [{"url": TWO}]
    assert router.told("DELETE") == [f"/workers/id of {OTHER}"]


def test_an_engine_is_added_once_however_long_the_router_takes() -> None:
    router = StandInRouter()
    router.slow = 6
    run(router, lambda client: client.serve_with([ONE], {ONE}, timeout=20))
    assert router.told("POST") == [{"url": ONE}]
    assert router.told("DELETE") == []
    assert router.workers == {ONE: True}


def test_an_engine_that_looks_ill_is_added_anew() -> None:
    router = StandInRouter(ONE)
    router.workers[ONE], router.slow = False, 2
    run(router, lambda client: client.serve_with([ONE], {ONE}, timeout=20))
    assert router.told("DELETE") == [f"/workers/id of {ONE}"]
    assert router.told("POST") == [{"url": ONE}]


def test_engines_get_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPO_ENGINE_API_KEY", "secret")
    router = StandInRouter()
    run(router, lambda client: client.serve_with([ONE], {ONE}, timeout=20))
    assert router.told("POST") == [{"url": ONE, "api_key": "secret"}]


def test_engines_that_it_does_not_take_are_named() -> None:
    router = StandInRouter(ONE)
    router.takes = False
    with pytest.raises(RapoError, match=rf"does not send to {TWO} after 0\.2 s"):
        run(router, lambda client: client.serve_with([ONE, TWO], {ONE, TWO}, timeout=0.2))


def test_workers_of_others_are_refused_before_anything_is_changed() -> None:
    router = StandInRouter(ONE, OTHER)
    with pytest.raises(RapoError, match=rf"workers that are no engines of this run.*: {OTHER}; remove"):
        run(router, lambda client: client.serve_with([ONE, TWO], {ONE, TWO}, timeout=20))
    assert router.told("POST") == router.told("DELETE") == []


def test_an_engine_is_removed_and_one_that_is_not_there_is_no_fault() -> None:
    router = StandInRouter(ONE, TWO)
    run(router, lambda client: client.remove(ONE))
    run(router, lambda client: client.remove(ONE))
    assert set(router.workers) == {TWO}
    assert router.told("DELETE") == [f"/workers/id of {ONE}"]


def test_a_router_that_does_not_remove_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTROL_TIMEOUT_S", 0.2)
    router = StandInRouter(ONE)
    router.removes = False
    with pytest.raises(EngineLost, match=rf"did not remove {ONE} in 0\.2 s"):
        run(router, lambda client: client.remove(ONE))


def test_what_is_no_router_is_told() -> None:
    router = StandInRouter()
    router.answer = {"workers": [{"url": ONE}]}
    with pytest.raises(RapoError, match=r"answers no list of HTTP workers.*is this SGLang's router"):
        run(router, lambda client: client.check_workers({ONE}))


def test_each_response_is_a_request_of_its_own_in_order() -> None:
    router = StandInRouter()
    wanted = [Generation((1, 2), 8, 1.0, seed=5), Generation((3,), 8, 1.0, seed=6)]
    answers = run(router, lambda client: client.generate(wanted))
    assert [(answer.token_ids.tolist(), answer.versions) for answer in answers] == [
        ([1, 2], ("5",)),
        ([3], ("6",)),
    ]
    assert all(body["return_logprob"] is True for body in router.told("POST"))
    router.answer = ["no", "dict"]
    with pytest.raises(EngineLost, match="no response"):
        run(router, lambda client: client.generate(wanted[:1]))
