"""Methods that shape rewards or guide, against their papers' formulas: loss and gradient, in fp64.

Each of a method's options changes the loss, and faults that are planted in its file are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.testing import check_method
from tests.guided import BAR, LIMIT, TEMPERATURE, Said, Step, a_group, a_method, an_episode, planted
from tests.unit.one_rank import one_rank

Formula = Callable[[list[list[Said]]], Tensor]

SOLUTION = Guide(response="a solution", name="solution")


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def surrogate(said: Said, advantage: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    """Of each token, to be minimised."""
    return -torch.minimum(said.ratio * advantage, said.ratio.clamp(1 - low, 1 + high) * advantage)


def k3(said: Said) -> Tensor:
    return (said.reference - said.log_prob).exp() - (said.reference - said.log_prob) - 1


def standardised(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / deviation if deviation > 1e-9 else 0.0 for value in values]


def mean_of_responses(losses: Sequence[Tensor]) -> Tensor:
    """Over each response's tokens, then over responses."""
    return torch.stack([loss.mean() for loss in losses]).mean()


def grpo_like(
    of_group: Callable[[list[Said]], tuple[list[Said], list[float]]], o: dict[str, Any], beta: float
) -> Formula:
    """GRPO's objective of the responses that count in a group, and their advantages."""

    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            for said, advantage in zip(*of_group(group), strict=True):
                value = surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2))
                losses.append(value + o.get("divergence_coefficient", beta) * k3(said))
        return mean_of_responses(losses)

    return paper


def rewards(group: Sequence[Said]) -> list[float]:
    return [float(said.scored.reward or 0.0) for said in group]


# Hybrid post-training


def hpt_groups() -> list[Group]:
    return [
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(1, 2), an_episode(0, 9), solution="s"),
        a_group(*(an_episode(0, n) for n in (4, 2, 7, 3)), an_episode(0, 11, SOLUTION), number=1),
        a_group(an_episode(0, 4), an_episode(1, 2), an_episode(0, 6), an_episode(0, 3), number=2),
        a_group(*(an_episode(0, n) for n in (1, 5, 2, 3)), an_episode(1, 2, SOLUTION), number=3),
    ]


def hpt(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            if len(group) == 5:
                losses.append(-o.get("sft_coefficient", 1.0) * group[4].log_prob.mean())
                continue
            mean = sum(rewards(group)) / 4
            own = [
                surrogate(said, r - mean, o.get("clip_low", 0.2), o.get("clip_high", 0.2)).sum()
                for said, r in zip(group, rewards(group), strict=True)
            ]
            losses.append(torch.stack(own).sum() / (4 * LIMIT))
        return torch.stack(losses).mean()

    return paper


# A share of the solution


def hinted(ratio: float) -> Guide:
    return Guide(question=f"1+1 hint {ratio:g}", keeps_prompt=True, name=f"hint of {ratio:g}")


def ghpo_groups() -> list[Group]:
    failed = [an_episode(0, n) for n in (3, 5, 2, 6)]
    quarter = [an_episode(0, n, hinted(0.25)) for n in (2, 2, 4, 5)]
    half = [an_episode(float(n == 4), n, hinted(0.5)) for n in (2, 4, 3, 6)]
    return [
        a_group(*failed, *quarter, *half, solution="s"),
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(1, 2), an_episode(0, 9), number=1),
        a_group(*failed, *quarter, number=2),
    ]


def ghpo(o: dict[str, Any]) -> Formula:
    return grpo_like(lambda group: (group[-4:], standardised(rewards(group[-4:]))), o, 0.04)


# Length and form


def open_rs_groups() -> list[Group]:
    def one(right: float, tokens: int, form: float) -> Any:
        return an_episode(right, tokens, form=form)

    return [
        a_group(one(1, 3, 1), one(0, 5, 0), one(1, 12, 1), one(0, 16, 1)),
        a_group(one(0, 1, 1), one(0, 9, 1), one(0, 4, 0), one(0, 2, 0), number=1),
    ]


def open_rs(o: dict[str, Any]) -> Formula:
    def of_group(group: list[Said]) -> tuple[list[Said], list[float]]:
        earned = []
        for said in group:
            kind = "correct" if said.scored.reward == 1 else "wrong"
            default = {"correct_short": 1.0, "correct_long": 0.5, "wrong_short": 0.0, "wrong_long": -0.5}
            short, long = (o.get(f"{kind}_{end}", default[f"{kind}_{end}"]) for end in ("short", "long"))
            progress = min(len(said.log_prob) / o.get("cosine_tokens", LIMIT), 1.0)
            cosine = long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))
            form = said.scored.verification.facts["form"] if "format_fact" in o else 0.0
            earned.append(o.get("cosine_weight", 2.0) * cosine + o.get("format_weight", 1.0) * form)
        return group, standardised(earned)

    return grpo_like(of_group, o, 0.04)


# Agreement


def empo_groups() -> list[Group]:
    def group(*answers: str | None, number: int) -> Group:
        return a_group(*(an_episode(0, n + 2, answer=a) for n, a in enumerate(answers)), number=number)

    return [
        group("4", "4", "5", "4 ", number=0),  # of entropy 0.56
        group("4", "5", "4", None, number=1),  # 1.04
        group("4", "5", "6", "7", number=2),  # ln 4
        group("4", "4", "4", "4", number=3),  # 0
        group("4", "5", "4", "5", number=4),  # ln 2
    ]


def empo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        shares = [[0.75, 0.75, 0.25, 0.75], [0.5, 0.25, 0.5, 0.0], None, None, [0.5] * 4]
        entropies = [0.5623, 1.0397, math.log(4), 0.0, math.log(2)]
        low, high = o.get("entropy_low", 0.0), o.get("entropy_high", math.log(4))
        losses = []
        for group, own, entropy in zip(groups, shares, entropies, strict=True):
            if own is not None and low < entropy < high:
                for said, advantage in zip(group, standardised(own), strict=True):
                    value = surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2))
                    losses.append(value + o.get("divergence_coefficient", 0.0) * k3(said))
        return mean_of_responses(losses)

    return paper


# Budgets


def hbpo_groups() -> list[Group]:
    def one(right: float, tokens: int, budget: int) -> Any:
        return an_episode(right, tokens, Guide(begins=f"{budget}", name=str(budget)))

    return [
        a_group(one(1, 3, 4), one(1, 7, 4), one(1, 5, 8), one(0, 12, 8)),
        a_group(one(0, 3, 4), one(0, 4, 4), one(0, 5, 8), one(0, 2, 8), number=1),
        a_group(one(1, 9, 4), one(0, 4, 4), one(1, 16, 8), one(1, 2, 8), number=2),
    ]


def hbpo(o: dict[str, Any]) -> Formula:
    def worth(tokens: float) -> float:
        return o.get("scale", 4.0) * math.cos(math.pi * tokens / (2 * LIMIT))

    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            earned = []
            for said in group:
                tokens, budget = len(said.log_prob), int(said.scored.guide.name)
                value = worth(tokens) - o.get("deviation", 1 / 4096) * abs(tokens - budget)
                earned.append(min(value, worth(budget)) if said.scored.reward else 0.0)
            between = standardised(earned)
            for place, said in enumerate(group):
                first = 2 * (place // 2)
                within = sum(earned[first : first + 2]) / 2 - worth(int(said.scored.guide.name))
                losses.append(surrogate(said, between[place] + within, o.get("clip_low", 0.2)))
        return torch.cat(losses).mean()

    return paper


# The weakest hint that helps


def scaf_groups() -> list[Group]:
    def told(name: str) -> Guide:
        return Guide(question=f"1+1 {name}", keeps_prompt=True, name=name)

    failed = [an_episode(0, n) for n in (3, 5, 2, 6)]
    hints = [an_episode(float(n > 3), n, told(f"h {n}")) for n in (2, 4, 7)]
    return [
        a_group(*failed, *hints),
        a_group(*failed, an_episode(0, 4, told("h")), number=1),
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(1, 2), an_episode(0, 9), number=2),
    ]


def scaf_grpo(o: dict[str, Any]) -> Formula:
    def of_group(group: list[Said]) -> tuple[list[Said], list[float]]:
        chosen = [*group[:3], group[5]] if len(group) == 7 else group[:4]
        return chosen, standardised(rewards(chosen))

    return grpo_like(of_group, o, 0.0)


# Refinements under a critique


REFINED = Guide(question="refine", name="refinement")


def critique_groups() -> list[Group]:
    return [
        a_group(
            *(an_episode(float(n > 4), n, text=f"r{n}") for n in (3, 5, 2, 6)),
            *(an_episode(float(n > 2), n, REFINED) for n in (2, 4, 7, 1)),
        ),
        a_group(
            *(an_episode(0, n) for n in (3, 5, 2, 6)),
            *(an_episode(0, n, REFINED) for n in (2, 4, 7, 1)),
            number=1,
        ),
    ]


def critique_grpo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        (first, second), gamma = groups, o.get("shaping", 0.1)
        k = o.get("refinements", 1)
        losses = []
        for initial, refined in (
            (first[:4], [first[5], first[6], first[4]][:k]),
            (second[:4], second[4 : 4 + k]),
        ):
            mean = sum(rewards([*initial, *refined])) / (4 + k)
            losses += [-(s.ratio * (r - mean)).sum() for s, r in zip(initial, rewards(initial), strict=True)]
            for said, r in zip(refined, rewards(refined), strict=True):
                x = said.log_prob.exp()
                losses.append(-(x / (x + gamma) * (r - mean)).sum())
        return torch.stack(losses).sum() / (len(losses) * LIMIT)

    return paper


# Explanations


def expo_groups() -> list[Group]:
    explained = Guide(question="explain", name="explanation")
    return [
        a_group(
            *(an_episode(0, n) for n in (3, 5, 2, 6)),
            *(an_episode(float(n == 4), n, explained) for n in (2, 4)),
        ),
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(1, 2), an_episode(0, 9), number=1),
    ]


def expo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        beta, losses = o.get("divergence_coefficient", 0.04), []
        for group in groups:
            for said, advantage in zip(group[:4], standardised(rewards(group[:4])), strict=True):
                value = surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2))
                losses.append(value + beta * k3(said))
        explanation = groups[0][5]
        likelihood = -o.get("explanation_coefficient", 0.1) * explanation.log_prob
        return mean_of_responses([*losses, likelihood + beta * k3(explanation)])

    return paper


# Behind examples


def icpo_groups() -> list[Group]:
    steered = Guide(question="examples", name="behind examples")
    return [
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(0, 2), an_episode(1, 9, steered)),
        a_group(an_episode(1, 4), an_episode(0, 3), an_episode(0, 2), an_episode(0, 6, steered), number=1),
    ]


def icpo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        earned = [[1.0, 0.0, 0.0, 1.0 + o.get("bonus", 0.1)], [1.0, 0.0, 0.0]]
        for group, own in zip(groups, earned, strict=True):
            for said, advantage in zip(group, standardised(own), strict=False):
                if said.scored.guide.question is None:
                    losses.append(surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2)))
                    continue
                x = (said.log_prob - said.engine).exp()
                losses.append(-x / (x + o.get("shaping", 0.01)) * advantage)
        return mean_of_responses(losses)

    return paper


# Teachers


def teacher(number: int) -> Guide:
    return Guide(response=f"t{number}", name=f"teacher {number}")


def ampo_groups() -> list[Group]:
    failed = [an_episode(0, n) for n in (3, 5, 2, 6)]
    taught = [an_episode(float(n != 4), n, teacher(n)) for n in (7, 4, 2, 3)]
    return [
        a_group(*failed, *taught),
        a_group(an_episode(1, 3), an_episode(0, 5), an_episode(1, 2), an_episode(0, 9), number=1),
        a_group(*failed, an_episode(0, 4, teacher(0)), number=2),
    ]


def ampo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        k, losses = o.get("replaced", 1), []
        for group in groups:
            right = [said for said in group[4:] if said.scored.reward == 1]
            likely = sorted(right, key=lambda said: -float(said.old.mean()))[:k]
            mixed = [*group[: 4 - len(likely)], *likely]
            for said, advantage in zip(mixed, standardised(rewards(mixed)), strict=True):
                if said.scored.guide.response is None:
                    losses.append(surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2)))
                    continue
                x = said.log_prob.exp()
                losses.append(-x / (x + o.get("shaping", 0.1)) * advantage)
        return mean_of_responses(losses)

    return paper


# Probes


def rex_groups() -> list[Group]:
    probe = Guide(begins="cut", name="probe")
    return [
        a_group(
            *(an_episode(float(n > 4), n, text=f"r{n}") for n in (3, 5, 2, 6)),
            an_episode(1, 4, probe),
            an_episode(0, 2, probe),
        ),
        a_group(*(an_episode(1, n) for n in (3, 5, 2)), an_episode(0, 4), number=1),
    ]


def rex_rag(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group, alpha in zip(groups, (2 / 6, 0.0), strict=True):
            for said, advantage in zip(group, standardised(rewards(group)), strict=True):
                mixture = said.old.exp() * (1.0 if said.scored.guide.begins else 1 - alpha)
                v = said.log_prob.exp() / mixture
                bounded = v.clamp(1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2))
                losses.append(-torch.minimum(v * advantage, bounded * advantage))
        return torch.cat(losses).mean()

    return paper


# Rewordings


def clpo_groups() -> list[Group]:
    def asked(name: str) -> Guide:
        return Guide(question="reworded", keeps_prompt=True, name=name)

    return [
        a_group(
            *(an_episode(float(n > 5), n) for n in (3, 5, 2, 6)),
            an_episode(0, 4, asked("rewording"), text="new"),
            *(an_episode(float(n > 3), n, asked("reworded")) for n in (3, 5, 2, 6)),
        ),
        a_group(*(an_episode(float(n > 3), n) for n in (3, 5, 2, 6)), number=1),
        a_group(an_episode(0, 3), an_episode(0, 2), an_episode(0, 7), an_episode(0, 5), number=2),
    ]


def clpo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group, rate in zip(groups, (0.25, 0.5, 0.0), strict=True):
            beta = o.get("divergence_coefficient", 0.04) if rate <= o.get("hard", 0.3) else 0.0
            for part in (group[:4], group[5:]):
                for said, advantage in zip(part, standardised(rewards(part)) if part else [], strict=True):
                    value = surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2))
                    losses.append(value + beta * k3(said))
        return mean_of_responses(losses)

    return paper


# Where uncertainty falls


def xrpo_groups() -> list[Group]:
    return [
        a_group(*(an_episode(float(n > 2), n, text=f"r{n}") for n in (3, 5, 2, 6, 1))),
        a_group(*(an_episode(float(n > 5), n) for n in (3, 5, 6)), number=1),
        a_group(an_episode(0, 3), an_episode(0, 2), number=2),
    ]


def xrpo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            likely = [float(said.engine.mean()) for said in group]
            advantages = standardised(rewards(group))
            for said, own, advantage in zip(group, likely, advantages, strict=True):
                if said.scored.reward == 1 and advantage > 0:
                    rarity = math.exp(sum(likely) / len(likely) - own) - 1
                    bonus = max(o.get("sharpening", 0.5) * rarity, 0.0)
                    advantage += min(bonus, o.get("largest_bonus", 0.5) * advantage)
                losses.append(surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2)))
        return mean_of_responses(losses)

    return paper


# Another temperature

TEMPERED = Guide(temperature=1.2 * TEMPERATURE, name="tempered")


def aepo_groups() -> list[Group]:
    return [
        a_group(*(an_episode(float(n == 2), n) for n in (3, 2, 5, 4)), an_episode(1, 6, TEMPERED)),
        a_group(*(an_episode(0, n) for n in (3, 2, 5, 4)), an_episode(1, 3, TEMPERED), number=1),
        a_group(*(an_episode(float(n > 3), n) for n in (3, 2, 5, 4)), an_episode(0, 7, TEMPERED), number=2),
    ]


def aepo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            plain, tempered = group[:4], group[4]
            for said, advantage in zip(plain, standardised(rewards(plain)), strict=True):
                losses.append(surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2)))
            if tempered.scored.reward:
                losses.append(-o.get("reinforce_coefficient", 1.0) * tempered.log_prob)
        return torch.cat(losses).mean()

    return paper


# Modes


def forced(mode: str) -> Guide:
    return Guide(begins=mode, name=mode)


def apo_groups() -> list[Group]:
    def forced_ones(*right: float) -> list[Any]:
        modes = [mode for mode in ("<instant>", "<reasoning>", "<agentic>") for _ in range(2)]
        return [
            an_episode(r, n + 1, forced(mode)) for n, (r, mode) in enumerate(zip(right, modes, strict=True))
        ]

    def free(right: float, text: str) -> Any:
        return an_episode(right, len(text), text=text)

    return [
        a_group(*forced_ones(1, 0, 1, 0, 1, 1), free(1, "<instant> 2"), free(1, "<agentic> 2"), free(1, "2")),
        a_group(*forced_ones(0, 0, 1, 0, 1, 1), free(1, "<reasoning>"), free(0, "<instant>"), number=1),
    ]


def apo(o: dict[str, Any]) -> Formula:
    modes = o.get("modes", ["<instant>", "<reasoning>", "<agentic>"])

    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            named = [said.scored.guide.name or said.scored.episode.answer for said in group]
            instant = [
                r for r, said in zip(rewards(group), group, strict=True) if said.scored.guide.name == modes[0]
            ]
            p = sum(instant) / len(instant)
            dear = 1 - p ** o.get("power", 2.0) if p > o["easy_rate"] else 1.0
            paid = [
                r * (1.0 if name.startswith(modes[0]) else dear if name.startswith(tuple(modes)) else 0.0)
                for r, name in zip(rewards(group), named, strict=True)
            ]
            for said, advantage in zip(group, standardised(paid), strict=True):
                losses.append(surrogate(said, advantage, o.get("clip_low", 0.2), o.get("clip_high", 0.2)))
        return torch.cat(losses).mean()

    return paper


# Turns


def dialogue(right: float | None, *turns: int, after: tuple[int, int] | None = None) -> Any:
    return an_episode(right, 2, Guide(after=after) if after else Guide(), turns=turns)


def arpo_groups() -> list[Group]:
    return [
        a_group(
            dialogue(1, 2, 3, 1),
            dialogue(0, 4),
            dialogue(0, 2, 2, after=(0, 1)),
            dialogue(1, 2, 3, 4, 1, after=(0, 2)),
        ),
        a_group(dialogue(0, 3, 3), dialogue(0, 5), dialogue(1, 3, 2, after=(0, 1)), number=1),
    ]


def arpo(o: dict[str, Any]) -> Formula:
    # Of each episode's turns, those that have them.
    sharing = [
        [[[0, 2, 3], [0, 3], [0]], [[1]], [[0, 2, 3], [2]], [[0, 2, 3], [0, 3], [3], [3]]],
        [[[0, 2], [0]], [[1]], [[0, 2], [2]]],
    ]

    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group, those in zip(groups, sharing, strict=True):
            own = standardised(rewards(group))
            for number, (said, turns) in enumerate(zip(group, those, strict=True)):
                of_turns = [
                    sum(own[n] for n in with_it) / len(with_it) if o.get("shared") == "hard" else own[number]
                    for with_it in turns
                ]
                losses.append(by_turn(said, of_turns, o))
        return torch.cat(losses).mean()

    return paper


def by_turn(said: Said, advantages: Sequence[float], o: dict[str, Any]) -> Tensor:
    lengths = torch.tensor([n for s in said.scored.episode.sequences for n in s.turns])
    each = torch.tensor(advantages, dtype=torch.float64).repeat_interleave(lengths)
    clipped = said.ratio.clamp(1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2))
    return -torch.minimum(said.ratio * each, clipped * each)


def igpo_groups() -> list[Group]:
    def told(number: int, turn: int) -> Any:
        return an_episode(0, 2 + turn, Guide(after=(number, turn), response="2", name="answer"))

    return [
        a_group(
            dialogue(1, 2, 3, 1),
            dialogue(0, 4),
            dialogue(0, 2, 2),
            dialogue(1, 5),
            *(told(*place) for place in ((0, 0), (0, 1), (0, 2), (2, 1))),
        ),
        a_group(dialogue(0, 3), dialogue(1, 5), dialogue(1, 1), dialogue(0, 2), number=1),
        a_group(
            dialogue(0, 1),
            dialogue(None, 3, 1),
            dialogue(0, 2, 4),
            dialogue(0, 1),
            *(told(*place) for place in ((1, 0), (1, 1), (2, 1))),
            number=2,
        ),
    ]


def igpo(o: dict[str, Any]) -> Formula:
    def paper(groups: list[list[Said]]) -> Tensor:
        losses = []
        for group in groups:
            p = {said.scored.guide.after: said.old.mean().exp().item() for said in group[4:]}
            start = next((value for (_, turn), value in p.items() if turn == 0), 0.0)  # type: ignore[misc]
            earned: list[list[float]] = []
            for number, said in enumerate(group[:4]):
                turns = [n for s in said.scored.episode.sequences for n in s.turns]
                told = [start, *(p[number, turn] for turn in range(1, len(turns)))]
                gains = [after - before for before, after in pairwise(told)]
                known = said.scored.reward is not None
                earned.append([*gains, said.scored.reward] if known else [])  # type: ignore[list-item]
            compared = iter(standardised([reward for own in earned for reward in own]))
            for said, own in zip(group[:4], earned, strict=True):
                values = [next(compared) for _ in own]
                following = [
                    sum(value * o.get("discount", 1.0) ** k for k, value in enumerate(values[t:]))
                    for t in range(len(values))
                ]
                if following:
                    losses.append(by_turn(said, following, o))
        return torch.cat(losses).mean()

    return paper


@dataclass(frozen=True)
class Case:
    """A method's proof.

    Attributes:
        formula: of the options.
        faults: texts of the method's file, and what stands there in a faulty one.
        base: options that others are added to.
        responses: to a prompt.
    """

    formula: Callable[[dict[str, Any]], Formula]
    groups: Callable[[], list[Group]]
    faults: Sequence[tuple[str, str]]
    base: dict[str, Any] | None = None
    responses: int = 4


CLIPS: list[dict[str, Any]] = [{"clip_low": 0.02}, {"clip_high": 0.03}]
# Each changes the loss. Named as the test of options names their sections.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "algorithm:hpt": [{"sft_coefficient": 0.3}, *CLIPS],
    "algorithm:ghpo": [{"divergence_coefficient": 0.1}, *CLIPS],
    "algorithm:open_rs": [
        {"correct_short": 0.25},
        {"correct_long": 0.25},
        {"wrong_short": 0.25},
        {"wrong_long": 0.25},
        {"cosine_tokens": 9},
        {"format_fact": "form"},
        {"cosine_weight": 0.5, "format_fact": "form"},
        {"format_fact": "form", "format_weight": 3.0},
        {"divergence_coefficient": 0.1},
        *CLIPS,
    ],
    "algorithm:empo": [
        {"entropy_low": 0.6},
        {"entropy_high": 1.0},
        {"divergence_coefficient": 0.1},
        *CLIPS,
    ],
    "algorithm:hbpo": [{"scale": 2.0}, {"deviation": 0.1}, CLIPS[0]],
    "algorithm:scaf_grpo": [{"divergence_coefficient": 0.1}, *CLIPS],
    "algorithm:critique_grpo": [{"shaping": 0.5}, {"refinements": 2}, {"refinements": 3}],
    "algorithm:expo": [{"explanation_coefficient": 0.7}, {"divergence_coefficient": 0.1}, *CLIPS],
    "algorithm:icpo": [{"shaping": 0.5}, {"bonus": 0.6}, *CLIPS],
    "algorithm:ampo": [{"replaced": 2}, {"replaced": 3}, {"shaping": 0.5}, *CLIPS],
    "algorithm:rex_rag": CLIPS,
    "algorithm:clpo": [{"hard": 0.2}, {"divergence_coefficient": 0.3}, *CLIPS],
    "algorithm:xrpo": [{"sharpening": 0.2}, {"largest_bonus": 0.1}, *CLIPS],
    "algorithm:aepo": [{"reinforce_coefficient": 0.5}, *CLIPS],
    "algorithm:apo": [
        {"easy_rate": 0.6},
        {"power": 1.0},
        {"modes": ["<reasoning>", "<instant>", "<agentic>"], "power": 3.0},
        *CLIPS,
    ],
    "algorithm:arpo": [{"shared": "soft"}, *CLIPS],
    "algorithm:igpo": [{"discount": 0.5}, *CLIPS],
}
CASES = {
    "hpt": Case(
        hpt,
        hpt_groups,
        [
            ("unit / one", "1 / one"),
            ("0.0 if one.guide == PLAIN", "0.0 if one.guide != PLAIN"),
            ("(one.guide != PLAIN) if flag", "(one.guide == PLAIN) if flag"),
            ("self._prompts * self", "self"),
        ],
    ),
    "ghpo": Case(
        ghpo,
        ghpo_groups,
        [
            ("group.episodes[-1].guide", "group.episodes[0].guide"),
            ("rewards_of(groups, self._last(groups))", "rewards_of(groups, super().choose(groups))"),
        ],
    ),
    "open_rs": Case(
        open_rs,
        open_rs_groups,
        [
            ("0.5 * (short", "0.4 * (short"),
            ("np.cos", "np.sin"),
            ("right, o.correct_short", "~right, o.correct_short"),
        ],
    ),
    "empo": Case(
        empo,
        empo_groups,
        [
            ("/ counts.total()", "- counts.total()"),
            ("answer.strip()", "answer"),
            ("if isinstance(answer, str) else 0.0", ""),
        ],
    ),
    "hbpo": Case(
        hbpo,
        hbpo_groups,
        [
            ("- self._worth(budget)", ""),
            ("np.minimum", "np.maximum"),
            ("kept, worth), 0.0", "kept, worth), -1.0"),
            ("2 * self.configured", "self.configured"),
        ],
        base={"budgets": [4, 8]},
    ),
    "scaf_grpo": Case(
        scaf_grpo,
        scaf_groups,
        [
            ("flags[helped[0]]", "flags[helped[-1]]"),
            ("flags[sum(flags) - 1], ", "_, "),
            ("and solved(one)]", "]"),
        ],
    ),
    "critique_grpo": Case(
        critique_grpo,
        critique_groups,
        [
            ("centred(", "0.5 * centred("),
            ("key=lambda place: not solved", "key=lambda place: solved"),
            ("PolicyGradient(1.0, math.inf)", "PolicyGradient(0.02, 0.02)"),
            ('aggregation = "constant"', 'aggregation = "token_mean"'),
        ],
    ),
    "expo": Case(
        expo,
        expo_groups,
        [
            ("(one.guide != PLAIN and solved(one))", "True"),
            ("float(one.guide != PLAIN)", "1.0"),
            ("rewards_of(groups, [[one.guide == PLAIN", "rewards_of(groups, [[solved(one) is not None"),
        ],
    ),
    "icpo": Case(
        icpo,
        icpo_groups,
        [
            ("over_engine=True", "over_engine=False"),
            ("or solved(one)", "or True"),
            ("bonus * np.array", "0.5 * bonus * np.array"),
            ("1.0 - self._steps", "0.5 - self._steps"),
        ],
    ),
    "ampo": Case(
        ampo,
        ampo_groups,
        [
            ("-means[n]", "means[n]"),
            ("row[n] / lengths[n]", "row[n]"),
            ("return weights / total if total > 0 else weights", "return weights"),
            ("own[: len(own) - len(taught)]", "own"),
            ("row[place] = row[taught[0]]", "row[place] = 1.0"),
        ],
    ),
    "rex_rag": Case(
        rex_rag,
        rex_groups,
        [
            ('- token.marks["mixture"]', '+ token.marks["mixture"]'),
            ("if flag else 0.0", "if not flag else 0.0"),
        ],
    ),
    "clpo": Case(
        clpo,
        clpo_groups,
        [
            ('_of(groups, "", "reworded")', '_of(groups, "", "reworded", "rewording")'),
            ("float(success_rate(group) <=", "float(success_rate(group) >="),
            ('for name in ("", "reworded"):', 'for name in ("",):'),
        ],
    ),
    "xrpo": Case(
        xrpo,
        xrpo_groups,
        [
            ("- likely) - 1.0", "+ likely) - 1.0"),
            ("if solved(one) and row[place] > 0", "if row[place] > -9"),
            ("min(bonus,", "max(bonus,"),
        ],
    ),
}


CASES |= {
    "aepo": Case(
        aepo,
        aepo_groups,
        [
            ("one.guide != PLAIN and solved(one)", "one.guide != PLAIN"),
            ("rewards_of(groups, _plain(groups))", "rewards_of(groups, [[True] * 5] * 3)"),
            ("chosen or self._is_reinforced(one)", "chosen"),
        ],
    ),
    "apo": Case(
        apo,
        apo_groups,
        [
            ("1.0 - p**", "1.0 + p**"),
            ("one.guide.name == o.modes[0]", "one.guide.name"),
            ("0.0 if mode is None else", "1.0 if mode is None else"),
            ("answer.lstrip()", "answer[1:]"),
        ],
        base={"forced": 2, "easy_rate": 0.4},
        responses=9,
    ),
    "arpo": Case(
        arpo,
        arpo_groups,
        [
            ("turn < after[1]", "turn <= after[1]"),
            ("sum(values) / len(values)", "sum(values)"),
            ("(after[0], turn)", "(after[0], 0)"),
        ],
        base={"shared": "hard"},
    ),
    "igpo": Case(
        igpo,
        igpo_groups,
        [
            ("log_prob / one.episode.trained_tokens", "log_prob"),
            ("b - a for", "a - b for"),
            ("following = float(value) +", "following = float(value) -"),
            ("number if turn else _ANY, turn)) for", "_ANY, turn)) for"),
            ("one.guide == PLAIN for", "True for"),
        ],
    ),
}


def the_step(name: str, options: dict[str, Any], method: type[Method] | None = None) -> Step:
    case = CASES[name]
    chosen = {**(case.base or {}), **options}
    return Step(a_method(name, case.responses, method=method, **chosen), GROUPS[name])


GROUPS = {name: case.groups() for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_papers_and_each_option_changes_them(name: str) -> None:
    case, losses, changes = CASES[name], set(), OPTIONS[f"algorithm:{name}"]
    for options in [{}, *changes]:
        step = the_step(name, options)
        assert step.apart(case.formula({**(case.base or {}), **options})) < BAR, options
        losses.add(round(step.loss, 9))
    assert len(losses) == 1 + len(changes), "an option changes nothing"


@pytest.mark.parametrize("name", CASES)
def test_grpo_in_its_place_is_found(name: str) -> None:
    case = CASES[name]
    step = Step(a_method("grpo", case.responses), GROUPS[name])
    assert step.apart(case.formula(case.base or {})) > 1e-4


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in CASES for fault in CASES[name].faults])
def test_a_fault_in_its_file_is_found(name: str, fault: tuple[str, str]) -> None:
    case = CASES[name]
    step = the_step(name, {}, planted(name, *fault))
    assert not step.apart(case.formula(case.base or {})) < 1e-6


# What is asked for, and what is made of it where a group is odd


def wanted(method: Method, *groups: Group) -> list[list[str]]:
    """The guides' names, "plain", or what they begin with."""
    return [[guide.name or guide.begins or "plain" for guide in guides] for guides in method.ask(groups)]


def failed(*guides: Guide, count: int = 4, **columns: Any) -> Group:
    """A group in which all failed: so many plain ones, and those of the guides."""
    return a_group(
        *(an_episode(0, 3) for _ in range(count)), *(an_episode(0, 3, g) for g in guides), **columns
    )


def test_hpt_asks_for_the_solution_where_too_few_are_right() -> None:
    half = a_group(an_episode(1, 3), an_episode(1, 3), an_episode(0, 3), an_episode(None, 3), solution="s")
    groups = [a_group(solution="s"), failed(solution="s"), failed(), failed(solution=" "), half]
    assert wanted(a_method("hpt"), *groups) == [["plain"] * 4, ["solution"], [], [], []]
    assert wanted(a_method("hpt", gate=0.7), half) == [["solution"]]
    assert wanted(a_method("hpt", gate=0.6), half) == [[]], "an unknown reward is not a failure"
    assert wanted(a_method("hpt"), failed(SOLUTION, solution="s")) == [[]]
    other = a_method("hpt", solution_field="proof")
    assert other.columns == ["proof"]
    assert other.ask([failed(proof="QED")])[0] == [Guide(response="QED", name="solution")]


def test_ghpo_tells_more_of_the_solution_as_long_as_all_fail() -> None:
    method = a_method("ghpo", hint_ratios=[0.25, 1.0], hint_prompt="|")
    text = "12345678"
    first, second = (
        Guide(question=f"1+1|{hint}", keeps_prompt=True, name=name)
        for hint, name in (("12", "hint of 0.25"), (text, "hint of 1"))
    )
    assert method.ask([a_group(solution=text)])[0] == [Guide()] * 4
    assert method.ask([failed(solution=text)])[0] == [first] * 4
    assert method.ask([failed(*[first] * 4, solution=text)])[0] == [second] * 4
    assert method.ask([failed(*[first] * 4, *[second] * 4, solution=text)])[0] == []
    right = a_group(an_episode(1, 3), *(an_episode(0, 3) for _ in range(3)), solution=text)
    assert wanted(method, right, failed()) == [[], []]
    assert a_method("ghpo", solution_field="proof").columns == ["proof"]


def test_hbpo_announces_each_budget_to_as_many() -> None:
    method = a_method("hbpo", budgets=[4, 8], announcement="<think> {budget}:")
    assert [guide.begins for guide in method.ask([a_group()])[0]] == ["<think> 4:"] * 2 + ["<think> 8:"] * 2
    assert method.ask([failed()])[0] == []
    for options, said in (
        ({"budgets": [4, 8, 9]}, "does not divide"),
        ({"announcement": "x"}, "has no {budget}"),
    ):
        with pytest.raises(ValueError, match=said):
            a_method("hbpo", **options)


def test_scaf_grpo_tells_each_part_of_each_hint_after_the_exemption() -> None:
    method = a_method(
        "scaf_grpo", hint_fields=["weak", "strong"], hint_parts=2, hint_prompt="|", exemption_steps=1
    )
    group = failed(weak="1234", strong="abcd")
    assert wanted(method, a_group(), group) == [["plain"] * 4, []]
    method.advantages([group])
    names = ["weak 1/2", "weak 2/2", "strong 1/2", "strong 2/2"]
    assert wanted(method, group, failed(strong="ab"), failed()) == [names, names[2:], []]
    asked = method.ask([group])[0]
    assert [guide.question for guide in asked] == ["1+1|12", "1+1|1234", "1+1|ab", "1+1|abcd"]
    assert all(guide.keeps_prompt for guide in asked)
    right = a_group(an_episode(1, 3), *(an_episode(0, 3) for _ in range(3)), weak="1234")
    assert wanted(method, right, failed(*asked, weak="1234")) == [[], []]
    assert method.columns == ["weak", "strong"]
    assert method.state() == {"steps": 1}


def test_critique_grpo_refines_each_response_under_a_critique() -> None:
    options: dict[str, Any] = {"refine_prompt": "{question}/{solution}/{critique}{x}"}
    group = a_group(an_episode(1, 3, text="{critique}"), an_episode(0, 3, text="b"), an_episode(None, 3))
    asked = a_method("critique_grpo", **options).ask([group])[0]
    assert [guide.question for guide in asked] == [
        "1+1/{critique}/The generated solution is correct, the ground truth is 2.{x}",
        "1+1/b/The generated solution is incorrect, the ground truth is 2.{x}",
    ]
    assert not any(guide.keeps_prompt for guide in asked)
    simple = a_method("critique_grpo", critique="simple", refine_prompt="{critique}").ask([group])[0]
    assert simple[1].question == "The generated solution is incorrect."
    assert a_method("critique_grpo").ask([failed(REFINED)]) == [[]]
    assert a_method("critique_grpo").reads_responses


def test_expo_has_answers_explained_that_all_missed() -> None:
    method = a_method("expo", explanations=2, explain_prompt="{question} is {answer}")
    right = a_group(an_episode(1, 3), an_episode(0, 3))
    explained = Guide(question="1+1 is 2", name="explanation")
    assert method.ask([failed(), right, failed(explained)]) == [[explained] * 2, [], []]
    without = replace(failed(), problem=replace(failed().problem, answer=""))
    assert method.ask([without]) == [[]]


def test_icpo_shows_examples_to_some_and_its_bonus_fades() -> None:
    method = a_method("icpo", examples="2+2=4;3+3=6;", guided_responses=2)
    steered = Guide(question="2+2=4;3+3=6;1+1", name="behind examples")
    assert method.ask([a_group()]) == [[Guide()] * 2 + [steered] * 2]
    assert method.ask([failed()]) == [[]]
    with pytest.raises(ValueError, match="guided_responses = 4 leaves none of"):
        a_method("icpo", guided_responses=4)
    fading, groups = a_method("icpo", bonus=1.0, bonus_steps=2), GROUPS["icpo"]
    seen = [float(fading.advantages(groups)[0][3]) for _ in range(4)]
    assert seen[0] > seen[1] > seen[2] == seen[3]
    assert seen[:3] == pytest.approx([standardised([1, 0, 0, 1 + bonus])[3] for bonus in (1.0, 0.5, 0.0)])


def test_ampo_asks_teachers_where_all_failed() -> None:
    method, texts = a_method("ampo"), ["a", " ", "b", 3]
    right = a_group(an_episode(1, 3), an_episode(0, 3), teacher_responses=texts)
    asked = method.ask([failed(teacher_responses=texts), right, failed(), failed(teacher_responses="a")])
    assert [[guide.response for guide in guides] for guides in asked] == [["a", "b"], [], [], []]
    assert method.ask([failed(asked[0][0], teacher_responses=texts)]) == [[]]
    other = a_method("ampo", teachers_field="experts")
    assert other.columns == ["experts"]
    assert wanted(other, failed(experts=["a"])) == [["teacher 0"]]


def test_rex_rag_continues_the_first_wrong_responses_after_a_phrase() -> None:
    method = a_method("rex_rag", probes=0.5, kept=0.75, phrases=["?", "!"])
    wrong = [an_episode(0, 3, text=text) for text in ("abcd", "efgh", "ijkl")]
    group = a_group(an_episode(1, 3, text="mnop"), *wrong, an_episode(None, 3))
    assert [guide.begins for guide in method.ask([group])[0]] == ["abc?", "efg!"]
    assert method.ask([failed(Guide(begins="ab?", name="probe"))]) == [[]]
    assert a_method("rex_rag", probes=0.0).ask([group]) == [[]]


def test_clpo_has_problems_reworded_that_are_not_easy_and_answers_them() -> None:
    prompts = {"simplify_prompt": "S {answer}: {question}", "reword_prompt": "R {answer}: {question}"}
    method = a_method("clpo", **prompts)

    def rate(right: int) -> Group:
        return a_group(*(an_episode(float(n < right), 3) for n in range(4)))

    asked = method.ask([rate(1), rate(2), rate(3)])
    questions = [[guide.question for guide in guides] for guides in asked]
    assert questions == [["S 2: 1+1"], ["R 2: 1+1"], []]
    assert a_method("clpo", medium=0.8, **prompts).ask([rate(3)])[0][0].question == "R 2: 1+1"
    reworded = replace(
        rate(1), episodes=(*rate(1).episodes, an_episode(0, 3, asked[0][0], text=" one and one "))
    )
    again = Guide(question="one and one", keeps_prompt=True, name="reworded")
    assert method.ask([reworded]) == [[again] * 4]
    silent = replace(reworded, episodes=(*rate(1).episodes, an_episode(0, 3, asked[0][0], text=" ")))
    done = replace(reworded, episodes=(*reworded.episodes, an_episode(0, 3, again)))
    assert method.ask([silent, done]) == [[], []]


def test_xrpo_samples_most_where_it_is_uncertain() -> None:
    method = a_method("xrpo", responses=8, rounds=2, exploration=0.0)
    assert [len(guides) for guides in method.ask([a_group(), a_group()])] == [4, 4]
    mixed = a_group(*(an_episode(float(n < 2), 3) for n in range(4)))
    assert [len(guides) for guides in method.ask([failed(), mixed])] == [0, 4]
    later = replace(mixed, episodes=mixed.episodes * 3)
    assert [len(guides) for guides in method.ask([failed(), later])] == [0, 0], "the budget is spent"
    equal = a_method("xrpo", responses=8, rounds=1, exploration=9.0).ask([failed(), mixed])
    assert [len(guides) for guides in equal] == [4, 4]
    few = a_method("xrpo", responses=8, base=0.25).ask([a_group()])
    assert len(few[0]) == 2
    # A wide interval makes the uncertain prompt gain more; a narrow one leaves it to who has few responses.
    narrow, wide = (
        a_method("xrpo", responses=8, rounds=8, exploration=0.4, confidence=c) for c in (0.1, 0.95)
    )
    small = a_group(an_episode(0, 3), an_episode(0, 3), an_episode(0, 3))
    assert [len(guides) for guides in narrow.ask([small, mixed])] == [1, 0]
    assert [len(guides) for guides in wide.ask([small, mixed])] == [0, 1]


def test_xrpo_puts_solved_problems_in_front_of_those_that_never_were() -> None:
    method = a_method("xrpo", responses=8, seeds=1)
    assert set(method.ask([failed()])[0]) == {Guide()}, "there is no seed yet"
    solved = [
        a_group(an_episode(1, 3, text=q), an_episode(0, 3), question=q, number=n) for n, q in enumerate("ab")
    ]
    method.advantages(solved)
    seeded = Guide(question="b\nb\n\n1+1", keeps_prompt=True, name="seeded")
    assert set(method.ask([failed()])[0]) == {seeded}
    resumed = a_method("xrpo", responses=8, seeds=1)
    resumed.restore(method.state())
    assert resumed.ask([failed()]) == method.ask([failed()])
    assert set(a_method("xrpo", responses=8, seeds=0).ask([failed()])[0]) == {Guide()}


def test_aepo_samples_flatter_below_the_target_entropy_and_sharper_above_it() -> None:
    method = a_method(
        "aepo", tempered_responses=2, target_entropy=0.3, high_temperature=1.5, low_temperature=0.5
    )
    asked = []
    for entropy in (0.3, 0.31):
        asked.append(method.ask([a_group(), failed()]))
        method.learn({"loss/entropy": entropy})
    asked.append(method.ask([a_group(), failed()]))
    for (wanted_ones, enough), times in zip(asked, (1.5, 1.5, 0.5), strict=True):
        assert wanted_ones == [Guide()] * 4 + [Guide(temperature=times * TEMPERATURE, name="tempered")] * 2
        assert enough == []
    again = a_method("aepo", target_entropy=0.3)
    again.restore(method.state())
    assert again.ask([a_group()])[0][-1].temperature == 0.8 * TEMPERATURE


def test_aepo_leaves_a_truncated_response_out_where_that_is_asked_for() -> None:
    cut = an_episode(1, 3, TEMPERED, truncated=True)
    group = a_group(*(an_episode(float(n == 1), n) for n in (1, 2)), cut)
    for masks in (False, True):
        assert a_method("aepo", responses=2, mask_truncated=masks).choose([group])[0][2] is not masks


def test_apo_forces_each_mode_and_leaves_the_rest_free() -> None:
    method = a_method("apo", modes=["<a>", "<b>"], forced=2, responses=5)
    assert method.ask([a_group()])[0] == [forced("<a>")] * 2 + [forced("<b>")] * 2 + [Guide()]
    assert method.ask([failed()])[0] == []
    for options, said in (
        ({"forced": 2}, r"forced = 2 of 3 modes leaves none of rollout.responses_per_prompt = 4 free"),
        ({"modes": ["<a>", " "]}, r"modes has ' ', which no response can be told by"),
    ):
        with pytest.raises(ValueError, match=said):
            a_method("apo", **options)


def test_arpo_branches_where_entropy_rose_and_samples_the_rest_whole() -> None:
    def of_entropies(*turns: float) -> Any:
        one = dialogue(0, *(2 for _ in turns))
        [sequence] = one.episode.sequences
        sequence.log_probs[sequence.sampled] = np.repeat([-h for h in turns], 2)
        return one

    group = a_group(of_entropies(1.0, 0.5, 9.0), of_entropies(1.0), of_entropies(1.0, 9.0))
    certain = {"branch_probability": 0.5, "entropy_weight": 10.0, "whole": 0.5}
    rises = [Guide(after=(2, 1), name="branch"), Guide(after=(0, 2), name="branch")]
    assert a_method("arpo", 6, **certain).ask([a_group()])[0] == [Guide()] * 3
    assert a_method("arpo", 6, **certain).ask([group])[0] == [*rises, Guide()]
    assert a_method("arpo", 4, **(certain | {"whole": 0.75})).ask([group])[0] == rises[:1]
    twice = a_method("arpo", 12, **(certain | {"whole": 0.25}), branches=2)
    assert twice.ask([group])[0] == [g for g in rises for _ in range(2)] + [Guide()] * 5
    first_token = a_method("arpo", 6, **certain, entropy_tokens=1)
    [sequence] = group.episodes[0].episode.sequences
    sequence.log_probs[np.flatnonzero(sequence.sampled)[-1]] = -99.0  # not the first of its turn
    assert first_token.ask([group])[0] == [*rises, Guide()]
    whole = a_group(*group.episodes, *(dialogue(0, 2) for _ in range(3)))
    assert a_method("arpo", 6).ask([whole])[0] == []


def test_arpo_draws_by_the_tokens() -> None:
    """About half of the turns branch where entropy does not matter, and the same ones each time."""
    group = a_group(*(dialogue(0, 1, 1) for _ in range(200)))
    method = a_method("arpo", 400, entropy_weight=0.0)
    [wanted_ones] = method.ask([group])
    branches = [guide for guide in wanted_ones if guide.after]
    assert 70 < len(branches) < 130
    assert method.ask([group])[0] == wanted_ones
    never = a_method("arpo", 400, entropy_weight=0.0, branch_probability=0.0)
    assert set(never.ask([group])[0]) == {Guide()}


def test_igpo_asks_for_the_answer_after_each_turn_but_the_last() -> None:
    def told(number: int, turn: int) -> Guide:
        return Guide(after=(number, turn), response="so 2", name="answer")

    method = a_method("igpo", told="so {answer}")
    assert method.ask([a_group()])[0] == [Guide()] * 4
    group = a_group(dialogue(0, 4), dialogue(0, 1, 2, 3), dialogue(1, 1, 2))
    wanted_ones = [told(1, 0), told(1, 1), told(1, 2), told(2, 1)]
    assert method.ask([group])[0] == wanted_ones
    assert method.ask([a_group(*group.episodes, an_episode(0, 2, wanted_ones[0]))])[0] == []
    assert method.ask([a_group(dialogue(0, 4))])[0] == []
    nothing = replace(group, problem=replace(group.problem, answer=" "))
    assert method.ask([nothing])[0] == []


def test_hbpo_pays_what_announces_no_budget_by_its_length() -> None:
    group = a_group(an_episode(1, 4), an_episode(1, 8), an_episode(0, 2), an_episode(0, 2))
    earned = [4 * math.cos(math.pi * n / (2 * LIMIT)) for n in (4, 8)] + [0.0, 0.0]
    own, mean = a_method("hbpo").advantages([group])[0], sum(earned) / 4
    assert own.tolist() == pytest.approx([a + mean for a in standardised(earned)])


def test_empo_calls_for_other_groups_in_place_of_those_it_leaves_out() -> None:
    groups = GROUPS["empo"]
    assert [a_method("empo").teaches(group) for group in groups] == [True, True, False, False, True]
    assert not a_method("empo").teaches(failed(count=1)), "one answer agrees with itself"


def test_groups_without_variance_are_those_of_the_episodes_that_count() -> None:
    """What is learnt of a failed group by other means than comparison stays."""
    learnt = {"hpt": [False] * 4 + [True], "expo": [False] * 4 + [False, True], "ghpo": [False] * 8}
    quarter = [an_episode(0, n, hinted(0.25)) for n in (2, 2, 4, 5)]
    groups = {
        "hpt": GROUPS["hpt"][1],
        "expo": GROUPS["expo"][0],
        "ghpo": a_group(*(an_episode(float(n > 2), n) for n in (1, 5, 2, 6)), *quarter),
    }
    for name, kept in learnt.items():
        chosen = a_method(name, groups_without_variance="drop").choose([groups[name]])
        assert [list(row) for row in chosen] == [kept], name


ODD: dict[str, Group] = {
    "one response": a_group(an_episode(0, 3)),
    "all right": a_group(*(an_episode(1, n) for n in (1, 2, 3, 4))),
    "all wrong": failed(),
    "one empty": a_group(an_episode(0, 1, answer=None), *(an_episode(1, 3, answer="2") for _ in range(3))),
    "one truncated": a_group(an_episode(0, LIMIT, truncated=True), *(an_episode(1, 3) for _ in range(3))),
    "one unknown": a_group(an_episode(None, 3), *(an_episode(float(n), 3) for n in (0, 1, 1))),
    "all unknown": a_group(*(an_episode(None, 3) for _ in range(4))),
    "rewards beyond 0 and 1": a_group(*(an_episode(r, 3) for r in (-1.0, 0.5, 1.0, 2.5))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("odd", ODD)
def test_odd_groups_give_finite_losses(name: str, odd: str) -> None:
    """A group that cannot be compared teaches nothing by comparison, beside one that does."""
    case = CASES[name]
    step = Step(a_method(name, case.responses, **(case.base or {})), [ODD[odd], GROUPS[name][0]])
    assert math.isfinite(step.loss)
    own = step.samples[: len(ODD[odd].episodes)]
    for sample, reward in zip(own, ODD[odd].rewards, strict=True):
        assert np.isfinite(sample.advantage).all()
        assert reward is not None or (sample.token_weight == 0.0 and not np.any(sample.advantage))
    if odd == "all unknown" or (odd in ("one response", "all right", "all wrong") and name not in PAID_ALONE):
        assert not any(np.any(sample.advantage) for sample in own)


# Their rewards hang on more than whether a response is right, or compare a group with something else.
PAID_ALONE = {"open_rs", "hbpo"}


@pytest.mark.parametrize("name", CASES)
def test_it_is_sound_under_every_layout(name: str) -> None:
    case = CASES[name]
    check_method(METHODS[name], case.base, groups=GROUPS[name])
