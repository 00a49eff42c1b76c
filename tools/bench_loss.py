"""Times the loss from hidden states to gradients, beside other ways to compute the same, on the same inputs.

    python tools/bench_loss.py                      # CPU: V = 8k, 32k, 150k
    python tools/bench_loss.py --device cuda        # 8,192 tokens × V 151,936 × hidden 2,048 and 3,584, bf16
    python tools/bench_loss.py --json result.json

Variants are run in turn, round after round, so that a machine whose speed drifts favours none; times are
medians. Peak memory is what a variant takes beyond its inputs and the gradients that it returns: of the
allocator on CUDA, of a process of its own on the CPU. `head GEMMs` is the matrix products alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss
from megatron_rapo.loss.kernels import row_sums, write_gradient
from megatron_rapo.loss.rows import GradientTerms, Pull
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.loss.vocabulary import VocabularyShard

ALPHA, BETA = 5e-3, 1e-3


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark."""

    tokens: int
    vocabulary: int
    hidden: int
    chunk: int = 1024


CPU = (Shape(2048, 8192, 512, 256), Shape(1024, 32768, 512, 256), Shape(512, 151_936, 512, 128))
SMALL = Shape(64, 512, 64, 32)
CUDA = (Shape(8192, 151_936, 2048, 2048), Shape(8192, 151_936, 3584, 2048))


@dataclass
class Inputs:
    """Policy and reference at `tokens` tokens."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    flattening: Tensor
    advantages: Tensor
    chunk: int

    @classmethod
    def make(cls, shape: Shape, device: str) -> Inputs:
        """Random inputs, bf16 on CUDA and fp32 on the CPU."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        scale = shape.hidden**-0.5
        return cls(
            hidden=random(shape.tokens, shape.hidden).requires_grad_(),
            weight=(random(shape.vocabulary, shape.hidden) * scale).requires_grad_(),
            targets=torch.randint(0, shape.vocabulary, (shape.tokens,), device=device),
            reference_hidden=random(shape.tokens, shape.hidden),
            reference_weight=random(shape.vocabulary, shape.hidden) * scale,
            flattening=torch.rand(shape.tokens, device=device),
            advantages=torch.randn(shape.tokens, device=device),
            chunk=shape.chunk,
        )


def this_package(x: Inputs, exact: bool) -> Tensor:
    """The loss as it is used in training."""
    group = dist.group.WORLD
    assert group is not None, "joined in one_rank"
    shard = VocabularyShard.of(len(x.weight), len(x.weight), group)
    reference = None
    if exact:
        reference = ReferenceStates(
            x.reference_hidden, x.reference_weight, x.flattening, forward=True, reverse=False
        )

    def token_loss(s: TokenStatistics, rows: slice) -> Tensor:
        loss = -x.advantages[rows] * s.log_prob - BETA * s.entropy
        return loss if s.forward_kl is None else loss + ALPHA * s.forward_kl

    return chunked_loss(x.hidden, x.targets, Head(x.weight, shard, 1.0, x.chunk), token_loss, reference)


def _plain_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference: tuple[Tensor, Tensor, Tensor] | None,
    advantages: Tensor,
) -> Tensor:
    log_policy = (hidden @ weight.T).float().log_softmax(-1)
    log_prob = log_policy.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    loss = -advantages * log_prob - BETA * entropy
    if reference is not None:
        reference_hidden, reference_weight, flattening = reference
        logits = (reference_hidden @ reference_weight.T).float()
        flattened = (flattening[:, None] * logits).log_softmax(-1)
        loss = loss + ALPHA * (flattened.exp() * (flattened - log_policy)).sum(-1)
    return loss.sum()


def plain_pytorch(x: Inputs, exact: bool) -> Tensor:
    """`log_softmax` and autograd over full logits."""
    reference = (x.reference_hidden, x.reference_weight, x.flattening) if exact else None
    return _plain_tokens(x.hidden, x.weight, x.targets, reference, x.advantages)


_compiled = torch.compile(_plain_tokens, dynamic=False)


def compiled_chunks(x: Inputs, exact: bool) -> Tensor:
    """Plain PyTorch under torch.compile, a chunk of tokens at a time, recomputed in the backward."""
    total = x.hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(x.targets), x.chunk):
        rows = slice(start, start + x.chunk)
        reference = None
        if exact:
            reference = (x.reference_hidden[rows], x.reference_weight, x.flattening[rows])
        total = total + torch.utils.checkpoint.checkpoint(
            _compiled,
            x.hidden[rows],
            x.weight,
            x.targets[rows],
            reference,
            x.advantages[rows],
            use_reentrant=False,
        )
    return total


def trl(x: Inputs, exact: bool) -> Tensor:
    """TRL's selective log-softmax and entropy over full logits; it has no exact divergence."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = x.hidden @ x.weight.T
    log_prob = selective_log_softmax(logits, x.targets)
    return (-x.advantages * log_prob - BETA * entropy_from_logits(logits)).sum()


def liger(x: Inputs, exact: bool) -> Tensor:
    """Liger's fused linear cross entropy: the log-probs' sum alone, no advantages, no entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(x.weight, x.hidden, x.targets)


def head_gemms(x: Inputs, exact: bool) -> Tensor:
    """Matrix products alone: logits, both gradients, and the reference's logits; chunk by chunk."""
    total = torch.zeros_like(x.weight, dtype=torch.float32)
    with torch.no_grad():
        for start in range(0, len(x.targets), x.chunk):
            hidden = x.hidden[start : start + x.chunk]
            logits = hidden @ x.weight.T
            if exact:
                x.reference_hidden[start : start + x.chunk] @ x.reference_weight.T
            logits @ x.weight
            total += logits.T @ hidden
    return total


Variant = Callable[[Inputs, bool], Tensor]
VARIANTS: dict[str, Variant] = {
    "this package": this_package,
    "plain PyTorch": plain_pytorch,
    "compiled chunks": compiled_chunks,
    "head GEMMs": head_gemms,
}


def variants(device: str) -> dict[str, Variant]:
    """Those that run here: peers only where they are installed."""
    found = dict(VARIANTS)
    if find_spec("trl"):
        found["TRL, no divergence"] = trl
    if find_spec("liger_kernel") and device == "cuda":
        found["Liger, log-prob alone"] = liger
    return found


def run_once(variant: Variant, x: Inputs, exact: bool) -> float:
    """Seconds of one forward and backward."""
    x.hidden.grad = x.weight.grad = None
    _synchronise(x)
    start = time.perf_counter()
    loss = variant(x, exact)
    if loss.requires_grad:
        loss.backward()
    _synchronise(x)
    return time.perf_counter() - start


def _synchronise(x: Inputs) -> None:
    if x.hidden.is_cuda:
        torch.cuda.synchronize()


def peak_memory(name: str, shape: Shape, device: str, exact: bool) -> int:
    """Bytes beyond inputs and returned gradients."""
    if device == "cuda":
        return _peak(name, shape, device, exact)
    # Freed memory goes back at once: what the allocator keeps would count as used, or not, by chance.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, shape, device, exact))


def _peak(name: str, shape: Shape, device: str, exact: bool) -> int:
    variant = variants(device)[name]
    with one_rank():
        warm = Inputs.make(Shape(8, 64, 16, 8), device)
        run_once(variant, warm, exact)
        x = Inputs.make(shape, device)
        gradients = x.hidden.nbytes + x.weight.nbytes
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_once(variant, x, exact)
            return torch.cuda.max_memory_allocated() - before - gradients
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, Linux only
        before = _resident("VmRSS")
        run_once(variant, x, exact)
        return _resident("VmHWM") - before - gradients


def _resident(field: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def logits_given(shape: Shape) -> dict[str, float]:
    """CUDA: sums and gradient of given logits, beside reading both logits and writing one gradient."""
    logits = torch.randn(shape.tokens, shape.vocabulary, device="cuda", dtype=torch.bfloat16)
    other = torch.randn_like(logits)
    phi = torch.rand(shape.tokens, device="cuda")
    pull = Pull(other, phi, forward=True, reverse=False)

    def ours() -> None:
        sums = row_sums(logits, 1.0, pull)
        ones = torch.ones_like(sums.total)
        assert sums.mass is not None
        terms = GradientTerms(
            sums.maximum, ones / sums.total, -ones / sums.total, sums.powers_maximum, ones / sums.mass
        )
        write_gradient(logits, 1.0, pull, terms)

    def floor() -> None:
        torch.add(logits, other, out=logits)  # reads two, writes one

    times: dict[str, list[float]] = {"this package": [], "floor": []}
    for _ in range(10):
        for name, function in (("this package", ours), ("floor", floor)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


class one_rank:
    """A process group of this process alone."""

    def __enter__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        store = f"file://{self._directory.name}/store"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            init_method=store,
            rank=0,
            world_size=1,
        )

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()
        self._directory.cleanup()


def bench(shape: Shape, device: str, exact: bool, rounds: int) -> list[dict[str, Any]]:
    """A record a variant."""
    chosen = variants(device)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    with one_rank():
        x = Inputs.make(shape, device)
        for round_number in range(rounds + 1):
            for name, variant in chosen.items():
                seconds = run_once(variant, x, exact)
                if round_number:  # the first warms up
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    chunk_bytes = shape.chunk * shape.vocabulary * (2 if device == "cuda" else 4)
    return [
        {
            **asdict(shape),
            "divergence": "forward_exact" if exact else "none",
            "variant": name,
            "ms": 1e3 * median,
            "to_plain": median / medians["plain PyTorch"],
            "to_gemms": median / medians["head GEMMs"],
            "extra_mib": peak_memory(name, shape, device, exact) / 2**20,
            "chunk_mib": chunk_bytes / 2**20,
        }
        for name, median in medians.items()
    ]


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="one shape that takes a second, on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = []
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    if options.small and options.device == "cuda":
        parser.error("--small is of a CPU; remove it, or --device cuda")
    shapes = CUDA if options.device == "cuda" else (SMALL,) if options.small else CPU
    for shape in shapes:
        for exact in (False, True):
            print(f"\n{shape}, divergence {'forward_exact' if exact else 'none'}")
            for record in bench(shape, options.device, exact, options.rounds):
                records.append(record)
                print(
                    "{variant:<22}{ms:10.1f} ms  {to_plain:5.2f} × plain  {to_gemms:5.2f} × GEMMs  "
                    "{extra_mib:9.0f} MiB extra (a chunk's logits: {chunk_mib:.0f})".format(**record)
                )
        if options.device == "cuda":
            given = logits_given(shape)
            records.append({**asdict(shape), "logits_given": given})
            print({name: f"{1e3 * seconds:.2f} ms" for name, seconds in given.items()}, "logits given")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
