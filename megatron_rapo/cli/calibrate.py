"""`megatron-rapo calibrate`: what the machine at hand can do, as a profile to plan with."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_rapo.folder import write_whole, writing_to


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, to plan with",
        description="Measures matrix products, attention, memory, links, the embedded engine, verifiers and "
        "disk of this machine, and writes a profile for megatron-rapo plan (docs/planning.md).",
    )
    calibrate.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on GPUs, float32 on CPUs"
    )
    calibrate.add_argument("--output", type=Path, metavar="FILE", help="default: named after the device")
    calibrate.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    import torch

    from megatron_rapo.calibration.calibrate import calibrate, to_toml
    from megatron_rapo.calibration.ranks import Dtype
    from megatron_rapo.scaling.devices import own_device_name

    dtype: Dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    name = re.sub(r"\W+", "-", own_device_name().lower()).strip("-")
    output = options.output or Path(f"{name}.toml")
    with writing_to(output.parent, "--output"):
        profile = calibrate(dtype, output.parent)
        write_whole(output, to_toml(profile))
    best = profile.matrix[-1].flops_per_s / 1e9
    print(f"{profile.device}, {dtype}: {best:,.1f} GFLOP/s in large matrix products")
    print(f"{profile.within_node.bytes_per_s / 1e9:.2f} GB/s between two devices")
    print(f"{output}  for megatron-rapo plan --profile {output}")
    return 0
