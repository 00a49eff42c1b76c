"""What a slow tool costs the engine: its batch, and the time it stands still.

    python tools/bench_turns.py                        # 256 episodes of 3 turns, a tool that takes 0.2 s
    python tools/bench_turns.py --tool-s 1 --json result.json

The same episodes run with and without the tool, in turn, on an embedded server of one thread. A turn is 16 to
32 tokens. `batch` is the mean number of responses that a decoding step of the engine had; `idle` the share of
the time in which the engine had nothing to do. Medians of rounds after a first one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

from random_model import add_size_options, make_random_model

from megatron_rapo import Episode, Generate, Problem, Score, Transcript
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.engine import Generated, Generation
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling

ROUNDS = 3
SHORTEST, LONGEST = 16, 32  # tokens of a turn


class Tokens:
    """In place of a tokenizer: a token is a number."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """The numbers."""
        return " ".join(map(str, token_ids))


class SlowTool:
    """Turns of random lengths, with a tool between them."""

    def __init__(self, turns: int, tool_s: float) -> None:
        self.turns, self.tool_s = turns, tool_s

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """One episode."""
        choose = random.Random(seed)
        transcript = Transcript(problem.token_ids)
        for number in range(self.turns):
            if number:
                await asyncio.sleep(self.tool_s)
                transcript.add_given([1, 2, 3, 4])
            most = choose.randint(SHORTEST, LONGEST)
            transcript.add_turn(await generate(transcript.token_ids, turn=number, max_tokens=most))
        return Episode((transcript.sequence(),), answer="", score=Score(0.0))


class Watched(EmbeddedClient):
    """Notes what the engine did: the tokens and steps of each request, and when it had any."""

    tokens = steps = 0
    busy_s = 0.0
    _under_way, _since = 0, 0.0

    async def generate(self, wanted: Sequence[Generation], **options: Any) -> list[Generated]:
        """As the client, and noted."""
        kind = type(self)
        if not kind._under_way:
            kind._since = time.perf_counter()
        kind._under_way += 1
        try:
            answers = await super().generate(wanted, **options)
        finally:
            kind._under_way -= 1
            if not kind._under_way:
                kind.busy_s += time.perf_counter() - kind._since
        lengths = [len(one.token_ids) for one in answers]
        kind.tokens += sum(lengths)
        kind.steps += max(lengths)
        return answers

    @classmethod
    def forget(cls) -> None:
        """Begins anew."""
        cls.tokens = cls.steps = 0
        cls.busy_s = 0.0


def main() -> None:
    """Makes the model, measures both ways in turn, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_size_options(parser)
    parser.set_defaults(layers=2, hidden=128, feed_forward=256, vocabulary=512)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompts-per-request", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tool-s", type=float, default=0.2, help="seconds of a call of the tool")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_random_model(model, options)
        launcher = EmbeddedLauncher(model, "cpu", "float32", 1)
        logs = Path(folder) / "logs"
        with LocalServers(launcher, Watched, count=1, log_directory=logs, startup_timeout=300) as servers:
            results = measure(servers.urls[0], model, options)
    for name, rounds in results.items():
        middle = {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
        print(f"{name}: batch {middle['batch']:.1f}, {middle['seconds']:.2f} s, idle {middle['idle']:.0%}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure(url: str, model: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Rounds of each way: batch, seconds, and share of them in which the engine was idle."""
    ways = {"without a tool": 0.0, f"a tool of {options.tool_s:g} s": options.tool_s}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    prompts = [
        Prompt(number, "", tuple(range(5, 5 + 8 + number % 8)), "") for number in range(options.prompts)
    ]
    sampling = Sampling(options.responses, options.turns * (LONGEST + 4), 1.0, 1, seed=0)
    with EnginePool(
        [url],
        Watched,
        vocab_size=options.vocabulary,
        prompts_per_request=options.prompts_per_request,
        request_timeout=600,
    ) as pool:
        pool.update_weights(model, 1)
        for round_ in range(ROUNDS + 1):
            for name, tool_s in ways.items():
                found = one_round(pool, prompts, sampling, SlowTool(options.turns, tool_s), options)
                if round_:
                    results[name].append(found)
    return results


def one_round(
    pool: EnginePool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    environment: SlowTool,
    options: argparse.Namespace,
) -> dict[str, float]:
    """All episodes once."""
    settings = EnvironmentOptions(use="bench_turns:SlowTool", max_turns=options.turns)
    tokenizer: Any = Tokens()
    episodes = EpisodeRunner(environment, settings, tokenizer, 1.0, options.vocabulary)

    async def judge(text: str, problem: Problem) -> Any:
        raise AssertionError("the environment scores by itself")

    Watched.forget()
    start = time.perf_counter()
    with Runner(episodes, pool) as runner:
        runner.run(prompts, sampling, judge)
    seconds = time.perf_counter() - start
    return {
        "batch": Watched.tokens / Watched.steps,
        "seconds": seconds,
        "idle": 1 - Watched.busy_s / seconds,
    }


if __name__ == "__main__":
    main()
