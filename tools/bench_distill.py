"""Times an exact divergence from a teacher beside one over its 64 most likely tokens, on the same inputs.

    python tools/bench_distill.py                    # CPU
    python tools/bench_distill.py --device cuda
    python tools/bench_distill.py --json result.json

What each does, from hidden states of both models to the gradients of the policy's hidden states and head:

- `exact`: this package: both heads, chunk by chunk, the divergence over the whole vocabulary;
- `top 64, chunks`: the teacher's head and its 64 largest log-probs, chunk by chunk, as a teacher apart sends
  them; then the policy's head and the sum over these 64, chunk by chunk, recomputed in the backward;
- `top 64, full logits`: the same with the policy's logits whole, as peers compute it.

Variants are run in turn, round after round; times are medians. Memory is beyond inputs and returned
gradients. `kept` is what waits for the update: the teacher's hidden states, or 64 ids and log-probs a token.
How much of a teacher the 64 tell is a matter of trained models; these are random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_loss import one_rank
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.loss.vocabulary import VocabularyShard

KEPT = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark; the teacher is wider than the policy."""

    tokens: int
    vocabulary: int
    hidden: int
    teacher_hidden: int
    chunk: int


CPU = (Shape(256, 151_936, 256, 512, 64),)
CUDA = (Shape(8192, 151_936, 2048, 3584, 2048),)


@dataclass
class Inputs:
    """Both models at `tokens` tokens."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    chunk: int

    @classmethod
    def make(cls, shape: Shape, device: str) -> Inputs:
        """Random inputs, bf16 on CUDA and fp32 on the CPU."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        return cls(
            hidden=random(shape.tokens, shape.hidden).requires_grad_(),
            weight=(random(shape.vocabulary, shape.hidden) * shape.hidden**-0.5).requires_grad_(),
            teacher_hidden=random(shape.tokens, shape.teacher_hidden),
            teacher_weight=random(shape.vocabulary, shape.teacher_hidden) * shape.teacher_hidden**-0.5,
            chunk=shape.chunk,
        )

    def chunks(self) -> list[slice]:
        """Of tokens."""
        return [slice(start, start + self.chunk) for start in range(0, len(self.hidden), self.chunk)]


def exact(x: Inputs, divergence: str) -> Tensor:
    """As it is used in training."""
    group = dist.group.WORLD
    assert group is not None, "joined in one_rank"
    teacher = ReferenceStates(
        x.teacher_hidden,
        x.teacher_weight,
        torch.ones(len(x.hidden), device=x.hidden.device),
        forward=divergence == "forward",
        reverse=divergence == "reverse",
        mixture=0.5 if divergence == "jensen_shannon" else None,
    )
    field = "jensen_shannon" if divergence == "jensen_shannon" else f"{divergence}_kl"

    def token_loss(statistics: TokenStatistics, rows: slice) -> Tensor:
        return getattr(statistics, field) / len(x.hidden)

    shard = VocabularyShard.of(len(x.weight), len(x.weight), group)
    targets = torch.zeros(len(x.hidden), dtype=torch.int64, device=x.hidden.device)
    return chunked_loss(x.hidden, targets, Head(x.weight, shard, 1.0, x.chunk), token_loss, teacher)


@torch.no_grad()
def largest(x: Inputs) -> tuple[Tensor, Tensor]:
    """The teacher's 64 largest log-probs of each token, and their ids."""
    log_probs, ids = [], []
    for rows in x.chunks():
        logits = (x.teacher_hidden[rows] @ x.teacher_weight.T).float()
        values, places = logits.topk(KEPT, dim=-1)
        log_probs.append(values - logits.logsumexp(-1, keepdim=True))
        ids.append(places)
    return torch.cat(log_probs), torch.cat(ids)


def _over(hidden: Tensor, weight: Tensor, log_teacher: Tensor, ids: Tensor, divergence: str) -> Tensor:
    """Σ over the 64, of distributions that are not normalised anew, as peers have it."""
    logits = (hidden @ weight.T).float()
    log_policy = logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
    if divergence == "forward":
        return (log_teacher.exp() * (log_teacher - log_policy)).sum()
    if divergence == "reverse":
        return (log_policy.exp() * (log_policy - log_teacher)).sum()
    policy, teacher = log_policy.exp(), log_teacher.exp()
    log_mixture = (0.5 * (policy + teacher)).log()
    apart = policy * (log_policy - log_mixture) + teacher * (log_teacher - log_mixture)
    return 0.5 * apart.sum()


def top_in_chunks(x: Inputs, divergence: str) -> Tensor:
    """Chunk by chunk, recomputed in the backward."""
    log_teacher, ids = largest(x)
    total = x.hidden.new_zeros((), dtype=torch.float32)
    for rows in x.chunks():
        total = total + checkpoint(
            _over, x.hidden[rows], x.weight, log_teacher[rows], ids[rows], divergence, use_reentrant=False
        )
    return total / len(x.hidden)


def top_in_full(x: Inputs, divergence: str) -> Tensor:
    """Of full logits."""
    log_teacher, ids = largest(x)
    return _over(x.hidden, x.weight, log_teacher, ids, divergence) / len(x.hidden)


VARIANTS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "exact": exact,
    "top 64, chunks": top_in_chunks,
    "top 64, full logits": top_in_full,
}


def run_once(variant: Callable[[Inputs, str], Tensor], x: Inputs, divergence: str) -> float:
    """Seconds of one forward and backward; on the CPU of its own time, so that other work counts little."""
    clock = time.perf_counter if x.hidden.is_cuda else time.process_time
    x.hidden.grad = x.weight.grad = None
    _synchronise(x)
    start = clock()
    variant(x, divergence).backward()
    _synchronise(x)
    return clock() - start


def _synchronise(x: Inputs) -> None:
    if x.hidden.is_cuda:
        torch.cuda.synchronize()


def peak_memory(name: str, shape: Shape, device: str, divergence: str) -> int:
    """Bytes beyond inputs and returned gradients."""
    if device == "cuda":
        return _peak(name, shape, device, divergence)
    # Freed memory goes back at once: what the allocator keeps would count as used, or not, by chance.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, shape, device, divergence))


def _peak(name: str, shape: Shape, device: str, divergence: str) -> int:
    with one_rank():
        run_once(VARIANTS[name], Inputs.make(Shape(8, 128, 16, 16, 8), device), divergence)
        x = Inputs.make(shape, device)
        gradients = x.hidden.nbytes + x.weight.nbytes
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_once(VARIANTS[name], x, divergence)
            return torch.cuda.max_memory_allocated() - before - gradients
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, Linux only
        before = _resident("VmRSS")
        run_once(VARIANTS[name], x, divergence)
        return _resident("VmHWM") - before - gradients


def _resident(field: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bench(shape: Shape, device: str, divergence: str, rounds: int) -> list[dict[str, Any]]:
    """A record a variant."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with one_rank():
        x = Inputs.make(shape, device)
        for round_number in range(rounds + 1):
            for name, variant in VARIANTS.items():
                seconds = run_once(variant, x, divergence)
                if round_number:  # the first warms up
                    times[name].append(seconds)
        element = x.hidden.element_size()
    return [
        {
            **asdict(shape),
            "divergence": divergence,
            "variant": name,
            "ms": 1e3 * statistics.median(times[name]),
            "kept_bytes": shape.teacher_hidden * element if name == "exact" else KEPT * (4 + 4),
            "extra_mib": peak_memory(name, shape, device, divergence) / 2**20,
        }
        for name in VARIANTS
    ]


def main() -> None:
    """Prints a table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for shape in CUDA if options.device == "cuda" else CPU:
        for divergence in ("forward", "reverse", "jensen_shannon"):
            found = bench(shape, options.device, divergence, options.rounds)
            records += found
            for r in found:
                print(
                    f"{r['tokens']} × {r['vocabulary']:,}  {r['divergence']:<15}{r['variant']:<20}"
                    f"{r['ms']:9.0f} ms  {r['extra_mib']:7.0f} MiB  kept {r['kept_bytes']:,} bytes a token",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
