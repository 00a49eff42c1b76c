"""tools/mutate.py: the faults that it makes of a line, what it leaves alone, and who is to notice."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))  # the tool is a script beside the package, not a part of it
import mutation.coverage  # noqa: E402
from mutation.coverage import Coverage, Store, Traced, digest  # noqa: E402
from mutation.equivalent import read_equivalents  # noqa: E402
from mutation.faults import Fault, find_faults, shuffled  # noqa: E402
from mutation.tracing import Tracer  # noqa: E402
from mutation.trial import Copy  # noqa: E402


def planted(source: str) -> set[str]:
    """What a source becomes, fault by fault."""
    text = textwrap.dedent(source).encode()
    return {
        fault.plant(text).decode() for fault in find_faults("file.py", text) if fault.plant(text) is not None
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c\n", {"a = b <= c\n", "a = b > c\n"}),
        ("a = b + c\n", {"a = b - c\n"}),
        ("a = (b) * (c)\n", {"a = (b) / (c)\n"}),
        ("a = b and c\n", {"a = b or c\n"}),
        ("a = not b\n", {"a = b\n"}),
        ("a = 3\n", {"a = 4\n"}),
        ("a = 0.5\n", {"a = 1.0\n"}),
        ("a = True\n", {"a = False\n"}),
        ("a = f(b, c)\n", {"a = f(c, b)\n"}),
        ("a = max(b)\n", {"a = min(b)\n"}),
        ("a += b\n", {"a -= b\n", "pass\n"}),
        ("a.b = c\n", {"pass\n"}),
        ("f(b)\n", {"pass\n"}),
        ("a = Field(gt=b)\n", {"a = Field(ge=b)\n"}),
        ("if a:\n    b\n", {"if True:\n    b\n", "if False:\n    b\n"}),
        ("a = [b for b in c if d]\n", {"a = [b for b in c if True]\n", "a = [b for b in c if False]\n"}),
        (
            "def f(a=False):\n    return a\n",
            {"def f(a=True):\n    return a\n", "def f(a=False):\n    return None\n"},
        ),
        ("a = 'é' and b == c\n", {"a = 'é' or b == c\n", "a = 'é' and b != c\n"}),
    ],
)
def test_faults_of_a_line(source: str, expected: set[str]) -> None:
    assert planted(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Says 1 < 2."""\n',
        "__all__ = [a + b]\n",
        "WAIT_S = 3.0\n",
        "def f(a: b[1] | c) -> d[2]: ...\n",
        "logger.info(a, b)\n",
        "raise ValueError(a, 3)\n",
        "a = torch.equal(b, c)\n",
        "from a import b\n",
        "a = f'{b + 1}'\n",
        "a = 'b' + c\n",
        "if TYPE_CHECKING:\n    a = 1\n",
        "a = zip(b, strict=True)\n",
        "@dataclass(frozen=True)\nclass A:\n    b: int\n",
    ],
)
def test_what_cannot_matter_is_left_alone(source: str) -> None:
    assert planted(source) == set()


SOURCE = b"""\
LIMIT = 3


def f(a):
    if a > LIMIT:
        return g(
            a
            + 1
        )
    return a
"""


def fault(before: str) -> Fault:
    return next(found for found in find_faults("room/file.py", SOURCE) if found.before == before)


def test_a_fault_is_shown_to_the_tests_that_run_its_line_quick_ones_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {5: ["tests/a.py::slow", "tests/a.py::quick", "tests/b.py::other"], 6: ["tests/a.py::slow"]}
    coverage = Coverage(tmp_path)
    for name, seconds in [
        ("tests/a.py", {"slow": 5.0, "quick": 1.0}),
        ("tests/b.py", {"other": 0.1, "idle": 0}),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import json\n")
        coverage.traced[name] = Traced(
            {}, {f"{name}::{test}": value for test, value in seconds.items()}, [], {"room/file.py": lines}
        )
    assert coverage.tests(fault(">")) == ["tests/b.py::other", "tests/a.py::quick", "tests/a.py::slow"]
    monkeypatch.setattr(mutation.coverage, "BUDGET_S", 3.0)
    assert coverage.tests(fault(">")) == ["tests/b.py::other", "tests/a.py::quick"]
    monkeypatch.setattr(mutation.coverage, "BUDGET_S", 0.0)
    assert coverage.tests(fault(">")) == ["tests/b.py::other", "tests/a.py::quick"], "one of each file"
    assert coverage.tests(fault("+")) == ["tests/a.py::slow"]  # a later line of one statement
    assert coverage.tests(fault("3")) == coverage.tests(
        fault(">")
    )  # run by the import: whoever uses the file


def test_traces_follow_lines_that_have_moved_and_forget_those_that_are_gone(tmp_path: Path) -> None:
    package, tests = tmp_path / "megatron_rapo", tmp_path / "tests"
    package.mkdir()
    tests.mkdir()
    (tests / "test_a.py").write_text("from tests.helper import b\n")
    (tests / "helper.py").write_text("b = open('rows.jsonl')\n")
    (tests / "rows.jsonl").write_text("{}\n")
    (package / "a.py").write_text("one\ntwo\nthree\n")
    store = Store(tmp_path / "cache", tmp_path)
    name, file = "tests/test_a.py", "megatron_rapo/a.py"
    lines = {1: ["t"], 2: ["t", "u"], 3: ["u"]}
    store.save(
        name, Traced({file: digest(package / "a.py")}, {"t": 1.0, "u": 1.0}, [], {file: lines}), tmp_path
    )
    (package / "a.py").write_text("new\none\nthree\n")
    moved = Store(tmp_path / "cache", tmp_path).load(name)
    assert moved is not None and moved.lines == {file: {2: ["t"], 3: ["u"]}}
    for other, text in (("rows.jsonl", "{}\n{}\n"), ("helper.py", "b = open('rows.jsonl', 'rb')\n")):
        (tests / other).write_text(text)
        digest.cache_clear()
        mutation.coverage._with_helpers.cache_clear()
        forgotten = Store(tmp_path / "cache", tmp_path).load(name)
        assert forgotten is None, f"another {other}, another test"
        store.save(name, Traced({}, {}, [], {}), tmp_path)
    assert store.load(name) is not None
    store.save(name, Traced({}, {}, ["t"], {}), tmp_path)
    assert store.load(name) is None, "what failed may pass by now"


def test_a_copy_has_all_that_git_lists_and_links_as_links(tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "megatron_rapo").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "models/model").write_text("weights")
    (root / "megatron_rapo/models").symlink_to("../models")
    (root / "new.txt").write_text("not added")
    (root / "gone.txt").write_text("removed, and still listed")
    for command in (["init", "-q"], ["add", "gone.txt", "megatron_rapo", "models"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "gone.txt").unlink()
    Copy(root, copy)
    assert (copy / "new.txt").exists() and not (copy / "gone.txt").exists()
    assert (copy / "megatron_rapo/models").readlink() == Path("../models")
    assert (copy / "megatron_rapo/models/model").read_text() == "weights"


def test_the_draw_takes_other_lines_first_and_does_not_depend_on_lines_elsewhere() -> None:
    drawn = shuffled(find_faults("room/file.py", SOURCE), seed=1)
    assert len({found.line for found in drawn[:4]}) == 4
    longer = shuffled(find_faults("room/file.py", b"import json\n\n" + SOURCE), seed=1)
    assert [(found.text, found.after) for found in longer] == [(found.text, found.after) for found in drawn]
    assert drawn != shuffled(find_faults("room/file.py", SOURCE), seed=2)


@pytest.mark.parametrize("equivalent", read_equivalents(ROOT), ids=lambda known: known.line)
def test_a_fault_that_is_declared_equivalent_exists(equivalent) -> None:
    faults = find_faults(equivalent.file, (ROOT / equivalent.file).read_bytes())
    assert any(equivalent.is_it(found) for found in faults), "the line has changed: judge it anew"
    assert equivalent.why


def test_a_test_that_ends_the_tracer_does_not_end_it_for_the_next(tmp_path: Path) -> None:
    """As Python does with a trace function that raises; lines of a later test are written all the same."""
    module = tmp_path / "module.py"
    module.write_text("def f():\n    return 1\n")
    code: dict[str, Any] = {}
    exec(compile(module.read_text(), str(module), "exec"), code)
    before, tracer = sys.gettrace(), Tracer(str(tmp_path), str(tmp_path / "lines.txt"))
    try:
        for test in ("first", "second"):
            tracer.enter(test)
            code["f"]()
            sys.settrace(None)
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines} == {"first", "second"}
