"""Which tests run which lines: traced once for each test file, and kept until it or what it ran changes."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mutation.faults import Fault
from mutation.tracing import VARIABLE, Tracer
from mutation.trial import Copy, run_tests

PACKAGE = "megatron_rapo"
TRACER = Path(__file__).with_name("tracing.py")  # what it did not see is not in its traces
BUDGET_S = 60.0  # of tests a fault; beyond it, only the quickest of each file


@dataclass(frozen=True)
class Traced:
    """What the tests of one file do: the seconds of those that pass, and the tests of each line."""

    hashes: dict[str, str]
    seconds: dict[str, float]
    failing: list[str]
    lines: dict[str, dict[int, list[str]]]

    def running(self, file: str, lines: Iterable[int] | None) -> set[str]:
        """The tests that run one of the lines, or any of the file."""
        found: set[str] = set()
        numbers = self.lines.get(file, {})
        for line in numbers if lines is None else lines:
            found.update(numbers.get(line, ()))
        return found & self.seconds.keys()


@dataclass
class Coverage:
    """The traces of all test files, by their path."""

    root: Path
    traced: dict[str, Traced] = field(default_factory=dict)

    def tests(self, fault: Fault) -> list[str]:
        """The tests that can notice a fault: files of quick tests first, and quick tests first in each.

        Those that run its line. Where none does, those that run its function, and where only an import does,
        those that run anything of its file; and those in a file that imports it by name.
        """
        chosen = {} if fault.imported else self._running(fault.file, fault.lines)
        if not chosen:
            chosen = self._running(fault.file, None if fault.imported else fault.function)
            for name, traced in self.traced.items():
                if fault.file in imported_files(self.root / name, self.root):
                    chosen[name] = set(traced.seconds)
        ordered = []
        for name in sorted(chosen, key=lambda name: self._mean_seconds(name, chosen[name])):
            ordered += sorted(chosen[name], key=lambda test: self.traced[name].seconds[test])
        return list(self._within_budget(ordered))

    def seconds(self, tests: Iterable[str]) -> float:
        """How long these tests took when they were traced."""
        return sum(self.traced[test.split("::")[0]].seconds[test] for test in tests)

    def _running(self, file: str, lines: Iterable[int] | None) -> dict[str, set[str]]:
        found = {name: traced.running(file, lines) for name, traced in self.traced.items()}
        return {name: tests for name, tests in found.items() if tests}

    def _mean_seconds(self, name: str, tests: set[str]) -> float:
        return sum(self.traced[name].seconds[test] for test in tests) / len(tests) if tests else 0.0

    def _within_budget(self, tests: Sequence[str]) -> Iterable[str]:
        spent, files = 0.0, set()
        for test in tests:
            spent += self.seconds([test])
            if spent <= BUDGET_S or test.split("::")[0] not in files:
                files.add(test.split("::")[0])
                yield test


class Store:
    """Traces on disk, each good for a test file as it is, with what it imports of `tests`.

    Where the package has changed since, lines that stand there still keep their tests, wherever they are now.
    """

    def __init__(self, directory: Path, root: Path) -> None:
        self._directory, self._root = directory, root
        self._sources = directory / "sources"
        self._sources.mkdir(parents=True, exist_ok=True)

    def load(self, test_file: str) -> Traced | None:
        """The newest trace of a test file, where there is one in which all tests passed."""
        path = self._path(test_file)
        if not path.is_file():
            return None
        raw = json.loads(path.read_text())
        if raw["failing"]:  # they may pass by now
            return None
        lines = {}
        for file, numbers in raw.pop("lines").items():
            places = self._places(raw["hashes"][file], self._root / file)
            moved = ((places.get(int(number)), tests) for number, tests in numbers.items())
            lines[file] = {place: tests for place, tests in moved if place is not None}
        return Traced(lines=lines, **raw)

    def save(self, test_file: str, traced: Traced, copy: Path) -> None:
        """Keeps it, with the sources that its lines are of."""
        for file, found in traced.hashes.items():
            _write(self._sources / found, (copy / file).read_text())
        _write(self._path(test_file), json.dumps(vars(traced)))

    @cache  # noqa: B019  # one store a process
    def _places(self, former: str, path: Path) -> dict[int, int]:
        """Where each line of a former source stands now."""
        old = (self._sources / former).read_text().splitlines()
        new = path.read_text().splitlines() if path.is_file() else []
        blocks = (
            [(0, 0, len(old))] if old == new else SequenceMatcher(None, old, new, False).get_matching_blocks()
        )
        return {before + n + 1: now + n + 1 for before, now, size in blocks for n in range(size)}

    def _path(self, test_file: str) -> Path:
        imported = [*sorted(_with_helpers(self._root / test_file, self._root)), TRACER]
        key = hashlib.sha256("".join(map(digest, imported)).encode()).hexdigest()[:24]
        return self._directory / f"{Path(test_file).stem}-{key}.json"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


@cache
def _with_helpers(test_file: Path, root: Path) -> frozenset[Path]:
    """A test file, the modules of `tests` that it imports, by way of each other too, and data files named."""
    source = test_file.read_text(encoding="utf-8")
    found = {test_file}
    found |= {path for path in (root / "tests").glob("*.*") if path.suffix != ".py" and path.name in source}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
            base = root / (node.module or "").replace(".", "/")
            for path in (base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)):
                if path.is_file() and path != test_file:
                    found |= _with_helpers(path, root)
    return frozenset(found)


class Recorder:
    """A plugin of pytest: tells the tracer which test runs, and keeps how long each took and which failed."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.seconds: dict[str, float] = {}
        self.failing: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self._tracer.enter(f"{item.nodeid} (setup)")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        self._tracer.enter(f"{item.nodeid} (call)")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failing.add(report.nodeid)


def trace(test_file: str, copy: Copy) -> int:
    """In a child: runs a test file under the tracer; `read_trace` has the result. Returns pytest's status."""
    log = copy.directory / "lines.txt"
    log.unlink(missing_ok=True)
    package = str(copy.directory / PACKAGE)
    tracer = Tracer(package, str(log))
    os.environ[VARIABLE] = os.pathsep.join((package, str(log)))
    recorder = Recorder(tracer)
    tracer.start()
    status = run_tests([test_file], [recorder], to_the_first_failure=False)
    sys.settrace(None)
    result = {
        "seconds": recorder.seconds,
        "failing": sorted(recorder.failing),
    }  # a skipped test harms nothing
    (copy.directory / "tests.json").write_text(json.dumps(result))
    return status


def read_trace(copy: Copy) -> Traced:
    """What `trace` found. What a fixture runs counts for all tests of the file, as they may share it."""
    raw = json.loads((copy.directory / "tests.json").read_text())
    seconds = {test: value for test, value in raw["seconds"].items() if test not in raw["failing"]}
    lines: dict[str, dict[int, set[str]]] = {}
    for row in (copy.directory / "lines.txt").read_text().splitlines():
        test, file, number = row.rsplit("\t", 2)
        name, _, phase = test.rpartition(" (")
        if name:
            tests = {name} if phase == "call)" else set(seconds)
            lines.setdefault(f"{PACKAGE}/{file}", {}).setdefault(int(number), set()).update(tests)
    return Traced(
        hashes={file: digest(copy.directory / file) for file in lines},
        seconds=seconds,
        failing=raw["failing"],
        lines={
            file: {number: sorted(tests) for number, tests in found.items()} for file, found in lines.items()
        },
    )


@cache
def digest(path: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@cache
def imported_files(test_file: Path, root: Path) -> frozenset[str]:
    """The package's files that a test imports by name, anywhere in it; a package's name means all in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(test_file.read_bytes())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            path = root / name.replace(".", "/")
            if name.count(".") and path.is_dir():
                found.update(str(file.relative_to(root)) for file in path.glob("*.py"))
            elif name.startswith(PACKAGE):
                found.add(f"{path.relative_to(root)}.py")
    return frozenset(found)
