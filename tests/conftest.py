"""What holds for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import has_shared_memory_of_its_own


def pytest_sessionstart() -> None:
    """Before anything is in shared memory."""
    has_shared_memory_of_its_own()


@pytest.fixture(autouse=True)
def forgotten_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test wrote and imported are its own: others write ones of the same name."""
    path, before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    temporary = tmp_path_factory.getbasetemp()
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and temporary in Path(file).parents:
            del sys.modules[name]
