"""The responses that the page holds: read from the stores, row group by row group, and split into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isnan
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet

from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.episode.outcome import Outcome, reward_of
from megatron_rapo.evaluation.counts import codes
from megatron_rapo.evaluation.store import Problem, SampleStore
from megatron_rapo.report.selection import Integers, Rule, Samples, choose_rule

OUTCOMES = {outcome.value: place for place, outcome in enumerate(Outcome)}
_SHOWN = [
    *("problem", "sample", "outcome", "reward", "truncated", "text", "token_ids", "log_probs", "sequences")
]


class Source(Protocol):
    """Where samples of a model on a data set are: an evaluation's, or a step's of a run."""

    @property
    def problems(self) -> Sequence[Problem]:
        """That were sampled."""

    def narrow(self) -> Samples:
        """All samples, in an order of the source's own."""

    def read(self, rows: Integers) -> list[dict[str, Any]]:
        """The samples of these numbers in that order.

        They have `problem`, `sample`, `outcome`, `reward`, `truncated`, `text`, and `sequences`: the
        `token_ids` and `log_probs` of each, None where a token was given, not sampled.
        """


@dataclass(frozen=True)
class EvaluatedSamples:
    """An evaluation's samples of a data set at a setting."""

    store: SampleStore

    @property
    def problems(self) -> Sequence[Problem]:
        """See `Source`."""
        return self.store.problems

    def narrow(self) -> Samples:
        """See `Source`: in the order of the parts' rows."""
        table = self.store.read(["problem", "sample", "outcome", "length", "given"]).unify_dictionaries()
        places = {problem.id: place for place, problem in enumerate(self.problems)}
        return Samples(
            problem=codes(table["problem"], places),
            number=table["sample"].to_numpy(),
            outcome=codes(table["outcome"], OUTCOMES),
            length=table["length"].to_numpy() + table["given"].fill_null(0).to_numpy(),
        )

    def read(self, rows: Integers) -> list[dict[str, Any]]:
        """See `Source`; a row group without one of them is not read."""
        wanted = np.sort(rows)
        found: list[dict[str, Any]] = []
        first = 0
        for path in self.store.parts():
            with pyarrow.parquet.ParquetFile(path) as part:
                for group in range(part.num_row_groups):
                    stop = first + part.metadata.row_group(group).num_rows
                    inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, stop)] - first
                    if len(inside):
                        found += part.read_row_group(group, columns=_SHOWN).take(inside).to_pylist()
                    first = stop
        return [row | {"reward": _reward(row), "sequences": _sequences(row)} for row in found]


@dataclass(frozen=True)
class Sampled:
    """One model's samples of one data set.

    Attributes:
        model: what the model is called.
        dataset: what data set and setting are called.
        token_texts: splits its responses; None where the model's tokenizer is not to be had.
    """

    model: str
    dataset: str
    source: Source
    token_texts: TokenTexts | None


@dataclass(frozen=True)
class Browser:
    """What the response browser holds.

    Attributes:
        rule: how the responses were chosen.
        shown, sampled: responses in the page, and on disk.
        has_given: whether some have tokens that were given after the prompt.
        data: as `responses.js` reads it.
    """

    rule: Rule
    shown: int
    sampled: int
    has_given: bool
    data: dict[str, Any]


def browse(parts: Sequence[Sampled]) -> Browser:
    """Chooses responses over all models and data sets, and reads them."""
    samples = [part.source.narrow() for part in parts]
    rule = choose_rule(samples)
    models = list(dict.fromkeys(part.model for part in parts))
    problems: dict[tuple[str, str], dict[str, Any]] = {}
    for part, narrow in zip(parts, samples, strict=True):
        sampled = np.bincount(narrow.problem, minlength=len(part.source.problems))
        for place, problem in enumerate(part.source.problems):
            entry = problems.setdefault(
                (part.dataset, problem.id),
                {
                    "id": problem.id,
                    "dataset": part.dataset,
                    "question": problem.question,
                    "answer": problem.answer,
                    "sampled": 0,
                    "responses": [],
                },
            )
            entry["sampled"] += int(sampled[place])
        for row in part.source.read(rule.rows(narrow)):
            response = _response(row, rule, part.token_texts) | {"model": models.index(part.model)}
            problems[part.dataset, row["problem"]]["responses"].append(response)
    shown = [entry for entry in problems.values() if entry["responses"]]
    for entry in shown:
        entry["responses"].sort(
            key=lambda response: (response["model"], OUTCOMES[response["outcome"]], response["sample"])
        )
    return Browser(
        rule=rule,
        shown=sum(len(entry["responses"]) for entry in shown),
        sampled=sum(len(narrow.number) for narrow in samples),
        has_given=any("given" in response for entry in shown for response in entry["responses"]),
        data={"models": models, "problems": shown},
    )


def _reward(row: dict[str, Any]) -> float | None:
    """What the response earned; older parts have outcomes alone."""
    earned: float | None = row.get("reward")
    return reward_of(Outcome(row["outcome"])) if earned is None else earned


def _sequences(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an evaluation's row, where NaN marks what was given."""
    return [
        {
            "token_ids": one["token_ids"],
            "log_probs": [None if isnan(value) else value for value in one["log_probs"]],
        }
        for one in row.get("sequences") or [row]
    ]


def _response(row: dict[str, Any], rule: Rule, token_texts: TokenTexts | None) -> dict[str, Any]:
    """What the page holds of one; `starts` tells where each of several sequences begins."""
    parts = [_from_first_sampled(one) if n == 0 else one for n, one in enumerate(row["sequences"])]
    log_probs = [value for part in parts for value in part["log_probs"]]
    length, given = len(log_probs), log_probs.count(None)
    sampled = [[value is not None for value in part["log_probs"]] for part in parts]
    response: dict[str, Any] = {
        "sample": row["sample"],
        "outcome": row["outcome"],
        "reward": row["reward"],
        "length": length - given,
        "truncated": row["truncated"],
    }
    if given:
        turns = sum(sum(now and not before for before, now in pairwise([False, *one])) for one in sampled)
        response |= {"given": given, "turns": turns}
    start, left_out = rule.gap(length)
    if token_texts is None:  # the text is cut where the tokens would be, in proportion
        text = row["text"]
        head, tail = (len(text) * place // max(length, 1) for place in (start, start + left_out))
        response |= {"tokens": [text[:head], text[tail:]], "log_probs": []}
        return response | ({"cut_at": 1, "cut": left_out} if left_out else {})
    texts = [text for part in parts for text in token_texts(part["token_ids"])]
    values = [None if value is None else round(value, 2) for value in log_probs]
    end = start + left_out
    response |= {"tokens": texts[:start] + texts[end:], "log_probs": values[:start] + values[end:]}
    if len(parts) > 1:
        begins = [0, *accumulate(len(part["token_ids"]) for part in parts[:-1])]
        response["starts"] = [min(place, start) if place < end else place - left_out for place in begins]
    return response | ({"cut_at": start, "cut": left_out} if left_out else {})


def _from_first_sampled(sequence: dict[str, Any]) -> dict[str, Any]:
    """Without its prompt, which the page shows apart."""
    values = sequence["log_probs"]
    first = next((place for place, value in enumerate(values) if value is not None), len(values))
    return {"token_ids": sequence["token_ids"][first:], "log_probs": values[first:]}
