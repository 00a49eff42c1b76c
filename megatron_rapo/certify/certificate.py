"""`megatron-rapo certify`: prepares small models, runs the job, and reports."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from megatron_rapo.certify.cases import (
    MAX_RESPONSE_TOKENS,
    RANKS,
    RESPONSES,
    TEMPERATURE,
    cases_of,
    other_than,
    small,
)
from megatron_rapo.certify.measure import BARS, Result, measure
from megatron_rapo.config import Adapter, RunConfig, validate
from megatron_rapo.config.algorithm import find_method
from megatron_rapo.launch.local import run_local
from megatron_rapo.methods.options import Options
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.model.rope import Rope

FIRST_SEED = 6
DEFAULT = Architecture(
    family="qwen2",
    layers=4,
    hidden=64,
    heads=8,
    kv_heads=4,
    head_dim=16,
    feed_forward=96,
    vocabulary=61,
    norm_epsilon=1e-6,
    rope=Rope(1e6),
    max_positions=64,
    attention_bias=True,
    query_key_norm=None,
    tied=False,
)


def certify(
    algorithm: Options, architecture: Architecture = DEFAULT, adapter: Adapter | None = None
) -> list[Result]:
    """Certifies a method's loss on a small model of a family, in RANKS processes of this machine.

    A teacher is of another family, depth, width and number of spare rows than the policy.

    Args:
        algorithm: the method and its options.
        architecture: whose family, biases, norms and tying the small model takes.
        adapter: what is trained of it, if not its weights; these without it are then the reference.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-rapo-certify-") as name:
        directory = Path(name)
        write_models(directory, architecture)
        report = directory / "report.json"
        config = configuration(directory, algorithm, adapter)
        run_local(measure, (config, report, cases_of(architecture)), RANKS)
        return [Result(**line) for line in json.loads(report.read_text())]


def table(results: list[Result]) -> str:
    """The certificate as text."""
    rows = [("layout", "type", "loss", "loss error", "gradient error", "")]
    rows += [
        (
            result.case,
            result.dtype,
            f"{result.loss:.12f}",
            f"{result.loss_error:.1e}",
            f"{result.gradient_error:.1e}",
            "ok" if result.passed else "FAILED",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = sum(not result.passed for result in results)
    bars = ", ".join(f"{dtype} {bar:.0e}" for dtype, bar in BARS.items())
    verdict = f"{failed} of {len(results)} FAILED" if failed else f"all {len(results)} passed"
    return "\n".join([*lines, "", f"{verdict} (relative to plain PyTorch on one process; bars: {bars})"])


def as_json(results: list[Result]) -> str:
    """The certificate as JSON: bars, verdict, and a record a line of the table."""
    records = [{**asdict(result), "passed": result.passed} for result in results]
    return json.dumps({"bars": BARS, "passed": all(r.passed for r in results), "results": records}, indent=1)


def configuration(directory: Path, algorithm: Options, adapter: Adapter | None = None) -> RunConfig:
    """Of the certificate of a method, and of adapters, for the small models in `directory`."""
    own = algorithm.model_dump(exclude_none=True)
    own.pop("minibatch_prompts", None)
    method = find_method(algorithm.method)(algorithm, Sampling(1.0, RESPONSES, MAX_RESPONSE_TOKENS))
    teacher = {"teacher": {"path": str(directory / "teacher")}} if method.wants_teacher else {}
    # What learns from given texts may know no temperature; where it is from plays no part in the loss.
    sampled = {"responses_per_prompt": RESPONSES, "temperature": TEMPERATURE}
    reference = {"reference_path": str(directory / "reference")}
    beside = {} if adapter is None else {"adapter": adapter.model_dump(mode="json")}
    return validate(
        {
            **teacher,
            **beside,
            "run": {"directory": str(directory), "steps": 1},
            "model": {
                "path": str(directory / "policy"),
                "dtype": "float32",
                **(reference if adapter is None else {}),
            },
            "data": {"source": "arithmetic"},
            "rollout": {
                "prompts_per_step": 4,
                "max_prompt_tokens": 8,
                "max_response_tokens": MAX_RESPONSE_TOKENS,
                **(sampled if method.demonstrations is None else {}),
            },
            "algorithm": {**own, "max_tokens_per_microbatch": 4096, "loss_chunk_tokens": 16},
        },
        source="of the certificate",
    )


def write_models(directory: Path, architecture: Architecture) -> None:
    """Random policy and reference, small ones of the architecture's kind, and a teacher of another, as
    `configuration` finds them.
    """
    own = small(architecture)
    models = {"policy": own, "reference": own, "teacher": other_than(own)}
    for seed, (model, its) in enumerate(models.items(), FIRST_SEED):
        _write_model(directory / model, its, seed)


def _write_model(directory: Path, architecture: Architecture, seed: int) -> None:
    """A random model with no two parameters alike, as a HF directory in fp64."""
    directory.mkdir(parents=True)
    AutoConfig.for_model(
        architecture.family,
        **family_of(architecture).written(architecture),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    ).save_pretrained(directory)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for _, rule in model_rules(architecture):
        for name, shape in rule.hf.items():
            values = torch.randn(shape, generator=random, dtype=torch.float64) * 0.1
            # fp32 values, so that both types certify the same model.
            weights[name] = (values + ("norm" in name)).float().double()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
