"""Converts a Megatron checkpoint of any layout, such as a run leaves, into a HF model directory.

    python tools/convert_megatron_to_hf.py runs/qwen2.5-7b /models/mine

The same as `megatron-rapo convert to-hf`; docs/conversion.md says more.
"""

from __future__ import annotations

import sys

from megatron_rapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
