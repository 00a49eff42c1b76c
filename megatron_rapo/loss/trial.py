"""A method's terms on a few tokens: what they report, and whether they work, before anything is trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rapo.episode.facts import NAME
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.observe.catalogue import groups

# Sums over response tokens that every update reports besides what terms do; only "total" is weighted.
OF_EVERY_UPDATE = (
    "total",
    "entropy",
    "importance",
    "importance_square",
    "importance_corrected",
    "not_finite",
    "tokens",
    "tokens_in_loss",
)
_ALWAYS = ("loss/total", "loss/tokens", "loss/entropy", "loss/not_finite")
_OF_TERMS = {"loss", "audit"}  # groups of metrics in which terms report; others are the trainer's
_GROUP = re.compile(r"[a-z0-9_]+")
_TOKENS = 3


def reported_names(method: Method) -> list[tuple[str, ...]]:
    """The names of what each of the method's terms reports.

    Raises:
        RapoError: there is no term, a term fails or returns what is no value a token, or a name is taken or
            cannot be logged.
    """
    what = f"method {method.options.method}"
    terms = method.terms()
    if not terms:
        raise RapoError(f"{what} has no terms, so no loss; return some from terms()")
    if method.wants_teacher and method.wants_reference_hidden:
        raise RapoError(
            f"{what} needs the whole distributions of both teacher and reference, and a loss has room for "
            "one: let terms read the reference at the sampled token alone (Need.REFERENCE_LOG_PROB)"
        )
    if not 0.0 < method.mixture < 1.0:
        raise RapoError(f"{what} has mixture = {method.mixture}; let it be above 0 and below 1")
    names = [tuple(_reported(term, what)) for _, term in terms]
    every = Counter([*OF_EVERY_UPDATE, *(name for own in names for name in own)])
    if twice := [name for name, count in every.items() if count > 1]:
        raise RapoError(f"a term of {what} reports {twice[0]!r}, which is taken; give it another name")
    _check_metrics([term for _, term in terms], names, what)
    return names


def _check_metrics(terms: Sequence[Term], reported: Sequence[Sequence[str]], what: str) -> None:
    """That what terms report can be logged, and hides no other metric."""
    logged: set[str] = set()
    for term, names in zip(terms, reported, strict=True):
        for metric in term.metrics(dict.fromkeys(names, 0.5)):
            group, *parts = metric.split("/")
            if not (_GROUP.fullmatch(group) and parts and all(map(NAME.fullmatch, parts))):
                raise RapoError(
                    f"a term of {what} reports {metric!r}, which cannot be logged; give it a name of "
                    "letters, digits, dots, hyphens and underscores"
                )
            if metric in logged or metric in _ALWAYS or group in groups().keys() - _OF_TERMS:
                raise RapoError(
                    f"a term of {what} reports {metric!r}, which is another metric; give it another name"
                )
            logged.add(metric)


def _reported(term: Term, what: str) -> list[str]:
    name = type(term).__name__
    needed = ", ".join(sorted(need.name for need in term.needs)) or "nothing"
    try:
        with torch.enable_grad():
            value, reported = term(_tokens(term))
    except Exception as error:  # whatever a user's code raises
        raise RapoError(
            f"term {name} of {what} fails on {_TOKENS} tokens: {type(error).__name__}: {error}. It says that "
            f"it needs {needed}, and reads {', '.join(sorted(term.reads)) or 'no marks'}, beside what every "
            "token has; mend it, or its `needs` and `reads`"
        ) from error
    for called, of_tokens in {"its value": value, **reported}.items():
        shape = tuple(of_tokens.shape) if isinstance(of_tokens, Tensor) else type(of_tokens).__name__
        if shape != (_TOKENS,):
            raise RapoError(
                f"term {name} of {what} returned {called} as {shape} for {_TOKENS} tokens; return a tensor "
                "of one number a token"
            )
    return list(reported)


def _tokens(term: Term) -> AtToken:
    """Tokens of a policy that moved a little, with what the term needs."""
    log_prob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    near = log_prob.detach() + torch.tensor([0.1, -0.2, 0.0])
    needed = {need.value: near for need in term.needs}
    return AtToken(
        log_prob=log_prob,
        entropy=torch.tensor([1.0, 1.5, 0.5], requires_grad=True),
        old_log_prob=near,
        engine_log_prob=near,
        advantage=torch.tensor([1.0, -1.0, 0.0]),
        phi=torch.tensor([1.0, 0.5, 0.5]),
        position=torch.arange(_TOKENS),
        marks={name: torch.tensor([0.5, 1.0, 0.0]) for name in term.reads},
        **needed,
    )
