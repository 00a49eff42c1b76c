"""Times sampling: each kind of engines on CPU, plain batched HF generate; and what the pool adds.

    python tools/bench_rollout.py         # 5M parameters, 64 prompts of 8 to 32 tokens, 64 new tokens each
    python tools/bench_rollout.py --responses 8 --dtype bfloat16
    python tools/bench_rollout.py --json result.json

All sample the same number of tokens from the same prompts, with the log-prob of each, on one thread, one
system after the other. `one batch` is a single request of all prompts; `pool` and `bare loop` send the same
requests, of `--prompts-per-request` prompts, all at once: through the rollout pool with its checks, and by
httpx alone. Medians of rounds after a first one. SGLang and vLLM are left out where `make sglang` and
`make vllm` have not installed them.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import httpx
import torch
from cpu_servers import CONNECTS, installed, launcher_of
from random_model import add_size_options, make_random_model
from transformers import AutoModelForCausalLM

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.engines.sglang.answers import generate_body
from megatron_rapo.engines.vllm.answers import generate_body as vllm_body
from megatron_rapo.engines.vllm.contact import GENERATE
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, first_turns

ROUNDS = 5


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
    parser.add_argument("--kinds", nargs="+", choices=CONNECTS, help="default: those that are installed")
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
        for kind in options.kinds or installed():
            with LocalServers(
                launcher_of(kind, model, options.dtype),
                CONNECTS[kind],
                count=1,
                log_directory=Path(folder) / kind,
                startup_timeout=300,
            ) as servers:
                results[kind] = time_server(servers.urls[0], kind, model, prompts, options)
            report(kind, results[kind], options)
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
    url: str, kind: str, model: Path, prompts: list[Prompt], options: argparse.Namespace
) -> dict[str, list[float]]:
    """One request of all; and smaller ones, through the pool and without it."""
    sampling = Sampling(options.responses, options.tokens, 1.0, 1, seed=0)
    size = options.prompts_per_request
    split_prompts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    requests = [one for part in split_prompts for one in requests_of(kind, part, sampling)]

    def pool_of(prompts_per_request: int) -> EnginePool:
        return EnginePool(
            [url],
            CONNECTS[kind],
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
            "bare loop": lambda: runner.run(bare_loop(http, url, requests)),
        }
        seconds = timed_in_turn(ways, len(prompts) * options.responses * options.tokens)
        runner.run(http.aclose())
        return seconds


Asked = tuple[str, dict[str, Any]]
"""A path, and a body."""


def requests_of(kind: str, prompts: list[Prompt], sampling: Sampling) -> list[Asked]:
    """What the pool sends for these prompts."""
    wanted = first_turns(prompts, sampling).wanted
    if kind == "vllm":
        return [(GENERATE, vllm_body(one)) for one in wanted]
    return [("/generate", generate_body(wanted))]


async def bare_loop(http: httpx.AsyncClient, url: str, requests: list[Asked]) -> int:
    """The requests and nothing else; their answers are decoded from JSON."""
    posts = (http.post(url + path, json=body) for path, body in requests)
    answers = [answer.json() for answer in await asyncio.gather(*posts)]
    return sum(tokens_in(answer) for answer in answers)


def tokens_in(answer: Any) -> int:
    """How many tokens an answer brings."""
    if isinstance(answer, list):
        return sum(len(response["output_ids"]) for response in answer)
    return sum(len(choice["token_ids"]) for choice in answer["choices"])


if __name__ == "__main__":
    main()
