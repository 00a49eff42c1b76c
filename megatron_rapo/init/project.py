"""Writes a small project that trains at once: a configuration, the user's file, its test, a toy model."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rapo.errors import RapoError

KINDS = ("reward", "method", "environment")
MODEL = "tiny-countdown"

_HERE = Path(__file__).parent
_PLACEHOLDER = "FOLDER"  # in the templates; it becomes the project's absolute path


def write_project(folder: Path, kind: str) -> list[Path]:
    """Writes the project of that kind; its files, which are all new.

    Raises:
        RapoError: the folder is there and not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RapoError(f"{folder} is there already, and not empty; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        whole = str(folder.resolve()).replace("\\", "\\\\").replace('"', '\\"')
        written = []
        for template in sorted(path for path in (_HERE / kind).iterdir() if path.is_file()):
            file = folder / template.name
            text = template.read_text(encoding="utf-8")
            shown = whole if template.suffix == ".toml" else str(folder)
            file.write_text(text.replace(_PLACEHOLDER, shown), encoding="utf-8")
            written.append(file)
        shutil.copytree(_HERE / MODEL, folder / MODEL)
    except OSError as error:
        raise RapoError(f"{folder} cannot be written: {error}; choose another place") from error
    return [*written, folder / MODEL]
