"""What a method says of itself, for people: its paper, what it changes, what it needs, which hooks it has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import OF_THE_REFERENCE, OF_THE_TEACHER

HOOKS = (
    "sampling",
    "ask",
    "teaches",
    "choose",
    "advantages",
    "flatten",
    "mark_responses",
    "off_policy",
    "aggregate",
    "weigh",
    "mark_tokens",
    "learn",
    "metrics",
    "state",
)
"""Hooks in the order of a step; all methods have terms."""


@dataclass(frozen=True)
class Described:
    """A method, for people.

    Attributes:
        name: by which `algorithm.method` calls it.
        paper: arXiv number; empty: there is none.
        changes: what it does, a sentence.
        needs: beside samples and rewards, with the options of its example.
        hooks: those of HOOKS that are its own.
    """

    name: str
    paper: str
    changes: str
    needs: tuple[str, ...]
    hooks: tuple[str, ...]


def example(name: str, responses: int = 8, max_response_tokens: int = 64) -> Method:
    """The method of that name with the defaults, and the options that it cannot do without."""
    kind = METHODS[name]
    options = kind.Options.model_validate({"method": name, **kind.example})
    return kind(options, Sampling(1.0, responses, max_response_tokens))


def described(name: str) -> Described:
    """The method of that name."""
    kind = METHODS[name]
    found = re.search(r"arXiv (\d{4}\.\d{5})", inspect.getdoc(kind.Options) or "")
    return Described(
        name=name,
        paper=found[1] if found else "",
        changes=(inspect.getdoc(kind) or "").partition("\n")[0],
        needs=tuple(_needs(example(name))),
        hooks=tuple(hook for hook in HOOKS if getattr(kind, hook) is not getattr(Method, hook)),
    )


def _needs(method: Method) -> Sequence[str]:
    found = {
        "a reference model": bool(method.needs & OF_THE_REFERENCE),
        "a teacher": bool(method.needs & OF_THE_TEACHER),
        "further episodes": method.asks,
        "the policy once more a step": method.weighs or method.marks_tokens,
        "and once more each further update": method.marks_tokens and method.follows_policy,
        "all responses on all ranks": method.reads_responses,
    }
    told = [what for what, is_needed in found.items() if is_needed]
    told += [f"column `{column}`" for column in method.columns]
    return told + [f"fact `{fact}`" for fact in method.facts]
