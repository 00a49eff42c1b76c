"""Times sampling: the embedded server, SGLang on CPU, plain batched HF generate; and what the pool adds.

    python tools/bench_rollout.py         # 5M parameters, 64 prompts of 8 to 32 tokens, 64 new tokens each
    python tools/bench_rollout.py --responses 8 --dtype bfloat16
    python tools/bench_rollout.py --json result.json

All sample the same number of tokens from the same prompts, with the log-prob of each, on one thread, one
system after the other. `one batch` is a single request of all prompts; `pool` and `bare loop` send the same
requests, of `--prompts-per-request` prompts, all at once: through the rollout pool with its checks, and by
httpx alone. Medians of rounds after a first one. SGLang is left out where `make sglang` has not installed it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import httpx
import torch
from random_model import add_size_options, make_random_model
from transformers import AutoModelForCausalLM

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.engine import Connect
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.engines.launching import Launch, Launcher
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.engines.sglang.answers import generate_body
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, first_turns

ROOT = Path(__file__).parents[1]
SGLANG_PYTHON = ROOT / ".venv-sglang/bin/python"
ROUNDS = 5


@dataclass(frozen=True)
class SGLangOnCpu:
    """A launcher of the server that tests/engines uses."""

    model_path: Path
    dtype: str
    name: str = "SGLang server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        """As `Launcher`."""
        tether = [sys.executable, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
        script = [str(SGLANG_PYTHON), str(ROOT / "tests/engines/sglang_on_cpu.py")]
        options = ["--model-path", str(self.model_path), "--port", str(port), "--dtype", self.dtype]
        return Launch([*tether, *script, *options, "--skip-tokenizer-init"])


def main() -> None:
    """Makes the model, measures each system, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_size_options(parser)
    parser.set_defaults(layers=4, hidden=256, feed_forward=1024, vocabulary=4096)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=1, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--prompts-per-request", type=int, default=8, help="where the pool is measured")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    choose = random.Random(0)
    prompts = [
        Prompt(i, "", tuple(choose.randrange(options.vocabulary) for _ in range(choose.randint(8, 32))), "")
        for i in range(options.prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        parameters = make_random_model(model, options)
        print(f"torch {torch.__version__}, {parameters / 1e6:.1f}M parameters, {options.dtype}")
        results = {"HF generate": {"one batch": time_hf(model, prompts, options)}}
        report("HF generate", results["HF generate"], options)
        embedded: Launcher = EmbeddedLauncher(model, "cpu", options.dtype, 1)
        kinds: dict[str, tuple[Launcher, Connect]] = {"embedded": (embedded, EmbeddedClient)}
        if SGLANG_PYTHON.exists():
            kinds["SGLang"] = SGLangOnCpu(model, options.dtype), SGLangClient
        else:
            print("SGLang: not installed (make sglang)")
        for name, (launcher, connect) in kinds.items():
            logs = Path(folder) / name
            with LocalServers(launcher, connect, count=1, log_directory=logs, startup_timeout=300) as servers:
                results[name] = time_server(servers.urls[0], connect, model, prompts, options)
            report(name, results[name], options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def report(name: str, seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """A line of medians, with the lowest and highest of the rounds."""
    tokens = options.prompts * options.responses * options.tokens
    parts = []
    for what, rounds in seconds.items():
        middle = statistics.median(rounds)
        parts.append(
            f"{what} {tokens / middle:,.0f} tokens/s ({min(rounds):.3f} {middle:.3f} {max(rounds):.3f} s)"
        )
    if "pool" in seconds:
        more = statistics.median(seconds["pool"]) / statistics.median(seconds["bare loop"]) - 1
        parts.append(f"the pool adds {more:+.1%}")
    print(f"{name}: {'; '.join(parts)}", flush=True)


def timed_in_turn(ways: dict[str, Callable[[], int]], tokens: int) -> dict[str, list[float]]:
    """Seconds of each round of each way, which returns how many tokens it sampled."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            sampled = way()
            elapsed = time.perf_counter() - start
            if sampled != tokens:
                raise RuntimeError(f"{name} sampled {sampled} tokens in place of {tokens}")
            if round_:
                seconds[name].append(elapsed)
    return seconds


def time_hf(model: Path, prompts: list[Prompt], options: argparse.Namespace) -> list[float]:
    """HF generate as a user calls it: one batch, padded on the left, with log-probs of what it samples."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype)).eval()
    rows = [list(prompt.token_ids) for prompt in prompts for _ in range(options.responses)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    @torch.inference_mode()
    def generate() -> int:
        output = hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options.tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sampled = output.sequences[:, width:]
        for step, logits in enumerate(output.logits):
            logits.float().log_softmax(-1).gather(-1, sampled[:, step, None]).tolist()
        return sampled.numel()

    tokens = len(rows) * options.tokens
    return timed_in_turn({"one batch": generate}, tokens)["one batch"]


def time_server(
    url: str, connect: Connect, model: Path, prompts: list[Prompt], options: argparse.Namespace
) -> dict[str, list[float]]:
    """One request of all; and smaller ones, through the pool and without it."""
    sampling = Sampling(options.responses, options.tokens, 1.0, 1, seed=0)
    size = options.prompts_per_request
    bodies = [body(prompts[i : i + size], sampling) for i in range(0, len(prompts), size)]

    def pool_of(prompts_per_request: int) -> EnginePool:
        return EnginePool(
            [url],
            connect,
            vocab_size=options.vocabulary,
            prompts_per_request=prompts_per_request,
            request_timeout=600,
        )

    def through(pool: EnginePool) -> int:
        each = pool.requests(len(prompts))
        parts = [prompts[start : start + each] for start in range(0, len(prompts), each)]
        with pool.round() as opened:
            answers = [opened.ask(first_turns(part, sampling)) for part in parts]
            return sum(len(response.token_ids) for answer in answers for response in answer.result())

    with pool_of(len(prompts)) as whole, pool_of(size) as split, asyncio.Runner() as runner:
        whole.update_weights(model, 1)
        http = http_client()
        ways = {
            "one batch": lambda: through(whole),
            "pool": lambda: through(split),
            "bare loop": lambda: runner.run(bare_loop(http, url, bodies)),
        }
        seconds = timed_in_turn(ways, len(prompts) * options.responses * options.tokens)
        runner.run(http.aclose())
        return seconds


def body(prompts: list[Prompt], sampling: Sampling) -> dict[str, object]:
    """What the pool sends for these prompts."""
    return generate_body(first_turns(prompts, sampling).wanted)


async def bare_loop(http: httpx.AsyncClient, url: str, bodies: list[dict[str, object]]) -> int:
    """The requests and nothing else; their answers are decoded from JSON."""
    answers = await asyncio.gather(*(http.post(f"{url}/generate", json=each) for each in bodies))
    return sum(len(response["output_ids"]) for answer in answers for response in answer.json())


if __name__ == "__main__":
    main()
