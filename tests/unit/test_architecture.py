"""What is read from a HF config.json, and what is refused."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rapo.certify.cases import small
from megatron_rapo.config import Model, Parallel
from megatron_rapo.errors import RapoError
from megatron_rapo.model.families.named import FAMILIES, REASONS, family_of
from megatron_rapo.model.features import Window
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_layer_parameters, count_parameters
from megatron_rapo.model.rope import Rope, Yarn
from tests import own_family  # noqa: F401  (a family from outside of the package)
from tests.models import OF_FAMILY

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def write(folder: Path, family: str = "qwen2", **options: Any) -> Path:
    given = deepcopy({**SHAPE, **OF_FAMILY.get(family, {}), **options})  # which transformers changes
    AutoConfig.for_model(family, **given).save_pretrained(folder)
    return folder


def change(folder: Path, **options: Any) -> Path:
    """Options that HF's classes would not write of themselves."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameters_are_those_of_the_hf_model(tmp_path: Path, family: str, tied: bool) -> None:
    if family in ("qwen2", "smollm3"):  # whose heads always are hidden / heads wide
        write(tmp_path, family, tie_word_embeddings=tied, head_dim=12)
    else:
        write(tmp_path, family, tie_word_embeddings=tied)
    architecture = read_architecture(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(architecture) == sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert count_layer_parameters(architecture) == layer
    assert (architecture.family, architecture.tied, architecture.layers) == (family, tied, 6)
    assert (architecture.heads, architecture.kv_heads, architecture.norm_epsilon) == (4, 2, 1e-5)


def test_a_config_file_is_as_good_as_its_folder(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_architecture(tmp_path / "config.json") == read_architecture(tmp_path)


@pytest.mark.parametrize(("multiple", "tensor", "rows"), [(1, 1, 61), (1, 2, 62), (1, 4, 64), (128, 2, 256)])
def test_vocabulary_is_padded_to_shards(tmp_path: Path, multiple: int, tensor: int, rows: int) -> None:
    assert read_architecture(write(tmp_path)).padded_vocabulary(multiple, tensor) == rows


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {"mlp_bias": True}, "mlp_bias = true"),
        ("llama", {"attention_bias": True}, "attention_bias = true"),
        (
            "llama",
            {"sliding_window": 127},
            "sliding_window = 127, less than max_position_embeddings = 128",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 6}, "layers of type chunked_attention"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias = true"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
                    "full_attention": {"rope_type": "default"},
                }
            },
            "rope_type = 'dynamic', whose frequencies change with a sequence's length",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {**YARN, "truncate": False},
                }
            },
            "truncate = false of full_attention, which transformers ignores",
        ),
        ("olmo2", {"attention_bias": True}, "attention_bias = true"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotary positions"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias = true"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type = 'dynamic', whose frequencies change with a sequence's length",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type = 'longrope', whose frequencies change",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type = 'proportional'",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], message: str
) -> None:
    write(tmp_path, family, **options)
    with pytest.raises(RapoError, match=f"{tmp_path} has {message}.* not supported"):
        read_architecture(tmp_path)


def test_a_window_as_long_as_the_model_has_positions_is_none(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path / "whole", "mistral", sliding_window=128)).window is None
    found = read_architecture(write(tmp_path / "short", "mistral", sliding_window=127)).window
    assert found == Window(127, tuple(range(6)))


def test_olmo3_stretches_the_positions_of_layers_without_a_window_alone(tmp_path: Path) -> None:
    """Whether one configuration tells the stretch for all layers, or by kind of layer as newer ones do."""
    for name, parameters in {
        "flat": YARN,
        "by kind": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }.items():
        found = read_architecture(write(tmp_path / name, "olmo3", rope_parameters=parameters))
        assert isinstance(found.rope.scaling, Yarn)
        assert found.window == Window(7, (0, 1, 2, 4, 5), Rope(1e4))


@pytest.mark.parametrize("options", [{}, {"rope_parameters": YARN}, {"attention_bias": False}], ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_written_configuration_reads_the_same(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Of the model's size, and of the small one that certificates are made with."""
    if family == "gemma3_text" and "rope_parameters" in options:
        kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e3}, "full_attention": YARN}
        options = {"rope_parameters": kinds}
    for name, change in {"same": lambda a: a, "small": small}.items():
        architecture = change(read_architecture(write(tmp_path / name, family, **options)))
        written = AutoConfig.for_model(family, **family_of(architecture).written(architecture))
        written.save_pretrained(tmp_path / "written")
        assert read_architecture(tmp_path / "written") == architecture


@pytest.mark.parametrize("family", ["gpt2", "no-such-model"])
def test_another_family_is_refused(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    there_are = "llama, mistral, qwen2, .*, mixtral, seed_oss; docs/families.md"
    with pytest.raises(RapoError, match=f"of the family '{family}' .*; there are {there_are}"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("family", REASONS)
def test_a_family_that_cannot_be_had_says_why(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(RapoError, match=re.escape(f", {REASONS[family]}; there are llama, ")):
        read_architecture(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_malformed_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RapoError, match=r"config\.json cannot be read"):
        read_architecture(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"has no config\.json; name a HF model directory in model\.path"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel = 3 does not divide the model's 4 attention heads"),
        ({"tensor_parallel": 4}, "tensor_parallel = 4 does not divide the model's 2 key-value heads"),
        ({"pipeline_parallel": 4}, "= 4 does not divide the model's 6 layers; choose a divisor of 6"),
        (
            {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2},
            "virtual_pipeline_parallel = 4 does not divide",
        ),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    tmp_path: Path, layout: dict[str, int], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        read_architecture(write(tmp_path)).check_layout(Parallel(**layout))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "\xff", "[" * 100_000])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(RapoError, match=r"config\.json cannot be read \(.*; copy it again"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "has hidden_size = 0, no size; copy it again"),
        ({"vocab_size": -1}, "has vocab_size = -1, no size"),
        ({"max_position_embeddings": 0}, "has max_position_embeddings = 0, no size"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4, no multiple of num_key_value_heads = 3"),
        ({"dtype": "x"}, "cannot be read"),
        ({"rope_parameters": {"rope_theta": "x"}}, "could not convert string to float|cannot be read"),
    ],
)
def test_sizes_that_are_none_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RapoError, match=message):
        read_architecture(change(write(tmp_path), **options))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"expert_parallel": 3, "data_parallel": 3}, "= 3 does not divide the model's 4 experts; choose a"),
        (
            {"expert_tensor_parallel": 5, "data_parallel": 5},
            "expert_tensor_parallel = 5 does not divide the model's 48 feed-forward channels of an expert",
        ),
        ({"tensor_parallel": 2}, "= 2 of a mixture of experts needs parallel.sequence_parallel = true"),
    ],
)
def test_a_layout_that_does_not_divide_the_experts_is_refused(
    tmp_path: Path, layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        read_architecture(write(tmp_path, "qwen3_moe")).check_layout(Parallel(**layout))


@pytest.mark.parametrize(
    "option", ["expert_parallel", "expert_tensor_parallel", "balance_coefficient", "router_z_coefficient"]
)
def test_options_of_experts_that_a_model_has_not_are_refused(tmp_path: Path, option: str) -> None:
    of_layout = "parallel" in option
    layout = Parallel(data_parallel=2, **({option: 2} if of_layout else {}))
    model = Model(path=tmp_path, **({} if of_layout else {option: 0.1}))
    read_architecture(write(tmp_path / "mixture", "mixtral")).check_experts(layout, model)
    with pytest.raises(RapoError, match=f"{option} has no effect: a qwen2 has no experts; remove it"):
        read_architecture(write(tmp_path)).check_experts(layout, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        ({"decoder_sparse_step": 2}, "sparse_step = 2"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1 of probabilities that sum to 1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5, more than its 4 experts; copy it again"),
        ({"num_experts": 0}, "num_experts = 0, no size; copy it again"),
    ],
)
def test_mixtures_with_mlps_between_or_wrong_numbers_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        read_architecture(write(tmp_path, "qwen3_moe", **options))
