"""Answers of code outside: a step that is done again hears what was heard first, wherever it was killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from renderers.base import create_renderer
from renderers.configs import config_from_name

from megatron_rapo import Episode, Problem
from megatron_rapo.config import RunConfig
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.recorded import Recorded
from megatron_rapo.environments.rendering import Rendering
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.tool_use import ToolUse
from megatron_rapo.episode.environment import Turn
from megatron_rapo.errors import RapoError
from megatron_rapo.record import answers
from megatron_rapo.record.answers import AnswerLog, drop_until
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.tools.described import load_tools
from megatron_rapo.tools.plan import Limits
from megatron_rapo.tools.toolbox import Toolbox
from tests.dialogues import SamplingIds, byte_level
from tests.stand_in import VOCAB, stand_ins
from tests.unit.test_environments import PROMPTS, SAMPLING, TOKENIZER, config, judge

# Three turns, and between them what a counter says, which no two calls have alike.
ASKS = """
import itertools
from pathlib import Path
from megatron_rapo import Episode, Score, Transcript

COUNTER = itertools.count(int(Path(__file__).with_name("from").read_text()))

class Asks:
    def __init__(self, again=False):
        self.again = again

    async def run(self, problem, generate, seed):
        transcript = Transcript(problem.token_ids)
        for number in range(3):
            transcript.add_turn(await generate(transcript.token_ids, turn=number, max_tokens=2))
            if number < 2:
                said = await generate.recorded("count", self.count, again=self.again)
                transcript.add_given([said % 50, said // 50 % 50])
        return Episode((transcript.sequence(),), "", Score(1.0))

    async def count(self):
        return next(COUNTER)
"""


class Run:
    """Starts of one run, each as a process of its own would be: nothing in memory is kept."""

    def __init__(self, folder: Path, pool: EnginePool) -> None:
        self.folder, self.pool = folder, pool
        self.starts = 0

    def config(self, **environment: Any) -> RunConfig:
        use = f"asks_{self.folder.name}".replace("-", "_")
        path = self.folder / f"{use}.py"
        if not path.exists():
            path.write_text(ASKS)
        (self.folder / "run").mkdir(exist_ok=True)
        return config(self.folder, use=f"{use}:Asks", **environment)

    def tokens(self, step: int = 1, head: int = 0, **environment: Any) -> list[list[int]]:
        """Of each episode; the counter of each start begins elsewhere."""
        self.starts += 1
        (self.folder / "from").write_text(str(100 * self.starts))
        run = self.config(**environment)
        sys.modules.pop(run.environment.use.partition(":")[0], None)
        log = AnswerLog(run, head)
        episodes = EpisodeRunner(open_environment(run), run.environment, TOKENIZER, 1.0, VOCAB)
        sampling = replace(SAMPLING, max_response_tokens=20)
        try:
            with (
                Runner(episodes, self.pool) as runner,
                runner.begin(PROMPTS, sampling, judge, answers=log.of_step(step)) as rollout,
            ):
                groups = rollout.groups()
        finally:
            log.close()
        return [
            one.episode.sequences[0].token_ids.tolist() for group in groups if group for one in group.episodes
        ]

    @property
    def file(self) -> Path:
        return self.folder / "run/answers/step_000001-000.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with (
        stand_ins(1) as (_, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=3, request_timeout=60) as pool,
    ):
        yield Run(tmp_path, pool)


def test_a_step_that_is_done_again_has_the_same_tokens(run: Run) -> None:
    first = run.tokens()
    assert len(first) == 6 and len({tuple(one) for one in first}) == 6
    assert run.tokens() == first
    assert run.tokens(head=1) == first, "also where another head has the prompts now"
    assert run.tokens(step=2) != first, "another step's are its own"


def test_wherever_it_was_killed_what_was_heard_is_heard_again(run: Run) -> None:
    """The file is cut at each of many bytes: whole lines count, and what is appended is read again."""
    first = run.tokens()
    whole = run.file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [0, 5, *(end + shift for end in ends[::4] for shift in (-1, 0, 7)), len(whole)]:
        run.file.write_bytes(whole[:cut])
        kept = dict(
            json.loads(line) for line in whole[: max([0, *(e for e in ends if e <= cut)])].splitlines()[1:]
        )
        found = run.tokens()
        lines = run.file.read_bytes().splitlines()
        assert len(lines) == 1 + 12
        assert kept.items() <= dict(json.loads(line) for line in lines[1:]).items()
        said = set(kept.values())
        for one, before in zip(found, first, strict=True):
            if {before[4] + 50 * before[5], before[8] + 50 * before[9]} <= said:
                assert one == before
        assert run.tokens() == found


def test_what_later_answers_hang_on_is_called_again_but_not_heard(run: Run) -> None:
    def calls() -> int:
        [module] = [sys.modules[name] for name in sys.modules if name.startswith(f"asks_{run.folder.name}")]
        return next(module.COUNTER) - 100 * run.starts

    first = run.tokens(options={"again": True})
    assert calls() == 12
    assert run.tokens(options={"again": True}) == first
    assert calls() == 12, "each call was made"
    first = run.tokens(step=2)
    assert run.tokens(step=2) == first
    assert calls() == 0, "none was"


@pytest.mark.parametrize("change", ["options", "code"])
def test_answers_of_another_environment_are_not_heard(run: Run, change: str) -> None:
    first = run.tokens()
    if change == "options":
        assert run.tokens(max_turns=5) != first
        return
    path = next(run.folder.glob("asks_*.py"))
    path.write_text(f"{path.read_text()}\nMENDED = True\n")
    assert run.tokens() != first


class Kept(dict[str, Any]):
    """In place of a step's file."""

    def find(self, key: str) -> tuple[bool, Any]:
        return key in self, self.get(key)

    keep = dict.__setitem__


def test_an_answer_belongs_to_its_episode_question_and_conversation() -> None:
    """As where an engine samples other tokens when a step is done again."""
    kept, counter = Kept(), itertools.count()

    async def ask() -> int:
        return next(counter)

    async def heard(episode: str, turns: list[list[int]], *questions: str) -> list[int]:
        recorded = Recorded(kept, episode)
        for turn in turns:
            ids = np.array(turn, np.int32)
            recorded.hear([1, 2], Turn(ids, ids * -1.0, ids * 0, "stop", ""))
        return [await recorded(question, ask) for question in questions]

    def found(*arguments: Any) -> list[int]:
        return asyncio.run(heard(*arguments))

    first = found("a", [[3], [4]], "q", "q", "r")
    assert first == [0, 1, 2], "the same question twice has two answers"
    assert found("a", [[3], [4]], "q", "q", "r") == first
    assert found("a", [[3], [4]], "r") == [2]
    for other in (("b", [[3], [4]], "q"), ("a", [[9], [4]], "q"), ("a", [[3]], "q"), ("a", [[3], [4]], "s")):
        assert found(*other)[0] > 2


class Hearing(SamplingIds):
    """With answers that are kept, as a step's are."""

    def __init__(self, kept: Kept, turns: Sequence[Sequence[int]]) -> None:
        super().__init__(byte_level(), turns, (), 4000)
        self._recorded = Recorded(kept, "episode")

    async def __call__(self, token_ids: Sequence[int], **options: Any) -> Turn:
        turn = await super().__call__(token_ids, **options)
        self._recorded.hear(list(token_ids), turn)
        return turn

    async def recorded(self, question: object, ask: Any, *, again: bool = False) -> Any:
        return await self._recorded(question, ask, again=again)


@pytest.mark.parametrize("lost", [False, True])
def test_an_interpreter_is_as_it_was_where_a_step_is_done_again(lost: bool) -> None:
    """The first answer was kept before a kill, and the second was not."""
    tools = load_tools(["python"], [])
    renderer = create_renderer(byte_level(), config_from_name("qwen3"))
    form = Rendering(renderer, byte_level(), [tool.schema for tool in tools], "qwen3")
    first, second = "import random\nx = random.random()\nx", "x < 1"
    calls = [json.dumps({"name": "python", "arguments": {"code": code}}) for code in (first, second)]
    turns = [byte_level().encode(f"<tool_call>\n{call}\n</tool_call><|im_end|>") for call in calls]

    def heard(kept: Kept) -> list[str]:
        async def play() -> Episode:
            box = Toolbox(tools, Limits(call_s=60), code=[], workers=1)
            async with aclosing(box):
                environment = ToolUse(box, form, ToolUse.Options(), max_turns=3)
                generate = Hearing(kept, [*turns, byte_level().encode("yes<|im_end|>")])
                return await environment.run(Problem("0", "?", token_ids=(1,)), generate, 0)

        asyncio.run(play())
        return [answer["text"] for answer in kept.values()]

    kept = Kept()
    number, below = heard(kept)
    assert below == "True\n"
    del kept[list(kept)[1]]
    if lost:  # it took too long then, and does not now
        [key] = kept
        kept[key] = {"outcome": "timeout", "text": "error: late; its variables are lost", "lost": True}
        assert "NameError" in heard(kept)[1]
        return
    assert heard(kept) == [number, below]


def test_they_go_with_the_checkpoint_that_has_their_step(run: Run) -> None:
    for step in (1, 2, 3):
        run.tokens(step=step)
    drop_until(run.folder / "run", 2)
    assert [path.name for path in (run.folder / "run/answers").iterdir()] == ["step_000003-000.jsonl"]


def test_no_more_is_kept_than_the_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "MOST_BYTES", 200)
    run.tokens()
    assert run.file.stat().st_size <= 200
    assert capsys.readouterr().err.count("further answers of step 1 are not kept") == 1


def test_a_full_disk_ends_the_run_and_names_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers.os, "write", full)
    with pytest.raises(RapoError, match=r"step_000001-000\.jsonl cannot be written to: No space left"):
        run.tokens()


def test_an_answer_that_json_cannot_write_ends_the_run(run: Run) -> None:
    run.config()
    path = next(run.folder.glob("asks_*.py"))
    path.write_text(ASKS.replace("return next(COUNTER)", "return {1, 2}"))
    with pytest.raises(RapoError, match=r"generate.recorded was given \{1, 2\}, which JSON cannot write"):
        run.tokens()


KILLED = """
import sys
from pathlib import Path
from megatron_rapo.record.answers import StepAnswers

kept = StepAnswers(Path(sys.argv[1]), 1, 0, "made")
for number in range(10**9):
    kept.keep(f"key {number}", "x" * 1000)
    print(number, flush=True)
"""


def test_what_was_kept_outlives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "answers")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    again = answers.StepAnswers(tmp_path / "answers", 1, 0, "made")
    assert all(again.find(f"key {number}") == (True, "x" * 1000) for number in told)
