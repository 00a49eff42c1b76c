"""Files as they come from elsewhere: verl's Parquet, slime's JSONL, OpenAI's messages."""

import json
import re
from datetime import datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_rapo.config.data import FileData
from megatron_rapo.data.columns import NotPlain, find, plain
from megatron_rapo.data.load import load_prompts
from megatron_rapo.data.sources import read_file
from megatron_rapo.errors import RapoError
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer(vocab_size=200)
TOKENIZER.chat_template = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VERL = {
    "data_source": "math",
    "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 7, "tags": ["a", "b"]},
}
SLIME = {"prompt": "1+1", "label": "2", "metadata": {"level": 3}}
CHAT = {
    "messages": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2+2"},
        {"role": "assistant", "content": "4"},
    ],
    "level": 3,
}
ROW = {"question": "1+1", "answer": "2"}


def file_data(path, **options):
    return FileData(source="file", path=path, **options)


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder, *rows):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def load(data, **options):
    loaded = load_prompts(data, TOKENIZER, max_prompt_tokens=500, split="train", count=None, **options)
    return list(loaded), [TOKENIZER.decode(prompt.token_ids) for prompt in loaded]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_verls_files_load_as_they_are(tmp_path, write):
    (prompt,), texts = load(file_data(write(tmp_path, VERL), format="verl"))
    assert texts == ["system:be brief\nuser:1+1\nassistant:"]  # its messages as such: no template_text
    assert (prompt.question, prompt.answer) == ("1+1", "2")
    assert prompt.columns == VERL
    assert prompt.problem["extra_info"]["tags"] == ["a", "b"]


def test_slimes_files_load_as_they_are(tmp_path):
    chat = {**SLIME, "prompt": [{"role": "user", "content": "2+2"}], "label": 4}
    data = file_data(jsonl(tmp_path, SLIME, chat), format="slime", template_text="Say {prompt}")
    prompts, texts = load(data)
    assert texts == ["user:Say 1+1\nassistant:", "user:2+2\nassistant:"]
    assert [prompt.answer for prompt in prompts] == ["2", "4"]
    assert prompts[0].problem["metadata"] == {"level": 3}


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_chats_load_without_their_last_answer_which_is_the_gold(tmp_path, write):
    (prompt,), texts = load(file_data(write(tmp_path, CHAT), format="messages"))
    assert texts == ["user:1+1\nassistant:2\nuser:and 2+2\nassistant:"]
    assert (prompt.question, prompt.answer) == ("and 2+2", "4")
    assert prompt.columns == CHAT


def test_a_chats_own_answer_comes_before_its_last_turn(tmp_path):
    rows = [{**CHAT, "gold": "four"}, {"messages": CHAT["messages"][:1], "gold": "2"}]
    prompts, texts = load(file_data(jsonl(tmp_path, *rows), format="messages", answer_field="gold"))
    assert [prompt.answer for prompt in prompts] == ["four", "2"]
    assert texts[1] == "user:1+1\nassistant:"


def test_parts_of_text_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    row = {"messages": [{"role": "user", "content": parts}], "answer": "2"}
    _, texts = load(file_data(jsonl(tmp_path, row), format="messages"))
    assert texts == ["user:1+1\nassistant:"]


def test_fields_may_be_nested(tmp_path):
    row = {"task": {"text": "1+1", "gold": {"value": 2}}, "task.text": "not this"}
    data = file_data(
        jsonl(tmp_path, {"task": row["task"]}), prompt_field="task.text", answer_field="task.gold.value"
    )
    assert [(one.question, one.answer) for one in read_file(data)] == [("1+1", "2")]
    assert find(row, "task.text") == "not this"  # a column of this very name comes first
    assert find(row, "task.none.value") is None


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        (
            VERL,
            "rows",
            r"no field 'question'; it has the columns of another format: set data\.format = \"verl\"",
        ),
        (VERL, "slime", r"no field 'label'; .* set data\.format = \"verl\""),
        (SLIME, "verl", r"no field 'reward_model.ground_truth'; .* set data\.format = \"slime\""),
        (CHAT, "rows", r"no field 'question'; .* set data\.format = \"messages\""),
        (ROW, "messages", r"no field 'messages'; .* set data\.format = \"rows\""),
        (ROW, "verl", r"no field 'prompt'; .* set data\.format = \"rows\""),
    ],
)
def test_the_wrong_format_is_told_with_the_right_one(tmp_path, row, format, message):
    with pytest.raises(RapoError, match=message):
        read_file(file_data(jsonl(tmp_path, row), format=format))


def test_messages_where_text_is_expected_are_told_with_the_format(tmp_path):
    data = file_data(jsonl(tmp_path, VERL), prompt_field="prompt", answer_field="reward_model.ground_truth")
    with pytest.raises(
        RapoError, match=r"row 0: field 'prompt' is \[.*not text; .*set data\.format = \"verl\""
    ):
        read_file(data)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"field 'messages' is no list of messages; set data\.prompt_field"),
        ({"role": "user"}, "no list of messages"),
        ([{"content": "1+1"}], "number 0 is .*without a role"),
        (["1+1"], "number 0 is '1\\+1', without a role"),
        ([{"role": "user", "content": None}], "number 0 has the content None, no text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has the content .*image_url.*no text"),
        ([{"role": "system", "content": "be brief"}], "end with system, so that there is nothing to answer"),
        ([{"role": "assistant", "content": "4"}], "end with nothing, so that there is nothing to answer"),
    ],
)
def test_what_is_no_chat_is_told_by_its_row(tmp_path, messages, message):
    data = file_data(jsonl(tmp_path, CHAT, {"messages": messages, "answer": "1"}), format="messages")
    with pytest.raises(RapoError, match=f"row 1: {message}" if "field" in message else f"row 1.*{message}"):
        read_file(data)


def test_golds_that_are_no_text_are_left_to_rewards_that_read_columns(tmp_path):
    row = {**VERL, "reward_model": {"ground_truth": {"tests": ["assert 1"]}}}
    data = file_data(jsonl(tmp_path, row), format="verl")
    with pytest.raises(RapoError, match=r"ground_truth' is \{.*no text and no number"):
        read_file(data)
    (prompt,), _ = load(data, needs_answers=False)
    assert prompt.answer == ""
    assert prompt.problem["reward_model"]["ground_truth"]["tests"] == ["assert 1"]


def test_a_reward_that_reads_no_golds_needs_no_answers(tmp_path):
    path = jsonl(tmp_path, {"question": "1+1", "level": 1}, {"question": "2+2"})
    prompts, _ = load(file_data(path), needs_answers=False)
    assert [prompt.question for prompt in prompts] == ["1+1", "2+2"]
    with pytest.raises(RapoError, match=r"no field 'answer'; set data\.answer_field"):
        load(file_data(path))
    with pytest.raises(RapoError, match=r"no field 'gold'; set data\.answer_field"):
        load(file_data(path, answer_field="gold"), needs_answers=False)


def test_options_of_text_beside_messages_are_refused(tmp_path):
    path = parquet(tmp_path, VERL)
    for options, message in (
        (
            {"system_prompt": "hi"},
            r"system_prompt = 'hi' contradicts row 0, which has a system turn of its own",
        ),
        (
            {"template_text": "Q {prompt}"},
            r"template_text = 'Q \{prompt\}' would have no effect: row 0 is made of",
        ),
        ({"template": "plain"}, r"template = \"plain\" cannot write a chat, and row 0 is made of messages"),
    ):
        with pytest.raises(RapoError, match=message):
            load(file_data(path, format="verl", **options))
    without = {**VERL, "prompt": VERL["prompt"][1:]}
    _, texts = load(file_data(parquet(tmp_path, without), format="verl", system_prompt="be kind"))
    assert texts == ["system:be kind\nuser:1+1\nassistant:"]


def test_columns_become_plain_python():
    nested = {"a": np.array([[1, 2], [3, 4]]), "b": (np.float32(0.5), np.str_("x")), "c": {3: np.int64(4)}}
    found = plain(nested)
    assert found == {"a": [[1, 2], [3, 4]], "b": (0.5, "x"), "c": {3: 4}}
    assert type(found["b"][1]) is str
    assert type(found["c"][3]) is int
    for value in (object(), {1.5: 2}, {"a": [{1, 2}]}, lambda: 1):
        with pytest.raises(NotPlain):
            plain(value)


def test_blanks_and_spans_of_other_libraries_become_pythons_own():
    nan, blank = float("nan"), type("NAType", (), {"__module__": "pandas._libs.missing"})()
    row = {"a": nan, "b": [np.float32("nan"), Decimal("nan")], "c": blank, "d": np.datetime64("NaT")}
    assert plain(row) == {"a": None, "b": [None, None], "c": None, "d": None}
    days = np.array(["2020-01-02"], "M8[ns]")  # as Parquet has them: nanoseconds, which Python's have not
    assert plain({"days": days, "span": np.timedelta64(3, "s")}) == {
        "days": [datetime(2020, 1, 2)], "span": timedelta(seconds=3),
    }  # fmt: skip


_LOOP: list = [1]
_LOOP.append(_LOOP)
_TREE: dict = {}
_TREE["left"] = _TREE["right"] = _TREE


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"note": "a\ud800"}, r"field 'note' has '\\ud800' at character 1, half of a surrogate pair"),
        ({"meta": {"tags": ["a", "\udfff"]}}, r"field 'meta\.tags\[1\]' has '\\udfff' at character 0"),
        ({"meta": {"\ud800": 1}}, r"field 'meta' has '\\ud800'"),
        ({"\ud800": 1}, r"row has '\\ud800'"),
        ({"meta": _LOOP}, r"field 'meta\[1\]' has a value that contains itself"),
        ({"meta": _TREE}, r"field 'meta\.left' has a value that contains itself"),
        ({"meta": json.loads("[" * 200 + "]" * 200)}, r"has values nested more than 100 deep; flatten them"),
        ({"meta": 10**4400}, r"field 'meta' has an integer of more than 4,300 digits, .* give it as a text"),
        ({"meta": {-(10**4400): 1}}, r"field 'meta' has an integer of more than 4,300 digits"),
        ({"meta": [1.0, float("inf")]}, r"field 'meta\[1\]' has inf, no finite number"),
        ({"meta": Decimal("-inf")}, r"field 'meta' has -Infinity, no finite number"),
        ({"meta": {1: 2, "b": 3}}, r"field 'meta' has a mapping with texts and integers as keys"),
        ({"meta": {True: 1}}, r"a mapping with the key True \(bool\)"),
    ],
)
def test_what_cannot_be_written_is_told_by_its_place(columns, message):
    with pytest.raises(NotPlain) as told:
        plain({"question": "1+1", **columns})
    assert re.search(message, f"row{told.value}")


def test_what_cannot_be_written_is_told_with_file_and_row(tmp_path):
    for text, message in (
        (r'{"question": "q", "answer": 1, "metadata": {"a": "\ud800"}}', r"'metadata\.a' has '\\ud800'"),
        (r'{"question": "q", "answer": 1, "metadata": {"score": 1e999}}', r"'metadata\.score' has inf"),
    ):
        path = jsonl(tmp_path, ROW)
        path.write_text(f"{json.dumps(ROW)}\n{text}\n")
        with pytest.raises(RapoError, match=rf"data file .*rows\.jsonl, row 1: field {message}"):
            read_file(file_data(path))


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_nan_is_blank_in_every_column(tmp_path, write):
    path = write(tmp_path, {**ROW, "level": float("nan")}, {**ROW, "level": 2.5})
    assert [row.columns["level"] for row in read_file(file_data(path))] == [None, 2.5]
