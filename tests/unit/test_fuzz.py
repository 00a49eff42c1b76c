"""Whatever a configuration or an input holds, it ends in what is wanted, or in one message for the user.

A few of each are tried with every run of the tests, thousands with `-m exhaustive`; all by fixed seeds.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import signal
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rapo.checkpoint.best import BestCheckpoint
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.load import validate
from megatron_rapo.config.options import sections_of
from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.engines.sglang.answers import to_generated as sglang_answer
from megatron_rapo.engines.vllm.answers import to_generated as vllm_answer
from megatron_rapo.errors import RapoError
from megatron_rapo.guards.findings import read_findings
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.publish.record import Record
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.record.identity import Identity
from megatron_rapo.rollout.responses import to_response
from megatron_rapo.samples.store import read_step
from megatron_rapo.section import Section
from megatron_rapo.weights.load import open_tensors
from tests.models import make_hf_model

LIMIT_S = 30  # of one input
FEW, MANY = 3, 45  # of each kind of input

BASE: dict[str, Any] = {
    "run": {"directory": "/nowhere/run", "steps": 4},
    "model": {"path": "/nowhere/model"},
    "data": {"source": "countdown", "numbers": 3},
    "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
}


@contextmanager
def in_time() -> Iterator[None]:
    """Nothing hangs."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Configurations


def places(
    section: type[Section] = RunConfig, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each option's dotted place and its annotation, sections themselves among them."""
    for name, field in section.model_fields.items():
        yield (*above, name), field.annotation
        for inner in sections_of(field.annotation):
            yield from places(inner, (*above, name))


_BY_NAME = {(place, repr(annotation)): (place, annotation) for place, annotation in places()}
PLACES = [_BY_NAME[key] for key in sorted(_BY_NAME)]

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "\0", "auto", "off", "/", "../..", "a:b", "a.b:c", "é" * 300, "@default"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.dates(),
)


def fitting(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of about the right type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(fitting, arguments))
    if origin is typing.Annotated:
        return fitting(arguments[0])
    if origin is list:
        return st.lists(fitting(arguments[0]), max_size=3)
    known: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-2, 70),
        float: st.floats(-0.5, 3.0),
        str: st.text(max_size=8),
        Path: st.sampled_from(["/nowhere", "data.jsonl", "."]),
    }
    return known.get(annotation, ODD)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """The smallest configuration, with some options set to what may fit, or to anything."""
    values: dict[str, Any] = copy.deepcopy(BASE)
    for place, annotation in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=7)):
        value = draw(st.one_of(fitting(annotation), fitting(annotation), ODD))
        table = values
        for name in place[:-1]:
            inner = table.get(name)
            table[name] = inner if isinstance(inner, dict) else {}
            table = table[name]
        table[place[-1]] = value
    return values


def one_end(values: dict[str, Any]) -> None:
    """A configuration that says the same once it was written out and read again, or one message."""
    with in_time():
        try:
            config = validate(values, source="fuzz")
        except RapoError as refusal:
            assert str(refusal).strip() and "Traceback" not in str(refusal)
            return
        assert validate(config.resolved(), source="fuzz again") == config


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_a_configuration_is_one_or_is_refused_with_a_message(values: dict[str, Any]) -> None:
    one_end(values)


@pytest.mark.exhaustive
@settings(max_examples=2500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_thousands_of_configurations(values: dict[str, Any]) -> None:
    one_end(values)


# Files


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes after one accident."""
    place = draw.randrange(len(content) + 1)
    length = draw.choice([1, 2, 16, 300])
    change = draw.choice(["flip", "cut", "empty", "zeros", "noise", "insert", "remove", "repeat", "digits"])
    if change == "flip":
        place = min(place, len(content) - 1)
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if change == "cut":
        return content[:place]
    if change == "empty":
        return b""
    made = {
        "zeros": bytes(length),
        "noise": draw.randbytes(length),
        "insert": draw.randbytes(length),
        "remove": b"",
        "repeat": content[place : place + length] * 2,
        "digits": b"9" * length,
    }[change]
    return content[:place] + made + content[place if change == "insert" else place + length :]


@dataclass(frozen=True)
class Kind:
    """A kind of input: what makes a folder with it, the files to damage (patterns), and what reads it."""

    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]


def read_tensors(folder: Path) -> None:
    architecture = read_architecture(folder.parent / "model" if folder.name == "checkpoint" else folder)
    with open_tensors(folder, architecture) as tensors:
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
            assert tensors.read(name, None, 0, 0).isfinite is not None


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary_size(tokenizer, 61)
    tokenizer.decode(tokenizer.encode("What is 1 + 1?"))


def make_rows(folder: Path) -> None:
    make_hf_model(folder / "model", num_hidden_layers=1)
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")


def read_rows(folder: Path) -> None:
    for name in ("data.jsonl", "data.parquet"):
        data = {"source": "file", "path": str(folder / name), "template": "plain"}
        config = validate({**BASE, "model": {"path": str(folder / "model")}, "data": data}, "fuzz")
        load_training_prompts(config, load_tokenizer(folder / "model"))


RUN_FILES = {
    "metrics.jsonl": [{"step": n, "time_s": 1.0, "reward/mean": 0.5} for n in range(9)],
    "guards.jsonl": [
        {"rollbacks": 0, "step": n, "guard": "mismatch", "action": "warn", "message": "…"} for n in range(9)
    ],
    "published.jsonl": [
        {"version": n, "dtype": "float32", "digest": "00ff", "seconds": 0.1, "engines": 1, "difference": 0.0}
        for n in range(9)
    ],
    "checkpoints/best.json": [{"step": 2, "metric": "pass@1", "value": 0.5}],
}


def make_run(folder: Path) -> None:
    for name, lines in RUN_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = validate({**BASE, "run": {"directory": str(folder), "steps": 4}}, "fuzz")
    (folder / "run.toml").write_text(
        "\n".join(
            f"[{section}]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
            for section, options in BASE.items()
        )
    )
    assert load_config([folder / "run.toml"]).run.steps == config.run.steps
    rows = [{"draw": n, "number": 0, "question": "?", "text": "!" * n} for n in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "step.parquet")


def read_run(folder: Path) -> None:
    """All of it: what one file is damaged in must not matter to the others."""
    failures = []
    for read in (
        lambda: read_step_lines(folder / "metrics.jsonl"),
        lambda: read_findings(folder),
        lambda: Record(folder),
        lambda: BestCheckpoint(folder / "checkpoints", "pass@1"),
        lambda: load_config([folder / "run.toml"]),
        lambda: read_step((folder / "step.parquet",)),
        lambda: Identity.read(folder),
        lambda: read_configurations(folder),
    ):
        try:
            read()
        except RapoError as error:
            failures.append(error)
    if failures:
        raise failures[0]


KINDS = {
    "a model": Kind(
        lambda folder: make_hf_model(folder, num_hidden_layers=2),
        ("model.safetensors", "config.json"),
        read_tensors,
    ),
    "a tokenizer": Kind(
        lambda folder: make_hf_model(folder, num_hidden_layers=1),
        ("tokenizer.json", "tokenizer_config.json"),
        read_tokenizer,
    ),
    "a Megatron checkpoint": Kind(
        lambda folder: convert_to_megatron(
            make_hf_model(folder.parent / "model", num_hidden_layers=2), folder
        ),
        (".metadata", "*.distcp"),
        read_tensors,
    ),
    "data rows": Kind(make_rows, ("data.jsonl", "data.parquet"), read_rows),
    "a run's records": Kind(make_run, (*RUN_FILES, "run.toml", "step.parquet"), read_run),
}


def many(kinds: list[str]) -> list[Any]:
    """Each kind a few times, and many times where all are asked for."""
    return [
        *(pytest.param(kind, range(FEW), id=f"{kind}") for kind in kinds),
        *(
            pytest.param(kind, range(FEW, MANY * 3), id=f"{kind}, often", marks=pytest.mark.exhaustive)
            for kind in kinds
        ),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("made") / (
                "checkpoint" if "checkpoint" in kind else "folder"
            )
            KINDS[kind].make(folders[kind])
            KINDS[kind].read(folders[kind])
        return folders[kind]

    return of


@pytest.mark.parametrize(("kind", "seeds"), many(list(KINDS)))
def test_a_damaged_file_is_read_or_told(
    made: Callable[[str], Path], tmp_path: Path, kind: str, seeds: range
) -> None:
    sound, failed = made(kind), []
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        folder = tmp_path / sound.name
        shutil.copytree(sound, folder)
        if sound.name == "checkpoint":
            (tmp_path / "model").mkdir(exist_ok=True)
            shutil.copytree(sound.parent / "model", tmp_path / "model", dirs_exist_ok=True)
        files = sorted(path for pattern in KINDS[kind].files for path in folder.rglob(pattern))
        path = draw.choice(files)
        path.write_bytes(damaged(path.read_bytes(), draw))
        try:
            with in_time():
                KINDS[kind].read(folder)
        except RapoError as error:
            assert str(error).strip()
        except BaseException as error:
            failed.append(f"seed {seed}, {path.name}: {type(error).__name__}: {str(error)[:200]}")
        shutil.rmtree(folder)
    assert not failed, "\n".join(failed)


# Engines' answers

ANSWERS: dict[str, tuple[Callable[[Any, str], Any], Any]] = {
    "SGLang": (
        sglang_answer,
        {
            "output_ids": [5, 6, 1],
            "meta_info": {
                "finish_reason": {"type": "stop"},
                "weight_version": "3",
                "output_token_logprobs": [[-0.5, 5, None], [-0.1, 6, None], [-2.0, 1, None]],
            },
        },
    ),
    "vLLM": (
        vllm_answer,
        {
            "choices": [
                {
                    "token_ids": [5, 6, 1],
                    "finish_reason": "stop",
                    "weight_versions": [{"version": "3"}],
                    "logprobs": {"content": [{"logprob": -0.5, "token_id": t} for t in (5, 6, 1)]},
                }
            ]
        },
    ),
}
JUNK = (
    None,
    "",
    "x" * 900,
    -1,
    2**40,
    2**70,
    10**400,
    math.nan,
    math.inf,
    True,
    [],
    {},
    [[]],
    0.5,
    "3",
    {"type": 1},
)


def changed(answer: Any, draw: random.Random) -> Any:
    """The answer with something else at one or two places."""
    answer = copy.deepcopy(answer)
    for _ in range(draw.choice([1, 1, 2])):
        holder, key, value = None, None, answer
        while isinstance(value, dict | list) and value and (holder is None or draw.random() < 0.85):
            holder, key = value, draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value = value[key]
        if holder is None:
            return draw.choice(JUNK)
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(JUNK))
    return answer


@pytest.mark.parametrize(("kind", "seeds"), many(list(ANSWERS)))
def test_a_strange_answer_is_taken_or_told(kind: str, seeds: range) -> None:
    read, answer = ANSWERS[kind]
    checks: dict[str, Any] = {
        "weight_version": 3,
        "vocab_size": 61,
        "max_tokens": 8,
        "source": "http://engine",
    }
    assert to_response(read(answer, "http://engine"), **checks).token_ids.tolist() == [5, 6, 1]
    failed = []
    for seed in seeds:
        strange = changed(answer, random.Random(f"{kind} {seed}"))
        try:
            response = to_response(read(strange, "http://engine"), **checks)
            assert all(math.isfinite(value) for value in response.log_probs)
        except RapoError:
            continue
        except Exception as error:
            failed.append(f"seed {seed}: {type(error).__name__}: {error}: {str(strange)[:300]}")
    assert not failed, "\n".join(failed)
