"""Countdown with further guesses: each wrong one is told what it comes to."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from megatron_rapo.config import CountdownData, RunConfig
from megatron_rapo.data.tasks import countdown
from megatron_rapo.environments.dialogue import Dialogue, Ending
from megatron_rapo.environments.rendering import Rendering, RenderingOptions, open_rendering
from megatron_rapo.episode.environment import Generate
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.section import PositiveInt

_FIELDS = {"question": "3 7=10:", "target": "10", "value": "4"}


class CountdownTurns:
    """`environment.use = "countdown_turns"`. The reward is 1 where a guess is right."""

    class Options(RenderingOptions):
        """Of `environment.options`. Verdicts may have `{question}`, `{target}` and `{value}`."""

        guesses: PositiveInt = Field(3, description="Guesses that an episode has at most.")
        wrong: str = Field(
            "That is {value}, not {target}. Try again.",
            description="What is said after an expression of the given numbers that misses the target.",
        )
        malformed: str = Field(
            "That is no expression of the given numbers, each used once. Try again.",
            description="What is said after anything else.",
        )

        @model_validator(mode="after")
        def _have_known_fields(self) -> Self:
            for name in ("wrong", "malformed"):
                verdict = getattr(self, name)
                try:
                    verdict.format(**_FIELDS)
                except (KeyError, IndexError, ValueError) as error:
                    raise ValueError(
                        f"{name} = {verdict!r} has a field other than {{question}}, {{target}} and "
                        "{value}; correct it"
                    ) from error
            return self

    def __init__(self, rendering: Rendering, options: Options) -> None:
        self._rendering = rendering
        self._options = options

    @classmethod
    def configured(cls, config: RunConfig, options: Options) -> Self:
        """The environment of a run.

        Raises:
            RapoError: problems are of another task, the turns do not suffice, or the model's template cannot
                be continued exactly.
        """
        from megatron_rapo.data.tokenizer import load_tokenizer

        for data in [*config.training_sources, *config.evaluation_data]:
            if not isinstance(data, CountdownData):
                raise RapoError(
                    f'environment.use = "countdown_turns" judges Countdown, and {data.name} is of source = '
                    f'"{data.source}"; set that to "countdown", or use = "conversation" for other tasks'
                )
        if options.guesses > config.environment.max_turns:
            raise RapoError(
                f"environment.options.guesses = {options.guesses} is more than environment.max_turns = "
                f"{config.environment.max_turns}; raise that, or lower it"
            )
        rendering = open_rendering(config, options, load_tokenizer(config.model.path))
        rendering.check_continues({"role": "user", "content": "That is 4, not 10. Try again."})
        return cls(rendering, options)

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """See `Environment`."""
        del seed  # it draws nothing of its own
        dialogue = Dialogue(problem, generate, self._rendering, self._options.guesses)
        ending, right = None, False
        while ending is None:
            said = await dialogue.hear()
            right = countdown.is_correct(said.turn.text, problem.answer)
            if said.turn.truncated:
                ending = Ending.OUT_OF_TOKENS
            elif right or dialogue.turns == self._options.guesses:
                ending = Ending.ANSWERED
            else:
                ending = dialogue.say([{"role": "user", "content": self._verdict(said.turn.text, problem)}])
        numbers = range(1, self._options.guesses + 1)
        by = {f"right_by_{n}": float(right and dialogue.turns <= n) for n in numbers}
        score = Score(float(right), answer=countdown.final_answer(said.turn.text))
        return dialogue.episode(ending, by, score)

    def _verdict(self, guess: str, problem: Problem) -> str:
        value = countdown.comes_to(guess, problem.answer)
        verdict = self._options.malformed if value is None else self._options.wrong
        return verdict.format(question=problem.question, target=problem["target"], value=value)
