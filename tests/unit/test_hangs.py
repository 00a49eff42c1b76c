"""What counts as a hang, and what is told of who waits for whom."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from megatron_rapo.config.load import validate
from megatron_rapo.hangs import opening
from megatron_rapo.hangs.bounds import REMEMBERED, Bounds
from megatron_rapo.hangs.collectives import Entered, entered, from_json, holding_up, to_json, who_waits
from megatron_rapo.hangs.patience import patient_layout
from megatron_rapo.hangs.report import Hang, describe
from megatron_rapo.hangs.stacks import Where, read_stack


def bounds() -> Bounds:
    return Bounds(5.0, 60.0, unmeasured_s=1800.0, patience_s={"rollout": 600.0})


def test_a_bound_follows_from_the_longest_stay() -> None:
    some = bounds()
    assert some.of("update") == 1800.0
    for seconds in (3.0, 20.0, 4.0):
        some.note("update", seconds)
    assert some.of("update") == 100.0
    assert some.of("update/inner") == 1800.0  # a phase of its own


def test_a_slow_start_is_forgotten() -> None:
    some = bounds()
    for seconds in [300.0, *[20.0] * (REMEMBERED - 1)]:
        some.note("update", seconds)
    assert some.of("update") == 1500.0
    some.note("update", 20.0)
    assert some.of("update") == 100.0


def test_short_phases_and_waits_for_engines_have_a_least_bound() -> None:
    some = bounds()
    some.note("annotate", 0.1)
    some.note("rollout", 30.0)
    some.note("rollout/first", 0.1)
    assert some.of("annotate") == 60.0
    assert some.of("rollout") == some.of("rollout/first") == 660.0  # the pool gives engines up before
    some.note("rollout", 200.0)
    assert some.of("rollout") == 1000.0


def test_the_options_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "run": {"directory": str(tmp_path), "steps": 1},
        "model": {"path": "model"},
        "data": {"source": "countdown"},
        "parallel": {"timeout_s": 900.0},
        "rollout": {
            "prompts_per_step": 1,
            "responses_per_prompt": 2,
            "max_prompt_tokens": 8,
            "max_response_tokens": 8,
            "request_timeout_s": 50.0,
            "startup_timeout_s": 70.0,
        },
        "observe": {"hang_factor": 3.0, "hang_least_s": 7.0, "hang_action": "tell"},
    }
    config = validate(options, source="test")
    assert patient_layout(config) == config.parallel.model_copy(update={"timeout_s": 1020.0})  # a group's 120
    longer = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"startup_timeout_s": 300.0})}
    )
    assert patient_layout(longer).timeout_s == 1200.0
    given: list[Bounds] = []
    monkeypatch.setattr(opening, "Watch", lambda *arguments: given.append(arguments[3]) or arguments[4])
    alone: Any = SimpleNamespace(
        share_from_main=lambda mine: mine, rank=0, layout=SimpleNamespace(world_size=1)
    )
    told: Any = opening.open_watch(config, alone)
    [some] = given
    assert some.of("update") == 900.0
    for phase in ("update", "rollout", "publish", "evaluate", "start engines"):
        some.note(phase, 4.0)
    some.note("annotate", 0.1)
    assert some.of("update") == 12.0
    assert some.of("annotate") == 7.0
    assert some.of("rollout") == 57.0
    assert some.of("start engines") == 77.0
    assert some.of("publish") == some.of("evaluate") == 77.0  # an engine that was lost is started anew there
    [folder] = told.args[:1]
    folder.mkdir(parents=True)
    told("where all are")
    assert (folder / "report.txt").read_text() == "where all are\n"
    assert folder.parent == tmp_path / "hangs"


def test_what_is_told_alone_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opening._tell(tmp_path, 0, "where all are", ends=False)
    assert capsys.readouterr().err == "warning: where all are\nthe run goes on (observe.hang_action)\n"


def at(number: int, *, waits: bool, operation: str = "all_reduce", group: str = "7") -> Entered:
    ranks = {"7": (0, 1, 2, 3), "8": (1, 2)}[group]
    return Entered(group, "TENSOR" if group == "7" else "PIPELINE", ranks, number, operation, waits)


def test_ranks_that_wait_for_one_that_does_not_come() -> None:
    here = {0: [at(5, waits=True)], 1: [at(5, waits=True)], 2: [at(4, waits=False)], 3: [at(5, waits=True)]}
    assert who_waits(here) == [
        "ranks 0-1, 3 wait in all_reduce, number 5 of group TENSOR (ranks 0-3), for rank 2"
    ]
    assert holding_up(here) == [2]


def test_a_rank_that_is_in_another_collective() -> None:
    here = {r: [at(5, waits=True, operation="barrier" if r == 1 else "all_reduce")] for r in range(4)}
    [sentence] = who_waits(here)
    assert sentence == (
        "ranks 0, 2-3 wait in all_reduce and rank 1 waits in barrier, number 5 of group TENSOR (ranks 0-3): "
        "the ranks of a group must call the same"
    )


def test_of_a_chain_the_one_at_its_end_holds_up_the_others() -> None:
    """Rank 0 waits for 1 in one group, which waits for 2 in another; nothing is known of rank 3."""
    here = {
        0: [at(5, waits=True)],
        1: [at(4, waits=False), at(9, waits=True, group="8")],
        2: [at(5, waits=True), at(8, waits=False, group="8")],
    }
    assert who_waits(here) == [
        "ranks 0, 2 wait in all_reduce, number 5 of group TENSOR (ranks 0-3), for ranks 1, 3",
        "rank 1 waits in all_reduce, number 9 of group PIPELINE (ranks 1-2), for rank 2",
    ]
    assert holding_up(here) == [3]
    assert holding_up({**here, 2: [at(4, waits=False), at(8, waits=False, group="8")], 3: []}) == [2, 3]


def test_nothing_is_told_where_no_rank_waits() -> None:
    assert who_waits({0: [at(5, waits=False)], 1: []}) == []
    assert holding_up({0: [at(5, waits=False)], 1: []}) == []


def test_what_the_recorder_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entries: a group's own count of what has completed takes in sends and receives. Of one rank's
    group nothing is told, as it waits for nobody, and of each group the newest collective."""

    def entry(group: str, number: int, *, retired: bool, state: str = "scheduled") -> dict[str, Any]:
        named = {"process_group": (group, "SOME"), "is_p2p": False, "profiling_name": "gloo:all_gather"}
        return {**named, "collective_seq_id": number, "retired": retired, "state": state}

    trace = {
        "entries": [
            entry("0", 5, retired=False),
            entry("1", 5, retired=True),
            entry("1", 6, retired=False),
            {**entry("1", 9, retired=False), "is_p2p": True},
            entry("2", 7, retired=True),
            entry("3", 7, retired=False, state="completed"),
        ],
        "pg_status": {group: {"last_completed_collective": 99} for group in "0123"},
    }
    world = SimpleNamespace(
        pg_names={group: group for group in "0123"},
        pg_group_ranks={group: {0: 0} if group == "0" else {0: 0, 1: 1} for group in "0123"},
    )
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace", lambda *_: pickle.dumps(trace))
    monkeypatch.setattr(distributed_c10d, "_world", world)
    assert [(one.group, one.number, one.waits) for one in entered()] == [
        ("1", 6, True),
        ("2", 7, False),
        ("3", 7, False),
    ]


def test_what_ranks_say_of_themselves_can_be_read_back() -> None:
    some = [at(5, waits=True), at(9, waits=False, group="8")]
    assert from_json(json.loads(json.dumps(to_json(some)))) == some


def test_a_report_shows_alike_stacks_once(tmp_path: Path) -> None:
    places = [Where(r, "elsewhere", 100 + r, ("File x, line 1 in f",) if r < 3 else ()) for r in range(4)]
    hang = Hang(rank=1, step=7, phase="update", seconds=71.0, bound=60.0, why="because")
    text = describe(hang, {r: [] for r in range(3)}, places, tmp_path)
    assert "rank 1 has been in update of step 7 for 71 s, over the bound of 60 s (because)" in text
    assert text.count("File x, line 1 in f") == 1
    assert "the stack of ranks 0-2 (elsewhere pid 100, elsewhere pid 101, elsewhere pid 102)" in text
    assert "rank 3 does not answer" in text
    assert "none was written" in text


WRITER = """
import ctypes, sys, threading, time
from pathlib import Path
from typing import Any
from megatron_rapo.hangs.stacks import stacks_to

def in_native_code():
    ctypes.PyDLL(None).sem_wait(bytes(64))  # with the interpreter's lock held; no signal ends it

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with stacks_to(Path(sys.argv[1]), 3):
    print("ready", flush=True)
    in_native_code()
"""


def test_the_stack_of_a_process_that_holds_the_interpreter(tmp_path: Path) -> None:
    """And of its main thread, whatever others do."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        before = read_stack(tmp_path, 3)
        assert before is not None
        assert (before.pid, before.stack) == (writer.pid, ())
        after = before
        for _ in range(200):  # it may not have come there yet; of several dumps the newest counts
            os.kill(writer.pid, signal.SIGQUIT)
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.1)
            after = read_stack(tmp_path, 3) or before
            if len(after.stack) == 2:
                break
        assert [frame.rpartition(" in ")[2] for frame in after.stack] == ["in_native_code", "<module>"]
        os.kill(writer.pid, signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        assert after.state == "stopped"
    finally:
        writer.kill()
        writer.wait()
    assert after.state == "gone"
    assert read_stack(tmp_path, 4) is None
