"""`doctor --mismatch` attributes planted faults to their cause and to no other, and clears sound engines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig, validate
from megatron_rapo.doctor.finding import Finding
from megatron_rapo.doctor.mismatch import examine_at
from megatron_rapo.doctor.table import table
from megatron_rapo.parallel.placement import arrange, process_groups
from tests.distributed.faulty_engines import (
    ComputesOtherwise,
    CutsTail,
    DecodesOtherwise,
    IgnoresWeights,
    KeepsAnswers,
    ScalesTwice,
    TellsPrompts,
    all_serving,
)
from tests.distributed.jobs import layout, run_job
from tests.models import make_hf_model

TEMPERATURE = 0.8
# Each fault with its cause and the layout that it is looked at from.
CASES = {
    "sound": ("tp2-pp2", None),
    "other weights": ("dp4", "weights"),
    "ignores updates": ("cp2-pp2", "weights"),
    "keeps answers": ("tp2-cp2", "stale cache"),
    "cuts the tail": ("pp2-vpp2", "truncated sampling"),
    "scales twice": ("tp2-sp", "temperature"),
    "tells prompts": ("pp2-vpp2", None),
    "decodes otherwise": ("tp2-pp2", "kernels, precision"),
    "computes otherwise": ("dp4", "kernels, precision"),
}


def configuration(base: Path, layout_name: str, urls: list[str], transport: str) -> RunConfig:
    parallel = layout(layout_name).model_dump(exclude_defaults=True)
    return validate(
        {
            "run": {"directory": str(base / "run"), "steps": 1},
            "model": {"path": str(base / "model"), "dtype": "float32"},
            "parallel": {**parallel, "timeout_s": 120.0},
            "data": {"source": "countdown", "problems": 20, "numbers": 3},
            "rollout": {
                "prompts_per_step": 4,
                "max_prompt_tokens": 32,
                "max_response_tokens": 24,
                "temperature": TEMPERATURE,
                "engine": {"kind": "embedded", "urls": urls},
                "request_timeout_s": 60.0,
            },
            "algorithm": {"max_tokens_per_microbatch": 1024},
            "weights": {"transport": transport},
        },
        source="test",
    )


def examine_all(base: Path, urls: dict[str, str], report: Path) -> None:
    """In each rank: every case's findings."""
    findings = {}
    with process_groups(layout("dp4"), seed=1) as everyone:
        for name, (layout_name, _) in CASES.items():
            # The planted server ignores weights that come by disk.
            transport = "disk" if name == "ignores updates" else "distributed"
            config = configuration(base, layout_name, [urls[name]], transport)
            found = examine_at(config, arrange(config.parallel, seed=1))
            findings[name] = [asdict(finding) for finding in found]
        if everyone.is_main:
            report.write_text(json.dumps(findings))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    base = tmp_path_factory.mktemp("doctor")
    model = make_hf_model(base / "model", seed=0)
    other = make_hf_model(base / "other", seed=7)
    engines: dict[str, Any] = {
        "sound": (model, None),
        "other weights": (other, None),
        "ignores updates": (model, IgnoresWeights),
        "keeps answers": (model, KeepsAnswers),
        "cuts the tail": (model, CutsTail),
        "scales twice": (model, ScalesTwice),
        "tells prompts": (model, TellsPrompts),
        "decodes otherwise": (model, DecodesOtherwise),
        "computes otherwise": (model, ComputesOtherwise),
    }
    with all_serving(engines) as urls:
        findings = run_job(examine_all, base, urls, directory=base)
    return {name: [Finding(**one) for one in of_case] for name, of_case in findings.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named_and_no_other(found: dict[str, list[Finding]], name: str) -> None:
    cause = CASES[name][1]
    causes = [finding.cause for finding in found[name] if finding.verdict == "FOUND"]
    assert causes == ([] if cause is None else [cause]), table(found[name])


def test_sound_engines_leave_nothing_open(found: dict[str, list[Finding]]) -> None:
    assert {finding.verdict for finding in found["sound"]} == {"ok"}
    assert table(found["sound"]).endswith("nothing found")


def test_the_evidence_is_quantitative(found: dict[str, list[Finding]]) -> None:
    by_cause = {name: {f.cause: f for f in findings} for name, findings in found.items()}
    assert "outside top_p = 0.8" in by_cause["cuts the tail"]["truncated sampling"].evidence
    scaled = by_cause["scales twice"]["temperature"].evidence
    assert "asked for 0.8" in scaled and "log-probs are of 0.64" in scaled
    assert "version default as found" in by_cause["other weights"]["weights"].evidence


def test_decoding_is_told_from_prefill(found: dict[str, list[Finding]]) -> None:
    sound, decoding, both = (
        next(f for f in found[name] if f.cause == "kernels, precision")
        for name in ("tells prompts", "decodes otherwise", "computes otherwise")
    )
    assert "read in one go" in sound.evidence and "decoding alone" not in sound.evidence
    assert decoding.evidence.endswith("decoding alone is off") and "prefill agrees" in decoding.remedy
    assert "read in one go" in both.evidence and "decoding alone" not in both.evidence
    assert "prefill agrees" not in both.remedy


def test_the_table_says_what_to_do(found: dict[str, list[Finding]]) -> None:
    text = table(found["keeps answers"])
    assert "stale cache             FOUND" in text
    assert "--disable-radix-cache" in text
    assert found["keeps answers"][0].url in text
