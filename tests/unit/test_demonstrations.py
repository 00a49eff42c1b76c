"""Given texts as what is trained on: which tokens, and of which templates they cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_rapo.config import ArithmeticData, FileData
from megatron_rapo.data.load import load_prompts
from megatron_rapo.data.prompts import PromptSet
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.demonstrations import Demonstrations
from tests.models import EOS, make_tokenizer

TURN = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}assistant:{% endif %}"
# Earlier answers lose all but their last letter, as templates drop what was thought in earlier turns.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else m.content[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# The beginning of an answer is not that of an answer that was given.
THINKING = TURN + "{% if add_generation_prompt %}assistant:(think){% endif %}"
ENDLESS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer(80)
    made.chat_template = CHATML
    return made


def load(
    path: Path,
    records: list[dict[str, Any]],
    column: str | None = None,
    turns: Any = "all",
    limits: tuple[int, int] = (200, 200),
    **options: Any,
) -> PromptSet:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_prompts(
        FileData(source="file", path=file, **options),
        tokenizer(),
        max_prompt_tokens=limits[0],
        max_response_tokens=limits[1],
        split="train",
        count=None,
        needs_answers=False,
        demonstrations=Demonstrations(column, turns),
    )


def spans(found: PromptSet, row: int = 0) -> tuple[str, list[str]]:
    """All of a row's text, and the stretches that are learnt, ends of turns as `|`."""
    made, sequence = tokenizer(), found[row].demonstration
    assert sequence is not None
    texts = [made.decode([token]).replace("<|im_end|>", "|") for token in sequence.token_ids]
    learnt, stretches = sequence.trained, [""]
    for text, is_learnt, before in zip(texts, learnt, [False, *learnt[:-1]], strict=True):
        if is_learnt and not before:
            stretches.append("")
        stretches[-1] += text if is_learnt else ""
    return "".join(texts), stretches[1:]


PLAIN = {"template": "plain", "template_text": "{prompt}"}
CHAT = {"template": "chat", "format": "messages"}
TWO_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "ef"},
]


def test_a_plain_text_goes_on_from_the_prompt_to_the_end(tmp_path: Path) -> None:
    found = load(tmp_path, [{"question": "1+1=", "answer": "2", "steps": "one more is 2"}], "steps", **PLAIN)
    assert spans(found) == ("1+1=one more is 2|", ["one more is 2|"])
    made = tokenizer()
    assert found[0].token_ids == tuple(made.encode("1+1=", add_special_tokens=False))
    assert found[0].demonstration is not None
    assert found[0].demonstration.token_ids[-1] == EOS
    assert not found[0].demonstration.sampled.any()


def test_without_a_column_the_answer_is_learnt(tmp_path: Path) -> None:
    found = load(tmp_path, [{"question": "1+1=", "answer": 2}], **PLAIN)
    assert spans(found) == ("1+1=2|", ["2|"])


def test_a_question_is_answered_in_the_chat_template(tmp_path: Path) -> None:
    options = {"template_text": "q {prompt}", "system_prompt": "s"}
    found = load(tmp_path, [{"question": "x", "answer": "y"}], **options)
    assert spans(found) == ("system:s|\nuser:q x|\nassistant:y|", ["y|"])


def test_worked_examples_are_given_not_learnt(tmp_path: Path) -> None:
    shots = [{"question": "v", "answer": "w"}]
    found = load(tmp_path, [{"question": "x", "answer": "y"}], template_text="{prompt}", few_shot=shots)
    assert spans(found) == ("user:v|\nassistant:w|\nuser:x|\nassistant:y|", ["y|"])


@pytest.mark.parametrize(("turns", "learnt"), [("all", ["bc|", "ef|"]), ("last", ["ef|"])])
def test_of_messages_the_assistants_turns_are_learnt(tmp_path: Path, turns: str, learnt: list[str]) -> None:
    found = load(tmp_path, [{"messages": TWO_TURNS}], turns=turns, **CHAT)
    assert spans(found) == ("user:a|\nassistant:bc|\nuser:d|\nassistant:ef|", learnt)
    first = "user:a|\nassistant:" if turns == "all" else "user:a|\nassistant:bc|\nuser:d|\nassistant:"
    made = tokenizer()
    assert made.decode(found[0].token_ids).replace("<|im_end|>", "|") == first


def test_a_column_may_answer_messages(tmp_path: Path) -> None:
    found = load(tmp_path, [{"messages": TWO_TURNS[:1], "best": "z"}], "best", **CHAT)
    assert spans(found) == ("user:a|\nassistant:z|", ["z|"])


@pytest.mark.parametrize(
    ("template", "turns", "why"),
    [
        (FORGETFUL, "all", r"turn 1 cannot .* written otherwise once more follows \('bc<|im_end|>"),
        (THINKING, "last", r"turn 3 cannot .* the conversation before it is written otherwise"),
        (ENDLESS, "last", r"no special token ends it"),
    ],
)
def test_a_template_that_hides_what_is_said_is_refused(
    tmp_path: Path, template: str, turns: str, why: str
) -> None:
    with pytest.raises(RapoError, match=rf"data.jsonl, row 0: what the assistant says in {why}|{why}"):
        load(tmp_path, [{"messages": TWO_TURNS}], turns=turns, format="messages", template=template)


def test_the_last_turn_of_a_forgetful_template_can_be_learnt(tmp_path: Path) -> None:
    options = {"format": "messages", "template": FORGETFUL}
    found = load(tmp_path, [{"messages": TWO_TURNS}], turns="last", **options)
    assert spans(found) == ("user:a|\nassistant:c|\nuser:d|\nassistant:ef|", ["ef|"])


def test_tokens_that_reach_over_the_boundary_are_refused(tmp_path: Path) -> None:
    """A tokenizer that merges the prompt's last character with the answer's first."""
    made = tokenizer()
    made.add_tokens([":y"])
    data = FileData(source="file", path=tmp_path / "data.jsonl", template_text="{prompt}")
    data.path.write_text(json.dumps({"question": "x", "answer": "y"}) + "\n")
    limits = {"max_prompt_tokens": 99, "max_response_tokens": 99}
    with pytest.raises(RapoError, match=r"row 0: .* last token of the conversation before it is another"):
        load_prompts(
            data,
            made,
            **limits,
            split="train",
            count=None,
            needs_answers=False,
            demonstrations=Demonstrations(None, "all"),
        )


def test_rows_that_cannot_be_learnt_are_told_by_number(tmp_path: Path) -> None:
    records = [
        {"question": "1", "solution": "a"},
        {"question": "2", "solution": " "},
        {"question": "3", "solution": "far too long"},
        {"question": "4" * 9, "solution": "a"},
        {"question": "5"},
    ]
    found = load(tmp_path, records, "solution", limits=(8, 4), **PLAIN)
    assert [prompt.index for prompt in found] == [0]
    told = str(found.report)
    assert "dropped 2 without a text to learn: rows 1, 4" in told
    assert "dropped 1 longer than 8 tokens: rows 3" in told
    assert "dropped 1 whose text to learn is longer than 4 tokens: rows 2" in told


def test_a_column_that_is_none_is_refused(tmp_path: Path) -> None:
    record = {"question": "1", "solution": ["a"]}
    with pytest.raises(
        RapoError, match=r"row 0: field 'solution' \(algorithm.solution\) is \['a'\], no text"
    ):
        load(tmp_path, [record], "solution", **PLAIN)
    with pytest.raises(
        RapoError, match=r'algorithm.solution = "best" is no column of .*: question, solution'
    ):
        load(tmp_path, [record], "best", **PLAIN)


def test_generated_problems_have_columns_too() -> None:
    loaded = load_prompts(
        ArithmeticData(source="arithmetic"),
        tokenizer(),
        max_prompt_tokens=99,
        max_response_tokens=99,
        split="train",
        count=3,
        needs_answers=False,
        demonstrations=Demonstrations("answer", "all"),
    )
    assert spans(loaded)[1] == [f"{loaded[0].answer}|"]
