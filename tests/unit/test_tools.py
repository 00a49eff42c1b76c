"""Tools: what the policy is told of them, what calls come to, and what their processes cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from renderers.base import create_renderer
from renderers.configs import config_from_name

from megatron_rapo import Episode, Problem
from megatron_rapo.environments.rendering import Rendering
from megatron_rapo.environments.tool_use import ToolUse
from megatron_rapo.errors import RapoError
from megatron_rapo.processes.confine import Confinement, lacking
from megatron_rapo.tools.calculator import calculator
from megatron_rapo.tools.described import load_tools
from megatron_rapo.tools.outcome import CallOutcome
from megatron_rapo.tools.plan import Limits
from megatron_rapo.tools.toolbox import Answer, Toolbox
from tests.dialogues import SamplingIds, byte_level

LIMITS = Limits(call_s=20.0, memory_gib=0.5, output_characters=200, file_mib=1)

needs_confinement = pytest.mark.skipif(
    bool(lacking(Confinement(Path()))), reason=f"this kernel lacks {lacking(Confinement(Path()))}"
)
pytestmark = needs_confinement

FUNCTIONS = '''
import os, socket, sys, time

def DESCRIBED(function):
    function.__doc__ = """It does what its name says.

    Args:
        x: a number
    """
    return function

def add_one(x: int, y: float = 0.5, names: list[str] | None = None) -> dict:
    """Adds one.

    Args:
        x: a number
        y: another
        names: of people
    """
    return {"sum": x + 1 + y, "names": names}

@DESCRIBED
async def waits(x: int) -> str:
    import asyncio
    await asyncio.sleep(0)
    return "waited"

@DESCRIBED
def sleeps(x: int) -> str:
    time.sleep(x)
    return "slept"

@DESCRIBED
def forks(x: int) -> str:
    while True:
        os.fork()

@DESCRIBED
def allocates(x: int) -> str:
    kept = []
    while True:
        kept.append(bytearray(2**24))

@DESCRIBED
def prints(x: int) -> str:
    for _ in range(1000):
        print("x" * 10**6)
    return "printed"

@DESCRIBED
def returns_much(x: int) -> str:
    return "y" * 10**7

@DESCRIBED
def kills_its_parent(x: int) -> str:
    os.kill(os.getppid(), 9)
    return "killed"

@DESCRIBED
def opens_a_socket(x: int) -> str:
    socket.socket().close()
    return "opened"

@DESCRIBED
def writes_outside(x: int) -> str:
    open(OUTSIDE, "w").close()
    return "written"

@DESCRIBED
def returns_none(x: int) -> str:
    pass

@DESCRIBED
def returns_bytes(x: int) -> str:
    return b"abc"

@DESCRIBED
def raises(x: int) -> str:
    raise LookupError("nothing there")

@DESCRIBED
def exits(x: int) -> str:
    sys.exit(3)

@DESCRIBED
def dies(x: int) -> str:
    os._exit(3)

@DESCRIBED
def starts_a_daemon(x: int) -> str:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()
    return "started"

@DESCRIBED
def counts(x: int) -> str:
    counts.so_far = getattr(counts, "so_far", 0) + x
    return str(counts.so_far)

counts.keeps_state = True
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    outside = folder / "written-outside"
    (folder / "tools_of_test.py").write_text(f"OUTSIDE = {str(outside)!r}\n{FUNCTIONS}")
    return folder


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    yield
    prefix, deadline = f"megatron-rapo-tool-{os.getpid()}-", time.monotonic() + 30
    while left := [*_processes_in(prefix), *Path(tempfile.gettempdir()).glob(f"{prefix}*")]:
        assert time.monotonic() < deadline, f"{left} stay"
        time.sleep(0.05)


def _processes_in(prefix: str) -> list[psutil.Process]:
    """Those of tools, also such as have lost their parent."""
    return [one for one in psutil.process_iter() if prefix in _environment(one).get("TMPDIR", "")]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def toolbox(code: Path, *names: str, limits: Limits = LIMITS, workers: int = 2) -> Toolbox:
    addresses = [name if name in ("python", "calculator") else f"tools_of_test:{name}" for name in names]
    return Toolbox(load_tools(addresses, [code]), limits, code=[code], workers=workers)


def answers(box: Toolbox, *calls: tuple[str, object]) -> list[Answer]:
    """Of calls of one episode, one after another."""

    async def all_calls() -> list[Answer]:
        async with aclosing(box), box.episode() as tools:
            return [await tools.call(name, arguments) for name, arguments in calls]

    return asyncio.run(all_calls())


def test_the_policy_is_told_a_tool_by_its_hints_and_docstring(code: Path) -> None:
    [tool] = load_tools(["tools_of_test:add_one"], [code])
    assert tool.schema["function"]["name"] == "add_one"
    assert tool.schema["function"]["description"] == "Adds one."
    parameters = tool.schema["function"]["parameters"]
    assert parameters["required"] == ["x"]
    assert parameters["properties"]["x"] == {"type": "integer", "description": "a number"}


def test_arguments_are_held_to_the_hints(code: Path) -> None:
    box = toolbox(code, "add_one")
    right, as_text, missing, unknown, wrong, no_object, no_tool = answers(
        box,
        ("add_one", {"x": 1, "names": ["Ada"]}),
        ("add_one", {"x": "2"}),
        ("add_one", {}),
        ("add_one", {"x": 1, "z": 2}),
        ("add_one", {"x": "one"}),
        ("add_one", [1]),
        ("add_two", {"x": 1}),
    )
    assert right == Answer(CallOutcome.RESULT, '{"sum": 2.5, "names": ["Ada"]}')
    assert as_text == Answer(CallOutcome.RESULT, '{"sum": 3.5, "names": null}')
    for answer, named in ((missing, "x"), (unknown, "z"), (wrong, "x"), (no_object, "object")):
        assert answer.outcome is CallOutcome.BAD_ARGUMENTS and named in answer.text
    assert no_tool.outcome is CallOutcome.UNKNOWN_TOOL
    assert "add_two" in no_tool.text and "add_one" in no_tool.text


TYPED = '''
from typing import Annotated, Any, Literal, Optional, Union

def typed(
    text: Union[int, str],
    copy: Optional[int] = None,
    schema: Literal["a", "b"] = "a",
    model_config: dict[str, list[int]] | None = None,
    pair: tuple[int, str] = (1, "x"),
    _x: Annotated[bool, "whether"] = False,
    *,
    anything: Any = None,
) -> str:
    """It.

    Args:
        text: one
        copy: two
        schema: three
        model_config: four
        pair: five
        _x: six
        anything: seven
    """
    return repr((text, copy, schema, model_config, pair, _x, anything))
'''


def test_all_that_a_schema_can_say_is_taken_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "typed_tools.py").write_text(TYPED)
    tools = load_tools(["typed_tools:typed"], [tmp_path])
    box = Toolbox(tools, Limits(call_s=30.0), code=[tmp_path], workers=1)
    given = {"text": "1", "copy": 2, "schema": "b", "model_config": {"a": [3]}, "pair": [4, "y"], "_x": True}
    found = answers(
        box,
        ("typed", {"text": 5}),
        ("typed", {**given, "anything": {"b": None}}),
        ("typed", {"text": 1, "schema": "c"}),
        ("typed", {"text": 1, "model_config": {"a": ["x"]}}),
    )
    assert [answer.text for answer in found] == [
        "(5, None, 'a', None, (1, 'x'), False, None)",
        "('1', 2, 'b', {'a': [3]}, (4, 'y'), True, {'b': None})",
        "error: schema: input should be 'a' or 'b'",
        "error: model_config.a.0: input should be a valid integer, unable to parse string as an integer",
    ]


def test_whatever_a_function_does_has_one_outcome(code: Path) -> None:
    expected = {
        "waits": (CallOutcome.RESULT, "waited"),
        "forks": (CallOutcome.RAISED, "PermissionError"),
        "allocates": (CallOutcome.OUT_OF_MEMORY, "0.5 GiB"),
        "prints": (CallOutcome.RAISED, "File too large"),
        "returns_much": (CallOutcome.RESULT, "y" * 200 + "… (cut to 200 characters)"),
        "kills_its_parent": (CallOutcome.RAISED, "PermissionError"),
        "opens_a_socket": (CallOutcome.RAISED, "PermissionError"),
        "writes_outside": (CallOutcome.RAISED, "Permission denied"),
        "returns_none": (CallOutcome.BAD_RESULT, "None"),
        "returns_bytes": (CallOutcome.BAD_RESULT, "bytes"),
        "raises": (CallOutcome.RAISED, "LookupError: nothing there"),
        "exits": (CallOutcome.RAISED, "SystemExit: 3"),
        "dies": (CallOutcome.DIED, "status 3"),
        "add_one": (CallOutcome.RESULT, '{"sum": 2.5, "names": null}'),  # after all that
    }
    found = answers(toolbox(code, *expected), *((name, {"x": 1}) for name in expected))
    for (name, (outcome, text)), answer in zip(expected.items(), found, strict=True):
        assert answer.outcome is outcome, (name, answer)
        assert text in answer.text, name
    assert not (code / "written-outside").exists()


def test_each_is_counted_by_its_name(code: Path) -> None:
    """Of one turn that calls them all, and a tool that is not there, and writes a call that is none."""
    expected = {
        CallOutcome.RESULT: ["waits"],
        CallOutcome.RAISED: [
            *("forks", "prints", "kills_its_parent", "opens_a_socket", "writes_outside", "raises")
        ],
        CallOutcome.OUT_OF_MEMORY: ["allocates"],
        CallOutcome.BAD_RESULT: ["returns_none", "returns_bytes"],
        CallOutcome.DIED: ["dies"],
        CallOutcome.TIMEOUT: ["sleeps"],
        CallOutcome.UNKNOWN_TOOL: ["is_not_there"],
    }
    names = [name for of_outcome in expected.values() for name in of_outcome]
    calls = [json.dumps({"name": name, "arguments": {"x": 600}}) for name in names] + ["no call"]
    turn = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    box = toolbox(code, *names[:-1], limits=replace(LIMITS, call_s=4.0), workers=4)
    form = Rendering(
        create_renderer(byte_level(), config_from_name("qwen3")),
        byte_level(),
        [tool.schema for tool in load_tools([f"tools_of_test:{name}" for name in names[:-1]], [code])],
        "qwen3",
    )

    async def play() -> Episode:
        options = ToolUse.Options(calls_per_turn=len(calls), parallel=True)
        prompt = byte_level().encode("<|im_start|>assistant\n")
        turns = [byte_level().encode(f"{text}<|im_end|>") for text in (turn, "done")]
        generate = SamplingIds(byte_level(), turns, prompt, 10**5)
        async with aclosing(box):
            environment = ToolUse(box, form, options, max_turns=2)
            return await environment.run(Problem("0", "?", token_ids=tuple(prompt)), generate, 0)

    episode = asyncio.run(play())
    counts = {outcome: len(of_outcome) for outcome, of_outcome in expected.items()}
    counts |= {CallOutcome.MALFORMED: 1, CallOutcome.BAD_ARGUMENTS: 0, CallOutcome.TOO_MANY_CALLS: 0}
    assert {outcome: episode.facts[f"calls_{outcome}"] for outcome in CallOutcome} == counts
    assert (episode.facts["calls"], episode.facts["ended_answered"]) == (len(calls), 1.0)


def test_a_call_that_takes_too_long_is_ended_and_costs_no_other(code: Path) -> None:
    async def both(box: Toolbox) -> list[Answer]:
        async with aclosing(box), box.episode() as tools:
            return await asyncio.gather(tools.call("sleeps", {"x": 600}), tools.call("counts", {"x": 1}))

    box = toolbox(code, "sleeps", "counts", limits=Limits(call_s=2.0))
    late, other = asyncio.run(both(box))
    assert late == Answer(CallOutcome.TIMEOUT, "error: sleeps: not done within 2 s")
    assert other == Answer(CallOutcome.RESULT, "1")


def test_no_more_processes_than_workers_serve_at_a_time(code: Path) -> None:
    before = set(psutil.Process().children())  # of tests before this one

    async def peak(box: Toolbox) -> int:
        async with aclosing(box), box.episode() as tools:
            calls = [asyncio.create_task(tools.call("sleeps", {"x": 0.3})) for _ in range(4)]
            most = 0
            while not all(call.done() for call in calls):
                most = max(most, len(set(psutil.Process().children()) - before))
                await asyncio.sleep(0.02)
            assert {call.result().text for call in calls} == {"slept"}
            return most

    (code / "tools_of_test_slow.py").write_text(
        "import time\ndef sleeps(x: float) -> str:\n    '''Sleeps.\n\n    Args:\n        x: s\n    '''\n"
        "    time.sleep(x)\n    return 'slept'\n"
    )
    tools = load_tools(["tools_of_test_slow:sleeps"], [code])
    box = Toolbox(tools, LIMITS, code=[code], workers=2)
    assert asyncio.run(peak(box)) == 2


def test_what_is_allowed_is_allowed_to_functions(code: Path) -> None:
    names = ("opens_a_socket", "writes_outside", "starts_a_daemon")
    limits = Limits(call_s=20.0, network=True, processes=True, files=True)
    found = answers(toolbox(code, *names, limits=limits), *((name, {"x": 1}) for name in names))
    assert [answer.text for answer in found] == ["opened", "written", "started"]
    (code / "written-outside").unlink()
    # The daemon has left its session and lost its parent; _leaves_nothing looks for it.


def test_a_function_that_keeps_state_has_a_process_for_each_episode(code: Path) -> None:
    async def episodes(box: Toolbox) -> list[str]:
        async with box.episode() as one, box.episode() as other:
            calls = [(one, 1), (one, 2), (other, 5), (one, 4)]
            return [(await tools.call("counts", {"x": x})).text for tools, x in calls]

    assert asyncio.run(episodes(toolbox(code, "counts"))) == ["1", "3", "5", "7"]


def test_the_python_tool_keeps_variables_and_shows_what_a_prompt_would(code: Path) -> None:
    sources = {
        "x = 5\nprint('hello')": "hello\n",
        "x * 2": "10\n",
        "None": "",
        "def f():\n    return 1 / 0\nf()": 'File "<code>", line 2, in f\n    return 1 / 0',
        "raise SystemExit": "SystemExit\n",
        "(": "SyntaxError",
        "x + 1": "6\n",
        "print('a' * 10**7)": "a" * 200 + "… (cut to 200 characters)",
        "chr(0xd800)": "\\ud800",
    }
    calls = [("python", {"code": source}) for source in sources]
    for (source, shown), answer in zip(
        sources.items(), answers(toolbox(code, "python"), *calls), strict=True
    ):
        assert answer.outcome is CallOutcome.RESULT, source
        assert shown in answer.text, source
        if shown.endswith("\n") and "Error" not in shown and "Exit" not in shown:
            assert answer.text == shown


# What the policy's code must not be able to do: each raises.
FORBIDDEN = {
    "os.fork()": "PermissionError",
    "subprocess.run(['true'])": "PermissionError",
    "os.execv('/bin/true', ['true'])": "PermissionError",
    "os.posix_spawn('/bin/true', ['true'], {})": "PermissionError",
    "os.setsid()": "PermissionError",
    "os.kill(os.getppid(), 0)": "PermissionError",
    "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)": "PermissionError",
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))": "PermissionError",
    "resource.prlimit(0, resource.RLIMIT_CPU, (9**9, 9**9))": "PermissionError",
    "socket.socket()": "PermissionError",
    "socket.socket(socket.AF_UNIX)": "PermissionError",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)": "PermissionError",
    "open('OUTSIDE', 'w')": "PermissionError",
    "open('SECRET').read()": "PermissionError",
    "os.symlink('SECRET', 'here'), open('here').read()": "PermissionError",
    "os.rename('SECRET', 'here')": "PermissionError|Invalid cross-device",
    "os.remove('SECRET')": "PermissionError",
    "os.truncate('SECRET', 0)": "PermissionError",
    "os.chmod('SECRET', 0o777)": "PermissionError",
    "os.utime('SECRET')": "PermissionError",
    "os.listdir('FOLDER')": "PermissionError",
    "open(f'/proc/{os.getppid()}/environ')": "PermissionError",
    "os.memfd_create('memory')": "PermissionError",
    "1 / (libc.prctl(1, 0, 0, 0, 0) + 1)": "ZeroDivisionError",  # −1: refused
    "os.environ['SECRET']": "KeyError",
    "with open('f', 'wb', 0) as f: os.remove('f'); f.write(b'x' * 2**20); f.write(b'x')": "File too large",
}


def test_what_the_policy_writes_cannot_leave_its_process(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the trainer")
    secret, outside = code / "answers.jsonl", code / "written-outside"
    secret.write_text("42")
    secret.chmod(0o600)
    setup = "import ctypes, os, resource, signal, socket, subprocess\nlibc = ctypes.CDLL(None)"
    sources = [
        source.replace("SECRET", str(secret)).replace("OUTSIDE", str(outside)).replace("FOLDER", str(code))
        if "environ['" not in source
        else source
        for source in FORBIDDEN
    ]
    allowed = {
        "open('here.txt', 'w').write('abc')": "3\n",
        "import threading; t = threading.Thread(target=lambda: None); t.start(); t.join(); 1": "1\n",
        "import asyncio; asyncio.run(asyncio.sleep(0, 'slept'))": "'slept'\n",
        "import tempfile; tempfile.NamedTemporaryFile().close(); 2": "2\n",
        "import numpy; int(numpy.arange(4).sum())": "6\n",
    }
    calls = [("python", {"code": source}) for source in (setup, *sources, *allowed)]
    box = toolbox(
        code, "python", limits=Limits(call_s=30.0, memory_gib=1.0, file_mib=1, network=True, files=True)
    )
    first, *found = answers(box, *calls)
    assert first.text == ""
    for (source, error), answer in zip(FORBIDDEN.items(), found[: len(sources)], strict=True):
        assert any(name in answer.text for name in error.split("|")), (source, answer)
    for (source, shown), answer in zip(allowed.items(), found[len(sources) :], strict=True):
        assert answer.text == shown, source
    assert secret.read_text() == "42" and secret.stat().st_mode & 0o777 == 0o600
    assert not outside.exists()


def test_packages_that_are_linked_from_elsewhere_can_be_imported(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some installers leave them; what lies beside their places stays closed."""
    site, store = tmp_path / "site-packages", tmp_path / "store"
    (store / "linked_package").mkdir(parents=True)
    (store / "linked_package/__init__.py").write_text("value = 7")
    (store / "beside.py").write_text("value = 8")
    site.mkdir()
    (site / "linked_package").symlink_to(store / "linked_package")
    monkeypatch.syspath_prepend(site)
    source = f"import linked_package\nlinked_package.value\nopen({str(store / 'beside.py')!r})"
    [found] = answers(toolbox(code, "python"), ("python", {"code": source}))
    assert "PermissionError" in found.text and "linked_package" not in found.text.rpartition("open(")[2]


def test_a_python_tool_that_is_lost_says_so_and_begins_anew(code: Path) -> None:
    sources = {
        "x = 1\nimport os; os._exit(2)": (CallOutcome.DIED, "status 2; its variables are lost"),
        "x": (CallOutcome.RESULT, "NameError"),
        "bytearray(2**31)": (CallOutcome.OUT_OF_MEMORY, "0.5 GiB of memory; its variables are lost"),
        "for n in range(3):\n  open(f'f{n}', 'wb').write(b'x' * 2**19)": (CallOutcome.DIED, "1 MiB"),
        "while True: pass": (CallOutcome.TIMEOUT, "1 s of CPU; its variables are lost"),
    }
    limits = Limits(call_s=60.0, cpu_s=1, memory_gib=0.5, file_mib=1)
    found = answers(toolbox(code, "python", limits=limits), *(("python", {"code": s}) for s in sources))
    for (source, (outcome, text)), answer in zip(sources.items(), found, strict=True):
        assert (answer.outcome, text in answer.text) == (outcome, True), (source, answer)


@pytest.mark.parametrize(
    "source",
    [
        "n = 0\nwhile True:\n  n += 1\n  open(f'f{n}', 'wb').write(b'x' * 2**19)",
        "n = 0\nwhile True:\n  n += 1\n  open(f'f{n}', 'wb').close()",
        "import os, time\nkept = []\nfor n in range(9):\n  kept.append(open('f', 'wb'))\n"
        "  kept[-1].write(b'x' * 2**19)\n  kept[-1].flush()\n  os.unlink('f')\ntime.sleep(600)",
        "import os\nwhile True:\n  os.mkdir('d')\n  os.chdir('d')",
    ],
    ids=["many files", "empty files", "removed files", "folders"],
)
def test_a_disk_is_not_filled_within_a_call(code: Path, source: str) -> None:
    limits = Limits(call_s=60.0, file_mib=1)
    began = time.monotonic()
    [answer] = answers(toolbox(code, "python", limits=limits), ("python", {"code": source}))
    assert time.monotonic() - began < 30
    assert (answer.outcome, answer.lost) == (CallOutcome.DIED, True)
    assert "its files are more than 1 MiB or 10,000, or too deep" in answer.text


def test_a_reply_that_is_none_ends_the_process(code: Path) -> None:
    """The policy's code has the socket, and may write to it what it likes."""
    forged = (
        "import os, stat\n"
        "for n in range(3, 4096):\n"
        "    try:\n"
        "        if stat.S_ISSOCK(os.fstat(n).st_mode): os.write(n, BYTES)\n"
        "    except OSError: pass"
    )
    garbage, long, other = (
        answers(toolbox(code, "python"), ("python", {"code": forged.replace("BYTES", repr(bytes_))}))[0]
        for bytes_ in (b"\0\0\0\3abc", b"\xff\xff\xff\xff", b"\0\0\0\2[]")
    )
    assert {garbage.outcome, long.outcome, other.outcome} == {CallOutcome.DIED}
    assert "no reply" in garbage.text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("-2**2", "-4"),
        ("2**-1", "0.5"),
        ("7//2", "3"),
        ("-7%3", "2"),
        (" 12 ", "12"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression", ["", "x", "1+", "f(1)", "2**0.5", "9**99", "1/0", "True", "'a'", "1 if 1 else 2"]
)
def test_the_calculator_refuses_what_is_no_arithmetic(expression: str) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        calculator(expression)


BAD = '''
import enum
from dataclasses import dataclass

@dataclass
class Point:
    x: int

class Color(enum.Enum):
    RED = "red"

def without_docstring(x: int) -> int:
    return x
def without_hint(x) -> int:
    """It.

    Args:
        x: a number
    """
def of_any_number(*x: int) -> int:
    """It."""
def of_a_class(x: Point) -> int:
    """It.

    Args:
        x: a point
    """
def of_colors(x: dict[str, list[Color]]) -> int:
    """It.

    Args:
        x: colors
    """
def of_a_bare_list(x: list) -> int:
    """It.

    Args:
        x: anything
    """
def of_nothing(x: "Missing") -> int:
    """It.

    Args:
        x: what is not there
    """
def yields(x: int) -> int:
    """It.

    Args:
        x: a number
    """
    yield x
number = 5
without_name = lambda: 5
'''


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("without_docstring", "docstring"),
        ("without_hint", "type hint"),
        ("of_any_number", r"\*x"),
        (
            "of_a_class",
            r"bad_tools_of_a_class.py:\d+\) has the parameter x of type Point, of which the policy",
        ),
        ("of_colors", "has the parameter x of type Color, .*use str, int"),
        ("of_a_bare_list", r"has the parameter x of type list, .*list\[…\]"),
        ("of_nothing", r"bad_tools_of_nothing.py:\d+\) cannot be described: NameError: name 'Missing'"),
        ("yields", "is a generator"),
        ("without_name", "has no name that a call could use"),
        ("number", "no function"),
        ("missing", "has no missing"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_with_its_place(tmp_path: Path, address: str, told: str) -> None:
    module = f"bad_tools_{address}"
    (tmp_path / f"{module}.py").write_text(BAD)
    with pytest.raises(RapoError, match=told):
        load_tools([f"{module}:{address}"], [tmp_path])


def test_a_name_that_no_shipped_tool_has_is_refused(code: Path) -> None:
    with pytest.raises(RapoError, match="python, calculator"):
        load_tools(["pyhton"], [code])
    with pytest.raises(RapoError, match="two functions calculator"):
        load_tools(["calculator", "calculator"], [code])


def test_tools_end_with_a_trainer_that_is_killed(code: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from megatron_rapo.tools.process import started\nfrom megatron_rapo.tools.plan import Plan\n"
        "async def main():\n"
        "    process = await started(Plan({'sleeps': 'tools_of_test:sleeps'}, code=[Path(sys.argv[1])]))\n"
        "    print(process._process.pid, process._folder, flush=True)\n"
        "    await process.call('sleeps', {'x': 600})\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(code)], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        pid, folder = trainer.stdout.readline().split()
        worker = psutil.Process(int(pid))
        trainer.kill()
    shutil.rmtree(folder)
    worker.wait(10)
