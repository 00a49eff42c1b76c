"""What sequences of a group begin with alike: so that a trainer may compute it once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Beginning = tuple[int, int]
"""The first tokens of a sequence: how many, and a digest of them."""

Tokens = npt.NDArray[np.int32]

# A further beginning cuts sequences into shorter pieces, each with attention of its own: it must save this
# many tokens. Responses of which some begin with the same few words are not cut there.
LEAST_SAVED = 32


def beginnings(sequences: Sequence[Tokens], prompt: Sequence[int] = ()) -> list[tuple[Beginning, ...]]:
    """Beginnings of each sequence that others have as well, ascending.

    That of the prompt is one of each sequence that begins with it, so that sequences which are looked at
    apart can share it. What two sequences have in common beside it may be all of one of them, or of both.

    Args:
        sequences: token ids of each.
        prompt: that of their problem.
    """
    found: list[list[Beginning]] = [[] for _ in sequences]
    # Big-endian, the order of the bytes is that of the tokens: neighbours have the most in common.
    order = sorted(range(len(sequences)), key=lambda n: sequences[n].astype(">u4").tobytes())
    common = [_common(sequences[one], sequences[other]) for one, other in pairwise(order)]
    given = np.asarray(prompt, np.int32)
    prompted = [len(prompt) > 0 and _common(ids, given) == len(prompt) for ids in sequences]
    for own, ids, begins in zip(found, sequences, prompted, strict=True):
        if begins:
            own.append(_beginning(ids, len(prompt)))
    waiting = [(0, len(order), 0)]
    while waiting:
        first, last, depth = waiting.pop()
        if last - first < 2:
            continue
        shared = min(common[first : last - 1])
        members = order[first:last]
        known = max(depth, len(prompt) if all(prompted[number] for number in members) else 0)
        if (shared - known) * (len(members) - 1) >= LEAST_SAVED:
            for number in members:
                found[number].append(_beginning(sequences[number], shared))
            known = shared
        waiting += [(*part, known) for part in _parts(common, first, last, shared)]
    return [tuple(sorted(each)) for each in found]


def _parts(common: Sequence[int], first: int, last: int, shared: int) -> Iterator[tuple[int, int]]:
    """The stretches of `first` to `last` whose neighbours have more than `shared` tokens in common."""
    start = first
    for place in range(first, last - 1):
        if common[place] == shared:
            yield start, place + 1
            start = place + 1
    yield start, last


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens they begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _beginning(ids: Tokens, length: int) -> Beginning:
    digest = hashlib.blake2b(ids[:length].astype("<i4").tobytes(), digest_size=8)
    return length, int.from_bytes(digest.digest(), "little")
