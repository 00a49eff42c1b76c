"""What is certified: a batch, the layouts it is run under, and the ways it is cut into microbatches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rapo.config import Parallel
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.methods.method import Method
from megatron_rapo.model.architecture import Architecture, Experts
from megatron_rapo.model.features import Window
from megatron_rapo.model.rope import Rope

RANKS, LAYERS = 4, 4
# Fewer real tokens than head rows, and an odd number: no TP divides it, and padding must be masked.
VOCABULARY, ROWS = 59, 61
RESPONSES, MAX_RESPONSE_TOKENS, TEMPERATURE = 4, 24, 0.8


@dataclass(frozen=True)
class Case:
    """One way to compute the same loss.

    Attributes:
        name: for the table.
        layout: of RANKS ranks.
        token_budget: of a microbatch; None packs each sequence alone.
        permuted: whether the groups come in another order.
        share_prompts: whether what sequences begin with is computed once.
    """

    name: str
    layout: Parallel
    token_budget: int | None = 96
    permuted: bool = False
    share_prompts: bool = False


def _layout(**options: int | bool) -> Parallel:
    of_a_replica = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    taken = math.prod(options.get(each, 1) for each in of_a_replica)
    return Parallel(**options, data_parallel=RANKS // taken)  # type: ignore[arg-type]


CASES = (
    Case("DP 4", _layout()),
    Case("DP 4, permuted", _layout(), permuted=True),
    Case("DP 4, unpacked", _layout(), token_budget=None),
    Case("TP 2", _layout(tensor_parallel=2)),
    Case("TP 2, sequence parallel", _layout(tensor_parallel=2, sequence_parallel=True)),
    Case("TP 4", _layout(tensor_parallel=4)),
    Case(
        "TP 4, sequence parallel, permuted", _layout(tensor_parallel=4, sequence_parallel=True), permuted=True
    ),
    Case("PP 2", _layout(pipeline_parallel=2)),
    Case("PP 4, unpacked", _layout(pipeline_parallel=4), token_budget=None),
    Case("PP 2, VPP 2", _layout(pipeline_parallel=2, virtual_pipeline_parallel=2)),
    Case("CP 2", _layout(context_parallel=2)),
    Case("CP 4", _layout(context_parallel=4), token_budget=64),
    Case("TP 2, PP 2", _layout(tensor_parallel=2, pipeline_parallel=2)),
    Case("TP 2, CP 2", _layout(tensor_parallel=2, context_parallel=2), token_budget=192),
    Case("PP 2, CP 2, permuted", _layout(pipeline_parallel=2, context_parallel=2), permuted=True),
    Case(
        "TP 2, PP 2, VPP 2, sequence parallel",
        _layout(tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True),
        token_budget=64,
    ),
    Case("TP 2, shared prompts", _layout(tensor_parallel=2), share_prompts=True),
    Case("PP 2, shared prompts, permuted", _layout(pipeline_parallel=2), permuted=True, share_prompts=True),
    Case(
        "TP 2, PP 2, shared prompts",
        _layout(tensor_parallel=2, pipeline_parallel=2),
        token_budget=None,
        share_prompts=True,
    ),
    Case(
        "TP 2, PP 2, VPP 2, sequence parallel, shared prompts",
        _layout(tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True),
        share_prompts=True,
    ),
)

# Of models with experts: whoever has them, ranks route their tokens to each other.
_TENSOR: dict[str, int | bool] = {"tensor_parallel": 2, "sequence_parallel": True}
CASES_OF_EXPERTS = (
    Case("DP 4", _layout()),
    Case("EP 2", _layout(expert_parallel=2)),
    Case("EP 4, unpacked", _layout(expert_parallel=4), token_budget=None),
    Case("TP 2", _layout(**_TENSOR)),
    Case("TP 2, EP 2", _layout(**_TENSOR, expert_parallel=2), permuted=True),
    Case("TP 2, EP 2, experts' TP 2", _layout(**_TENSOR, expert_parallel=2, expert_tensor_parallel=2)),
    Case("PP 2, EP 2", _layout(pipeline_parallel=2, expert_parallel=2)),
    Case("PP 2, VPP 2, EP 2", _layout(pipeline_parallel=2, virtual_pipeline_parallel=2, expert_parallel=2)),
    Case("CP 2, EP 4", _layout(context_parallel=2, expert_parallel=4)),
    Case("TP 2, PP 2, EP 2", _layout(**_TENSOR, pipeline_parallel=2, expert_parallel=2)),
)


def cases_of(architecture: Architecture) -> tuple[Case, ...]:
    """What a model is certified at; tensor parallelism of experts goes with sequence parallelism."""
    return CASES if architecture.experts is None else CASES_OF_EXPERTS


def small(architecture: Architecture) -> Architecture:
    """A model of the same family that any of the layouts divides."""
    return replace(
        architecture,
        layers=LAYERS,
        hidden=64,
        heads=8,
        kv_heads=4,
        head_dim=16,
        feed_forward=96,
        vocabulary=ROWS,
        max_positions=64,
        layers_without_rope=_some(architecture.layers_without_rope, architecture.layers),
        window=_short(architecture.window, architecture.layers),
        # As those of families that have them: √hidden, and 1 / √head_dim.
        embedding_scale=None if architecture.embedding_scale is None else 8.0,
        attention_scale=None if architecture.attention_scale is None else 0.25,
        experts=_few(architecture.experts),
    )


def _some(layers: tuple[int, ...], of: int) -> tuple[int, ...]:
    """The like of some layers of so many, in a model of four: those among the first four, and never all."""
    few = tuple(layer for layer in layers if layer < LAYERS)
    return few[:-1] if len(layers) < of and len(few) == LAYERS else few


def _short(window: Window | None, layers: int) -> Window | None:
    return None if window is None else replace(window, size=8, layers=_some(window.layers, layers))


def _few(experts: Experts | None) -> Experts | None:
    if experts is None:
        return None
    return replace(experts, count=4, chosen=2, shared=None if experts.shared is None else 32)


def other_than(architecture: Architecture) -> Architecture:
    """A small teacher for a small policy: of another family, deeper and narrower, with more spare rows.

    Any of the layouts divides it.
    """
    is_qwen3 = architecture.family == "qwen3"
    return Architecture(
        family="qwen2" if is_qwen3 else "qwen3",
        layers=8,
        hidden=32,
        heads=4,
        kv_heads=4,
        head_dim=8,
        feed_forward=48,
        vocabulary=ROWS + 5,
        norm_epsilon=1e-6,
        rope=Rope(1e6),
        max_positions=architecture.max_positions,
        attention_bias=is_qwen3,
        query_key_norm=None if is_qwen3 else "head",
        tied=not architecture.tied,
    )


def batch(seed: int = 0, *, facts: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Group]:
    """Groups of random tokens, with both outcomes in each: of mixed lengths down to one sampled token.

    Every other episode is of two turns: between its two sampled spans stand tokens that were given.

    Args:
        seed: of the tokens.
        facts: that each episode tells, numbers of 1 and more.
        columns: that each problem has, 0 or 1.
    """
    random = np.random.default_rng(seed)

    def episode(prompt: tuple[int, ...], outcome: Outcome, given: int) -> ScoredEpisode:
        tokens = int(random.choice([1, *range(2, MAX_RESPONSE_TOKENS + 1)]))
        first = tokens // 2 if given else tokens
        sampled = np.repeat([False, True, False, True], [len(prompt), first, given, tokens - first])
        rest = random.integers(0, VOCABULARY, tokens + given)
        # Near what a random model gives, so that ratios lie on both sides of the clip.
        log_probs = random.normal(0.0, 0.3, len(sampled)) - np.log(VOCABULARY)
        sequence = TokenSequence(
            token_ids=np.concatenate([prompt, rest]).astype(np.int32),
            sampled=sampled,
            log_probs=np.where(sampled, log_probs, np.nan).astype(np.float32),
            versions=np.where(sampled, 0, -1).astype(np.int32),
        )
        return ScoredEpisode(Episode((sequence,), ""), Verification(outcome))

    def told(scored: ScoredEpisode, number: int) -> ScoredEpisode:
        known = dict.fromkeys(facts, number + 1.0)
        verification = replace(scored.verification, extracted=str(number % 3), facts=known)
        return replace(scored, verification=verification)

    groups = []
    for index in range(4):
        token_ids = tuple(int(t) for t in random.integers(0, VOCABULARY, random.integers(2, 9)))
        outcomes = [Outcome.CORRECT if number <= index % 3 else Outcome.WRONG for number in range(RESPONSES)]
        episodes = [
            told(episode(token_ids, outcome, given=3 * (number % 2)), number)
            for number, outcome in enumerate(outcomes)
        ]
        problem = Problem(str(index), "", token_ids=token_ids, columns=dict.fromkeys(columns, index % 2))
        groups.append(Group(problem, tuple(episodes)))
    return groups


def batch_of(method: Method) -> list[Group]:
    """The batch, with the facts and columns that a method reads, and responses begun as it asks for."""
    groups = batch(facts=method.facts, columns=method.columns)
    asked = method.ask([replace(group, episodes=()) for group in groups])
    return [_begun(group, guides) for group, guides in zip(groups, asked, strict=True)]


def _begun(group: Group, guides: Sequence[Guide]) -> Group:
    begun = [guide if guide.begins else PLAIN for guide in guides] + [PLAIN] * RESPONSES
    pairs = zip(group.episodes, begun, strict=False)
    return replace(group, episodes=tuple(replace(one, guide=guide) for one, guide in pairs))
