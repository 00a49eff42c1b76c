"""A step whose gradient is not finite is rolled back, and the run goes on with other prompts."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rapo.config import load_config
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import order_of
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.samples.store import read_step, steps_of
from tests.end_to_end.command import MODEL, checkpoints, metrics, run, write_config

METHOD = '''
from pathlib import Path

from megatron_rapo.methods.grpo import GRPO

FAULTY = Path(__file__).with_name("faulty")


class Faulty(GRPO):
    """GRPO, whose gradient overflows wherever a certain problem takes part."""

    def advantages(self, groups):
        found = super().advantages(groups)
        if any(group.problem.question == FAULTY.read_text() for group in groups):
            return [[1e30] * len(advantages) for advantages in found]
        return found
'''


def test_a_step_that_is_not_finite_is_rolled_back(tmp_path: Path) -> None:
    """Two ranks, each with half of the model. It goes on with the prompts that come next."""
    (tmp_path / "faulty.py").write_text(METHOD)
    (tmp_path / "faulty").touch()
    config = write_config(
        tmp_path / "run.toml",
        tmp_path / "run",
        algorithm={"method": "faulty:Faulty"},
        parallel={"pipeline_parallel": 2},
        checkpoint={"every": 2, "in_background": True},
        guards={"not_finite": "roll_back", "rollbacks": 1},
    )
    loaded = load_config([config])
    order = order_of(load_training_prompts(loaded, load_tokenizer(MODEL)), loaded.run.seed)
    drawn = [prompt.problem for prompt in order.draw(20)]
    (tmp_path / "faulty").write_text(drawn[10].question)

    command = run(config)
    assert command.process.returncode == 0, command.stderr
    assert "the step is rolled back (guards.not_finite)" in command.stderr
    assert "guards: not_finite: rolled back, 1 time, first in step 3: " in command.stdout
    assert command.stdout.count("guards: ") == 1 and " is out " not in command.stdout
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line["guards/rollbacks"]) for line in lines[1:]] == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
    ]
    assert [line["optimizer/changed_tensors"] for line in lines[1:]] == [1.0] * 4
    assert checkpoints(tmp_path / "run") == ["step_000002", "step_000004"]
    state = json.loads((tmp_path / "run/checkpoints/step_000004/run.json").read_text())["state"]
    assert state["prompts_drawn"] == 20 and state["guards"]["rollbacks"] == 1
    samples = steps_of(tmp_path / "run")
    for step, first in ((1, 0), (2, 4), (3, 12), (4, 16)):
        rows = read_step(tuple(samples[step]))
        assert {row["question"] for row in rows} == {problem.question for problem in drawn[first : first + 4]}
