"""A run's samples in the terminal: what was sampled told apart from what was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.samples.choosing import Chosen

SAMPLED, GIVEN = "bold cyan", "dim"
OPENS, CLOSES = "⟦", "⟧"  # around what was sampled, where there is no colour
_OUTCOME = {"correct": "green", "wrong": "red", "timeout": "yellow", "crash": "yellow"}


def show(
    chosen: Chosen, token_texts: TokenTexts | None, console: Console | None = None, *, tokens: bool
) -> None:
    """Prints them.

    Args:
        chosen: samples of a step.
        token_texts: splits their tokens; None where the run's tokenizer is not to be had: texts alone are
            shown then.
        console: where to; default: standard output.
        tokens: whether each token has a line, with id, log-prob and version.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    marks = console.color_system is None or console.no_color
    console.print(_heading(chosen, marks=marks, has_tokens=token_texts is not None))
    for _, rows in groupby(chosen.rows, key=lambda row: row["draw"]):
        for place, row in enumerate(rows):
            if place == 0:
                console.print(_problem(row, token_texts))
            console.print(_response(row, token_texts, marks=marks, tokens=tokens))


def printable(text: str) -> str:
    """The text without what steers a terminal: control characters are written out."""
    return "".join(
        char if char in "\n\t" or char.isprintable() or char == "\u3000" else _escaped(char) for char in text
    )


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _heading(chosen: Chosen, *, marks: bool, has_tokens: bool) -> Text:
    of_kind = " · ".join(f"{count:,} {kind}" for kind, count in chosen.outcomes.items())
    text = Text(f"step {chosen.step} · {sum(chosen.outcomes.values()):,} responses: {of_kind}")
    if len(chosen.rows) < chosen.matching:
        text.append(f" · the first {len(chosen.rows):,} of {chosen.matching:,} that match (--count)")
    if not has_tokens:
        text.append("\nthe run's tokenizer is not on this machine: texts are shown without prompts")
    elif marks:
        text.append(f"\n{OPENS}sampled{CLOSES} given")
    else:
        text.append("\n").append("sampled", SAMPLED).append(" ").append("given", GIVEN)
    return text


def _problem(row: dict[str, Any], token_texts: TokenTexts | None) -> RenderableType:
    title = Text(f"problem {printable(row['problem'])}", "bold")
    title.append(f" · {printable(row['source'])}" if row["source"] else "", "not bold")
    parts: list[RenderableType] = [Rule(title, align="left", characters="═")]
    sequences = row["sequences"]
    if token_texts is None or not sequences:
        parts.append(Text(printable(row["question"]), GIVEN))
    else:
        first = sequences[0]
        prompt = first["token_ids"][: prompt_tokens(first)]
        parts.append(Text(printable("".join(token_texts(prompt))), GIVEN))
    if row["gold"]:
        parts.append(Text(f"gold answer: {printable(row['gold'])}"))
    return Group(*parts)


def _response(
    row: dict[str, Any], token_texts: TokenTexts | None, *, marks: bool, tokens: bool
) -> RenderableType:
    parts: list[RenderableType] = [Rule(_title(row), align="left", characters="─")]
    parts += [Text(line) for line in _notes(row)]
    if token_texts is None or not row["sequences"]:
        return Group(*parts, Text(printable(row["text"])))
    several = len(row["sequences"]) > 1
    for place, sequence in enumerate(row["sequences"]):
        if several:
            parts.append(Text(f"sequence {place + 1} of {len(row['sequences'])}", "italic"))
        if tokens:
            parts.append(_token_table(sequence, token_texts))
        else:
            parts.append(_spans(sequence, token_texts, whole=place > 0, marks=marks))
    return Group(*parts)


def _title(row: dict[str, Any]) -> Text:
    versions = sorted({v for s in row["sequences"] for v in s["versions"] if v >= 0})
    title = Text(f"response {row['number']} · ")
    title.append(row["outcome"], _OUTCOME.get(row["outcome"], ""))
    title.append(" · reward " + ("unknown" if row["reward"] is None else f"{row['reward']:g}"))
    title.append(f" · {row['length']:,} tokens")
    if versions:
        between = f"{versions[0]}" if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
        title.append(f" · weights of step {between}")
    title.append(" · truncated" if row["truncated"] else "")
    title.append("" if row["trained"] else " · not trained on")
    return title


def _notes(row: dict[str, Any]) -> Iterator[str]:
    if row["extracted"] is not None:
        yield f"answer: {printable(row['extracted'])}"
    facts = {**row["facts"], **{f"environment/{n}": v for n, v in row["environment_facts"].items()}}
    if facts:
        yield ", ".join(f"{printable(name)} = {value:g}" for name, value in facts.items())
    if row["why"] is not None:
        yield f"why: {printable(row['why'])}"
    if row["trace"] is not None:
        yield printable(row["trace"].rstrip())


def _spans(sequence: dict[str, Any], token_texts: TokenTexts, *, whole: bool, marks: bool) -> Text:
    """The sequence's text; without its prompt, which stands above, unless `whole`."""
    text = Text()
    start = 0 if whole else prompt_tokens(sequence)
    flags = sequence["sampled"][start:]
    texts = token_texts(sequence["token_ids"])[start:]
    for sampled, pieces in groupby(zip(flags, texts, strict=True), key=lambda pair: pair[0]):
        span = printable("".join(piece for _, piece in pieces))
        if marks:
            text.append(f"{OPENS}{span}{CLOSES}" if sampled else span)
        else:
            text.append(span, SAMPLED if sampled else GIVEN)
    return text


def prompt_tokens(sequence: dict[str, Any]) -> int:
    """Tokens before the first sampled one; all, where none was sampled."""
    sampled: list[bool] = sequence["sampled"]
    return sampled.index(True) if True in sampled else len(sampled)


def _token_table(sequence: dict[str, Any], token_texts: TokenTexts) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("place", "token", "log-prob", "weights"):
        table.add_column(name, justify="right")
    table.add_column("text")
    ids: Sequence[int] = sequence["token_ids"]
    columns = (ids, sequence["sampled"], sequence["log_probs"], sequence["versions"], token_texts(ids))
    for place, (token, sampled, log_prob, version, text) in enumerate(zip(*columns, strict=True)):
        measured = (f"{log_prob:.4f}", str(version)) if sampled else ("", "given")
        table.add_row(
            *(str(place), str(token), *measured),
            Text(repr(printable(text))[1:-1], SAMPLED if sampled else GIVEN),
        )
    return table
