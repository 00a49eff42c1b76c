"""What papers say of their methods' losses, in plain PyTorch on whole logits, and a step to say it of.

Nothing of `megatron_rapo.methods` is used here; `tests/unit/test_zoo.py` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tests.zoo import LIMIT, Case, One

EPISODES = [
    [
        One(1.0, [[3, 2]], "a", {"calls": 1.0, "rubrics": 0.5}),
        One(0.0, [[2], [4]], "b", {"calls": 3.0, "rubrics": 1.0}),
        One(1.0, [[1, 3]], "c", {"calls": 2.0, "rubrics": 0.25}),
        One(0.25, [[2]], None, {"calls": 3.0, "rubrics": 0.0}, truncated=True),
    ],
    [
        One(0.0, [[1]], "d", {"calls": 7.0, "rubrics": 0.0}),
        One(1.0, [[5], [3], [1]], "d", {"calls": 0.0, "rubrics": 0.75}),
        One(0.0, [[4]], "e", {"calls": 6.0, "rubrics": 0.5}),
        One(0.5, [[2, 1]], "f", {"calls": 4.0, "rubrics": 0.5}),
    ],
    [
        One(0.0, [[3]], "g", {"calls": 1.0, "rubrics": 0.5}),
        One(0.0, [[2]], "g", {"calls": 0.0, "rubrics": 0.5}),
        One(0.0, [[1, 2]], None, {"calls": 2.0, "rubrics": 0.5}),
        One(0.0, [[2]], "h", {"calls": 0.0, "rubrics": 0.5}),
    ],
]
COLUMNS = [
    {"base_success": 0.5, "other": 0.9},
    {"base_success": 1.0, "other": 0.2},
    {"base_success": 0.0, "other": 0.0},
]


def a_case() -> Case:
    """With a second count of calls, `searches`."""
    counted = [
        [replace(one, facts={**one.facts, "searches": 2.0 * one.tokens}) for one in group]
        for group in EPISODES
    ]
    return Case(counted, COLUMNS)


# What formulas have in common.


def ppo(case: Case, advantage: Tensor, low: Any = 0.2, high: Any = 0.2, dual: float | None = None) -> Tensor:
    """−min(w A, clip(w) A) of each token, at least c A from below where A < 0."""
    ratio = case.ratio
    bounds = [torch.as_tensor(bound, dtype=torch.float64) for bound in (1 - low, 1 + high)]
    clipped = torch.maximum(torch.minimum(ratio, bounds[1]), bounds[0])
    value = torch.minimum(ratio * advantage, clipped * advantage)
    if dual is not None:
        value = torch.where(advantage < 0, torch.maximum(value, dual * advantage), value)
    return -value


def clip_of(o: Any) -> dict[str, Any]:
    return {"low": o.clip_low, "high": o.clip_high, "dual": o.clip_dual}


def by_group(case: Case, values: list[float]) -> list[Tensor]:
    """Values of all episodes, a tensor a group."""
    sizes = [len(group) for group in case.episodes]
    return list(torch.tensor(values, dtype=torch.float64).split(sizes))


def standard(case: Case, rewards: list[float] | None = None) -> list[float]:
    """(r − mean) / std of each episode; 0 in groups of one reward."""
    found: list[float] = []
    for group in by_group(case, rewards or case.rewards):  # type: ignore[arg-type]
        spread = group.std()
        found += ((group - group.mean()) / spread if spread > 1e-9 else 0 * group).tolist()
    return found


def spread(case: Case, values: list[float]) -> Tensor:
    """To each episode's tokens."""
    return torch.tensor(values, dtype=torch.float64)[case.episode]


def mean(losses: Tensor, kept: Tensor | None = None) -> Tensor:
    """Over tokens; of those that are kept."""
    return losses.mean() if kept is None else losses[kept].mean()


def sums(case: Case, values: Tensor) -> list[Tensor]:
    """Of each episode's tokens, a tensor a group."""
    total = torch.stack([values[case.episode == number].sum() for number in range(len(case.flat))])
    return list(total.split([len(group) for group in case.episodes]))


def untruncated(case: Case) -> Tensor:
    return ~torch.tensor([one.truncated for one in case.flat])[case.episode]


def facts(case: Case, name: str) -> list[float]:
    return [one.facts[name] for one in case.flat]


# The formulas.


def bapo(case: Case, o: Any) -> Tensor:
    advantage, ratio = spread(case, standard(case)), case.ratio.detach()

    def share(low: float, high: float) -> float:
        value = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        return float(value[advantage > 0].sum() / value.abs().sum())

    low, high = o.lowest_ratio, o.highest_ratio
    while share(low, high) < o.positive_share and high < o.highest_ratio_limit:
        high = min(high + o.highest_ratio_step, o.highest_ratio_limit)
    while share(low, high) < o.positive_share and low < o.lowest_ratio_limit:
        low = min(low + o.lowest_ratio_step, o.lowest_ratio_limit)
    return mean(ppo(case, advantage, 1 - low, high - 1))


def hapo(case: Case, o: Any) -> Tensor:
    lengths, found = [float(one.tokens) for one in case.flat], []
    for rewards, own, plain in zip(
        by_group(case, case.rewards),
        by_group(case, lengths),
        by_group(case, standard(case)),
        strict=True,  # type: ignore[arg-type]
    ):
        per_token = rewards.repeat_interleave(own.long())
        deviation = per_token.std(correction=0)
        of_tokens = (rewards - per_token.mean()) / deviation if deviation > 1e-9 else 0 * rewards
        found += (plain if (of_tokens.abs() >= 5).any() else of_tokens).tolist()
    advantage = spread(case, found)
    logs = case.entropy(case.old_logits).log()
    pivot = logs.sort().values[round(o.entropy_pivot * (len(logs) - 1))]
    apart = logs - pivot
    h = torch.where(apart > 0, apart / apart.max(), apart / apart.min().abs())
    low = o.clip_low * torch.where(h <= 0, 1 - o.clip_alpha * h, torch.ones_like(h))
    high = o.clip_high * torch.where(h > 0, 1 + o.clip_alpha * h, torch.ones_like(h))
    ratio = case.ratio.detach()
    near = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    changed = torch.where(h > 0, ~near, near)
    advantage = torch.where(changed, advantage * (1 + o.advantage_beta * h), advantage)
    return mean(ppo(case, advantage, low, high, o.clip_dual))


def d3s(case: Case, o: Any, steps: int = 0) -> Tensor:
    grown = min(1.0, steps / o.relax_steps)
    samples = o.sample_share + (1 - o.sample_share) * grown
    tokens = o.token_share + (1 - o.token_share) * grown
    chosen: list[bool] = []
    for rewards in by_group(case, case.rewards):  # type: ignore[arg-type]
        size = math.ceil(samples * len(rewards))
        best = max(
            combinations(range(len(rewards)), size), key=lambda s: float(rewards[list(s)].var(correction=0))
        )
        chosen += [number in best for number in range(len(rewards))]
    advantage = spread(case, standard(case))
    kept = torch.tensor(chosen)[case.episode]
    score = torch.where(kept, advantage.abs() * case.entropy(case.old_logits), -1.0)
    left = score.sort(descending=True).values[math.ceil(tokens * int(kept.sum())) - 1]
    return mean(ppo(case, advantage, **clip_of(o)), score >= left)


def capo(case: Case, o: Any) -> Tensor:
    advantage = spread(case, standard(case))
    apart = torch.nn.functional.one_hot(case.targets, case.old_logits.size(1)) - case.old_logits.softmax(-1)
    moved = (advantage * apart.square().sum(-1)) ** 2
    order = moved.argsort(descending=True)
    kept = torch.ones_like(moved, dtype=torch.bool)
    kept[order[: math.floor(o.rejected_share * len(moved))]] = False
    return mean(ppo(case, advantage, **clip_of(o)), kept)


def dcpo(case: Case, o: Any, entropy: float | None = None) -> Tensor:
    plain = spread(case, standard(case))
    if entropy is None:
        return mean(ppo(case, plain, **clip_of(o)))
    temperature = o.high_temperature if entropy <= o.target_entropy else o.low_temperature
    right = [float(reward > 0) for reward in case.rewards]  # type: ignore[operator]
    alpha = min(abs(o.target_entropy - entropy), o.largest_weight) / (sum(right) / len(right))
    alpha = alpha / (1 + alpha)
    rho = (case.at_targets(case.old_logits / temperature) - case.old_log_prob).exp()
    return mean(ppo(case, (1 - alpha) * plain + alpha * spread(case, right) * rho, **clip_of(o)))


def riskpo(case: Case, o: Any, quantiles: tuple[float, float] | None = None) -> Tensor:
    groups = by_group(case, case.rewards)  # type: ignore[arg-type]
    bundles = [groups[start : start + o.bundle_prompts] for start in range(0, len(groups), o.bundle_prompts)]
    earned = [torch.stack(own).sum(0) * o.bundle_prompts / len(own) for own in bundles]
    everything = torch.cat(earned)
    low, high = quantiles or [float(everything.quantile(level)) for level in (o.lower_level, o.upper_level)]
    gains = [-o.tail_weight * (low - r).clamp(min=0) - (high - r).clamp(min=0) for r in earned]
    centre = torch.cat(gains).mean()
    advantage = torch.cat([g - centre for g, own in zip(gains, bundles, strict=True) for _ in own])
    return mean(ppo(case, advantage[case.episode], **clip_of(o)))


def polychromic(case: Case, o: Any) -> Tensor:
    found: list[float] = []
    for group in case.episodes:
        scores: dict[tuple[int, ...], float] = {}
        for members in combinations(range(len(group)), o.set_size):
            answers = [group[n].answer for n in members]
            texts = {f"text {answer}" for answer in answers}
            different = len(texts) if o.diversity == "texts" else len(set(answers) - {None})
            scores[members] = sum(group[n].reward for n in members) / o.set_size * different / o.set_size  # type: ignore[misc]
        overall = sum(scores.values()) / len(scores)
        for number in range(len(group)):
            own = [score for members, score in scores.items() if number in members]
            found.append(sum(own) / len(own) - overall)
    return mean(ppo(case, spread(case, found), **clip_of(o)))


def copg_contrasts(case: Case, o: Any) -> Tensor:
    shaped = [
        rewards - o.beta * ratio
        for rewards, ratio in zip(
            by_group(case, case.rewards),
            sums(case, case.log_prob - case.reference_log_prob),
            strict=True,  # type: ignore[arg-type]
        )
    ]
    return torch.cat([torch.stack([(own - r).sum() / (len(r) - 1) for own in r]) for r in shaped])


def copg(case: Case, o: Any) -> Tensor:
    contrast = copg_contrasts(case, o).detach()[case.episode]
    return -(contrast * case.log_prob).sum() / (len(case.flat) * LIMIT)


def zero_success(case: Case, o: Any) -> Tensor:
    advantage = standard(case)
    log_probs, place = torch.cat(sums(case, case.old_log_prob)), 0
    for group in case.episodes:
        for one in group:
            if all(other.reward == 0 for other in group):
                sure = math.exp(float(log_probs[place]) / one.tokens)
                advantage[place] = -o.penalty * min(sure / (1 - sure), o.largest_odds)
            place += 1
    return mean(ppo(case, spread(case, advantage), **clip_of(o)))


def epo(case: Case, o: Any, history: tuple[float, ...] = ()) -> Tensor:
    entropy, k = case.entropy(case.logits), len(history)
    loss = ppo(case, spread(case, standard(case)), **clip_of(o)) - o.entropy_coefficient * entropy
    if history:
        usual = sum(history) / k
        below = (o.band_low * usual - entropy).clamp(min=0)
        above = (entropy - o.band_high * usual).clamp(min=0)
        x = min(2 * k / o.schedule_steps, 2)
        weight = 1 - 0.2 * (1 - math.exp(-2 * x)) if x <= 1 else 0.8 * math.exp(-3 * (x - 1))
        loss = loss + o.entropy_coefficient * o.smoothing * weight * (below + above)
    return mean(loss)


def forward_kl(case: Case) -> Tensor:
    q, policy = case.reference_logits.log_softmax(-1), case.logits.log_softmax(-1)
    return (q.exp() * (q - policy)).sum(-1)


def reverse_kl(case: Case) -> Tensor:
    q, policy = case.reference_logits.log_softmax(-1), case.logits.log_softmax(-1)
    return (policy.exp() * (policy - q)).sum(-1)


def jensen_shannon(case: Case) -> Tensor:
    q, policy = case.reference_logits.softmax(-1), case.logits.softmax(-1)
    middle = (q + policy) / 2
    return ((q * (q / middle).log()).sum(-1) + (policy * (policy / middle).log()).sum(-1)) / 2


def dph_rl(case: Case, o: Any) -> Tensor:
    rates = torch.tensor([group.problem[o.base_success_column] for group in case.groups])
    mastered = (rates >= o.mastered_rate)[case.group]
    divergence = {"forward": forward_kl, "jensen_shannon": jensen_shannon}[o.divergence](case)
    learnt = ppo(case, spread(case, standard(case)), **clip_of(o))
    return mean(torch.where(mastered, o.divergence_coefficient * divergence, learnt))


def sage(case: Case, o: Any) -> Tensor:
    entropy = case.entropy(case.logits).detach()
    guide = (1 + o.guide_ratio * torch.relu(entropy - o.entropy_threshold)).clamp(max=o.guide_maximum)
    rho = guide * (case.reference_log_prob - case.log_prob).exp()
    loss = ppo(case, spread(case, standard(case)), **clip_of(o)) + o.divergence_coefficient * (
        rho - rho.log() - 1
    )
    own = [loss[case.episode == number].mean() for number in range(len(case.flat))]
    return torch.stack(own).mean()


def mara(case: Case, o: Any) -> Tensor:
    rewards: list[float] = []
    for own, log_probs in zip(by_group(case, case.rewards), sums(case, case.reference_log_prob), strict=True):  # type: ignore[arg-type]
        good = [n for n in range(len(own)) if own[n] >= o.threshold]
        z = max(good, key=lambda n: float(log_probs[n]), default=0)
        rewards += [
            float(own[z] + o.beta * (log_probs[z] - log_probs[n])) if n in good else float(own[n])
            for n in range(len(own))
        ]
    apart = case.log_prob - case.reference_log_prob
    estimate = {"k1": apart, "k2": apart**2 / 2, "k3": (-apart).exp() + apart - 1}[o.divergence]
    return mean(ppo(case, spread(case, standard(case, rewards)), **clip_of(o)) + o.beta * estimate)


def matched_entropy(case: Case, o: Any, entropies: tuple[float, ...] = ()) -> Tensor:
    beta = o.entropy_coefficient
    for measured in entropies:
        beta = min(max(beta + o.gain * (o.target_entropy - measured), 0), o.entropy_coefficient_limit)
    loss = ppo(case, spread(case, standard(case)), **clip_of(o)) - beta * case.entropy(case.logits)
    return mean(loss + o.divergence_coefficient * forward_kl(case))


def matched_kl(case: Case, o: Any, measured: tuple[dict[str, float], ...] = ()) -> Tensor:
    alpha = o.divergence_coefficient
    for kl in measured:
        alpha *= math.exp(o.gain * max(-1.0, min(1.0, kl[o.measure] / o.target - 1)))
    divergence = {"forward": forward_kl, "reverse": reverse_kl}[o.direction](case)
    return mean(ppo(case, spread(case, standard(case)), **clip_of(o)) + alpha * divergence)


def aspo(case: Case, o: Any) -> Tensor:
    found: list[float] = []
    for group, plain in zip(case.episodes, by_group(case, standard(case)), strict=True):
        calls = [
            n for n, one in enumerate(group) if one.reward > 0 and plain[n] > 0 and len(one.turns[0]) > 1
        ]  # type: ignore[operator]
        first = {n: group[n].turns[0][0] for n in calls}
        for number, advantage in enumerate(plain.tolist()):
            if number in calls:
                usual = sum(first.values()) / len(calls)
                length = sum(group[n].tokens for n in calls) / len(calls)
                bonus = o.shaping * (first[number] - usual) / length
                advantage += min(max(bonus, -o.bound * advantage), o.bound * advantage)
            found.append(advantage)
    return mean(ppo(case, spread(case, found), **clip_of(o)))


def otc(case: Case, o: Any, fewest: Mapping[int, int] | None = None) -> Tensor:
    rewards: list[float] = []
    for number, group in enumerate(case.episodes):
        right = [one.facts[o.calls_fact] for one in group if one.reward > 0]  # type: ignore[operator]
        n = min([*right, *([fewest[number]] if fewest else [])], default=None)
        for one in group:
            m, factor = one.facts[o.calls_fact], 1.0
            if n == 0:
                factor = math.cos(m * math.pi / (2 * m + o.smoothing)) if m else 1.0
            elif n is not None:
                factor = math.sin(2 * n * m / (m + n) * math.pi / (2 * n))
            rewards.append(one.reward * factor)  # type: ignore[operator]
    return mean(ppo(case, spread(case, standard(case, rewards)), **clip_of(o)))


def tapo(case: Case, o: Any) -> Tensor:
    rewards = [
        reward - o.call_penalty * max(0.0, calls - o.call_limit)  # type: ignore[operator]
        for reward, calls in zip(case.rewards, facts(case, o.calls_fact), strict=True)
    ]
    losses = ppo(case, spread(case, standard(case, rewards)), **clip_of(o))
    return mean(losses, untruncated(case) if o.mask_truncated else None)


def eapo(case: Case, o: Any) -> Tensor:
    found: list[float] = []
    for group in case.episodes:
        rounds = [
            (one.reward * o.discount ** (len(one.turns) - 1 - t), sum(turns))  # type: ignore[operator]
            for one in group
            for t, turns in enumerate(one.turns)
        ]
        rewards = torch.tensor([reward for reward, _ in rounds], dtype=torch.float64)
        deviation = rewards.std()
        for reward, tokens in rounds:
            found += [float((reward - rewards.mean()) / deviation) if deviation > 1e-9 else 0.0] * tokens
    return mean(ppo(case, torch.tensor(found, dtype=torch.float64), **clip_of(o)))


def c_grpo(case: Case, o: Any) -> Tensor:
    rewards: list[float] = []
    for group in case.episodes:
        most = max(one.facts[o.rubric_fact] for one in group) or 1.0
        rewards += [
            one.reward * ((1 - o.rubric_weight) + o.rubric_weight * one.facts[o.rubric_fact] / most)  # type: ignore[operator]
            for one in group
        ]
    return mean(ppo(case, spread(case, standard(case, rewards)), **clip_of(o)))


CLIP = [{"clip_low": 0.02}, {"clip_high": 0.02}, {"clip_dual": 1.02}]


@dataclass(frozen=True)
class Paper:
    """What a method is held against.

    Attributes:
        formula: its loss, of a case and the method's options.
        options: settings, each of which must change the loss; together they have all of its own options.
        faults: texts in its file, each with one that is wrong in its place.
        base: options of every setting.
        heard: metrics of earlier steps, which the method has learnt; the formula is given `known`.
    """

    formula: Callable[..., Tensor]
    options: list[dict[str, Any]]
    faults: list[tuple[str, str]]
    base: dict[str, Any] = field(default_factory=dict)
    heard: list[dict[str, float]] = field(default_factory=list)
    known: tuple[Any, ...] = ()


PAPERS: dict[str, Paper] = {
    "bapo": Paper(
        bapo,
        [
            {"positive_share": 0.585},
            {"lowest_ratio": 0.85},
            {"positive_share": 0.99, "lowest_ratio_limit": 0.7},
            {"positive_share": 0.99, "lowest_ratio_step": 0.25, "highest_ratio_limit": 1.3},
            {"highest_ratio": 1.32},
            {"positive_share": 0.99, "highest_ratio_limit": 1.25},
            {"highest_ratio_step": 0.5},
        ],
        [
            ("size.clamp(min=0)", "size.clamp(max=0)"),
            ("candidates += [(len(positive) - 1, low)", "candidates += [(0, low)"),
            ("[*np.arange(first, last - 1e-9, step).tolist(), last]", "[first, last]"),
        ],
        base={"positive_share": 0.57, "highest_ratio": 1.1},
    ),
    "hapo": Paper(
        hapo,
        [*CLIP, {"entropy_pivot": 0.4}, {"clip_alpha": 0.5}, {"advantage_beta": 0.5}],
        [
            ("(-lowest).clamp", "lowest.clamp"),
            ("inside != (h > 0)", "inside == (h > 0)"),
            ("(rewards - mean) ** 2 * lengths", "(rewards - mean) ** 2 * lengths**2"),
            ("h.clamp(max=0.0)", "h"),
        ],
    ),
    "d3s": Paper(
        d3s,
        [*CLIP, {"sample_share": 0.4}, {"token_share": 0.3}, {"relax_steps": 3}],
        [
            ("tokens.advantages.abs() * tokens.old_entropies", "tokens.old_entropies"),
            ("return masked(tokens, score", "return tokens.weights * (score"),
            ("np.var", "-np.var"),
            ("self.steps += 1", "self.steps += 2"),
        ],
        base={"sample_share": 0.7, "token_share": 0.6},
        heard=[{}],
        known=(1,),
    ),
    "capo": Paper(
        capo,
        [*CLIP, {"rejected_share": 0.3}],
        [
            ("2.0 * tokens.old_log_probs - tokens", "tokens.old_log_probs - tokens"),
            ("(tokens.advantages * size)", "size"),
            ("1.0 - 2.0 *", "1.0 -"),
            ("return masked(tokens, moved <=", "return tokens.weights * (moved <="),
        ],
        base={"rejected_share": 0.1},
    ),
    "dcpo": Paper(
        dcpo,
        [
            *CLIP,
            {"target_entropy": 1.05},
            {"high_temperature": 1.5},
            {"target_entropy": 0.1, "low_temperature": 0.5},
            {"largest_weight": 0.02},
        ],
        [
            ("> 0.0, False", ">= 1.0, False"),
            ("* ratio", "/ ratio"),
            ("weight / (weight + share)", "weight"),
            ("math.inf if self.entropy is None else self.entropy", "math.inf"),
        ],
        base={"target_entropy": 1.5},
        heard=[{"loss/entropy": 1.0}],
        known=(1.0,),
    ),
    "riskpo": Paper(
        riskpo,
        [
            *CLIP,
            {"bundle_prompts": 5},
            {"lower_level": 0.7},
            {"upper_level": 0.75},
            {"tail_weight": 2.0},
        ],
        [
            ("(low - earned)", "(earned - low)"),
            ("gains - gains.mean()", "gains"),
            ("* (size / len(bundle))", ""),
        ],
        base={"bundle_prompts": 1, "lower_level": 0.65},
    ),
    "polychromic": Paper(
        polychromic,
        [*CLIP, {"set_size": 3}, {"diversity": "texts"}],
        [("* diversity\n", "\n"), ("- score.mean()", "- score.max()"), ("mean(axis=1)", "max(axis=1)")],
        base={"set_size": 2},
    ),
    "copg": Paper(
        copg,
        [{"beta": 0.5}],
        [
            ("tokens.log_probs - tokens", "tokens.old_log_probs - tokens"),
            ("* k / (k - 1)", "* k / k"),
            ("self._rewards - self", "self._rewards + self"),
        ],
    ),
    "zero_success": Paper(
        zero_success,
        [*CLIP, {"penalty": 0.5}, {"largest_odds": 0.05}],
        [
            ("-self.options.penalty", "self.options.penalty"),
            ("/ self._lengths.clip(min=1)", ""),
            ("self._failed, -", "~self._failed, -"),
        ],
    ),
    "epo": Paper(
        epo,
        [
            *CLIP,
            {"entropy_coefficient": 0.01},
            {"smoothing": 2.0},
            {"band_low": 0.5},
            {"band_high": 1.05},
            {"schedule_steps": 3},
            {"schedule_steps": 10},
        ],
        [
            ("(-o.entropy_coefficient, Entropy", "(o.entropy_coefficient, Entropy"),
            ("distance.abs()", "distance"),
            ("self.total / self.steps if", "self.total if"),
            ("-3.0 * (progress - 1.0)", "-3.0 * progress"),
        ],
        base={"schedule_steps": 2, "entropy_coefficient": 0.1},
        heard=[{"loss/entropy": 1.0}, {"loss/entropy": 1.2}],
        known=((1.0, 1.2),),
    ),
    "dph_rl": Paper(
        dph_rl,
        [
            *CLIP,
            {"mastered_rate": 0.5},
            {"divergence": "jensen_shannon"},
            {"divergence_coefficient": 0.1},
            {"base_success_column": "other", "mastered_rate": 0.5},
        ],
        [(">= self.options.mastered_rate", "< self.options.mastered_rate"), ("* present(", "+ present(")],
    ),
    "sage": Paper(
        sage,
        [
            *CLIP,
            {"divergence_coefficient": 0.5},
            {"guide_ratio": 0.5},
            {"entropy_threshold": 0.8},
            {"guide_maximum": 1.01},
        ],
        [
            ("+ guide.log()", "- guide.log()"),
            ("token.entropy.detach()", "token.entropy"),
            ("- log_rho - 1", "- 1"),
        ],
    ),
    "mara": Paper(
        mara,
        [*CLIP, {"divergence": "k1"}, {"divergence": "k2"}, {"beta": 0.2}, {"threshold": 0.2}],
        [
            ("log_probs, anchor, 1) - log_probs", "log_probs, anchor, 1)"),
            (".argmax(", ".argmin("),
            ("(o.beta, Divergence", "(2 * o.beta, Divergence"),
        ],
    ),
    "matched_entropy": Paper(
        matched_entropy,
        [
            *CLIP,
            {"divergence_coefficient": 0.1},
            {"target_entropy": 3.0},
            {"entropy_coefficient": 0.01},
            {"entropy_coefficient_limit": 0.005},
            {"gain": 0.1},
        ],
        [
            ('(target - measured["loss/entropy"])', '(measured["loss/entropy"] - target)'),
            ("(-self.coefficient", "(self.coefficient"),
            ("max(moved, 0.0)", "abs(moved)"),
        ],
        base={"target_entropy": 2.0},
        heard=[{"loss/entropy": 2.3}, {"loss/entropy": 1.0}],
        known=((2.3, 1.0),),
    ),
    "matched_kl": Paper(
        matched_kl,
        [
            *CLIP,
            {"direction": "reverse"},
            {"measure": "forward"},
            {"target": 0.02},
            {"divergence_coefficient": 0.1},
            {"gain": 0.5},
        ],
        [
            ("/ self.options.target - 1.0", "- self.options.target"),
            ("-1.0), 1.0)", "-9.0), 9.0)"),
            ('both[f"{self.direction}_kl"]', 'both["reverse_kl"]'),
        ],
        heard=[
            {"loss/reverse_kl": 0.05, "loss/forward_kl": 0.002},
            {"loss/reverse_kl": 0.012, "loss/forward_kl": 0.009},
        ],
        known=(({"reverse": 0.05, "forward": 0.002}, {"reverse": 0.012, "forward": 0.009}),),
    ),
    "aspo": Paper(
        aspo,
        [*CLIP, {"shaping": -1.0}, {"bound": 0.1}],
        [
            ("self.options.shaping * later", "-self.options.shaping * later"),
            ("row[number] = turns[0]", "row[number] = sum(turns)"),
            ("/ lengths.mean(axis=1, keepdims=True)", ""),
        ],
    ),
    "otc": Paper(
        otc,
        [*CLIP, {"smoothing": 1.0}, {"calls_fact": "searches"}],
        [
            ("2 * fewest * calls /", "fewest * calls /"),
            ("calls * math.pi / (2 * calls + smoothing)", "calls / (calls + smoothing)"),
            ("earned *= ", "earned += "),
        ],
    ),
    "tapo": Paper(
        tapo,
        [
            *CLIP,
            {"mask_truncated": False},
            {"calls_fact": "searches"},
            {"call_limit": 1},
            {"call_penalty": 0.5},
        ],
        [
            ("known_rewards(groups) - o", "known_rewards(groups) + o"),
            ("(calls - o.call_limit)", "(o.call_limit - calls)"),
        ],
    ),
    "eapo": Paper(
        eapo,
        [*CLIP, {"discount": 0.5}],
        [
            ("np.arange(rounds - 1, -1, -1.0)", "np.arange(rounds)"),
            ("self.options.discount **", "self.options.discount *"),
        ],
        base={"discount": 0.9},
    ),
    "c_grpo": Paper(
        c_grpo,
        [*CLIP, {"rubric_weight": 0.6}, {"rubric_fact": "calls"}],
        [("weight * outcome * share", "weight * share"), ("rubric / np.where", "rubric / 1.0 * np.where")],
    ),
}
