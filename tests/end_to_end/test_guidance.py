"""A method that asks by all kinds of guides that one turn can have: trained on, resumed and replayed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_rapo.samples.store import read_step, steps_of
from tests.end_to_end.command import MODEL, metrics, run, without_times, write_config

METHOD = """
from megatron_rapo import Guide
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import off_policy_marks
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.mixed_gradient import MixedGradient


class AllGuides(Method):
    Options = Clipping

    def ask(self, groups):
        def wanted(group):
            question = "1+" + group.problem.question
            return {
                0: [Guide()] * 2,
                2: [Guide(question=question), Guide(question=question, keeps_prompt=True)],
                4: [Guide(begins="1+"), Guide(response="1+2")],
                6: [Guide(after=(0, 0), response="1+2"), Guide(temperature=1.5)],
            }.get(len(group.episodes), [])

        return list(map(wanted, groups))

    def advantages(self, groups):
        return [[0.1 * number + 0.1 for number in range(len(group.episodes))] for group in groups]

    def mark_responses(self, groups):
        return {"off_policy": off_policy_marks(groups)}

    def terms(self):
        return [(1.0, MixedGradient(self.options.surrogate(), 0.1))]
"""
GUIDED = 6  # of eight episodes


def prompt_of(row: dict[str, Any]) -> list[int]:
    """The tokens before the first that is trained on."""
    [sequence] = row["sequences"]
    trained = [s or v == -2 for s, v in zip(sequence["sampled"], sequence["versions"], strict=True)]
    return sequence["token_ids"][: trained.index(True)]


def test_guides_are_asked_trained_on_resumed_and_replayed(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(METHOD)
    whole, resumed, replayed = (tmp_path / name for name in ("whole", "resumed", "replayed"))

    def config(directory: Path, **rollout: Any) -> Path:
        return write_config(
            tmp_path / "run.toml",
            directory,
            run={"steps": 2},
            parallel={"data_parallel": 2},
            rollout=rollout,
            algorithm={"method": "my_method:AllGuides"},
        )

    command = run(config(whole))
    assert command.process.returncode == 0, command.stderr
    lines = metrics(whole)
    assert lines[1]["rollout/guided"] == pytest.approx(GUIDED / 8)
    assert lines[2]["mismatch/log_prob_max"] < 1e-4, "log-probs of two prompts are compared"
    assert lines[2]["importance/mean"] == pytest.approx(1.0, abs=1e-4)

    decode = AutoTokenizer.from_pretrained(MODEL).decode
    rows = read_step(steps_of(whole)[2])
    assert len(rows) == 4 * 8
    for row in rows:
        question, number = row["question"], row["number"]
        asked = {3: "1+" + question, 4: question + "1+"}.get(number, question)
        assert decode(prompt_of(row)) == asked
        [sequence] = row["sequences"]
        assert any(sequence["sampled"]) == (number not in (5, 6))
        assert row["temperature"] == (1.5 if number == 7 else 1.0)
        if number in (5, 6):
            assert decode(sequence["token_ids"], skip_special_tokens=True) == question + "1+2"
    hinted = [row["text"] for row in rows if row["number"] in (2, 3)]
    assert len(set(hinted)) > len(hinted) // 2, "episodes of a group were drawn by one seed"

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints/step_000002")
    replay = {"replay": str(whole), "startup_timeout_s": None, "request_timeout_s": None}
    for command in (run(config(resumed)), run(config(replayed, **replay))):
        assert command.process.returncode == 0, command.stderr
    assert list(map(without_times, metrics(resumed))) == list(map(without_times, lines))
    for written in (whole / "model").iterdir():
        for again in (resumed, replayed):
            assert (again / "model" / written.name).read_bytes() == written.read_bytes(), written.name
