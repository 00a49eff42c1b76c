"""A real SGLang server on a machine without a GPU: its own code, bar what only a GPU could load.

    .venv-sglang/bin/python tests/engines/sglang_on_cpu.py --model-path MODEL --port PORT

It takes `sglang.launch_server`'s options, and adds those that a CPU needs. Three things need CUDA where
nothing is done on it; they are replaced before SGLang is imported, at module level, so that the processes
that SGLang spawns replace them too (they run this file as `__mp_main__`):

1. PyPI's `torchvision` registers kernels for operators that its CUDA library defines, which does not load
   beside a CPU build of torch. Operators of those names are then defined here, so that the registration
   passes; no language model calls them.
2. `sgl_kernel` is CUDA code. One of its functions is called on CPU, and is written in PyTorch below; any
   other raises if it is ever called.
3. `torch.cuda.synchronize` is called without a look at the device: there is nothing to wait for.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import version

# What SGLang reads at import.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

VISION_OPERATORS = [
    *("roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("nms", "qnms", "qroi_align", "deform_conv2d", "_deform_conv2d_backward"),
]
CPU_OPTIONS = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup"),
    *("--mem-fraction-static", "0.3", "--max-total-tokens", "32768", "--max-running-requests", "64"),
]


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int | None = None,
) -> None:
    """Writes each request's new cache slots into its row: `sgl_kernel`'s function, in a loop."""
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def define_vision_operators() -> torch.library.Library | None:
    """See 1. above; the operators exist for as long as the result does. None: torchvision's library loads."""
    if torch.version.cuda or version("torchvision").endswith("+cpu"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in VISION_OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def install_kernel_stand_in() -> None:
    """See 2. above."""
    module = types.ModuleType("sgl_kernel", "Stands in for CUDA kernels.")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None)
    module.__version__ = "0.0.0"
    module.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu

    def absent(name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*_: object, **__: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

        return kernel

    module.__getattr__ = absent
    sys.modules["sgl_kernel"] = module


_vision_library = define_vision_operators()
install_kernel_stand_in()
torch.cuda.synchronize = lambda *_: None

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*CPU_OPTIONS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
