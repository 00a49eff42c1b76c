"""The pool of verifier processes: order, limits, crashes, and that nothing outlives its trainer.

The checks stand in for real verifiers: they do what the response tells them to.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from pydantic import ValidationError

from megatron_rapo.config.reward import Reward
from megatron_rapo.config.verifiers import VERIFIERS, built_in
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.episode.outcome import Outcome, reward_of
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.reward import process as process_module
from megatron_rapo.reward.verifier import Verifier
from tests.judging import outcomes, verified

CORRECT, WRONG, TIMEOUT, CRASH = Outcome

OBEDIENT = """
import os, signal, sys, time

def check(response, answer):
    word, _, argument = response.partition(" ")
    if word == "sleep":
        time.sleep(float(argument))
        return True
    if word == "compute":  # one multiplication in C: no Python signal handler would get a turn
        return 9 ** 9 ** 9 ** 9 == 0
    if word == "unkillable":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    if word == "raise":
        raise ValueError("x" * 100_000)
    if word == "exit":
        sys.exit(0)
    if word == "alarm":  # as a worker whose trainer was too late
        os.kill(os.getpid(), signal.SIGALRM)
    if word == "returns":
        return eval(argument)
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "killed":  # as by the kernel, or by a person; "killed FILE": the first time
        if not argument or not os.path.exists(argument):
            open(argument or os.devnull, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return True
    if word == "memory":
        return bytes(6 * 2**30) == b""  # more than a worker may have; untouched, it costs nothing
    if word == "hash":
        return str(hash("text")) == argument
    return response == answer
"""


@pytest.fixture
def obedient(tmp_path, monkeypatch):
    """Makes `built_in("obedient")` possible; returns the folder of its module."""
    (tmp_path / "obedient.py").write_text(OBEDIENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERIFIERS, "obedient", "obedient:check")
    return tmp_path


def pool(workers=2, time_limit_s=20.0):
    return Verifier(built_in("obedient"), workers=workers, time_limit_s=time_limit_s)


def workers_of(pid=None):
    children = psutil.Process(pid).children()
    return [child for child in children if "megatron_rapo.reward.worker" in child.cmdline()]


def ended(worker):
    """Also where nobody reaps orphans, as in a container without an init process."""
    return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def wait_until(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "not within the limit"
        time.sleep(0.05)


def test_outcomes_come_in_the_items_order(obedient):
    items = [(f"sleep {0.3 if i == 0 else 0}" if i % 3 == 0 else str(i % 3), "1") for i in range(60)]
    with pool() as verifier:
        expected = [CORRECT if i % 3 in (0, 1) else WRONG for i in range(60)]
        assert outcomes(verifier, items) == expected
        assert outcomes(verifier, []) == []
        assert outcomes(verifier, items[1:3]) == expected[1:3]


def test_texts_arrive_unchanged(obedient):
    texts = ["", "\0", "\udc80", "π\u2028\r\n", "x" * 1_000_000]
    with pool(workers=1) as verifier:
        assert outcomes(verifier, [(text, text) for text in texts]) == [CORRECT] * len(texts)


@pytest.mark.parametrize("hang", ["sleep 600", "compute", "unkillable"])
def test_a_hang_costs_its_own_limit_and_nothing_else(obedient, hang):
    with pool(workers=1, time_limit_s=1.0) as verifier:
        (before,) = workers_of()
        started = time.monotonic()
        assert outcomes(verifier, [("1", "1"), (hang, "1"), ("1", "1"), ("2", "1")]) == [
            CORRECT,
            TIMEOUT,
            CORRECT,
            WRONG,
        ]
        assert 1.0 <= time.monotonic() - started < 10.0
        assert [worker.pid for worker in workers_of()] != [before.pid]
        assert not before.is_running()


def test_hangs_run_side_by_side(obedient):
    with pool(workers=4, time_limit_s=2.0) as verifier:
        started = time.monotonic()
        assert outcomes(verifier, [("sleep 600", "1")] * 4) == [TIMEOUT] * 4
        assert time.monotonic() - started < 7.5  # one after the other takes eight


@pytest.mark.parametrize("crash", ["raise", "exit", "segfault", "memory"])
def test_a_crash_is_counted_apart_and_costs_its_own_item(obedient, crash):
    with pool(workers=1) as verifier:
        items = [("1", "1"), (crash, "1"), (crash, "1"), ("1", "1"), ("2", "1")]
        assert outcomes(verifier, items) == [CORRECT, CRASH, CRASH, CORRECT, WRONG]


def test_what_a_process_was_killed_over_is_judged_once_more(obedient):
    """So that a kill from outside changes no reward; what is killed each time is a crash."""
    with pool(workers=1) as verifier:
        items = [("1", "1"), (f"killed {obedient / 'once'}", "1"), ("killed", "1"), ("2", "1")]
        assert outcomes(verifier, items) == [CORRECT, CORRECT, CRASH, WRONG]


def test_a_verification_has_its_time_limit_and_no_more(obedient):
    with pool(workers=1, time_limit_s=7.0) as verifier:
        (process,) = verifier._processes
        before = time.monotonic()
        process.submit("sleep 600", Problem("", "", "1"))
        assert before + 7.0 <= process.deadline <= time.monotonic() + 7.0


def test_timeouts_and_crashes_tell_why(obedient):
    items = [("1", "1"), ("sleep 600", "1"), ("alarm", "1"), ("raise", "1"), ("segfault", "1")]
    with pool(workers=1, time_limit_s=1.0) as verifier:
        found = verified(verifier, items)
    assert [one.outcome for one in found] == [CORRECT, TIMEOUT, TIMEOUT, CRASH, CRASH]
    assert found[0].why is None
    assert found[1].why == found[2].why == "not done within 1 s"
    assert found[3].why == f"ValueError: {'x' * 488}"
    assert found[4].why == "its process died with status -11"


@pytest.mark.parametrize("returned", ["0.5", "1", "None", "'wrong'"])
def test_a_verifier_that_returns_no_bool_is_refused(obedient, returned):
    expected = rf"obedient:check returned {returned} \(\w+\), not True or False; let it return bool\(…\)"
    with pool(workers=1) as verifier, pytest.raises(RapoError, match=expected):
        outcomes(verifier, [("1", "1"), (f"returns {returned}", "1")])
    assert workers_of() == []


def test_every_verifier_of_the_table_can_be_chosen():
    for name in VERIFIERS:
        assert Reward(verifier=name).verifier == name
    with pytest.raises(ValidationError, match="'math', 'countdown' or 'integer'"):
        Reward(verifier="maths")


def test_a_worker_that_died_while_idle_costs_no_item(obedient):
    with pool(workers=2) as verifier:
        for worker in workers_of():
            worker.kill()
            worker.wait(10)
        assert outcomes(verifier, [("1", "1")] * 4) == [CORRECT] * 4


def test_starting_a_worker_is_not_charged_to_an_item(obedient):
    (obedient / "obedient.py").write_text("import time\ntime.sleep(1.0)\n" + OBEDIENT)
    with pool(workers=1, time_limit_s=0.5) as verifier:
        items = [("1", "1"), ("segfault", "1"), ("1", "1"), ("sleep 600", "1"), ("1", "1")]
        assert outcomes(verifier, items) == [CORRECT, CRASH, CORRECT, TIMEOUT, CORRECT]


def test_modules_in_the_working_directory_do_not_stand_in_for_real_ones(obedient, monkeypatch):
    elsewhere = obedient / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "resource.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(elsewhere)
    with pool(workers=1) as verifier:
        assert outcomes(verifier, [("1", "1")]) == [CORRECT]


def test_every_worker_hashes_alike_so_that_sets_have_one_order(obedient):
    program = [sys.executable, "-c", "print(hash('text'))"]
    expected = subprocess.check_output(program, env={**os.environ, "PYTHONHASHSEED": "0"}, text=True).strip()
    with pool() as verifier:
        assert outcomes(verifier, [(f"hash {expected}", "1"), ("segfault", "1")] * 4) == [CORRECT, CRASH] * 4


def test_closing_ends_every_worker_and_later_use_is_refused(obedient):
    with pool() as verifier:
        workers = workers_of()
        assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        outcomes(verifier, [("1", "1")])


def test_an_error_while_scoring_leaves_no_worker(obedient):
    with pool() as verifier:
        with pytest.raises(TypeError):
            verifier.verify([("sleep 600", Problem("", "")), None])
        assert workers_of() == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "(?s)obedient:check.*line 1.*ModuleNotFoundError.*no_such_module"),
        ("", "reward.verifier = .*/obedient.py has no check; it has nothing"),
        ("import os; os._exit(3)", "cannot be imported: its process ended with status 3"),
    ],
)
def test_a_verifier_that_cannot_start_is_an_error_not_a_crash_of_each_item(obedient, source, message):
    (obedient / "obedient.py").write_text(source)
    with pytest.raises(RapoError, match=message):
        pool()
    assert workers_of() == []


def test_a_start_that_hangs_is_an_error(obedient, monkeypatch):
    monkeypatch.setattr(process_module, "STARTUP_LIMIT_S", 1.0)
    (obedient / "obedient.py").write_text("import time; time.sleep(600)")
    with pytest.raises(RapoError, match="did not start within 1 s"):
        pool()
    assert workers_of() == []


def test_a_replacement_that_cannot_start_is_an_error(obedient):
    with pool(workers=1) as verifier:
        (obedient / "obedient.py").write_text("raise ImportError('gone')")
        with pytest.raises(RapoError, match=r"(?s)fails when it is imported.*ImportError: gone"):
            outcomes(verifier, [("segfault", "1"), ("1", "1")])
    assert workers_of() == []


def test_an_unknown_verifier_is_refused_by_name():
    with pytest.raises(RapoError, match='"maths" does not exist; choose one of math, countdown, integer'):
        built_in("maths")


@pytest.mark.parametrize("name", ["countdown", "integer"])
def test_the_generated_tasks_are_checked(name):
    right, wrong, answer = {
        "countdown": ("1+2*3", "1+2+3", '{"numbers":[1,2,3],"target":7}'),
        "integer": (r"so \boxed{42}", r"42, so \boxed{24}", "42"),
    }[name]
    with Verifier(built_in(name), workers=1, time_limit_s=20.0) as verifier:
        assert outcomes(verifier, [(right, answer), (wrong, answer)]) == [CORRECT, WRONG]


def test_only_correct_earns_and_what_did_not_finish_has_no_reward():
    assert [reward_of(outcome) for outcome in Outcome] == [1.0, 0.0, None, None]


# Trainers in processes of their own. No `if __name__ == "__main__"`: a worker must not run them again.

TRAINER = """
import sys, threading
from megatron_rapo.config.verifiers import VERIFIERS, built_in
from megatron_rapo.episode.problem import Problem
from megatron_rapo.reward.verifier import Verifier
threading.Thread(target=threading.Event().wait, daemon=True).start()
VERIFIERS["obedient"] = "obedient:check"
verifier = Verifier(built_in("obedient"), workers=2, time_limit_s=3.0)
print("scoring", flush=True)
items = [(item, Problem("", "", "1")) for item in sys.argv[1:]]
print(*[one.outcome for one in verifier.verify(items)], flush=True)
sys.stdin.read()
"""

NESTED = """
import multiprocessing, sys

def rank():
    from megatron_rapo.config.verifiers import VERIFIERS, built_in
    from megatron_rapo.episode.problem import Problem
    from megatron_rapo.reward.verifier import Verifier
    VERIFIERS["obedient"] = "obedient:check"
    with Verifier(built_in("obedient"), workers=2, time_limit_s=3.0) as verifier:
        items = [(item, Problem("", "", "1")) for item in ("1", "exit", "2")]
        print(*[one.outcome for one in verifier.verify(items)], flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=rank, daemon=True)
    process.start()
    process.join(60)
    sys.exit(process.exitcode)
"""


def start(folder, source, *arguments):
    (folder / "trainer.py").write_text(source)
    return subprocess.Popen(
        [sys.executable, "trainer.py", *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_works_inside_a_daemonic_spawned_process(obedient):
    with start(obedient, NESTED) as trainer:
        try:
            assert trainer.communicate(timeout=60)[0] == "correct crash wrong\n"
            assert trainer.returncode == 0
        finally:
            trainer.kill()


@pytest.mark.parametrize(("item", "state"), [("compute", "verifying"), ("1", "idle")])
def test_workers_die_with_a_killed_trainer(obedient, item, state):
    with start(obedient, TRAINER, item) as trainer:
        try:
            assert trainer.stdout.readline() == "scoring\n"
            if state == "idle":
                assert trainer.stdout.readline() == "correct\n"
            workers = workers_of(trainer.pid)
            assert len(workers) == 2
        finally:
            trainer.send_signal(signal.SIGKILL)
        wait_until(lambda: all(ended(worker) for worker in workers))
        assert trainer.stderr.read() == ""


def test_ctrl_c_does_not_make_workers_print_tracebacks(obedient, capfd):
    with pool() as verifier:
        for worker in workers_of():
            os.kill(worker.pid, signal.SIGINT)
        assert outcomes(verifier, [("1", "1")]) == [CORRECT]
    assert capfd.readouterr() == ("", "")


def test_the_answer_that_was_read_is_told_with_the_outcome():
    items = [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        ("I give up", "7"),
        (r"\boxed{" + "1+" * 300 + "1}", "7"),
    ]
    with Verifier(built_in("math"), workers=1, time_limit_s=20.0) as verifier:
        found = verified(verifier, items)
    assert [one.outcome for one in found] == [CORRECT, WRONG, WRONG]
    assert [one.extracted for one in found[:2]] == [r"\frac{1}{2}", None]
    assert len(found[2].extracted) == 200


@pytest.mark.parametrize(
    ("module", "response", "expected"),
    [
        (countdown, "try 3+4\n3*4-5=7", "3*4-5=7"),
        (countdown, "8/(3-3)", "8/(3-3)"),
        (countdown, "I do not know", None),
        (countdown, "1+" * 200 + "1", None),
        (arithmetic, r"\boxed{12} no, \boxed{13}", "13"),
        (arithmetic, r"\boxed{seven}", "seven"),
        (arithmetic, r"\boxed{12", None),
        (arithmetic, "12", None),
    ],
)
def test_the_final_answer_of_generated_tasks(module, response, expected):
    assert module.final_answer(response) == expected
