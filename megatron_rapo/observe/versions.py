"""With which software a run or an evaluation was made: `versions.jsonl`, and an evaluation's manifest."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_rapo.errors import RapoError

FILE = "versions.jsonl"
LIBRARIES = ("megatron_rapo", "torch", "megatron-core", "transformers", "latex2sympy2_extended", "sympy")
OPTIONAL = ("transformer-engine", "triton")

Versions = Mapping[str, str]


@dataclass(frozen=True)
class Start:
    """A start of a run with software that it had not had before.

    Attributes:
        step: that it went on after; 0 is the beginning.
        started: UTC, ISO 8601.
    """

    step: int
    started: str
    versions: Versions


def software_versions() -> dict[str, str]:
    """Versions of Python, of what results depend on, and of CUDA where torch was built with it."""
    import torch  # late: it takes seconds

    found = {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}}
    for library in OPTIONAL:
        with suppress(PackageNotFoundError):  # then the run does without
            found[library] = version(library)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def record_versions(directory: Path, resume_step: int | None, versions: Versions) -> str:
    """Adds a line to `versions.jsonl` where the versions are not those of the last one.

    Args:
        directory: of the run.
        resume_step: that the run goes on after; None for a new one, whose file is begun anew.
        versions: of now.

    Returns:
        What changed since the last start, for people; empty where nothing did.

    Raises:
        RapoError: the file is damaged.
    """
    before = [] if resume_step is None else read_versions(directory)
    last = before[-1].versions if before else {}
    if last == versions:
        return ""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [json.dumps(asdict(start)) + "\n" for start in [*before, Start(resume_step or 0, now, versions)]]
    partial = directory / f".{FILE}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(directory / FILE)
    if not before:
        return ""
    changed = [
        f"{name} {last.get(name, 'none')} → {versions.get(name, 'none')}"
        for name in dict.fromkeys([*last, *versions])
        if last.get(name) != versions.get(name)
    ]
    return f"going on with other versions: {', '.join(changed)}"


def read_versions(directory: Path) -> list[Start]:
    """The starts that `versions.jsonl` tells, oldest first; none where there is no file.

    Raises:
        RapoError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return []
    try:
        return [Start(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise RapoError(
            f"{path} is no record of versions ({error}); mend it, or remove it: it is begun anew then"
        ) from error
