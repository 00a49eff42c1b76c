"""The tiny model as vLLM takes it on CPUs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.command import MODEL

HEAD, WIDE = 16, 32  # dimensions of the model's heads, and the least that vLLM has on CPUs


def with_wide_heads(folder: Path) -> Path:
    """The tiny model twice as wide, with heads twice as wide, which computes the same.

    RoPE turns dimension i of a head with i + width / 2, by the frequency θ^(−2i / width): twice i, in a head
    of twice the width, has the same one. All further dimensions are 0; q makes the scale 1 / √width good, and
    norms (their weights, and ε) that they take the mean over twice as many.
    """
    half = HEAD // 2
    place = torch.cat([2 * torch.arange(half), WIDE // 2 + 2 * torch.arange(half)])
    wide = {}
    for name, values in load_file(MODEL / "model.safetensors").items():
        values = values.float()
        if "norm" in name:
            values = torch.cat([values, torch.ones_like(values)]) * 0.5**0.5
        elif match := re.search(r"self_attn\.([qkv])_proj", name):
            heads = values.unflatten(0, (-1, HEAD))
            spread = torch.zeros(len(heads), WIDE, *values.shape[1:])
            spread[:, place] = heads * (2**0.5 if match[1] == "q" else 1.0)
            values = spread.flatten(0, 1)
        elif "o_proj" in name:
            spread = torch.zeros(len(values), values.size(1) // HEAD, WIDE)
            spread[:, :, place] = values.unflatten(1, (-1, HEAD))
            values = spread.flatten(1)
        if re.search("embed|[qkv]_proj.weight|gate_proj|up_proj", name):
            values = torch.cat([values, torch.zeros_like(values)], 1)
        if re.search("o_proj|down_proj", name):
            values = torch.cat([values, torch.zeros_like(values)])
        wide[name] = values.contiguous()
    folder.mkdir()
    for file in MODEL.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"hidden_size": 2 * config["hidden_size"], "rms_norm_eps": config["rms_norm_eps"] / 2}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
