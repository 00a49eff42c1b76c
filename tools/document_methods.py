"""Writes the tables of docs/methods.md, of the methods' files and of what they make of a few groups.

python tools/document_methods.py            # writes them
python tools/document_methods.py --check    # whether they are current
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.described import described, example
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.terms.term import AtToken, Need
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.testing.made_up import a_group, a_problem

PAGE = Path(__file__).parents[1] / "docs/methods.md"
VOCABULARY = 128
TOKENS = 4  # of a response
# Of every sampled token: half of the policy's probability, a quarter of the reference's.
PROBABILITY, OF_REFERENCE, ENTROPY, DIVERGENCE = 0.5, 0.25, 1.0, 0.1


def list_of_methods() -> str:
    """Name, paper, what each changes and needs, and its own hooks."""
    lines = [
        "| name | paper | what it changes | needs beside samples and rewards | its own hooks |",
        "|---|---|---|---|---|",
    ]
    for one in map(described, METHODS):
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else ""
        hooks = ", ".join(f"`{hook}`" for hook in one.hooks)
        cells = (f"`{one.name}`", paper, one.changes, ", ".join(one.needs), hooks)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def told(group: Group, method: Method, columns: Mapping[str, Any] | None = None) -> Group:
    """With the facts and columns that a method reads, and answers: the first half's are all the same.

    Responses begin as a method that reads them asks for.
    """
    if columns is None:
        columns = {name: "5" if name != "base_success" else 0.5 for name in method.columns}
    problem = replace(group.problem, columns=columns)
    asked = list(method.ask([Group(problem, ())])[0]) + [PLAIN] * len(group.episodes)
    episodes = []
    for number, one in enumerate(group.episodes):
        facts = dict.fromkeys(method.facts, float(number + 1))
        answer = "5" if number < len(group.episodes) / 2 else str(number)
        begun = method.reads_responses and asked[number].begins
        verification = replace(one.verification, extracted=answer, facts=facts)
        episodes.append(replace(one, verification=verification, guide=asked[number] if begun else PLAIN))
    return replace(group, problem=problem, episodes=tuple(episodes))


def pull(
    method: Method, groups: Sequence[Group], columns: Mapping[str, Any] | None = None
) -> list[list[float]]:
    """How a step's first update pulls at log π of each response's tokens, their mean, times all tokens.

    −∂ loss / ∂ log π, where the loss is a mean: of a policy gradient that is the advantage.
    """
    groups = [told(group, method, columns) for group in groups]
    seen = groups if method.reads_responses else [group.brief() for group in groups]
    [samples] = make_samples(seen, method, VOCABULARY, len(groups))
    counts = [sample.sequence.sampled_tokens for sample in samples]

    def of_tokens(values: Sequence[Any]) -> Tensor:
        parts = [np.broadcast_to(value, count) for value, count in zip(values, counts, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float64))

    def all_tokens(value: float) -> Tensor:
        return torch.full((sum(counts),), value, dtype=torch.float64)

    log_prob, entropy = all_tokens(PROBABILITY).log().requires_grad_(), all_tokens(ENTROPY)
    old = log_prob.detach()
    tokens = Annotated(
        weights=of_tokens([sample.token_weight for sample in samples]),
        advantages=of_tokens([sample.advantage for sample in samples]),
        phi=of_tokens([sample.phi for sample in samples]),
        positions=torch.cat([torch.arange(count) for count in counts]),
        engine_log_probs=old,
        old_log_probs=old,
        old_entropies=entropy,
        tempered_log_probs=old,
        reference_log_probs=all_tokens(OF_REFERENCE).log(),
        marks={name: of_tokens([sample.marks[name] for sample in samples]) for name in samples[0].marks},
        log_probs=old,
        entropies=entropy,
        of_all_ranks=lambda values: values,
    )
    weights = method.weigh(tokens)
    marks = {**tokens.marks, **method.mark_tokens(tokens)}
    needed = {need: all_tokens(DIVERGENCE) for need in Need}
    needed |= dict.fromkeys((Need.IMPORTANCE, Need.SEQUENCE_IMPORTANCE), all_tokens(1.0))
    needed[Need.SEQUENCE_LOG_RATIO] = all_tokens(0.0)
    needed[Need.REFERENCE_LOG_PROB] = needed[Need.FLATTENED_LOG_PROB] = all_tokens(OF_REFERENCE).log()
    token = AtToken(
        log_prob,
        entropy,
        old,
        old,
        tokens.advantages,
        tokens.phi,
        tokens.positions,
        marks=marks,
        **{need.value: needed[need] for need in method.needs},
    )
    value = torch.stack([coefficient * term(token)[0] for coefficient, term in method.terms()]).sum(0)
    loss = (weights * value).sum()
    gradient = torch.zeros_like(log_prob)
    if loss.requires_grad and len(log_prob):
        gradient = torch.autograd.grad(loss, log_prob)[0]
    # A response's sequences are one after the other.
    pulls = iter((-gradient * sum(counts)).split(counts))
    return [
        [float(torch.cat([next(pulls) for _ in one.episode.sequences]).nanmean()) for one in group.episodes]
        for group in groups
    ]


def effects() -> str:
    """Of two groups of four responses."""
    lines = ["| method | the right one | the failed ones beside it | where all failed |", "|---|---|---|---|"]
    for name in METHODS:
        group, failed = (
            a_group(1.0, 0.0, 0.0, 0.0),
            a_group(0.0, 0.0, 0.0, 0.0, problem=replace(a_problem("1+1="), id="1")),
        )
        try:
            (right, *others), alone = pull(example(name, responses=4), [group, failed])
        except RapoError:
            continue  # what it learns from is not of these groups
        numbers = (_number(right), _range(others), _range(alone))
        lines.append(f"| `{name}` | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0").replace("0.00", "0")


def _range(values: Sequence[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def empty(one: ScoredEpisode) -> ScoredEpisode:
    """It without a sampled token."""
    assert isinstance(one.episode, Episode)
    sequence = one.episode.sequences[0]
    kept = ~sequence.sampled
    bare = replace(
        sequence,
        token_ids=sequence.token_ids[kept],
        sampled=sequence.sampled[kept],
        log_probs=sequence.log_probs[kept],
        versions=sequence.versions[kept],
    )
    return replace(one, episode=replace(one.episode, sequences=(bare,)))


def _with_last(group: Group, change: Callable[[ScoredEpisode], ScoredEpisode]) -> Group:
    return replace(group, episodes=(*group.episodes[:-1], change(group.episodes[-1])))


def truncated(one: ScoredEpisode) -> ScoredEpisode:
    """It, cut at a limit."""
    assert not isinstance(one.episode, BriefEpisode)
    return replace(one, episode=replace(one.episode, truncated=True))


MIXED = a_group(1.0, 0.0, 0.0, 0.0)
BAD = {
    "one response": a_group(1.0),
    "all right": a_group(1.0, 1.0, 1.0, 1.0),
    "all wrong": a_group(0.0, 0.0, 0.0, 0.0),
    "one empty": _with_last(MIXED, empty),
    "one truncated": _with_last(MIXED, truncated),
    "one unknown": a_group(1.0, 0.0, 0.0, None),
    "a reward of 2": a_group(2.0, 0.0, 0.0, 0.0),
    "a reward of −1": a_group(-1.0, 0.0, 0.0, 1.0),
}


def bad_groups() -> str:
    """What each method makes of them."""
    lines = [f"| method | {' | '.join(BAD)} | no solution |", f"|---|{'---|' * (len(BAD) + 1)}"]
    for name in METHODS:
        cells = [_learns(name, group) for group in BAD.values()]
        cells.append(_learns(name, MIXED, {}) if example(name).columns else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _learns(name: str, group: Group, columns: Mapping[str, Any] | None = None) -> str:
    """Which responses pull at their own tokens; or that it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of the deviation of one reward
            [pulls] = pull(example(name, responses=4), [group], columns)
    except RapoError:
        return "refused"
    learnt = [not np.isnan(value) and abs(value) > 1e-9 for value in pulls]
    if all(learnt):
        return "all"
    return f"{sum(learnt)} of {len(learnt)}" if any(learnt) else "none"


TABLES = {"methods": list_of_methods, "effects": effects, "bad groups": bad_groups}


def render(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in TABLES.items():
        begins, ends = f"<!-- {name}: tools/document_methods.py -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begins)
        _, ended, after = rest.partition(ends)
        if not (found and ended):
            raise SystemExit(f"{PAGE} has no place for {name}: {begins.strip()} … {ends}")
        page = f"{before}{begins}\n{table()}\n\n{ends}{after}"
    return page


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page is not current")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    current = render(page)
    if options.check:
        return int(page != current)
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
