"""Each method on the demo's model, three steps at TP 2 × PP 2, the last again after a kill.

One launch for all of them: ranks and imports stay, a method's job is opened after the other's. What engines
would sample is what the demo's run has recorded, of two turns each; where a method asks for more, it is made
of that. `make test` trains a few methods, whose hooks differ the most.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_rapo import opening
from megatron_rapo.config import Parallel, load_config
from megatron_rapo.data import load
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.following import follow
from megatron_rapo.environments.running import Tries
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.experience.course import Wanted
from megatron_rapo.loop import train
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.parallel.placement import arrange, process_groups
from megatron_rapo.samples.replay import Replay
from tests.distributed.jobs import run_job
from tests.end_to_end.command import MODEL, Command, metrics, without_times, write_config
from tests.end_to_end.conftest import LAYOUT

STEPS = 3
# They weigh tokens, mark them by all of them or by the moved policy, have a state, and ask for more.
FEW = ["bapo", "d3s", "igpo"]
# `sft` samples nothing: test_cold_start.py trains it, and goes on.
OTHERS = [name for name in METHODS if name not in (*FEW, "sft")]
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"policy_coefficient": 1.0, "share_prompts": True},
    "arpo": {"shared": "hard", "share_prompts": True},
    "igpo": {"share_prompts": True},
}
# Of episodes of one sequence that call few tools, they say the same.
SAME = {"dapo", "tapo", "eapo"}


@pytest.fixture(scope="module")
def few(finished: tuple[Path, Command], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(FEW, finished[0], tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def others(finished: tuple[Path, Command], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(OTHERS, finished[0], tmp_path_factory.mktemp("others"))


def trained(names: Sequence[str], recorded: Path, base: Path) -> dict[str, Any]:
    """Of each method its metrics and the digest of its model, in one go and resumed."""
    rollout = {"replay": str(recorded), "startup_timeout_s": None, "request_timeout_s": None}
    for name in names:
        for run in ("whole", "resumed"):
            folder = base / name / run
            folder.mkdir(parents=True)
            write_config(
                folder / "run.toml",
                folder / "run",
                run={"steps": STEPS},
                parallel=LAYOUT,
                rollout=rollout,
                algorithm={"method": name, **METHODS[name].example, **OPTIONS.get(name, {})},
                **({"teacher": {"path": str(MODEL)}} if name == "distill" else {}),
            )
    return run_job(measure, names, base, directory=base)


def measure(names: Sequence[str], base: Path, report: Path) -> None:
    """In each rank."""
    found = {}
    layout = Parallel(**LAYOUT)
    with process_groups(layout, seed=1) as everyone, pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "process_groups", lambda layout, seed: nullcontext(arrange(layout, seed)))
        patch.setattr(load, "_require_columns", lambda *given: None)
        patch.setattr(Replay, "begin", with_columns(Replay.begin))
        patch.setattr(Replay, "_group", made_up)
        for name in names:
            whole, resumed = base / name / "whole", base / name / "resumed"
            train(load_config([whole / "run.toml"]))
            if everyone.is_main:
                shutil.copytree(whole / "run", resumed / "run")
                shutil.rmtree(resumed / "run/model")
                shutil.rmtree(resumed / f"run/checkpoints/step_{STEPS:06d}")
            dist.barrier()
            train(load_config([resumed / "run.toml"]))
            gc.collect()
            kept = [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]
            assert not kept, "a run that has ended keeps its models and their process groups"
            if everyone.is_main:
                found[name] = [
                    {
                        "metrics": [without_times(line) for line in metrics(folder / "run")],
                        "model": digest(folder / "run/model"),
                    }
                    for folder in (whole, resumed)
                ]
        if everyone.is_main:
            report.write_text(json.dumps(found))


# What the recorded run has not.


def with_columns(begin: Any) -> Any:
    """Problems have what methods read of them."""
    texts = dict.fromkeys(("solution", "hint_knowledge", "hint_planning", "hint_solution"), "1+2+3")

    def begun(self: Replay, wanted: Wanted, **options: Any) -> Any:
        with_theirs = [
            replace(
                prompt,
                columns={
                    **prompt.columns,
                    **texts,
                    "teacher_responses": ["1+2", "2+1", "3"],
                    "base_success": float(prompt.index % 2),
                },
            )
            for prompt in wanted.prompts
        ]
        return begin(self, Wanted(with_theirs, wanted.tries), **options)

    return begun


def made_up(
    self: Replay,
    step: int,
    prompt: Prompt,
    rows: Sequence[dict[str, Any]],
    chosen: Sampling,
    tries: Tries | None,
) -> Group:
    """Episodes of recorded tokens, as many as are asked for; those that are recorded have their rewards."""
    tries = tries or Tries(0, (PLAIN,) * chosen.responses_per_prompt)
    made = [
        an_episode(prompt, rows, number, guide, tries.before)
        for number, guide in enumerate(tries.guides, tries.first)
    ]
    return Group(prompt.problem, tuple(made))


def an_episode(
    prompt: Prompt,
    rows: Sequence[dict[str, Any]],
    number: int,
    guide: Guide,
    before: tuple[ScoredEpisode, ...],
) -> ScoredEpisode:
    row = rows[number % len(rows)]
    [fields] = row["sequences"]
    tokens = [t for t, sampled in zip(fields["token_ids"], fields["sampled"], strict=True) if sampled]
    digest = zlib.crc32(f"{row['text']} {number}".encode())
    reward = row["reward"] if number < len(rows) else float(digest % 2)
    sequence = of_two_turns(fields)
    if guide.response is not None:
        context = prompt.token_ids if guide.after is None else follow(before, guide.after, str).context
        sequence = TokenSequence.of_text(context, tokens[: 1 + number % 4])
    facts = {"calls": float(digest % 4), "rubrics": (digest % 5) / 4}
    outcome = Outcome.CORRECT if reward == 1.0 else Outcome.WRONG
    return ScoredEpisode(
        Episode((sequence,), guide.begins + row["text"], truncated=row["truncated"]),
        Verification(outcome, row["extracted"], reward=reward, facts=facts),
    )


def of_two_turns(fields: dict[str, Any]) -> TokenSequence:
    """The recorded sequence, in which the token in the middle of what was sampled is given."""
    sampled = np.array(fields["sampled"], bool)
    log_probs, versions = np.array(fields["log_probs"], np.float32), np.array(fields["versions"], np.int32)
    places = np.flatnonzero(sampled)
    if len(places) > 2:
        middle = places[len(places) // 2]
        sampled[middle], log_probs[middle], versions[middle] = False, np.nan, -1
    return TokenSequence(np.array(fields["token_ids"], np.int32), sampled, log_probs, versions)


def digest(model: Path) -> str:
    """Of all weights."""
    files = sorted(model.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("name", FEW)
def test_three_steps_and_a_kill(few: dict[str, Any], name: str) -> None:
    check(few, name)


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)  # eighty-six runs
@pytest.mark.parametrize("name", OTHERS)
def test_three_steps_and_a_kill_of_the_others(others: dict[str, Any], name: str) -> None:
    check(others, name)


def check(trained: dict[str, Any], name: str) -> None:
    whole, resumed = trained[name]
    steps = [line for line in whole["metrics"] if line["step"]]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert max(line["optimizer/gradient_norm"] for line in steps) > 0
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["model"] == whole["model"], "it does not go on as it would have"
    twins = [other for other, (run, _) in trained.items() if run["model"] == whole["model"]]
    assert twins == [name] or set(twins) <= SAME, "another method trains the same policy"
