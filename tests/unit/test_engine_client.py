"""The client of one engine, against servers that answer what a test tells them, byte by byte."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import EngineLost, RapoError


def reply(status=200, body=b"{}", length=None):
    """An HTTP answer; `length` bytes are promised, all unless told."""
    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
    promised = len(content) if length is None else length
    return (
        f"HTTP/1.1 {status} X\r\ncontent-length: {promised}\r\nconnection: close\r\n\r\n".encode() + content
    )


class Server:
    """Answers each path with the next of what it was told, the last again and again; records the paths."""

    def __init__(self, answers):
        self.answers = {path: list(given) for path, given in answers.items()}
        self.asked = []

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.splitlines()[0].split()
        for line in head.lower().splitlines():
            if line.startswith("content-length:"):
                await reader.readexactly(int(line.split(":")[1]))
        self.asked.append(path if method == "POST" else f"{method} {path}")
        given = self.answers.get(path.split("?")[0], [reply()])
        answer = given.pop(0) if len(given) > 1 else given[0]
        if answer is None:  # hangs
            await asyncio.sleep(60)
        elif answer == "reset":
            writer.transport.abort()
            return
        else:
            writer.write(answer)
        writer.close()


@asynccontextmanager
async def connected(answers, timeout=10.0):
    server = Server(answers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with http_client() as http:
        yield server, SGLangClient(http, f"http://127.0.0.1:{port}", timeout=timeout)
    listening.close()


def run(answers, work, timeout=10.0):
    """What `work(client)` makes of a server that answers so; and the paths that were asked for."""

    async def scenario():
        async with connected(answers, timeout) as (server, client):
            try:
                return await work(client), server.asked
            except RapoError as error:
                error.asked = server.asked
                raise

    return asyncio.run(scenario())


NEW = {"/begin_weight_update": [reply(405), reply(200, {"success": True, "message": ""})]}
OLD = {"/begin_weight_update": [reply(404)]}


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (reply(500, b"out of memory"), "out of memory"),
        (reply(503, b"the weights are not whole"), "not whole"),
        (reply(200, b"<html>"), "not JSON"),
        (reply(200, b'{"success": tr', length=20), "connection was lost"),
        (b"HTTP/1.1 200", "connection was lost"),
        (b"", "connection was lost"),
        ("reset", "connection was lost"),
        (None, "not answered within 0.5 s"),
    ],
)
def test_an_engine_that_does_not_answer_as_one_is_lost(answer, named):
    timeout = 0.5 if answer is None else 60.0  # on a busy machine an answer may take its time
    with pytest.raises(EngineLost, match=named):
        run({"/x": [answer]}, lambda client: client.post("/x", {}), timeout=timeout)


def test_an_engine_that_is_not_there_is_lost():
    async def work(client):
        client._exchange.url = "http://127.0.0.1:1"
        await client.post("/x", {})

    with pytest.raises(EngineLost, match="cannot connect"):
        run({}, work)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (reply(400, {"success": False, "message": "no such shape"}), "no such shape"),
        (reply(200, {"success": False, "message": "no such shape"}), "no such shape"),
        (reply(404), "404"),
        (reply(401), "RAPO_ENGINE_API_KEY"),
    ],
)
def test_a_refusal_leaves_the_engine(answer, named):
    with pytest.raises(RapoError, match=named) as refused:
        run({"/x": [answer]}, lambda client: client.post("/x", {}))
    assert not isinstance(refused.value, EngineLost)


async def two_updates(client):
    for _ in range(2):
        await client.begin_update()
        await client.end_update(1)


def test_updates_stand_between_begin_and_end_where_the_engine_knows_them():
    _, asked = run(NEW, two_updates)
    opened = ["/pause_generation", "/flush_cache", "/begin_weight_update"]
    closed = ["/end_weight_update", "/continue_generation"]
    assert asked == [*opened[:2], "GET /begin_weight_update", opened[2], *closed, *opened, *closed]


def test_an_older_engine_is_asked_once_whether_it_knows_them():
    _, asked = run(OLD, two_updates)
    quiet = ["/pause_generation", "/flush_cache"]
    assert asked == [
        *quiet,
        "GET /begin_weight_update",
        "/continue_generation",
        *quiet,
        "/continue_generation",
    ]


def test_an_update_that_another_trainer_left_open_is_ended_first():
    refused = reply(400, {"success": False, "message": "already open"})
    answers = {"/begin_weight_update": [reply(405), refused, reply(200, {"success": True})]}
    _, asked = run(answers, lambda client: client.begin_update())
    assert asked[-3:] == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


@pytest.mark.parametrize(
    ("path", "answers", "work"),
    [
        ("/pause_generation", [reply(400)], lambda client: client.begin_update()),
        ("/begin_weight_update", [reply(405), reply(400)], lambda client: client.begin_update()),
        ("/end_weight_update", [reply(400)], lambda client: client.end_update(1)),
    ],
)
def test_a_step_that_is_refused_leaves_no_engine_paused(path, answers, work):
    with pytest.raises(RapoError) as failed:
        run({**NEW, path: answers}, work)
    assert failed.value.asked[-1] == "/continue_generation"


@pytest.mark.parametrize(
    ("path", "work"),
    [
        ("/pause_generation", lambda client: client.begin_update()),
        ("/begin_weight_update", lambda client: client.begin_update()),
        ("/end_weight_update", lambda client: client.end_update(1)),
        ("/pause_generation", lambda client: client.load_checkpoint(Path("model"), 1)),
        ("/update_weights_from_disk", lambda client: client.load_checkpoint(Path("model"), 1)),
    ],
)
@pytest.mark.parametrize("answer", [None, "reset"])
def test_a_lost_engine_is_asked_nothing_more(path, work, answer):
    """Each further request to one that is silent would take its whole time."""
    before = [reply(405)] if path == "/begin_weight_update" else []
    with pytest.raises(EngineLost) as lost:
        run({**NEW, path: [*before, answer]}, work, timeout=10.0 if answer else 1.0)
    assert lost.value.asked[-1] == path


def test_to_abandon_an_update_is_no_error_whatever_fails():
    async def work(client):
        await client.begin_update()
        await client.abandon_update()

    answers = {**NEW, "/end_weight_update": [reply(500)], "/continue_generation": ["reset"]}
    _, asked = run(answers, work)
    assert asked[-2:] == ["/end_weight_update", "/continue_generation"]


def test_a_cache_that_is_in_use_is_asked_for_again():
    _, asked = run({"/flush_cache": [reply(400), reply(400), reply()]}, lambda client: client.flush_cache())
    assert asked == ["/flush_cache"] * 3


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("http://127.0.0.1:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://192.0.2.7:1", False),
        ("http://engine.example:1", False),
    ],
)
def test_over_the_network_a_key_is_demanded(url, fine, monkeypatch):
    def make():
        http = http_client()
        try:
            return SGLangClient(http, url, timeout=1)
        finally:
            asyncio.run(http.aclose())

    monkeypatch.delenv("RAPO_ENGINE_API_KEY", raising=False)
    if fine:
        make()
    else:
        with pytest.raises(RapoError, match="RAPO_ENGINE_API_KEY"):
            make()
    monkeypatch.setenv("RAPO_ENGINE_API_KEY", "secret")
    make()


def test_checksums_are_read_where_the_engine_has_them():
    async def read(client):
        return await EmbeddedClient(client._exchange._http, client.url, timeout=60).weights_checksum()

    answer = {"weight_version": "3", "checksums": {"a": str(2**64 - 1)}}
    found, _ = run({"/weights_checksum": [reply(200, answer)]}, read)
    assert found == ("3", {"a": 2**64 - 1})
    with pytest.raises(EngineLost, match="no checksums"):
        run({"/weights_checksum": [reply(200, [])]}, read)
