"""The functions of a reward, in the process that calls them: imported, called, and held to their contract."""

from __future__ import annotations

import functools
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rapo.episode.facts import checked_facts, checked_reward, finite_number, shown
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import in_order, load, own_traceback, place_of

if TYPE_CHECKING:
    import asyncio

PARAMETERS = ("response", "problem")  # of a user's function

_GOLDS = {"answer", "expected", "gold", "ground_truth", "label", "reference", "solution", "target"}
_OF_OTHERS = {  # names that other libraries have there, or the other way round
    "response": _GOLDS | {"data_source", "example", "item", "prompt", "prompts", "question", "row"},
    "problem": _GOLDS | {"completion", "completions", "output", "prediction", "responses", "text"},
}
_GIVEN = {
    "response": "the response's text",
    "problem": "a mapping of all columns, with the attributes answer (the gold one) and question",
}

_LONGEST_REASON = 500  # characters; SymPy's messages can hold whole expressions
_LONGEST_EXTRACTED = 200  # characters
_ROUNDING = 1e-9  # 0.7 + 0.2 + 0.1 is a little less than 1


@dataclass(frozen=True)
class _Function:
    """One of them.

    Attributes:
        told: which it is, for errors: option, address, file and line.
        call: of (response, problem).
        final_answer, stating: a verifier's (`config.verifiers`); None where its module has none.
    """

    told: str
    name: str | None
    weight: float
    verifies: bool
    call: Callable[[str, Problem], object]
    final_answer: Callable[[str], str | None] | None = None
    stating: Callable[[str], str] | None = None


class Functions:
    """What judges responses: a plan's functions (`config.verifiers.RewardPlan`).

    Args:
        parts: what a `RewardPart` holds.
        correct_at: the reward from which on a response counts as correct.
        code: folders of the user's own modules.
        taken: names that no fact may have.

    Raises:
        RapoError: a function cannot be found or imported, or takes other arguments.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]],
        correct_at: float,
        code: Sequence[str],
        taken: Sequence[str] = (),
    ) -> None:
        folders = [Path(folder) for folder in code]
        self._functions = [_loaded(part, folders) for part in parts]
        self._correct_at = correct_at
        self._taken = frozenset(taken)

    @functools.cached_property
    def _events(self) -> asyncio.Runner:
        """One event loop for all calls: what a function opened in it goes on to serve."""
        import asyncio  # most functions need none

        return asyncio.Runner()

    def verify(self, response: str, problem: Problem) -> Verification:
        """Judges a response.

        Raises:
            RapoError: a function returned what is no reward: a fault of its code, not of the response.
            MemoryError: a function ran out of it.
        """
        total, facts, extracted = 0.0, dict[str, float](), None
        for function in self._functions:
            try:
                returned = self._call(function, response, problem)
                answer = function.final_answer(response) if function.final_answer else None
            except MemoryError:
                raise
            except BaseException as error:  # sys.exit, too: it is this response that led there
                return _crash(error)
            if function.verifies:
                score = Score(float(_verdict(function, returned)), answer=answer)
            else:
                score = self._score(function, returned, problem)
            if score.value is None:
                return Verification(Outcome.CRASH, why=f"{function.told} returned Score(None)")
            total += function.weight * score.value
            extracted = extracted or score.answer
            told = score.facts if function.name is None else {function.name: score.value, **score.facts}
            self._add(told, facts, function)
        checked_reward(total, " and ".join(function.told for function in self._functions))
        correct = total >= self._correct_at - _ROUNDING
        return Verification(
            Outcome.CORRECT if correct else Outcome.WRONG,
            reward=total,
            extracted=extracted[:_LONGEST_EXTRACTED] if extracted else None,
            facts=facts,
        )

    def judge(self, gold: str) -> Verification:
        """Whether each verifier that can tell takes a gold answer for equal to itself."""
        for function in self._functions:
            if function.stating is None:
                continue
            try:
                response = function.stating(gold)
                correct = function.call(response, Problem("", "", gold))
            except MemoryError:
                raise
            except Exception as error:
                return _crash(error)
            if not correct:
                return Verification(Outcome.WRONG, reward=0.0)
        return Verification(Outcome.CORRECT, reward=1.0)

    def _call(self, function: _Function, response: str, problem: Problem) -> object:
        returned = function.call(response, problem)
        return self._events.run(_awaited(returned)) if inspect.isawaitable(returned) else returned

    def _score(self, function: _Function, returned: object, problem: Problem) -> Score:
        """What a user's function returned, as a score of finite numbers."""
        score = returned if isinstance(returned, Score) else None
        value = returned if score is None else score.value
        if score is not None and value is None:
            return score
        number = finite_number(value)
        if number is None:
            within = "Score(value) of " if score else ""
            raise RapoError(
                f"{function.told} returned {within}{shown(value)} for problem {problem.id}, which is no "
                f"reward; {_remedy(value)}"
            )
        if score is None:
            return Score(number)
        if not isinstance(score.answer, str | None):
            raise RapoError(f"{function.told} returned {shown(score)}; answer must be text or None")
        return Score(
            number,
            checked_facts(score.facts, function.told, group="reward", taken=self._taken),
            score.answer,
        )

    @staticmethod
    def _add(told: Mapping[str, float], facts: dict[str, float], function: _Function) -> None:
        if twice := sorted(told.keys() & facts.keys()):
            raise RapoError(
                f"{function.told} returned the fact {twice[0]!r}, which another of the reward's functions "
                "has too; give one of them another name"
            )
        facts.update(told)


async def _awaited(awaitable: Any) -> object:
    return await awaitable


def _loaded(part: Mapping[str, Any], folders: Sequence[Path]) -> _Function:
    address, option = part["address"], part["option"]
    found = load(address, folders, option)
    if part["verifies"]:
        module = sys.modules[address.partition(":")[0]]

        def decide(response: str, problem: Problem) -> object:
            return found(response, problem.answer)

        return _Function(
            told=f"the verifier {address}",
            name=part["name"],
            weight=part["weight"],
            verifies=True,
            call=decide,
            final_answer=getattr(module, "final_answer", None),
            stating=getattr(module, "stating", None),
        )
    call = in_order(found, PARAMETERS, address, option, options=part["options"])
    _refuse_others(found, address, option)
    return _Function(
        told=f'{option} = "{address}" ({place_of(found)})',
        name=part["name"],
        weight=part["weight"],
        verifies=False,
        call=call,
    )


def _refuse_others(found: Any, address: str, option: str) -> None:
    """Refuses parameters that say that other arguments are meant than those which are given."""
    try:
        own = list(inspect.signature(found).parameters)[: len(PARAMETERS)]
    except (TypeError, ValueError):  # written in C
        return
    for name, given in zip(own, PARAMETERS, strict=False):
        if name in _OF_OTHERS[given]:
            raise RapoError(
                f'{option} = "{address}" ({place_of(found)}) has the parameter {name} where {given} is '
                f"given: {_GIVEN[given]}; call the parameters {' and '.join(PARAMETERS)}, in any order"
            )


def _verdict(function: _Function, returned: object) -> bool:
    if not isinstance(returned, bool):  # 0.5, None or an array would all be read as something they do not say
        raise RapoError(
            f"{function.told} returned {shown(returned)}, not True or False; let it return bool(…) of what "
            "it means"
        )
    return returned


def _remedy(value: object) -> str:
    if value is None:
        return (
            "return a number at its every end (0.0 where the response earns nothing), or Score(None) where "
            "the reward is unknown"
        )
    if isinstance(value, numbers.Real):
        return "return a finite number, or Score(None) where the reward is unknown"
    return "return a number (float(…) of what it means), True or False, or a Score"


def _crash(error: BaseException) -> Verification:
    why = traceback.format_exception_only(error)[-1].strip()
    return Verification(Outcome.CRASH, why=why[:_LONGEST_REASON], trace=own_traceback(error))
