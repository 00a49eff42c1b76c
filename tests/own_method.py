"""The method of docs/methods.md, as a user's own file outside the package."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/methods.md"
ADDRESS = "my_method:RunningBaseline"


def write_method(folder: Path, *changes: tuple[str, str]) -> Path:
    """Writes the page's example to `my_method.py` in a folder, with texts in it changed."""
    block = re.search(r"```python\n# my_method\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, "docs/methods.md has no my_method.py"
    source = block[1]
    for before, after in changes:
        assert before in source, before
        source = source.replace(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "my_method.py"
    file.write_text(source, encoding="utf-8")
    return file
