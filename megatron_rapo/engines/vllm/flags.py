"""What a vLLM server of a run is started with, whoever starts it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import megatron_rapo

VERSION = "0.32"  # whose routes these are
MODULE = "vllm.entrypoints.openai.api_server"
PATH = Path(megatron_rapo.__file__).parent / "vllm_worker/path"  # for PYTHONPATH
BACKEND = "rapo"  # as vllm_worker/extension.py registers it
DEV_MODE = "VLLM_SERVER_DEV_MODE"  # without it a server has no routes for weights
SCALE_OUT = "--enable-scale-out"  # the routes that take and give tokens
LOGPROBS = ("--logprobs-mode", "processed_logprobs")  # of the distribution that was sampled from
EXTENSION = ("--worker-extension-cls", "rapo_vllm.Extension")
TRANSFER = ("--weight-transfer-config", json.dumps({"backend": BACKEND}, separators=(",", ":")))
GUARD = ("--middleware", "rapo_vllm.Guard")
SLEEP = "--enable-sleep-mode"
FLAGS = (SCALE_OUT, *LOGPROBS, *EXTENSION, *TRANSFER, *GUARD)


def command(python: str) -> list[str]:
    """What starts one by hand, bar its model and address; no word has a space."""
    variables = [f"{name}={value}" for name, value in environment(None).items()]
    return ["env", *variables, python, "-m", MODULE, *FLAGS]


def written(words: tuple[str, ...] = FLAGS) -> str:
    """As a shell takes them."""
    return shlex.join(words)


def environment(inherited: str | None) -> dict[str, str]:
    """What it needs in its environment; `inherited` is the PYTHONPATH of whoever starts it."""
    path = f"{PATH}:{inherited}" if inherited else str(PATH)
    return {DEV_MODE: "1", "PYTHONPATH": path}
