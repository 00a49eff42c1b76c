"""Given texts as what is trained on: the tokens that the policy would be asked with, and say itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rapo.config.data import Data
from megatron_rapo.config.templates import Templated
from megatron_rapo.data.columns import find
from megatron_rapo.data.messages import Message
from megatron_rapo.data.rows import Row
from megatron_rapo.data.templates import (
    ChatTemplate,
    chat_template,
    conversations,
    encode,
    encode_plain,
    encode_template,
    refuse_contradictions,
)
from megatron_rapo.episode.sequence import TAUGHT
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.demonstrations import Demonstrations


def solution_of(row: Row, wanted: Demonstrations, source: str) -> Message | None:
    """The assistant's last turn of a row, as it is to be learnt; None where the row has none.

    Raises:
        RapoError: the column is no text.
    """
    if wanted.column is None:
        text: Any = row.answer
        if row.messages is not None:
            return row.solution if row.solution and (row.solution.get("content") or "").strip() else None
    else:
        text = find(row.columns, wanted.column)
    if text is not None and not isinstance(text, str):
        raise RapoError(
            f"{source}, row {row.index}: field '{wanted.column}' (algorithm.solution) is {text!r:.80}, no "
            "text; name a column with what the assistant is to say"
        )
    return {"role": "assistant", "content": text} if text and text.strip() else None


def encode_demonstrations(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    wanted: Demonstrations,
    source: str,
    option: str = "data",
    date: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[TokenSequence]:
    """Each row's tokens, of which those that the assistant says are trained on (`Sequence.trained`).

    A plain text is the prompt's tokens, then the solution's and the token that ends a text: so they stand in
    RL, where the response is sampled behind the prompt. Of a chat template it is asked by its own renderings
    what the assistant says: each turn stands between the conversation that opens it and that which ends with
    it, and both must be beginnings of the whole, as texts and as tokens.

    Args:
        rows: each with a solution.
        tokenizer: the policy's.
        data: where they are from, and the template.
        wanted: which texts.
        source: what people call the data.
        option, date, tools: as in `encode_template`.

    Raises:
        RapoError: as `encode_template`; or the template's rendering does not tell what the assistant says.
    """
    said = [solution_of(row, wanted, source) or {} for row in rows]
    if isinstance(data, Templated) and data.template != "plain":
        refuse_contradictions(rows, data, option)
        chat = chat_template(data, tokenizer, option, tools)
        asked = conversations(rows, data, option)
        return [
            _of_chat(_Chat(chat, row, [*turns, solution], date, f"{source}, row {row.index}"), wanted, option)
            for row, turns, solution in zip(rows, asked, said, strict=True)
        ]
    if isinstance(data, Templated):
        prompts = encode_template(rows, tokenizer, data, option, date, tools)
    else:
        prompts = encode_plain([row.question for row in rows], tokenizer)
    texts = encode([solution["content"] for solution in said], tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        TokenSequence.of_text(prompt, text if text[-1:] == eos else [*text, *eos])
        for prompt, text in zip(prompts, texts, strict=True)
    ]


@dataclass(frozen=True)
class _Chat:
    """A conversation that ends with the assistant's turn, in its template."""

    template: ChatTemplate
    row: Row
    turns: list[Message]
    date: str | None
    place: str

    def text(self, count: int, *, opens: bool) -> str:
        """Its first turns, and where `opens` the beginning of the assistant's next."""
        return self.template.render(self.turns[:count], self.row.columns, self.date, opens=opens)

    def own(self) -> Iterator[int]:
        """Where the assistant speaks in the row itself, worked examples left out."""
        own = list(dropwhile(lambda turn: turn["role"] == "system", self.row.messages or ()))
        first = len(self.turns) - 1 - max(1, len(own))
        yield from (i for i in range(first, len(self.turns)) if self.turns[i]["role"] == "assistant")


def _of_chat(chat: _Chat, wanted: Demonstrations, option: str) -> TokenSequence:
    tokenizer = chat.template.tokenizer
    whole = chat.text(len(chat.turns), opens=False)
    [ids] = encode([whole], tokenizer)
    versions = np.full(len(ids), -1, np.int32)
    end = 0
    for turn in list(chat.own())[0 if wanted.turns == "all" else -1 :]:
        start, end = _span(chat, turn, whole, ids, option)
        versions[start:end] = TAUGHT
    return TokenSequence(
        token_ids=np.array(ids[:end], np.int32),
        sampled=np.zeros(end, bool),
        log_probs=np.full(end, np.nan, np.float32),
        versions=versions[:end],
    )


def _span(chat: _Chat, turn: int, whole: str, ids: list[int], option: str) -> tuple[int, int]:
    """The tokens that the assistant says in a turn, with that which ends it."""
    tokenizer, called = chat.template.tokenizer, chat.template.called
    last_alone = 'learn the last turn alone (algorithm.turns = "last"), or '

    def refused(why: str) -> RapoError:
        is_last = turn == len(chat.turns) - 1
        return RapoError(
            f"{chat.place}: what the assistant says in turn {turn} cannot be told from what {called} writes: "
            f"{why}; {'' if is_last else last_alone}set {option}.template to one that adds to what is there"
        )

    bounds = []
    for what, text in (
        ("the conversation before it", chat.text(turn, opens=True)),
        ("the conversation up to its end", chat.text(turn + 1, opens=False)),
    ):
        if not whole.startswith(text):
            raise refused(f"{what} is written otherwise once more follows ({_parting(text, whole)})")
        [begin] = encode([text], tokenizer)
        if ids[: len(begin)] != begin:
            raise refused(f"the last token of {what} is another once more follows")
        bounds.append(len(begin))
    start, end = bounds
    special = [place for place in range(start, end) if ids[place] in set(tokenizer.all_special_ids)]
    if not special:
        raise refused("no special token ends it, so that the policy never learnt to end a turn")
    return start, special[-1] + 1  # what stands behind is the template's


def _parting(text: str, whole: str) -> str:
    """Where two texts part, for people."""
    place = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), len(whole))
    return f"{text[place : place + 20]!r} in place of {whole[place : place + 20]!r}"
