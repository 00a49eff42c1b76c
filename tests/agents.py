"""Programs that play episodes through the gateway, for tests: they know HTTP and nothing of the package."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(episode: Any, token_ids: list[int], **params: Any) -> list[int]:
    """The tokens that the policy says next."""
    body = json.dumps({"token_ids": token_ids, "sampling_params": params}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{episode.url}/inference/v1/generate", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def turns(episode: Any, count: int = 3, given: int = 9, most: int = 2) -> dict:
    """So many turns, with a token given between two."""
    tokens = episode.problem["token_ids"]
    for number in range(count):
        tokens = tokens + [given] * bool(number)
        tokens = tokens + ask(episode, tokens, max_tokens=most)
    facts = {"tokens": len(tokens), "level": episode.problem["columns"].get("level", 0)}
    return {"reward": 0.25, "facts": facts, "answer": "what it says"}


def searches(episode: Any) -> dict:
    """A turn, three tokens that nobody else hears, and another turn."""
    tokens = episode.problem["token_ids"]
    tokens = tokens + ask(episode, tokens, max_tokens=2)
    told = {"question": "a search", "answer": [byte % 50 for byte in os.urandom(3)]}
    body, headers = json.dumps(told).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(f"{episode.url}/recorded", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        tokens = tokens + json.load(answer)["answer"]
    ask(episode, tokens, max_tokens=2)
    return {"reward": 1.0}


async def text(episode: Any) -> str:
    """A text, which the configured reward judges."""
    tokens = await asyncio.to_thread(ask, episode, episode.problem["token_ids"])
    return str(tokens[0])


def greedy(episode: Any) -> dict:
    """Asks until it is refused, and is content with that."""
    tokens, refusals = episode.problem["token_ids"], []
    while not refusals:
        try:
            tokens = tokens + ask(episode, tokens, max_tokens=2)
        except urllib.error.HTTPError as error:
            refusals.append(json.load(error)["error"]["message"])
    return {"reward": 1.0, "answer": refusals[0]}


class Agent:
    """Counts its episodes; leaves processes that nobody asked it to start."""

    def __init__(self, sleep: str) -> None:
        self.played = 0
        self.sleep = sleep

    async def play(self, episode: Any) -> float:
        self.played += 1
        number = self.played
        subprocess.Popen(["setsid", "--fork", "sleep", self.sleep])
        await asyncio.to_thread(ask, episode, [1, 2])
        return float(number)

    async def aclose(self) -> None:
        Path(os.environ["AGENT_CLOSED"]).write_text(str(self.played))


def raises(episode: Any) -> None:
    ask(episode, [1, 2])
    raise LookupError("no such move")


def returns_nothing(episode: Any) -> None:
    ask(episode, [1, 2])


def dies(episode: Any) -> None:
    os._exit(7)


def asks_nothing(episode: Any) -> float:
    return 1.0


def other_sessions(episode: Any) -> dict:
    ask(episode, [1, 2])
    return {"reward": 1.0, "sessions": ["x"]}


def not_a_number(episode: Any) -> dict:
    ask(episode, [1, 2])
    return {"reward": "one"}


async def hangs(episode: Any) -> None:
    """On every second problem."""
    if int(episode.problem["id"]) % 2:
        await asyncio.sleep(600)
    await asyncio.to_thread(ask, episode, [1, 2])
    return 1.0


async def blocks(episode: Any) -> None:
    time.sleep(600)
