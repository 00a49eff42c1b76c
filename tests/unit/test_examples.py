"""The shipped examples, pins and commands are what they say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_rapo.config import FileData, RunConfig, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples/configs").glob("*.toml"))
QWEN = [path for path in CONFIGS if path.stem.startswith("qwen")]
COMMAND = str(Path(sys.executable).with_name("megatron-rapo"))
# What Hugging Face counts in the published safetensors.
QWEN_PARAMETERS = {
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
}
GPU_GIB = 80 * 10**9 / 2**30


def dry_run(config: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "train", str(config.relative_to(ROOT)), "--dry-run"]
    command += ["--set", *settings] if settings else []
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def load(path: Path) -> RunConfig:
    return load_config([path])


def test_there_are_examples() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", *QWEN_PARAMETERS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert load(path).run.directory == Path("runs") / path.stem


def test_the_demo_is_sharded_and_its_model_is_here() -> None:
    demo = load(ROOT / "examples/configs/demo.toml")
    assert (demo.parallel.tensor_parallel, demo.parallel.pipeline_parallel) == (2, 2)
    assert demo.parallel.world_size == 4
    assert (ROOT / demo.model.path / "model.safetensors").is_file()
    assert demo.algorithm.divergence == "forward_exact"


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_qwen_plans_without_the_model_and_fits(path: Path) -> None:
    result = dry_run(path)
    assert result.returncode == 0, result.stderr
    plan = result.stdout
    (parameters,) = re.findall(r"^qwen\w+ of ([\d,]+) parameters", plan, re.M)
    assert int(parameters.replace(",", "")) == QWEN_PARAMETERS[path.stem]
    (total,) = re.findall(r"^total +([\d.]+) GiB$", plan, re.M)
    # A fifth is left to CUDA, NCCL and the allocator.
    assert float(total) < 0.85 * GPU_GIB
    config = load(path)
    assert config.parallel.world_size % 8 == 0, "whole nodes"
    assert f"{config.parallel.world_size} trainer ranks" in plan
    assert f"so not checked: {config.model.path}" in plan
    assert config.rollout.engine.urls, "engines must be named"


def test_the_mixture_plans_on_twice_the_gpus_with_less_memory_on_each() -> None:
    path = ROOT / "examples/configs/qwen3-30b-a3b.toml"
    assert load(path).parallel.world_size == 32
    result = dry_run(path, "parallel.data_parallel=16")
    assert result.returncode == 0, result.stderr
    assert "64 trainer ranks: TP 4 × PP 1 × CP 1 × DP 16, EP 8, sequence parallel" in result.stdout
    totals = [
        float(re.findall(r"^total +([\d.]+) GiB$", plan, re.M)[0])
        for plan in (dry_run(path).stdout, result.stdout)
    ]
    assert totals[1] < totals[0] < 0.85 * GPU_GIB


def test_a_layout_that_does_not_fit_the_model_is_refused() -> None:
    result = dry_run(ROOT / "examples/configs/qwen2.5-7b.toml", "parallel.tensor_parallel=8")
    assert result.returncode == 1
    assert "parallel.tensor_parallel = 8" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_qwen_follows_the_reference_settings(path: Path) -> None:
    config = load(path)
    rollout, algorithm = config.rollout, config.algorithm
    assert (rollout.prompts_per_step, rollout.responses_per_prompt, config.minibatch_prompts) == (
        1024,
        8,
        256,
    )
    assert (rollout.temperature, rollout.max_response_tokens, rollout.max_prompt_tokens) == (1.0, 8192, 1024)
    assert config.optimizer.learning_rate == 5e-7
    assert (algorithm.clip_low, algorithm.clip_high) == (0.2, 0.2)
    assert (algorithm.divergence_coefficient, algorithm.entropy_coefficient) == (5e-3, 1e-3)
    assert isinstance(config.data, FileData)
    assert config.evaluate is not None
    assert config.evaluate.data is not None
    [held_out] = config.evaluate.data
    assert isinstance(held_out, FileData)
    assert held_out.path != config.data.path


def constraints(name: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins: dict[str, Version] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        (pin,) = requirement.specifier
        assert pin.operator == "==", f"{line}: pin one version"
        assert "+" not in pin.version, f"{line}: a local version is on no index"
        pins[canonicalize_name(requirement.name)] = Version(pin.version)
    return pins


def setup_arguments() -> dict[str, Any]:
    """The literal arguments of setup() in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    chosen = ("install_requires", "extras_require", "python_requires")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in chosen}


def test_constraints_pin_every_requirement() -> None:
    pins, arguments = constraints(), setup_arguments()
    for text in [
        *arguments["install_requires"],
        *arguments["extras_require"]["dev"],
        *arguments["extras_require"]["gym"],
        *arguments["extras_require"]["tools"],
    ]:
        requirement = Requirement(text)
        if requirement.name == "triton":  # torch's build with CUDA pins its own
            continue
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
        assert pinned in requirement.specifier, f"{requirement} excludes the pinned {pinned}"


def test_what_must_move_together_is_what_the_code_names() -> None:
    pins = constraints()
    assert pins["megatron-core"].release[:2] == (0, 16)
    assert str(pins["antlr4-python3-runtime"]) == "4.13.2"  # setup.py's extra of the parser
    assert "latex2sympy2_extended[antlr4_13_2]" in setup_arguments()["install_requires"]


def test_pins_of_the_newest_environment_stand_in_for_older_ones() -> None:
    """Under the same spelling, since that is how `make` and the image put the two files together."""
    pins, newest = constraints(), constraints("constraints-newest.txt")
    assert all(pins[name] < pin for name, pin in newest.items())
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    named = re.findall(r"^[\w-]+==", (ROOT / "constraints-newest.txt").read_text(encoding="utf-8"), re.M)
    assert named and all(f"\n{name}" in text for name in named)
    (needed,) = (r for r in setup_arguments()["install_requires"] if r.startswith("megatron-core"))
    assert newest["megatron-core"] in Requirement(needed).specifier


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):(?!=)", makefile, re.M))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/performance.md"])
def test_every_make_command_of_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    used = set(re.findall(r"\bmake ([a-z]+)", "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))))
    assert used, f"{page} names no make command"
    assert used <= make_targets()


def test_paths_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    named = set(re.findall(r"\b(?:examples|docs|tests|tools)/[\w./-]*\w", text))
    missing = [path for path in sorted(links | named) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("script", ["examples/run_cpu.sh", ".ci/run"])
def test_scripts_are_executable_bash(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


@pytest.mark.parametrize(
    ("target", "variable", "remedy"),
    [
        ("install", "PYTHON", "make PYTHON="),
        ("test-newest", "PYTHON_NEWEST", "make test-newest PYTHON_NEWEST="),
    ],
)
def test_make_says_what_to_do_without_python(target: str, variable: str, remedy: str, tmp_path: Path) -> None:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", "constraints-newest.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run(
        ["make", target, f"{variable}=python-that-is-not-there"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode != 0
    assert "python-that-is-not-there" in result.stderr
    assert remedy in result.stderr
    assert not list(tmp_path.glob(".venv*"))


def test_pyproject_and_setup_agree_on_python() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert setup_arguments()["python_requires"] == f">={pyproject['tool']['mypy']['python_version']}"
