"""What a pool asks of all its engines: memory, what they are, updates; and of the router before them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.router import SGLangRouter
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout import pool as module
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, first_turns
from tests.pools import generate_groups
from tests.stand_in import VOCAB, stand_ins

WAIT_S = 30.0
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
ALL = {"tags": ["weights", "kv_cache"]}


def make_pool(urls: list[str], **options: Any) -> EnginePool:
    return EnginePool(
        urls,
        **{
            "connect": SGLangClient,
            "vocab_size": VOCAB,
            "prompts_per_request": 2,
            "request_timeout": 60.0,
            **options,
        },
    )


def memory(server: Any) -> list[Any]:
    return [(path, body) for path, body in server.asked if path in (RELEASE, RESUME)]


def generate(pool: EnginePool, count: int = 4) -> Any:
    prompts = [Prompt(100 + i, "", (i, 7), "") for i in range(count)]
    options: dict[str, Any] = {"max_response_tokens": 8, "temperature": 0.5, "weight_version": 3, "seed": 11}
    return generate_groups(pool, prompts, responses_per_prompt=2, **options)


def test_a_pool_needs_an_engine() -> None:
    with pytest.raises(ValueError, match="at least one server"):
        make_pool([])


def test_at_its_end_a_pool_leaves_no_connection_and_no_thread() -> None:
    before = threading.active_count()
    with stand_ins(1) as (_, urls):
        with make_pool(urls, health_interval=WAIT_S) as pool:
            generate(pool)
        assert pool._http.is_closed
        assert pool._loop._loop.is_closed()
    assert threading.active_count() <= before


def test_memory_is_given_back_by_all_and_taken_again_by_those() -> None:
    with stand_ins(3) as (servers, urls), make_pool(urls) as pool:
        pool.resume_memory()
        assert all(memory(server) == [] for server in servers), "nobody rests"
        servers[2].fault, servers[2].faulty = "closed", RELEASE
        pool.release_memory()
        assert pool.urls == urls[:2], "one that is lost meanwhile is out"
        pool.resume_memory()
        pool.resume_memory()
        assert [memory(server) for server in servers[:2]] == [[(RELEASE, ALL), (RESUME, ALL)]] * 2
        pool.release_memory()
        servers[0].fault, servers[0].faulty = "closed", RESUME
        with pytest.raises(EngineLost):
            pool.resume_memory()
        assert pool.urls == urls[1:2]
        servers[1].answers[RELEASE] = (400, b"busy")
        with pytest.raises(RapoError, match="busy"):
            pool.release_memory()


def test_what_engines_say_of_themselves() -> None:
    with stand_ins(3) as (servers, urls), make_pool(urls, connect=EmbeddedClient) as pool:
        said = [("float32", "9"), ("bfloat16", "8"), ("float32", "9")]
        for number, (dtype, version) in enumerate(said):
            info = {"server": "own", "tp_size": number + 1, "dtype": dtype, "version": version}
            sums = {"weight_version": "3", "checksums": {"a": str(number)}}
            servers[number].answers["/server_info"] = (200, json.dumps(info).encode())
            servers[number].answers["/weights_checksum"] = (200, json.dumps(sums).encode())
        assert pool.tensor_parallel() == [1, 2, 3]
        assert pool.software() == "own 8, own 9"
        assert pool.weights_checksums("float32") == {urls[0]: {"a": 0}, urls[2]: {"a": 2}}
        assert pool.weights_checksums("bfloat16") == {urls[1]: {"a": 1}}
        servers[1].fault, servers[1].faulty = "closed", "/server_info"
        with pytest.raises(EngineLost):
            pool.tensor_parallel()
        assert pool.tensor_parallel() == [1, 3]


@pytest.mark.parametrize(("kind", "own"), [(SGLangClient, False), (EmbeddedClient, True)])
def test_a_pool_can_what_its_engines_can(kind: Any, own: bool) -> None:
    with stand_ins(2) as (servers, urls), make_pool(urls, connect=kind) as pool:
        assert (pool.take_slices(), pool.one_request_at_a_time()) == (own, own)
        if not own:
            for server in servers:
                server.answers["/server_info"] = (200, b'{"tp_size": 1, "dtype": "float32"}')
            assert pool.weights_checksums("float32") == {}
            assert all(path != "/weights_checksum" for server in servers for path, _ in server.asked)


@pytest.mark.parametrize(
    ("options", "per_engine", "minimum", "first"),
    [
        ({}, 32, 1, 0),
        ({"requests_per_engine": 5, "minimum_engines": 2, "head": 1}, 5, 2, 1),
        ({"head": 2}, 32, 1, 2),
        ({"head": 5}, 32, 1, 2),
    ],
)
def test_a_round_is_as_the_pool_is_told(
    options: dict[str, int], per_engine: int, minimum: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[Any, Any]] = []
    asked: list[list[list[int]]] = []
    closed: list[bool] = []
    last = 4

    class Noted:
        resent = 3

        def __init__(self, members: Any, send: Any, **limits: int) -> None:
            rounds.append(([member.url for member in members], limits))
            closed.append(False)
            asked.append([])

        async def ask(self, request: Any, after: Any) -> Any:
            asked[-1].append([ask.token_ids[0] for ask in request.asks])
            if request.asks[-1].token_ids[0] == last:
                raise TooFewEngines("too few")
            return list(range(len(request)))

        async def close(self) -> None:
            closed[-1] = True

    monkeypatch.setattr(module, "Dispatch", Noted)
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    with make_pool(urls, **options) as pool:
        responses = [group and group.responses for group in generate(pool, 5)]
        assert responses == [(0, 1), (2, 3)] * 2 + [None]
        last = 1
        responses = [group and group.responses for group in generate(pool, 2)]
        assert responses == [(0, 1), None]
        assert pool.resent == 6
    limits = {"per_engine": per_engine, "minimum": minimum}
    assert rounds == [(urls[first:] + urls[:first], limits)] * 2
    assert asked == [[[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]], [[0, 0], [1, 1]]]
    assert closed == [True, True]


def test_a_round_is_left_once_nothing_of_it_is_under_way() -> None:
    """Also after an error: what follows may give engines other weights."""
    with stand_ins(1) as ([server], urls), make_pool(urls, prompts_per_request=1) as pool:
        server.go_on.clear()
        sampling = Sampling(1, 8, 1.0, 3, seed=0)
        with pytest.raises(KeyError), pool.round() as opened:
            answer = opened.ask(first_turns([Prompt(0, "", (1,), "")], sampling))
            wait_until(lambda: bool(server.asked))
            raise KeyError
        assert not pool._members.live[0]._asked
        wait_until(answer.cancelled)
        wait_until(opened.ask(first_turns([Prompt(0, "", (2,), "")], sampling)).cancelled)
        server.go_on.set()
        assert [body["input_ids"] for _, body in server.asked] == [[[1]]]
        assert pool.urls == urls


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_servers_that_are_still_starting_are_not_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_ins(1) as (_, urls), make_pool(urls) as pool:
        seen: list[int] = []

        async def until_healthy(timeout: float) -> None:
            seen.append(len(pool._to_watch()))

        monkeypatch.setattr(pool._members, "until_healthy", until_healthy)
        pool.wait_until_healthy(1.0)
        assert (seen, len(pool._to_watch())) == ([0], 1)


def test_engines_are_not_watched_while_an_update_is_open(tmp_path: Any) -> None:
    with stand_ins(1) as ([server], urls), make_pool(urls) as pool:
        seen: list[int] = []
        route = pool._route

        async def noted() -> None:
            seen.append(len(pool._to_watch()))
            await route()

        pool._route = noted  # type: ignore[method-assign]
        assert len(pool._to_watch()) == 1
        pool.begin_update()
        assert pool._to_watch() == []
        pool.end_update(3)
        assert len(pool._to_watch()) == 1
        pool.begin_update()
        pool.abandon_update()
        assert len(pool._to_watch()) == 1
        pool.update_weights(tmp_path, 4)
        assert len(pool._to_watch()) == 1
        assert seen == [0, 0]
        server.answers["/update_weights_from_disk"] = (400, b"no")
        with pytest.raises(RapoError):
            pool.update_weights(tmp_path, 5)
        assert len(pool._to_watch()) == 1


async def post_piece(engine: Any, number: int) -> Any:
    return await engine.post("/piece", {"n": number}, timeout=WAIT_S)


def test_parts_are_as_many_as_engines() -> None:
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        assert pool.each(post_piece, [1, 2]).result(WAIT_S) == [{}, {}]
        assert [server.asked for server in servers] == [[("/piece", {"n": 1})], [("/piece", {"n": 2})]]
        for parts in ([1], [1] * 3):
            with pytest.raises(EngineLost, match=f"{len(parts)} parts for 2 live engines"):
                pool.each(post_piece, parts).result(WAIT_S)


class Routes:
    """Stands for the router: notes what it is told, and answers each request."""

    made: list[Any]
    told: list[Any]

    def __init__(self, router: Any, vocab_size: int) -> None:
        self.made.append((router.url, vocab_size))

    async def check(self, urls: list[str]) -> None:
        self.told.append(("check", urls))

    async def serve_with(self, urls: list[str]) -> None:
        self.told.append(("serve", urls))

    async def send(self, request: Any, members: Any) -> list[str]:
        self.told.append([ask.token_ids for ask in request.asks])
        return [f"answer {number} of {members.size}" for number in range(len(request))]

    def take_out(self, member: Any) -> None:
        self.told.append(("out", member.url))


def test_behind_a_router_it_gets_the_prompts_and_is_told_who_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(Routes, "made", [], raising=False)
    monkeypatch.setattr(Routes, "told", told := [], raising=False)
    monkeypatch.setattr(module, "Routing", Routes)
    router = "http://127.0.0.1:7000"
    through = partial(SGLangRouter, url=router)
    with stand_ins(2) as (servers, urls), make_pool(urls, router=through, prompts_per_request=9) as pool:
        assert Routes.made == [(router, VOCAB)]
        pool.wait_until_healthy(WAIT_S)
        assert told == [("check", urls)]
        told.clear()
        answers = ("answer 0 of 2", "answer 1 of 2")
        assert [(g.prompt.index, g.responses) for g in generate(pool, 3)] == [
            (number, answers) for number in (100, 101, 102)
        ]
        assert sorted(told) == [[(number, 7)] * 2 for number in range(3)], (
            "a prompt a request: the router spreads them"
        )
        assert not any(path == "/generate" for server in servers for path, _ in server.asked)
        told.clear()
        pool.begin_update()
        pool.end_update(3)
        assert told == [("serve", urls)]
        pool.update_weights(tmp_path, 4)
        assert told == [("serve", urls)] * 2
        told.clear()
        servers[0].fault, servers[0].faulty = "closed", "/update_weights_from_disk"
        pool.update_weights(tmp_path, 5)
        assert told == [("out", urls[0]), ("serve", urls[1:])]
