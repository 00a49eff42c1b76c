"""Converts a HF model directory into a Megatron checkpoint, which loads under any layout.

    python tools/convert_hf_to_megatron.py /models/Qwen2.5-7B /models/Qwen2.5-7B-megatron

The same as `megatron-rapo convert to-megatron`; docs/conversion.md says more.
"""

from __future__ import annotations

import sys

from megatron_rapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
