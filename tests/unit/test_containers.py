"""The images' files: style, pins that agree with setup.py, and nothing copied that is not there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.containers.dockerfile import ROOT, ignored, instructions
from tests.unit.test_examples import setup_arguments

DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cpu"]


def texts(dockerfile: Path, word: str) -> list[str]:
    return [step.text for step in instructions(dockerfile) if step.word == word]


def requirement(extra: str) -> Requirement:
    (text,) = setup_arguments()["extras_require"][extra]
    return Requirement(text)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "it comes with the extra `dev`"
    result = subprocess.run([hadolint, str(dockerfile)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_runs_is_pinned_and_not_root(dockerfile: Path) -> None:
    (base,) = texts(dockerfile, "FROM")
    assert re.fullmatch(r"[\w./]+:[\d.]+-\w+", base), "a release, not `latest`"
    for step in texts(dockerfile, "RUN"):
        for command in re.findall(r"pip install[^&]*", step):
            assert "constraint" in step or "==" in command, command
    assert texts(dockerfile, "USER")[-1] == "10001"
    assert texts(dockerfile, "ENTRYPOINT") == ['["megatron-rapo"]']
    assert len(texts(dockerfile, "HEALTHCHECK")) == 1


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    for step in texts(dockerfile, "COPY"):
        for source in step.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source
    assert ignored("runs") and ignored(".venv") and ignored(".git"), "the context stays small"


def test_the_gpu_image_fits_the_extras() -> None:
    dockerfile = ROOT / "Dockerfile"
    (sglang,) = [step.split("=")[1] for step in texts(dockerfile, "ARG") if step.startswith("SGLANG_VERSION")]
    assert sglang in requirement("sglang").specifier
    oldest = re.search(r"SGLang \(([\d.]+) to ([\d.]+)\)", (ROOT / "README.md").read_text())
    assert oldest and Version(oldest[1]) <= Version(sglang) <= Version(oldest[2])

    # What the base brings stands in a comment, beside its tag.
    text = dockerfile.read_text()
    brings = re.search(r"torch ([\d.]+),\s*#?\s*Transformer Engine ([\d.]+)", text)
    assert brings, "say what the base brings"
    torch = next(Requirement(r) for r in setup_arguments()["install_requires"] if r.startswith("torch"))
    assert brings[1] in torch.specifier
    assert brings[2] in requirement("gpu").specifier


def test_the_cpu_image_has_the_tested_python() -> None:
    text = (ROOT / "Dockerfile.cpu").read_text()
    tested = re.search(r"Python ([\d.]+), Linux", (ROOT / "constraints.txt").read_text())
    assert tested and set(re.findall(r"python(3\.\d+)", text)) == {tested[1]}
    assert "--constraint constraints.txt" in text
