"""A Dockerfile's instructions, and what they do to a folder that stands in for the image."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Instruction:
    """`RUN pip install .` is `word` RUN with the text after it."""

    word: str
    text: str


def instructions(dockerfile: Path) -> Iterator[Instruction]:
    """All instructions, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, text = line.split(maxsplit=1)
            yield Instruction(word, text)


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file of the repository's root out of the image: the last rule counts."""
    out = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(name, rule.removeprefix("!")):
            out = not rule.startswith("!")
    return out


@dataclass
class Image:
    """A root folder, and the state that instructions leave for the next ones."""

    root: Path
    environment: dict[str, str]
    arguments: dict[str, str]
    workdir: str = "/"
    user: str = "0"
    entry_point: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def build(self, dockerfile: Path, skip: str = "") -> None:
        """Follows all instructions after FROM, but RUN steps with the text `skip`."""
        for step in instructions(dockerfile):
            if step.word == "RUN" and not (skip and skip in step.text):
                self.run(["/bin/bash", "-o", "pipefail", "-ec", step.text], timeout=900)
            elif step.word == "ENV":
                pairs = (pair.split("=", 1) for pair in shlex.split(step.text))
                self.environment |= {name: self._expand(value) for name, value in pairs}
            elif step.word == "ARG":
                name, value = shlex.split(step.text)[0].split("=", 1)
                self.arguments.setdefault(name, value)
            elif step.word == "WORKDIR":
                self.workdir = step.text
                (self.root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif step.word == "COPY":
                self._copy(step.text.split())
            elif step.word == "USER":
                self.user = step.text
            elif step.word == "ENTRYPOINT":
                self.entry_point = json.loads(step.text)
            elif step.word == "HEALTHCHECK":
                self.health_check = json.loads(step.text[step.text.index("CMD") + 3 :])
            else:
                assert step.word in ("FROM", "SHELL", "CMD", "RUN"), f"unknown instruction {step.word}"

    def run(self, command: list[str], timeout: float = 120.0) -> str:
        """Runs a command as the image would at this point; its output.

        Raises:
            AssertionError: it ended with another status than 0.
        """
        variables = [f"{name}={value}" for name, value in {**self.arguments, **self.environment}.items()]
        inside = f'cd {shlex.quote(self.workdir)} && exec "$0" "$@"'
        chroot = ["chroot", f"--userspec={self.user}", str(self.root)]
        result = subprocess.run(
            [*chroot, "/usr/bin/env", "-i", *variables, "/bin/sh", "-c", inside, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{command}:\n{result.stdout[-4000:]}"
        return result.stdout

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        destination = self.root / str(Path(self.workdir) / target).lstrip("/")
        for source in sources:
            assert not ignored(source), f".dockerignore keeps {source} out"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, destination)

    def _expand(self, value: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: self.environment.get(match[1], ""), value)
