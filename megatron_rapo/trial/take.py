"""Takes one problem through what a run does before it trains, and keeps the time of each part."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import Data, RunConfig
from megatron_rapo.config.reward import Reward
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner, Judge
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.engines import open_own_engines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.requests import Sampling

WEIGHT_VERSION = 0  # the engine is given one model, once


@dataclass(frozen=True)
class Taken:
    """What became of one problem.

    Attributes:
        report: what became of the data's rows.
        group: the problem's scored episodes.
        seconds: of each part, by name, in order.
    """

    prompt: Prompt
    report: str
    group: Group
    seconds: dict[str, float]
    tokenizer: PreTrainedTokenizerBase

    @property
    def known(self) -> bool:
        """Whether each response has a reward."""
        return all(reward is not None for reward in self.group.rewards)


def take(config: RunConfig, wanted: str | None, responses: int) -> Taken:
    """Samples and judges responses to one problem of the training data, by an engine with `model.path`.

    Args:
        config: of a run, whose directory stays as it is.
        wanted: the problem's id, or its row; None: the first.
        responses: how many.

    Raises:
        RapoError: there is no such problem, or data, environment, engine or reward are at fault.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        tokenizer = load_tokenizer(config.model.path)
        architecture = read_architecture(config.model.path)
        loaded = load_training_prompts(config, tokenizer)
        prompt = find_prompt(loaded.prompts, wanted, loaded.report)
        environment = open_environment(config)
    with _timed(seconds, "reward's start"):
        verifier = Verifier.configured(
            config.verifier_of(_source(config, prompt)), _few_workers(config, responses)
        )
    with verifier, _apart(config) as apart:
        began = time.perf_counter()
        with open_own_engines(apart, architecture) as pool:
            # Also where servers run already: what they serve is then what is tried, for certain.
            pool.update_weights(config.model.path, WEIGHT_VERSION)
            seconds["engine's start"] = time.perf_counter() - began
            episodes = EpisodeRunner(
                environment, config.environment, tokenizer, config.reward.correct_at, architecture.vocabulary
            )
            judge = _TimedJudge(verifier.score)
            with (
                Runner(episodes, pool) as runner,
                runner.begin([prompt], _sampling(config, responses), judge) as rollout,
            ):
                with _timed(seconds, "sampling"):
                    rollout.wait_until_sampled()
                [group] = rollout.groups()
            seconds["reward"] = judge.seconds
            if group is None:
                reasons = "".join(f"\n  {url}: {reason}" for url, reason in pool.failures.items())
                raise RapoError(f"the engine was lost; mend what ended it, and try again:{reasons}")
    return Taken(prompt, loaded.report, group, seconds, tokenizer)


def find_prompt(prompts: Sequence[Prompt], wanted: str | None, report: str) -> Prompt:
    """The prompt of that id, or else of that row; of several data sets also `name/id`.

    Raises:
        RapoError: there is none, or several data sets have one.
    """
    if wanted is None:
        return prompts[0]
    found = (
        [one for one in prompts if wanted in (one.id, f"{one.source}/{one.id}")]
        or [one for one in prompts if wanted == str(one.index)]
    )  # fmt: skip
    if not found:
        raise RapoError(
            f"--problem {wanted}: no usable problem has this id or row; the first is {prompts[0].id}, the "
            f"last {prompts[-1].id}\n{report}"
        )
    if len({one.source for one in found}) > 1:
        names = " or ".join(f"{one.source}/{one.id}" for one in found)
        raise RapoError(f"--problem {wanted}: several data sets have one; say {names}")
    return found[0]


class _TimedJudge:
    """The configured reward; and how long it took, from the first response to the last."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._began: float | None = None
        self.seconds = 0.0

    async def __call__(self, text: str, problem: Problem) -> Verification:
        self._began = time.perf_counter() if self._began is None else self._began
        try:
            return await self._judge(text, problem)
        finally:
            self.seconds = time.perf_counter() - self._began


def _source(config: RunConfig, prompt: Prompt) -> Data:
    """The data set that the prompt is of, which may have a reward of its own."""
    return next(data for data in config.training_sources if data.name == prompt.source)


def _few_workers(config: RunConfig, responses: int) -> Reward:
    """The reward's options, with no more processes than there are responses."""
    return config.reward.model_copy(update={"workers": min(config.reward.workers, responses)})


def _sampling(config: RunConfig, responses: int) -> Sampling:
    return Sampling(
        responses_per_prompt=responses,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        weight_version=WEIGHT_VERSION,
        seed=config.run.seed,
    )


@contextmanager
def _apart(config: RunConfig) -> Iterator[RunConfig]:
    """The run with one engine, which logs outside of the run's directory; its log stays after an error."""
    directory = Path(tempfile.mkdtemp(prefix="megatron-rapo-try-"))
    run, rollout = config.run.model_copy(update={"directory": directory}), config.rollout
    if not rollout.engine.urls:
        alone = {"engine": rollout.engine.model_copy(update={"servers": 1}), "minimum_engines": 1}
        rollout = rollout.model_copy(update=alone)
    yield config.model_copy(update={"run": run, "rollout": rollout})
    shutil.rmtree(directory)


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - began
