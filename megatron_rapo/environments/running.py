"""One episode from its problem to its verification; what the environment does wrong is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.config.reward import TAKEN
from megatron_rapo.data.guided import Guided, TooLong
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.bundle import Bundle
from megatron_rapo.environments.fault import EnvironmentFault
from megatron_rapo.environments.following import Followed, follow
from megatron_rapo.environments.generating import Generating, Turns
from megatron_rapo.environments.own_time import OwnTime
from megatron_rapo.environments.recorded import Answers, Recorded
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.environment import Environment
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.facts import checked_facts, checked_reward, finite_number, shown
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification, encodable
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.requests import Sampling, name_of
from megatron_rapo.user_code import message_of, own_traceback

Judge = Callable[[str, Problem], Awaitable[Verification]]
"""The configured reward of a text."""

_OWN_DRAWS = -1  # the "turn" that seeds what an environment itself draws


@dataclass(frozen=True)
class Attempt:
    """The number-th episode of a prompt, its place in a bundle, what it is given, those before it, and what
    is sampled of it already, to which more is added.
    """

    prompt: Prompt
    number: int
    place: int
    guide: Guide = PLAIN
    before: tuple[ScoredEpisode, ...] = ()
    so_far: Turns | None = None


@dataclass(frozen=True)
class Tries:
    """Episodes that are wanted of a prompt: what each is given, the number of the first, and those before it,
    which the head that sampled them alone has.
    """

    first: int
    guides: tuple[Guide, ...]
    before: tuple[ScoredEpisode, ...] = ()


@dataclass(frozen=True)
class Common:
    """What episodes have in common.

    Attributes:
        bundle: sends what they ask engines.
        sampling: of all turns.
        times: count them.
        answers: of code outside, in this step; None: none are kept.
    """

    bundle: Bundle
    sampling: Sampling
    times: Times
    answers: Answers | None


@dataclass(frozen=True)
class EpisodeRunner:
    """Runs episodes of an environment.

    Attributes:
        correct_at: the reward from which an environment's own score counts as correct.
        vocabulary: tokens that the model has.
        guided: makes tokens of guides; None: there are none.
        folder: the working directory, which episodes may not change.
    """

    environment: Environment
    options: EnvironmentOptions
    tokenizer: PreTrainedTokenizerBase
    correct_at: float
    vocabulary: int
    guided: Callable[[Prompt, Guide], Guided] | None = None
    folder: Path = field(default_factory=Path.cwd)

    async def play(self, attempt: Attempt, common: Common) -> Episode | Verification:
        """The episode; or why there is none, where the environment took too long or raised.

        Raises:
            TooFewEngines: too few engines are left to go on with it.
            RapoError: an engine refused, or the environment does what the protocol does not allow.
        """
        if attempt.guide == PLAIN:
            return await self._play(attempt, attempt.prompt.problem, common)
        assert self.guided is not None, "only training prompts are guided"
        try:
            guided = self.guided(attempt.prompt, attempt.guide)
        except TooLong as error:
            common.bundle.end(attempt.place)
            return Verification(Outcome.CRASH, why=str(error))
        after = None if attempt.guide.after is None else self._followed(attempt, attempt.guide.after)
        if guided.response is not None:
            common.bundle.end(attempt.place)
            context = guided.trained_under if after is None else after.context
            given = TokenSequence.of_text(context, guided.response)
            return Episode((given,), answer=str(attempt.guide.response))
        if after is not None:
            return await self._play(attempt, attempt.prompt.problem, common, after=after)
        asked = replace(attempt.prompt.problem, token_ids=guided.prompt + guided.begins)
        found = await self._play(attempt, asked, common, len(guided.prompt))
        if isinstance(found, Verification) or guided.trained_under == guided.prompt:
            return found
        try:
            under = [one.under(guided.prompt, guided.trained_under) for one in found.sequences]
        except ValueError as error:
            raise RapoError(f"{self._told(asked)}: {error}") from error
        return replace(found, sequences=tuple(under))

    async def _play(
        self,
        attempt: Attempt,
        problem: Problem,
        common: Common,
        prompt_tokens: int | None = None,
        after: Followed | None = None,
    ) -> Episode | Verification:
        """The episode of a problem whose first `prompt_tokens` are the prompt; default: all.

        Where it goes on from another one, the environment draws and hears what it did there.
        """
        prompt, sampling, bundle = problem.token_ids[:prompt_tokens], common.sampling, common.bundle
        own_time = OwnTime(self.options.time_limit_s)
        origin = attempt.number if after is None else after.origin
        generate = Generating(
            bundle,
            self.tokenizer,
            episode=attempt.place,
            prompt=prompt,
            name_of=lambda turn: name_of(attempt.prompt, turn),
            seed_of=lambda turn: sampling.seed_of(attempt.prompt, attempt.number, turn),
            max_tokens=sampling.max_response_tokens,
            max_turns=self.options.max_turns,
            on_waiting=own_time.wait,
            recorded=Recorded(common.answers, f"{sampling.seed}/{attempt.prompt.draw}/{origin}"),
            played=() if after is None else after.turns,
            temperature=attempt.guide.temperature or sampling.temperature,
            so_far=attempt.so_far,
        )
        seed = sampling.seed_of(attempt.prompt, origin, _OWN_DRAWS)
        found: Any = None
        try:
            with common.times.open.one_more():
                found = await own_time.run(self.environment.run(problem, generate, seed))
        except RapoError as error:  # of the engines, or of an environment of ours: the run cannot go on
            generate.failure = generate.failure or error
        except Exception as error:  # the user's own code raises what it likes
            found = self._unknown(error, late=own_time.is_up)
        finally:
            common.times.add(own_time)
            bundle.end(attempt.place)
        try:
            if generate.failure is not None:
                raise generate.failure
            if (folder := Path.cwd()) != self.folder:
                raise EnvironmentFault(
                    f"the working directory is {folder} now, and the run's relative paths begin in "
                    f"{self.folder}; leave it, and give absolute paths to what you call"
                )
            if not isinstance(found, Verification):
                found = _well_formed(found)
                self._check(found, generate, len(prompt) + sampling.max_response_tokens)
                if (shape := sampling.experts) is not None:
                    told = tuple(generate.with_experts(one, shape) for one in found.sequences)
                    found = replace(found, sequences=told)
        except EnvironmentFault as fault:
            raise RapoError(f"{self._told(problem)}: {fault}") from fault
        return found

    async def judge(self, found: Episode | Verification, problem: Problem, judge: Judge) -> ScoredEpisode:
        """Its verification: by the environment's own score, or else by the configured reward.

        Raises:
            RapoError: reward or facts are no finite numbers, or a fact cannot be logged.
        """
        if isinstance(found, Verification):
            return ScoredEpisode(Episode((), ""), found)
        found = replace(found, facts=checked_facts(found.facts, self._told(problem), group="environment"))
        if found.score is None:
            return ScoredEpisode(found, await judge(found.answer, problem))
        return ScoredEpisode(found, self._verification(found.score, problem))

    def _verification(self, score: Score, problem: Problem) -> Verification:
        told = self._told(problem)
        facts = checked_facts(score.facts, told, group="reward", taken=TAKEN)
        if score.value is None:
            return Verification(Outcome.CRASH, score.answer, "the environment gave no reward", facts=facts)
        if (value := finite_number(score.value)) is None:
            raise RapoError(
                f"{told}: the reward is {shown(score.value)}, no finite number; return Score(None) where it "
                "is unknown"
            )
        checked_reward(value, told)
        outcome = Outcome.CORRECT if value >= self.correct_at else Outcome.WRONG
        return Verification(outcome, score.answer, reward=value, facts=facts)

    def _unknown(self, error: Exception, *, late: bool) -> Verification:
        if late:
            limit = self.options.time_limit_s
            why = f"the environment took more than environment.time_limit_s = {limit:g} s for itself"
            return Verification(Outcome.TIMEOUT, why=why)
        return Verification(Outcome.CRASH, why=message_of(error), trace=own_traceback(error))

    def _followed(self, attempt: Attempt, after: tuple[int, int]) -> Followed:
        return follow(
            attempt.before, after, lambda ids: self.tokenizer.decode(list(ids), skip_special_tokens=True)
        )

    def _told(self, problem: Problem) -> str:
        return f'environment.use = "{self.options.use}", problem {problem.id}'

    def _check(self, episode: Episode, generate: Generating, longest: int) -> None:
        """Refuses what cannot be trained on."""
        if not episode.sequences or not episode.sampled_tokens:
            raise EnvironmentFault("an episode has no sampled token; return the sequences that were sampled")
        most = max(map(len, episode.sequences))
        if most > longest:
            raise EnvironmentFault(
                f"a sequence has {most} tokens, more than the prompt and rollout.max_response_tokens "
                f"({longest}); give less, or raise that"
            )
        for sequence in episode.sequences:
            for token in (int(sequence.token_ids.min()), int(sequence.token_ids.max())):
                if not 0 <= token < self.vocabulary:
                    raise EnvironmentFault(
                        f"a sequence has token id {token}, and the model has {self.vocabulary} tokens; give "
                        "what generate.encode makes of a text"
                    )
        generate.check(episode.sequences)


def _well_formed(found: Any) -> Episode:
    """What `run` returned, whose fields are of the types that an episode has.

    Raises:
        EnvironmentFault: it is no episode, or one of them is of another type.
    """
    if not isinstance(found, Episode):
        raise EnvironmentFault(f"run returned {shown(found)}, no Episode")
    many = isinstance(found.sequences, tuple | list)
    answer = None if not isinstance(found.score, Score) else found.score.answer
    for name, value, right, remedy in (
        ("sequences", found.sequences, many, "a tuple of a Transcript's sequence()"),
        *(
            ("sequences", one, isinstance(one, TokenSequence), "what a Transcript's sequence() is")
            for one in (found.sequences if many else ())
        ),
        ("answer", found.answer, isinstance(found.answer, str), "a text"),
        ("score", found.score, isinstance(found.score, Score | None), "a Score, or None"),
        ("score.answer", answer, isinstance(answer, str | None), "a text, or None"),
        ("truncated", found.truncated, finite_number(found.truncated) in (0.0, 1.0), "True or False"),
    ):
        if not right:
            raise EnvironmentFault(f"an episode's {name} is {shown(value)}; let it be {remedy}")
    return replace(
        found,
        sequences=tuple(found.sequences),
        answer=encodable(found.answer),
        truncated=bool(found.truncated),
    )
