"""What became of one problem, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.trial.take import Taken

WIDTH = 100  # characters of a line of tokens
_LABEL = 11  # characters before a line's contents


def show(taken: Taken) -> Iterator[str]:
    """The problem, the prompt's tokens, each response with its reward, and the time of each part."""
    prompt, texts = taken.prompt, TokenTexts(taken.tokenizer)
    yield taken.report
    yield f"\nproblem {prompt.id} of {prompt.source}"
    yield from _lines("question", repr(prompt.question))
    yield from _lines("answer", repr(prompt.answer))
    for name, value in prompt.columns.items():
        yield from _lines("column", f"{name} = {value!r:.200}")
    yield f"\nprompt, {len(prompt.token_ids)} tokens"
    yield from _tokens("given", prompt.token_ids, texts)
    for number, scored in enumerate(taken.group.episodes, start=1):
        yield f"\nresponse {number} of {len(taken.group.episodes)}"
        yield from _response(scored, prompt.token_ids, texts)
    yield "\nseconds"
    for part, seconds in taken.seconds.items():
        yield f"  {part:<16}{seconds:7.3f}"


def _response(scored: ScoredEpisode, prompt: Sequence[int], texts: TokenTexts) -> Iterator[str]:
    episode, verification = scored.episode, scored.verification
    sequences: Sequence[TokenSequence | BriefSequence] = episode.sequences
    for place, sequence in enumerate(sequences):
        if len(episode.sequences) > 1:
            yield f"  sequence {place + 1} of {len(episode.sequences)}"
        yield from _sequence(sequence, prompt, texts)
    if episode.truncated:
        yield from _lines("truncated", "by a limit of tokens or turns")
    if episode.sequences:
        yield from _lines("text", repr(episode.answer))
    read = verification.extracted
    yield from _lines("answer", "none was read" if read is None else f"{read!r}, as it was read")
    yield from _lines("outcome", str(verification.outcome))
    by = "" if episode.score is None else ", of the environment"
    known = verification.reward is not None
    yield from _lines("reward", f"{verification.reward:g}{by}" if known else "unknown: not trained on")
    for name, value in verification.facts.items():
        yield from _lines("", f"reward/{name} = {float(value):g}")
    for name, value in episode.facts.items():
        yield from _lines("", f"environment/{name} = {float(value):g}")
    if verification.why:
        yield from _lines("why", verification.why)
    if verification.trace:
        yield from _lines("", verification.trace.rstrip())


def _sequence(
    sequence: TokenSequence | BriefSequence, prompt: Sequence[int], texts: TokenTexts
) -> Iterator[str]:
    """Its spans: what was given, and what was sampled."""
    pieces = texts(sequence.token_ids.tolist())
    for sampled, places in groupby(range(len(sequence)), key=lambda place: bool(sequence.sampled[place])):
        span = list(places)
        span_ids = sequence.token_ids[span].tolist()
        if span_ids == list(prompt) and not sampled and span[0] == 0:
            yield from _lines("given", f"the prompt's {len(span)} tokens")
            continue
        label = "sampled" if sampled else "given"
        yield from _wrapped(label, [f"{i} {pieces[p]!r}" for i, p in zip(span_ids, span, strict=True)])
        if sampled:
            mean = float(np.mean(sequence.log_probs[span]))
            yield from _lines("", f"{len(span)} tokens, of mean log-prob {mean:.3f}")


def _tokens(label: str, token_ids: Sequence[int], texts: TokenTexts) -> Iterator[str]:
    pieces = texts(token_ids)
    return _wrapped(label, [f"{i} {piece!r}" for i, piece in zip(token_ids, pieces, strict=True)])


def _wrapped(label: str, items: Sequence[str]) -> Iterator[str]:
    """The items in lines of at most WIDTH characters, none of them broken."""
    line = ""
    for item in items:
        if line and _LABEL + len(line) + 3 + len(item) > WIDTH:
            yield from _lines(label, line)
            label, line = "", ""
        line += f" · {item}" if line else item
    yield from _lines(label, line)


def _lines(label: str, text: str) -> Iterator[str]:
    for line in text.splitlines() or [""]:
        yield f"  {label:<{_LABEL - 2}}{line}".rstrip()
        label = ""
