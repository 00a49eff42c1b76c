"""examples/tools runs, with an engine that calls the tool and then answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rapo.cli import main
from megatron_rapo.config import load_config
from tests.dialogues import tiny
from tests.stand_in import StandIn, stand_ins

ROOT = Path(__file__).parents[2]


def answer(server: StandIn, body: dict) -> list[dict]:
    """`3*4=` to a problem, and `1+2` once that is answered."""
    made = []
    for prompt in body["input_ids"]:
        text = tiny().decode(prompt)
        said = "1+2" if text.endswith("12\n") else "3*4="
        ids = [*tiny().encode(said), *([tiny().eos_token_id] if said == "1+2" else [])]
        logprobs = [[-0.5, token, None] for token in ids]
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": server.version,
            "output_token_logprobs": logprobs,
        }
        made.append({"text": "", "output_ids": ids, "meta_info": meta})
    return made


@pytest.mark.parametrize("tool", ["calculator", "my_tools:calculate"])
def test_the_policy_calls_the_tool_and_sees_what_it_returned(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with stand_ins(1) as ([server], urls):
        server.generate = lambda body: answer(server, body)
        settings = [
            f'rollout.engine={{kind = "sglang", urls = ["{urls[0]}"]}}',
            f'environment.tools=["{tool}"]',
        ]
        status = main(["try", "examples/tools/run.toml", "--responses", "1", "--set", *settings])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    newline, one, two = (tiny().encode(text)[0] for text in "\n12")
    assert f"given    {one} '1' · {two} '2' · {newline} " in shown.out
    assert "text     '1+2" in shown.out
    for fact in ("turns = 2", "calls = 1", "calls_result = 1", "ended_answered = 1"):
        assert f"environment/{fact}" in shown.out
    stops = [
        params["stop_token_ids"]
        for path, body in server.asked
        if path == "/generate"
        for params in body["sampling_params"]
    ]
    assert stops == [[tiny().eos_token_id, *tiny().encode("=")]] * 2, "a call ends the policy's turn"


def test_the_examples_own_tests_pass() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        "examples",
        "examples/tools",
        "examples/rebuilt",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_the_calculator_is_laid_over_the_sums() -> None:
    folder = ROOT / "examples/tools"
    alone = load_config([folder / "sums.toml"])
    both = load_config([folder / "sums.toml", folder / "calculator.toml"])
    assert (alone.environment.use, both.environment.use) == ("single_turn", "tool_use")
    assert both.run.directory != alone.run.directory
    assert both.rollout == alone.rollout and both.optimizer == alone.optimizer
