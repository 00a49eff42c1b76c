"""Times conversion both ways on a random model, with each process's peak memory, and compares the outcome.

    python tools/bench_convert.py                       # 1B parameters in bfloat16
    python tools/bench_convert.py --layers 64 --hidden 5120 --feed-forward 27648     # 32B; 120 GiB of disk

The random model and both outcomes lie in a temporary folder of --scratch, and are removed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import add_size_options, make_random_model

from megatron_rapo.weights.hf_files import HFTensors


def main() -> None:
    """Makes the model, converts it to Megatron and back, and prints what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_size_options(parser)
    parser.add_argument("--scratch", type=Path, help="folder to work in (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        source, megatron, back = (Path(folder) / name for name in ("source", "megatron", "back"))
        parameters = make_random_model(source, options)
        print(f"{parameters / 1e9:.2f}B parameters, bfloat16")
        _convert("convert_hf_to_megatron.py", source, megatron)
        _convert("convert_megatron_to_hf.py", megatron, back)
        print("round trip:", "bit for bit the same" if _same(source, back) else "DIFFERENT")


def _convert(script: str, source: Path, destination: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), str(source), str(destination)]
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} failed")
    print(f"{script}: {time.monotonic() - start:.1f} s, {usage.ru_maxrss / 2**20:.2f} GiB of memory at most")


def _same(source: Path, back: Path) -> bool:
    with HFTensors(source) as before, HFTensors(back) as after:
        return before.names() == after.names() and all(
            torch.equal(before.read(name, None, 0, 0), after.read(name, None, 0, 0))
            for name in before.names()
        )


if __name__ == "__main__":
    main()
