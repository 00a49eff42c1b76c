"""The gateway over HTTP: what passes, what is recorded of it, and what is refused with which reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_rapo.episode.environment import Turn
from megatron_rapo.errors import RapoError
from megatron_rapo.gateway.route import Ending, Route
from megatron_rapo.gateway.server import Gateway

VOCABULARY, LONGEST, MAX_TURNS = 50, 12, 3


class Sampler:
    """A `Generate` that samples [number of the turn, length of the prompt], once it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int, int | None, list[int]]] = []
        self.given_up = 0
        self.may = asyncio.Event()
        self.may.set()
        self.error: Exception | None = None
        self.heard: dict[str, Any] = {}

    async def __call__(
        self,
        token_ids: Sequence[int],
        *,
        turn: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[int] = (),
    ) -> Turn:
        self.asked.append((list(token_ids), turn, max_tokens, list(stop)))
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error:
            raise self.error
        sampled = np.array([turn, len(token_ids)][:max_tokens], np.int32)
        log_probs = np.array([-0.1, -1 / 3][:max_tokens], np.float32)
        versions = np.array([4, 5][:max_tokens], np.int32)
        return Turn(sampled, log_probs, versions, "stop" if len(sampled) == 2 else "length", "text")

    async def recorded(self, question: object, ask: Any, *, again: bool = False) -> Any:
        """The first answer to a question; the disk may be full."""
        answer = await ask()
        if self.error:
            raise self.error
        return self.heard.setdefault(json.dumps(question), answer)

    def tokens_left(self, token_ids: Sequence[int]) -> int:
        return LONGEST - len(token_ids)

    def encode(self, text: str) -> list[int]:
        raise AssertionError("nothing is encoded")

    def decode(self, token_ids: Sequence[int]) -> str:
        raise AssertionError("nothing is decoded")


class Client:
    """Of one episode."""

    def __init__(self, http: httpx.AsyncClient, url: str, route: Route, sampler: Sampler) -> None:
        self.http, self.url, self.route, self.sampler = http, url, route, sampler

    async def ask(
        self, token_ids: Any, session: str | None = None, body: dict[str, Any] | None = None, **params: Any
    ) -> httpx.Response:
        headers = {"X-Session-ID": session} if session else {}
        body = {"token_ids": token_ids, "sampling_params": params, **(body or {})}
        return await self.http.post(f"{self.url}/inference/v1/generate", json=body, headers=headers)


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    opened = Gateway("policy", VOCABULARY, MAX_TURNS)
    try:
        await opened.start()
        yield opened
    finally:
        await opened.aclose()


@asynccontextmanager
async def client(opened: Gateway) -> AsyncIterator[Client]:
    sampler = Sampler()
    async with opened.episode(sampler) as route, httpx.AsyncClient(timeout=20) as http:
        yield Client(http, opened.url_of(route), route, sampler)


def played(play: Callable[[Client], Coroutine[Any, Any, None]]) -> Client:
    """What became of an episode."""

    async def whole() -> Client:
        async with gateway() as opened, client(opened) as one:
            await play(one)
        return one

    return asyncio.run(asyncio.wait_for(whole(), 60))


def test_the_answer_is_vllm_s_and_exact() -> None:
    async def play(one: Client) -> None:
        answer = (await one.ask([7, 8, 9], max_tokens=5, stop_token_ids=[3], logprobs=1)).json()
        [choice] = answer["choices"]
        assert choice["token_ids"] == [0, 3]
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["token_id:0", "token_id:3"]
        assert (
            np.float32([entry["logprob"] for entry in content]).tolist()
            == np.float32([-0.1, -1 / 3]).tolist()
        )
        assert choice["weight_versions"] == [
            {"version": "4", "start": 0, "end": 1},
            {"version": "5", "start": 1, "end": 2},
        ]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 3)
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        cut = (await one.ask([7], max_tokens=1)).json()["choices"][0]
        assert (cut["token_ids"], cut["finish_reason"], cut["stop_reason"]) == ([1], "length", None)
        models = (await one.http.get(f"{one.url}/v1/models")).json()
        assert models["data"] == [{"id": "policy", "object": "model", "max_model_len": LONGEST}]

    one = played(play)
    assert one.sampler.asked == [([7, 8, 9], 0, 5, [3]), ([7], 1, 1, [])]
    assert (one.route.turns, one.route.refused, one.route.ending) == (2, 0, Ending.ANSWERED)


def test_prompts_that_go_on_from_what_was_sampled_join_one_sequence_and_others_begin_their_own() -> None:
    async def play(one: Client) -> None:
        await one.ask([7, 8], session="a")  # samples 0, 2
        await one.ask([7, 8, 0, 2, 30], session="a")  # goes on: samples 1, 5
        await one.ask([7, 8, 0, 31], session="a")  # history that is written otherwise: samples 2, 4

    one = played(play)
    first, second = one.route.record.sequences()
    assert first.token_ids.tolist() == [7, 8, 0, 2, 30, 1, 5]
    assert first.sampled.tolist() == [False, False, True, True, False, True, True]
    assert first.versions.tolist() == [-1, -1, 4, 5, -1, 4, 5]
    assert second.token_ids.tolist() == [7, 8, 0, 31, 2, 4]
    assert second.sampled.tolist() == [False] * 4 + [True] * 2, "what it repeats is trained on once"


def test_sessions_are_apart_even_where_their_tokens_agree() -> None:
    async def play(one: Client) -> None:
        await one.ask([7], session="a")  # samples 0, 1
        await one.ask([7, 0, 1, 9], session="b")
        await one.ask([7], session="a")  # the same again: not joined to what it does not go on from

    record = played(play).route.record
    assert record.sessions == ["a", "b"]
    assert [len(one) for one in record.sequences()] == [3, 3, 6]
    assert [one.token_ids.tolist() for one in record.sequences(["b"])] == [[7, 0, 1, 9, 1, 4]]
    assert record.sequences([]) == ()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two responses": ({"n": 2}, "n = 2 is not honoured: send a request for each"),
    "a temperature": ({"temperature": 0.5}, "temperature = 0.5 is not honoured: the run samples at its own"),
    "a seed": ({"seed": 3}, "seed = 3 is not honoured"),
    "a nucleus": ({"top_p": 0.9}, "top_p = 0.9 is not honoured"),
    "a penalty": ({"presence_penalty": 0.1}, "presence_penalty = 0.1 is not honoured"),
    "texts that stop": ({"stop": ["\n"]}, "send stop_token_ids"),
    "text": ({"detokenize": True}, "detokenize = True is not honoured: answers are token ids"),
    "further log-probs": ({"logprobs": 5}, "sampling_params.logprobs: Input should be 0 or 1"),
    "no tokens": ({"max_tokens": 0}, "sampling_params.max_tokens: Input should be greater than 0"),
    "what nobody knows": ({"mirostat": 2}, "mirostat is no parameter that the gateway honours"),
    "going on past the end": ({"ignore_eos": True}, "ignore_eos = True is not honoured"),
}
BODIES: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "no prompt": ([], {}, 400, "token_ids: List should have at least 1 item"),
    "texts": (["a"], {}, 400, "token_ids.0: Input should be a valid integer"),
    "an unknown token": ([VOCABULARY], {}, 400, f"token id {VOCABULARY} is outside the model's vocabulary"),
    "an image": ([1], {"features": {}}, 400, "features: Extra inputs are not permitted"),
    "a stream": ([1], {"stream": True}, 400, "turns are answered whole"),
    "another model": ([1], {"model": "other"}, 404, "the model 'other' does not exist"),
    "too many tokens": ([1] * LONGEST, {}, 400, f"maximum context length is {LONGEST} tokens. However, your"),
}


def told(answer: httpx.Response, status: int) -> str:
    """The reason, of an error in vLLM's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.status_code == error["code"] == status, error
    return error["message"]


def test_what_cannot_be_exact_is_refused_with_the_reason() -> None:
    async def play(one: Client) -> None:
        for params, reason in REFUSED.values():
            assert reason in told(await one.ask([1], **params), 400)
        for tokens, body, status, reason in BODIES.values():
            assert reason in told(await one.ask(tokens, body=body), status)
        headers = {"content-type": "application/json"}
        unread = await one.http.post(f"{one.url}/inference/v1/generate", content=b"{", headers=headers)
        assert "JSON decode error" in told(unread, 400)
        chat = await one.http.post(f"{one.url}/v1/chat/completions", json={"messages": []})
        assert "texts are not exact in tokens" in told(chat, 404)

    one = played(play)
    assert one.sampler.asked == [] and one.route.turns == 0
    assert one.route.refused == len(REFUSED) + len(BODIES) + 2
    assert one.route.ending is Ending.OUT_OF_TOKENS, "a full context is a limit that the episode met"


def test_parameters_that_change_nothing_are_taken() -> None:
    async def play(one: Client) -> None:
        neutral = {"n": 1, "temperature": None, "min_p": 0.0, "stop": [], "skip_special_tokens": False}
        assert (await one.ask([1], body={"model": "policy", "cache_salt": "x"}, **neutral)).status_code == 200

    played(play)


def test_turns_end_at_the_limit() -> None:
    async def play(one: Client) -> None:
        for _ in range(MAX_TURNS):
            assert (await one.ask([1])).status_code == 200
        assert f"environment.max_turns = {MAX_TURNS} turns" in told(await one.ask([1]), 400)

    one = played(play)
    assert (one.route.turns, one.route.ending) == (MAX_TURNS, Ending.OUT_OF_TURNS)


def test_who_hangs_up_is_not_sampled_for() -> None:
    async def play(one: Client) -> None:
        one.sampler.may.clear()
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(timeout=0.3) as http:
                await Client(http, one.url, one.route, one.sampler).ask([1])
        while not one.sampler.given_up:
            await asyncio.sleep(0.01)
        one.sampler.may.set()
        await one.ask([2])

    one = played(play)
    [sequence] = one.route.record.sequences()
    assert sequence.token_ids.tolist() == [2, 1, 1], "and the next turn has another number, so another seed"
    assert one.route.refused == 0


def test_engines_that_fail_end_the_episode() -> None:
    async def play(one: Client) -> None:
        one.sampler.error = RapoError("gone")
        assert "the engines failed" in told(await one.ask([1]), 503)
        with pytest.raises(RapoError, match="gone"):
            await one.route.failed

    assert played(play).route.record.sequences() == ()


def test_a_program_hears_what_it_heard_first() -> None:
    async def play(one: Client) -> None:
        async def hear(body: Any) -> httpx.Response:
            return await one.http.post(f"{one.url}/recorded", json=body)

        question = {"search": ["a", 1]}
        for answer in ({"found": [1, None]}, {"found": []}):
            heard = await hear({"question": question, "answer": answer})
            assert (heard.status_code, heard.json()) == (200, {"answer": {"found": [1, None]}})
        assert (await hear({"question": None, "answer": None})).json() == {"answer": None}
        assert "answer: Field required" in told(await hear({"question": question}), 400)
        one.sampler.error = RapoError("the disk is full")
        assert "the run failed" in told(await hear({"question": "b", "answer": 1}), 503)
        with pytest.raises(RapoError, match="the disk is full"):
            await one.route.failed

    assert played(play).route.turns == 0


def test_episodes_are_told_apart_by_keys_that_end_with_them() -> None:
    async def whole() -> None:
        async with gateway() as opened, client(opened) as one:
            async with client(opened) as two:
                await asyncio.gather(one.ask([1]), two.ask([2]), one.ask([3]))
                assert sorted(asked[0] for asked in one.sampler.asked) == [[1], [3]]
                assert [asked[0] for asked in two.sampler.asked] == [[2]]
                two.sampler.may.clear()
                two.http = one.http  # which is open for longer than the episode
                waiting = asyncio.create_task(two.ask([4]))
                while len(two.sampler.asked) < 2:
                    await asyncio.sleep(0.01)
            assert "the episode is over" in told(await waiting, 404)
            assert two.sampler.given_up == 1
            base, _, key = two.url.rpartition("/")
            assert len(key) >= 32 and two.url != one.url
            for gone in (two.url, f"{base}/x"):
                assert "no episode has this key" in told(await one.http.get(f"{gone}/v1/models"), 404)

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_the_port_is_free_afterwards_and_of_this_machine_alone() -> None:
    async def whole() -> str:
        async with gateway() as opened, client(opened) as one:
            return one.url

    url = asyncio.run(whole())
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=5)
