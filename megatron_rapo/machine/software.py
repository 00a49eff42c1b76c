"""The packages that runs use, by whether each feature has what it needs."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.distributed as dist

from megatron_rapo.errors import RapoError
from megatron_rapo.machine.finding import Finding
from megatron_rapo.megatron_repairs.install import check_version


@dataclass(frozen=True)
class _Optional:
    """A package that a feature needs.

    Attributes:
        package: as pip names it.
        module: what is imported of it.
        without: what a run does or lacks without it.
        how: to get it.
    """

    package: str
    module: str
    without: str
    how: str


_ON_GPUS: Sequence[_Optional] = (
    _Optional(
        "transformer-engine",
        "transformer_engine",
        "layers are Megatron's local ones: slower, with more memory, without fused attention",
        "pip install 'megatron_rapo[gpu]', or NVIDIA's PyTorch image (docs/containers.md)",
    ),
    _Optional(
        "apex",
        "apex",
        "Megatron's optimizer and norms take PyTorch's own kernels, which is slower",
        "it comes with NVIDIA's images, or from source; PyPI's apex is another project",
    ),
    _Optional(
        "triton",
        "triton",
        "the loss takes PyTorch's functions in place of its own kernels: more memory traffic",
        "it comes with torch for CUDA",
    ),
)
_ANYWHERE: Sequence[_Optional] = (
    _Optional(
        "renderers",
        "renderers",
        'environment.use = "tool_use" and "conversation" are refused',
        "pip install 'megatron_rapo[tools]'",
    ),
    _Optional(
        "reasoning_gym",
        "reasoning_gym",
        'data.source = "reasoning_gym" is refused',
        "pip install 'megatron_rapo[gym]'",
    ),
    _Optional("wandb", "wandb", "observe.wandb is refused", "pip install 'megatron_rapo[wandb]'"),
)
_ENGINES: Sequence[_Optional] = tuple(
    _Optional(
        kind,
        kind,
        f'this environment starts no engines of rollout.engine.kind = "{kind}" (those of another one, by '
        "`rollout.engine.python` or URL, can be used)",
        f"pip install {kind} into an environment of its own (docs/engines.md)",
    )
    for kind in ("sglang", "vllm")
)


def software() -> Iterator[Finding]:
    """What is installed, in the environment that asks."""
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("torch", "ok", f"{torch.__version__}, {_backends()}")
    yield _megatron()
    yield _devices()
    for one in (*(_ON_GPUS if torch.cuda.is_available() else ()), *_ANYWHERE, *_ENGINES):
        yield _optional(one)


def _backends() -> str:
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.cuda.is_available():
        found.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    return f"collectives by {' and '.join(found)}" if found else "no collectives"


def _megatron() -> Finding:
    try:
        return Finding("megatron-core", "ok", str(check_version()))
    except RapoError as error:
        return Finding("megatron-core", "wrong", "another release", str(error))


def _devices() -> Finding:
    if not torch.cuda.is_available():
        without = "all computes on CPU, which is enough for tests and toy models"
        how = "a GPU with its driver, and torch for a CUDA that is no newer than the driver's"
        return Finding("GPUs", "absent", f"none that torch {torch.__version__} sees", f"{without}; {how}")
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    told = ", ".join(f"{one.name} of {one.total_memory / 2**30:.0f} GiB" for one in names)
    return Finding("GPUs", "ok", f"{len(names)}: {told}; CUDA {torch.version.cuda}")


def _optional(one: _Optional) -> Finding:
    if find_spec(one.module) is None:
        return Finding(one.package, "absent", "not installed", f"{one.without}; {one.how}")
    try:
        return Finding(one.package, "ok", version(one.package))
    except PackageNotFoundError:
        return Finding(one.package, "ok", "of unknown version")
