"""Each family's plain PyTorch twin against transformers, and one that comes from outside of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rapo.errors import RapoError
from megatron_rapo.model.families.named import FAMILIES, family_of
from megatron_rapo.model.hf_config import read_architecture
from tests import own_family
from tests.models import load_reference, make_hf_model

WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 6.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 6.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("seed_oss", {"attention_bias": False}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    ("mistral", {"sliding_window": 7}),
    ("mixtral", {"sliding_window": 7}),
    ("qwen3", WINDOWS),
    ("qwen2_moe", WINDOWS),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    ("smollm3", WINDOWS),
    ("qwen3", {"rope_parameters": YARN}),
    ("olmo3", {"rope_parameters": YARN}),
    ("glm4", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    ("glm", {"attention_bias": False}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}}),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
]


def test_the_pages_family_is_none_of_ours() -> None:
    assert own_family.names["SEED_OSS"] is FAMILIES["seed_oss"]
    assert "megatron_rapo" not in own_family.LINE
    named = Path(family_of.__code__.co_filename).read_text(encoding="utf-8")
    assert "seed_oss" not in named


def test_the_page_names_every_family() -> None:
    named = re.findall(r"^\| `(\w+)` \|", own_family.PAGE, re.M)
    assert {*named, "seed_oss"} == {"model_type", *FAMILIES}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: str(value))
def test_plain_logits_are_those_of_transformers(
    tmp_path: Path, family: str, options: dict[str, Any], tied: bool
) -> None:
    path = make_hf_model(tmp_path / "model", family=family, tied=tied, **options)
    architecture = read_architecture(path)
    token_ids = torch.arange(2, 40)
    with torch.no_grad():
        expected = load_reference(path)(token_ids[None]).logits[0]
        found = family_of(architecture).plain(load_file(path / "model.safetensors"), architecture, token_ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["attention_out_bias", "mlp_bias"])
def test_a_family_from_outside_refuses_what_it_says(tmp_path: Path, option: str) -> None:
    path = make_hf_model(tmp_path / "model", family="seed_oss", **{option: True})
    with pytest.raises(RapoError, match=f"has {option} = true in its config.json, which is not supported"):
        read_architecture(path)
