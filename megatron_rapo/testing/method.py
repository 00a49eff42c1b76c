"""Whether a method's gradient is that of its loss, its loss the same under every layout, its state whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.state import restore_state, saved_state

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rapo.testing.toy import Layout

M = TypeVar("M", bound=Method)
TEMPERATURE = 0.8
BAR = 1e-9  # relative: of losses and gradients that must be the same, in fp64
GRADIENT_BAR = 1e-5  # of finite differences of STEP
STEP = 1e-6
LEAST = 1e-3  # length of a gradient that counts
DIRECTIONS = 4


def a_method(
    method: type[M],
    options: Mapping[str, Any] | None = None,
    *,
    responses_per_prompt: int = 8,
    max_response_tokens: int = 64,
) -> M:
    """One of the class, as a run of these options makes it."""
    own = {"method": f"{method.__module__}:{method.__name__}", **(options or {})}
    configured = Sampling(TEMPERATURE, responses_per_prompt, max_response_tokens)
    return method(method.Options.model_validate(own), configured)


def check_method(
    method: type[Method],
    options: Mapping[str, Any] | None = None,
    *,
    gradient: bool = True,
    groups: Sequence[Group] | None = None,
) -> None:
    """Runs a method over made-up groups, in fp64 and without a model, and compares:

    - the gradient of each of its terms with finite differences of the term's value;
    - loss and gradient in chunks and microbatches of several sizes, with the groups in another order, and
      on two tensor-parallel, context-parallel and data-parallel ranks, with those in one piece;
    - a method that was restored from the state of another, by way of JSON, with that one over a step.

    Args:
        method: the class.
        options: of its own.
        gradient: whether to compare gradients: not where a term means to have another one than its value's,
            by a `detach`.
        groups: of the made-up step; default: four of four episodes, of rewards 0 and 1, of one or two turns.

    Raises:
        AssertionError: with a line for each deviation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of packages that nothing here needs
        from megatron_rapo.certify.cases import batch_of
        from megatron_rapo.testing import toy  # late: torch takes seconds  # noqa: F401

    groups = batch_of(a_method(method, options)) if groups is None else groups
    largest = max(len(group.episodes) for group in groups)
    most = max(episode.episode.sampled_tokens for group in groups for episode in group.episodes)

    def new(**changed: Any) -> Method:
        given = {**(options or {}), **changed}
        return a_method(method, given, responses_per_prompt=largest, max_response_tokens=most)

    try:
        deviations = [
            *_of_state(new, groups),
            *(_of_gradients(new, groups) if gradient else ()),
            *_of_layouts(new, groups),
        ]
    except RapoError as error:  # it does not work at all
        raise AssertionError(str(error)) from error
    if deviations:
        raise AssertionError(
            f"{method.__module__}:{method.__name__} is not sound:\n  " + "\n  ".join(deviations)
        )


def _of_state(new: Callable[[], Method], groups: Sequence[Group]) -> Iterator[str]:
    """Of a method that goes on after two steps, and one that was restored in its place."""
    method, resumed = new(), new()
    _said(method, groups)
    _said(method, groups)
    state = saved_state(method)
    restore_state(resumed, state)
    if (restored := saved_state(resumed)) != state:
        yield f"state {state!r:.200} is {restored!r:.200} after restore; let restore take up all that it says"
    goes_on = _said(method, groups)
    for what, found in _said(resumed, groups).items():
        if found != goes_on[what]:
            yield (
                f"{what} of the step after restore: {_first_difference(found, goes_on[what])} where the run "
                "goes on; let state have all that the method learnt, and restore take it up"
            )
            return


def _said(method: Method, groups: Sequence[Group]) -> dict[str, list[Any]]:
    """What a method says of a step, plainly."""
    from megatron_rapo.loss.trial import reported_names
    from megatron_rapo.testing.toy import samples_of

    sampling = method.sampling()
    samples = samples_of(method, groups, _vocabulary(groups))
    reported = [
        (term, names) for (_, term), names in zip(method.terms(), reported_names(method), strict=True)
    ]
    method.learn(
        {"loss/entropy": 0.5}
        | {
            metric: value
            for term, names in reported
            for metric, value in term.metrics(dict.fromkeys(names, 0.5)).items()
        }
    )
    return {
        "sampling": [sampling],
        "advantages": [_plain(sample.advantage) for sample in samples],
        "flatten": [sample.phi for sample in samples],
        "mark_responses": [{n: _plain(v) for n, v in sample.marks.items()} for sample in samples],
        "off_policy": [sample.off_policy for sample in samples],
        "choose or aggregate": [_plain(sample.token_weight) for sample in samples],
        "terms": [(coefficient, type(term).__name__) for coefficient, term in method.terms()],
    }


def _of_gradients(new: Callable[[], Method], groups: Sequence[Group]) -> Iterator[str]:
    """Each term's gradient in the toy's parameters, along random directions, and finite differences."""
    import torch

    from megatron_rapo.testing.ranks import alone
    from megatron_rapo.testing.toy import Layout, Step, Toy

    method = new()
    step = Step(method, groups, _vocabulary(groups), Layout(), alone())
    policy = step.policy()
    leaves = Toy(*(parameter.clone().requires_grad_() for parameter in policy))
    for place, (_, term) in enumerate(method.terms()):
        objective = step.objective_of(_only(method, place))
        gradient = torch.autograd.grad(step.loss(leaves, objective), list(leaves))
        length = float(torch.cat([part.flatten() for part in gradient]).norm())
        for seed in range(DIRECTIONS):
            direction = Toy.random(seed + 10, len(policy.embedding), len(policy.position))
            ahead, behind = (float(step.loss(policy.moved(direction, by), objective)) for by in (STEP, -STEP))
            expected = (ahead - behind) / (2 * STEP)
            found = sum(float((own * along).sum()) for own, along in zip(gradient, direction, strict=True))
            if not abs(found - expected) <= GRADIENT_BAR * max(length, abs(expected), LEAST):
                yield (
                    f"term {type(term).__name__}: its gradient along a random direction is {found:.6g}, and "
                    f"finite differences of its value are {expected:.6g}; look for a detach, or for values "
                    "that are computed outside of torch"
                )
                break


def _of_layouts(new: Callable[..., Method], groups: Sequence[Group]) -> Iterator[str]:
    """Loss and gradient under several layouts, against one piece on one rank."""
    from megatron_rapo.testing.toy import Layout, loss_and_gradient

    def computed(layout: Layout, place: int | None = None) -> tuple[float, Tensor]:
        def of_rank() -> Method:
            method = new(loss_chunk_tokens=layout.chunk)
            return method if place is None else _only(method, place)

        return loss_and_gradient(of_rank, groups, _vocabulary(groups), layout)

    longest = max(len(s) for group in groups for e in group.episodes for s in e.episode.sequences)
    layouts = {
        "in chunks of 1 token": (Layout(chunk=1), _TOKENS),
        "in chunks of 7 tokens": (Layout(chunk=7), _TOKENS),
        "with each sequence in a microbatch of its own": (Layout(budget=None), _TOKENS),
        "in several microbatches": (Layout(budget=2 * longest + 8), _TOKENS),
        "with the groups in reverse order": (Layout(backwards=True), _GROUPS),
        "on 2 tensor-parallel ranks": (Layout(tensor=2), _RANKS),
        "on 2 context-parallel ranks": (Layout(context=2), _RANKS),
        "on 2 data-parallel ranks": (Layout(data=2), _RANKS),
    }
    whole, terms = computed(Layout()), new().terms()
    if told := _apart(computed(Layout()), whole):
        yield f"when it is computed again: {told}; a hook must not draw unseeded random numbers"
        return
    for name, (layout, remedy) in layouts.items():
        if told := _apart(computed(layout), whole):
            guilty = [
                type(term).__name__
                for place, (_, term) in enumerate(terms)
                if remedy is _TOKENS and _apart(computed(layout, place), computed(Layout(), place))
            ]
            by = f", by term {' and '.join(guilty)}" if guilty else ""
            yield f"{name}{by}: {told}; {remedy}"


_TOKENS = "what a term says of a token may depend on what is given of that token alone"
_GROUPS = "hooks must treat groups alike wherever they stand"
_RANKS = "hooks must say the same on every rank, and weigh gather what it needs of all tokens (of_all_ranks)"


def _apart(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> str:
    """How far loss and gradient are apart; empty where they are the same."""
    size = max(abs(expected[0]), 1e-6)
    if not abs(found[0] - expected[0]) <= BAR * size:
        return f"the loss is {found[0]:.9g} in place of {expected[0]:.9g}"
    length = max(float(expected[1].norm()), 1e-6)
    apart = float((found[1] - expected[1]).norm()) / length
    return "" if apart <= BAR else f"the gradient is another, by {apart:.1e} of its length"


def _only(method: Method, place: int) -> Method:
    """The method with one of its terms alone, once."""
    one = copy.copy(method)
    one.terms = lambda: [(1.0, method.terms()[place][1])]  # type: ignore[method-assign]
    return one


def _vocabulary(groups: Sequence[Group]) -> int:
    from megatron_rapo.certify.cases import VOCABULARY

    highest = max(
        int(s.token_ids.max()) for group in groups for e in group.episodes for s in e.episode.sequences
    )
    return max(VOCABULARY, highest + 1)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _first_difference(found: Sequence[Any], expected: Sequence[Any]) -> str:
    place = next((p for p, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
    return f"{found[place]!r:.60}, but {expected[place]!r:.60}"
