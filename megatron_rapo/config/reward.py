"""The options of what responses earn."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from megatron_rapo.config.verifiers import REWARDS, VERIFIERS, RewardPart, VerifierName
from megatron_rapo.episode.facts import NAME
from megatron_rapo.section import Fraction, PositiveFloat, PositiveInt, Seconds, Section
from megatron_rapo.user_code import malformed

# Metrics `reward/…` that every run has.
TAKEN = (
    *("mean", "correct", "wrong", "timeout", "crash", "unknown"),
    *("groups_all_fail", "groups_without_variance"),
)


class RewardFunction(Section):
    """One of several functions; the reward is the sum of their values, each times its weight."""

    use: str = Field(
        description="One of your own as `module:name` (docs/rewards.md), a verifier (`math`, `countdown`, "
        "`integer`), `reasoning_gym` for its problems, or `format`: 1 where the response as a whole matches "
        "the regular expression "
        "`options.pattern` of Python's `re` (`(?s)` lets `.` match line ends), else 0."
    )
    weight: float = Field(
        1.0, allow_inf_nan=False, description="What its value is multiplied by; 0: it is logged only."
    )
    name: str | None = Field(
        None, description="Its values are logged as `reward/<name>`. Default: what stands last in `use`."
    )
    options: dict[str, JsonValue] = Field({}, description="Further arguments of the function, by name.")

    @property
    def metric(self) -> str:
        """What its values are logged as."""
        return self.name or self.use.rpartition(":")[2]

    @model_validator(mode="after")
    def _check(self) -> RewardFunction:
        if self.use not in VERIFIERS | REWARDS and (wrong := malformed(self.use)):
            raise ValueError(f'use = "{self.use}" {wrong}, or one of {", ".join(VERIFIERS | REWARDS)}')
        if not NAME.fullmatch(self.metric) or self.metric in TAKEN:
            raise ValueError(
                f'name = "{self.metric}" would be logged as reward/{self.metric}, which '
                f"{'has another meaning' if self.metric in TAKEN else 'is no name of a metric'}; give another"
            )
        if self.use in VERIFIERS and self.options:
            raise ValueError(
                f'options = {self.options} would have no effect: "{self.use}" has none; remove it'
            )
        if self.use == "format":
            self._check_pattern()
        return self

    def _check_pattern(self) -> None:
        pattern = self.options.get("pattern")
        if set(self.options) != {"pattern"} or not isinstance(pattern, str):
            raise ValueError(f'options = {self.options}: "format" takes {{ pattern = "…" }}; give that alone')
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"options.pattern = {pattern!r} is no regular expression: {error}") from None


class Judging(Section):
    """What judges responses: a verifier, a function, or several."""

    verifier: VerifierName | None = Field(
        None,
        description="`math`: final answers, marked by what they say (docs/evaluation.md); `countdown`, "
        "`integer`: exact checkers of the generated tasks. Default: the one that belongs to `data.source`, "
        "unless there are functions.",
    )
    function: str | None = Field(
        None,
        description="A function of your own, `module:name`, called as function(response, problem) "
        "(docs/rewards.md). Problems then need no gold answers.",
    )
    functions: list[RewardFunction] = Field([], description="Several functions, with weights.")
    correct_at: float = Field(
        1.0,
        allow_inf_nan=False,
        description="The reward of functions from which on a response counts as correct, in pass@k and "
        "`reward/correct`.",
    )

    def without_effect(self) -> dict[str, str]:
        if self.function or self.functions:
            return {}
        return {"correct_at": "a verifier says what is correct; it is for functions"}

    def parts(self, table: str = "reward") -> tuple[RewardPart, ...]:
        """Those of `function` or `functions`; none where a verifier decides.

        Args:
            table: that the user set, as errors call it.
        """
        if self.function:
            return (RewardPart(self.function, f"{table}.function"),)
        return tuple(
            RewardPart(
                address=(VERIFIERS | REWARDS).get(one.use, one.use),
                option=f"{table}.functions[{place}].use",
                name=one.metric,
                weight=one.weight,
                verifies=one.use in VERIFIERS,
                options=one.options,
            )
            for place, one in enumerate(self.functions)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen: dict[str, Any] = {
            "verifier": self.verifier,
            "function": self.function,
            "functions": self.functions,
        }
        given = [name for name, value in chosen.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} and {given[1]} are both set; keep one, or name all in functions with a "
                "weight each"
            )
        if self.function in VERIFIERS:
            raise ValueError(f'function = "{self.function}" is a verifier; set verifier to it')
        if self.function is not None and (wrong := malformed(self.function)):
            raise ValueError(f'function = "{self.function}" {wrong}')
        if self.functions:
            self._check_functions()
        return self

    def _check_functions(self) -> None:
        [(name, times)] = Counter(one.metric for one in self.functions).most_common(1)
        if times > 1:
            raise ValueError(f'functions has {times} of the name "{name}"; give each a name of its own')
        if not any(one.weight for one in self.functions):
            raise ValueError("functions have the weight 0 all: no response would earn anything; raise one")


class Reward(Judging):
    """What responses earn: 1 where a built-in verifier finds them correct, else 0; or what functions return.

    Where a function raises or does not end the reward is unknown: the response is not trained on, takes no
    part in its group's comparison, and is counted (`reward/timeout`, `reward/crash`, `reward/unknown`).
    """

    workers: PositiveInt = Field(
        2,
        description="Processes of each data-parallel head in which responses are judged, one at a time each; "
        "functions that wait for a service want more of them.",
    )
    time_limit_s: Seconds = Field(
        5.0, description="Hard limit for one response; past it the process is killed: outcome `timeout`."
    )
    memory_limit_gib: PositiveFloat = Field(
        4.0, description="Address space of one such process, in GiB; beyond it allocations fail: `crash`."
    )
    unknown_limit: Fraction = Field(
        0.5,
        description="Share of a step's rewards that may be unknown; beyond it the run ends, and says why "
        "(`guards.unknown_rewards`).",
    )
