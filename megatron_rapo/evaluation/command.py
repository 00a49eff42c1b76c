"""`megatron-rapo evaluate`: from what was asked to stored numbers and a table."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.frontier import powers_of_two
from megatron_rapo.evaluation.results import Result, compute, examples_of_failed_extraction, table, write
from megatron_rapo.evaluation.standalone import evaluate
from megatron_rapo.evaluation.subject import default_name, open_model, recorded_configuration
from megatron_rapo.evaluation.typed import as_typed
from megatron_rapo.folder import own_folder

GENERATED = ("countdown", "arithmetic")

# Without a configuration: what an evaluation takes no part of, and defaults that suit any model.
WITHOUT_CONFIGURATION: dict[str, Any] = {
    "run.directory": "evaluations",
    "run.steps": 1,
    "rollout.prompts_per_step": 1,
    "rollout.max_prompt_tokens": 1024,
    "rollout.max_response_tokens": 2048,
    "algorithm.max_tokens_per_microbatch": 2**30,
}


@dataclass(frozen=True)
class Request:
    """What was asked for; None is what was not said.

    Attributes:
        configs: of a run, as `load_config` takes them; may be empty.
        settings: `section.key=value`.
        model: HF directory, checkpoint or run.
        data: files, generated tasks, and TOML tables like those of `evaluate.data`.
        template: of the files.
        stop_after_correct: correct samples at which a problem is done.
        out: the evaluation's directory.
    """

    configs: Sequence[Path | Mapping[str, Any]] = ()
    settings: Sequence[str] = ()
    model: Path | None = None
    data: Sequence[str] | None = None
    template: str | None = None
    samples: int | None = None
    k: Sequence[int] | None = None
    max_response_tokens: int | None = None
    stop_after_correct: int | None = None
    out: Path | None = None


def run(request: Request) -> tuple[Path, list[Result]]:
    """Evaluates, writes results.json and results.csv, prints the table.

    Returns:
        The evaluation's directory, and its numbers.

    Raises:
        RapoError: what was asked for does not work, or something failed meanwhile.
    """
    try:
        config = _configuration(request)
        out = request.out or _default_directory(request, config)
        with own_folder(out, "--out"):
            return out, _evaluate(request, config, out)
    except RapoError as error:
        raise RapoError(_as_typed(str(error), request)) from error


def _evaluate(request: Request, config: RunConfig, out: Path) -> list[Result]:
    assert config.evaluate is not None
    path, record = open_model(config.model.path, out)
    sampled = config.model_copy(
        update={
            "run": config.run.model_copy(update={"directory": out}),
            "model": config.model.model_copy(update={"path": path}),
        }
    )
    evaluation = evaluate(sampled, record, out, adaptive=request.stop_after_correct)
    if path != config.model.path:
        shutil.rmtree(path)  # it can be exported again
    results = compute(evaluation, config.evaluate.k)
    write(results, out)
    print(f"{table(results)}\n\n{examples_of_failed_extraction(evaluation)}", end="")
    print(f"{out}  samples, results.json, results.csv")
    return results


def _configuration(request: Request) -> RunConfig:
    """The configuration with what the command line says beside it."""
    if not request.configs and (request.model is None or request.data is None):
        raise RapoError("evaluate needs a configuration, or --model and --data; name them")
    if request.stop_after_correct is not None and request.stop_after_correct < 2:
        raise RapoError(
            f"--stop-after-correct {request.stop_after_correct} tells too little of a problem; give at "
            "least 2 (16 hardly widens intervals)"
        )
    if request.template is not None and request.data is None:
        raise RapoError(f"--template {request.template} is that of the files of --data; name them, too")
    asked: dict[str, Any] = {} if request.configs else dict(WITHOUT_CONFIGURATION)
    if request.model is not None:
        asked["model.path"] = str(request.model)
    if request.data is not None:
        asked["evaluate.data"] = [_source(text, request) for text in request.data]
        if not request.configs:
            asked |= {f"data.{key}": value for key, value in asked["evaluate.data"][0].items()}
    if request.max_response_tokens is not None:
        asked["rollout.max_response_tokens"] = request.max_response_tokens
    if request.samples is not None:
        asked["evaluate.samples"] = request.samples
    if request.k is not None or request.samples is not None:
        asked["evaluate.k"] = list(request.k or powers_of_two(request.samples or 1))
    config = load_config(
        request.configs, [*(f"{key}={toml_value(value)}" for key, value in asked.items()), *request.settings]
    )
    if config.evaluate is None:
        raise RapoError("the configuration has no [evaluate]; add it, or say --data and --samples")
    if (request.stop_after_correct or 0) > config.evaluate.samples:
        raise RapoError(
            f"--stop-after-correct {request.stop_after_correct} has no effect beside "
            f"{config.evaluate.samples} samples a problem; give fewer, or more --samples"
        )
    return config


def _source(text: str, request: Request) -> dict[str, Any]:
    """One table of evaluate.data."""
    if text in GENERATED:
        return _generated(text, request)
    if text.startswith("{"):
        return _table(text)
    return {"source": "file", "path": text, **({"template": request.template} if request.template else {})}


def _table(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise RapoError(
            f'--data {text} is no TOML table ({error}); write it like {{source = "countdown", numbers = 3}}'
        ) from error


def _generated(task: str, request: Request) -> dict[str, Any]:
    """The task as the model was trained on it, where that can be told; else by its defaults."""
    config: RunConfig | None = None
    if request.configs:
        config = load_config(request.configs, request.settings)
    elif request.model is not None and (recorded := recorded_configuration(request.model)) is not None:
        config = load_config([recorded])
    trained_on = [data for data in config.training_sources if data.source == task] if config else []
    if len(trained_on) != 1:
        return {"source": task}
    return trained_on[0].model_dump(mode="json", exclude={"reward", "weight"}, exclude_none=True)


def _as_typed(message: str, request: Request) -> str:
    """Without a configuration none but the options with flags were written by the user."""
    flags = {
        "model.path": (request.model, "--model"),
        "evaluate.samples": (request.samples, "--samples"),
        "evaluate.k": (request.k, "--k"),
        "rollout.max_response_tokens": (request.max_response_tokens, "--max-response-tokens"),
    }
    typed = {
        option: flag for option, (said, flag) in flags.items() if said is not None or not request.configs
    }
    tables = [_table(text) if text.startswith("{") else {"path": text} for text in request.data or ()]
    return as_typed(message, typed, tables=tables, settings=request.settings, stands_in=not request.configs)


def _default_directory(request: Request, config: RunConfig) -> Path:
    parent = config.run.directory / "evaluations" if request.configs else config.run.directory
    return parent / default_name(config.model.path)
