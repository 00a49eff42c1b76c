"""Prompt tokens: plain text, the tokenizer's own habits, and its chat template."""

import json
from datetime import UTC, datetime

import pytest
from tokenizers.processors import TemplateProcessing

from megatron_rapo.config.data import FileData
from megatron_rapo.data.rows import Row
from megatron_rapo.data.templates import encode_plain, encode_template
from megatron_rapo.errors import RapoError
from tests.models import make_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(*, bos=False, eos=False, chat_template=None):
    made = make_tokenizer(vocab_size=200)
    made.chat_template = chat_template
    if bos:
        made.add_special_tokens({"bos_token": "<|begin|>"})
        single = "<|begin|> $A" + (" <|im_end|>" if eos else "")
        made._tokenizer.post_processor = TemplateProcessing(
            single=single,
            special_tokens=[(t, made.convert_tokens_to_ids(t)) for t in ("<|begin|>", "<|im_end|>")],
        )
    return made


def rows(*questions):
    return [Row(index, question, "") for index, question in enumerate(questions)]


def encode_chat(texts, made, system_prompt, option="data", date=None):
    data = FileData(source="file", path="x.jsonl", template_text="{prompt}", system_prompt=system_prompt)
    return encode_template(rows(*texts), made, data, option, date)


def test_plain_text_becomes_its_own_tokens():
    made = tokenizer()
    assert [made.decode(ids) for ids in encode_plain(["1+1=", "a b"], made)] == ["1+1=", "a b"]
    assert encode_plain([], made) == []


def test_plain_text_begins_with_bos_where_that_is_the_tokenizers_habit():
    made = tokenizer(bos=True, eos=True)
    (ids,) = encode_plain(["1+1="], made)
    assert made.convert_ids_to_tokens(ids) == ["<|begin|>", "1", "+", "1", "="]


def test_bos_is_not_doubled_where_the_text_brings_it():
    made = tokenizer(bos=True)
    (ids,) = encode_plain(["<|begin|>1"], made)
    assert made.convert_ids_to_tokens(ids) == ["<|begin|>", "1"]


def test_a_bos_token_that_the_tokenizer_does_not_put_in_front_stays_out():
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<|begin|>"})
    (ids,) = encode_plain(["1"], made)
    assert made.convert_ids_to_tokens(ids) == ["1"]


def test_chat_renders_the_turns_up_to_the_assistants():
    made = tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    with_system, without = encode_chat(["1+1"], made, "be brief"), encode_chat(["1+1"], made, None)
    assert made.decode(with_system[0]) == "system:be brief\nuser:1+1\nassistant:"
    assert made.decode(without[0]) == "user:1+1\nassistant:"


def test_chat_is_what_the_tokenizer_itself_makes_of_the_conversation():
    made = tokenizer(bos=True, chat_template="<|begin|>" + CHAT_TEMPLATE)
    conversation = [{"role": "user", "content": "1+1"}]
    expected = made.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert encode_chat(["1+1"], made, None) == [expected]


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy():
    with pytest.raises(RapoError, match=r'has no chat template; set data.template = "plain"'):
        encode_chat(["1+1"], tokenizer(), None)


def test_a_template_that_refuses_the_system_turn_is_told():
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    made = tokenizer(chat_template=refusing)
    with pytest.raises(RapoError, match=r"refuses the conversation: no system; remove data.system_prompt"):
        encode_chat(["1+1"], made, "be brief")
    assert made.decode(encode_chat(["1"], made, None)[0]) == "user:1\nassistant:"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{{ 1 + 'a' }}", r"TypeError\(.+\)"),
        ("{{ 1 // 0 }}", r"ZeroDivisionError\(.+\)"),
        ("{{ messages[7].x.y }}", ".+"),
        ("{% for %}", ".+"),
        ("{{ [].pop() }}", ".+"),
    ],
)
def test_a_template_that_fails_is_told(body, why):
    made = tokenizer(chat_template=CHAT_TEMPLATE + body)
    with pytest.raises(
        RapoError,
        match=rf'chat template of .* refuses the conversation: {why}; set evaluate.data.template = "plain"',
    ):
        encode_chat(["1+1"], made, None, "evaluate.data")


def test_named_templates_need_a_default():
    made = tokenizer(chat_template={"tool_use": CHAT_TEMPLATE, "rag": CHAT_TEMPLATE})
    with pytest.raises(RapoError, match=r"special uses alone \(rag, tool_use\) and no default; name one of"):
        encode_chat(["1+1"], made, None)
    made.chat_template["default"] = CHAT_TEMPLATE
    assert made.decode(encode_chat(["1+1"], made, None)[0]) == "user:1+1\nassistant:"


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_configured_text_goes_around_the_question_braces_and_all(template):
    made = tokenizer(chat_template=CHAT_TEMPLATE)
    data = FileData(source="file", path="x.jsonl", template=template, template_text="Q({prompt})")
    (ids,) = encode_template(rows("1 + 1 = x"), made, data)
    text = "Q(1 + 1 = x)"
    assert made.decode(ids) == (text if template == "plain" else f"user:{text}\nassistant:")


def test_the_configured_system_prompt_comes_first():
    made = tokenizer(chat_template=CHAT_TEMPLATE)
    data = FileData(source="file", path="x.jsonl", template_text="{prompt}", system_prompt="be brief")
    (ids,) = encode_template(rows("1+1"), made, data)
    assert made.decode(ids) == "system:be brief\nuser:1+1\nassistant:"


def test_braces_in_the_question_are_no_placeholders():
    made = tokenizer()
    made.add_tokens(["{", "}"])
    data = FileData(source="file", path="x.jsonl", template="plain", template_text="{{{prompt}}}")
    (ids,) = encode_template(rows("{0}{prompt}"), made, data)
    assert "".join(made.convert_ids_to_tokens(ids)) == "{{0}{prompt}}"


def test_a_template_is_told_the_day_and_no_time():
    made = tokenizer(chat_template="{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}")
    (ids,) = encode_chat(["1"], made, None, date="2026-02-03")
    assert made.decode(ids) == "2026-02-03 00:00:00 1"
    (ids,) = encode_chat(["1"], made, None)
    assert made.decode(ids) == f"{datetime.now(UTC).date()} 00:00:00 1"


def encoded(made, *rows, **options):
    data = FileData(source="file", path="x.jsonl", **{"template_text": "{prompt}", **options})
    return [made.decode(ids) for ids in encode_template(rows, made, data)]


SHOTS = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4"}]


def test_a_role_that_the_template_refuses_is_told_by_its_row():
    refuses = "{% if messages[0].role == 'developer' %}{{ raise_exception('no developer') }}{% endif %}"
    good, bad = ({"role": "user", "content": "1"},), ({"role": "developer", "content": "2"},)
    chats = [Row(number, "1", "", messages=turns) for number, turns in ((3, good), (8, bad + good))]
    data = FileData(source="file", path="rows.jsonl")
    made = tokenizer(chat_template=refuses + CHAT_TEMPLATE)
    with pytest.raises(RapoError, match=r"^data, row 8: .*conversation: no developer; .*or correct the row$"):
        encode_template(chats, made, data)


def test_few_shot_examples_are_turns_of_the_chat(tmp_path):
    made = tokenizer(chat_template=CHAT_TEMPLATE)
    expected = "system:hi\nuser:Q 1+1\nassistant:2\nuser:Q 2+2\nassistant:4\nuser:Q 3+3\nassistant:"
    options = {"template_text": "Q {prompt}", "system_prompt": "hi"}
    assert encoded(made, *rows("3+3"), few_shot=SHOTS, **options) == [expected]
    path = tmp_path / "shots.jsonl"
    path.write_text("\n".join(map(json.dumps, SHOTS)))
    assert encoded(made, *rows("3+3"), few_shot_file=path, **options) == [expected]


def test_few_shot_examples_stand_behind_the_datas_own_system_turn():
    made = tokenizer(chat_template=CHAT_TEMPLATE)
    messages = ({"role": "system", "content": "hi"}, {"role": "user", "content": "3+3"})
    (text,) = encoded(made, Row(0, "3+3", "", messages=messages), few_shot=SHOTS[:1])
    assert text == "system:hi\nuser:1+1\nassistant:2\nuser:3+3\nassistant:"


def test_few_shot_examples_of_plain_text_end_with_a_blank_line():
    made = tokenizer()
    (text,) = encoded(made, *rows("3+3"), template="plain", template_text="Q {prompt} A ", few_shot=SHOTS)
    assert text == "Q 1+1 A 2\n\nQ 2+2 A 4\n\nQ 3+3 A "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no rows; remove the option"),
        (
            '{"question": "1"}',
            r"shots\.jsonl, row 0, has no texts question and answer but question; write both",
        ),
        (
            r'{"question": "1", "answer": "\ud800"}',
            r"shots\.jsonl, row 0: field 'answer' has '\\ud800' at character 0, half of a surrogate pair",
        ),
        ("{", r"shots\.jsonl:1 is not JSON"),
        (None, r"few_shot_file = '.*shots\.jsonl' cannot be read: .*; correct it"),
    ],
)
def test_a_file_of_examples_that_is_none_is_told(tmp_path, content, message):
    path = tmp_path / "shots.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RapoError, match=message):
        encoded(tokenizer(chat_template=CHAT_TEMPLATE), *rows("1"), few_shot_file=path)


SWITCHED = (
    CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}none {% endif %}{{ tools }}"
)


def test_switches_of_the_chat_template_are_set():
    made = tokenizer(chat_template=SWITCHED)
    (text,) = encoded(made, *rows("1"), template_options={"enable_thinking": False})
    assert text == "user:1\nassistant:none None"
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}
    (text,) = encoded(made, *rows("1"), template_options={"tools": [tool]})
    assert "name: add" in text


def test_a_switch_that_the_template_does_not_mention_is_refused():
    with pytest.raises(
        RapoError,
        match=r"template_options has thinking = True, which the chat template of .* does not mention",
    ):
        encoded(tokenizer(chat_template=SWITCHED), *rows("1"), template_options={"thinking": True})


OWN = "{% for m in messages %}({{ m.content }}){% endfor %}{{ problem.level }}"


def test_a_template_of_ones_own_sees_messages_and_columns(tmp_path):
    made = tokenizer()  # without one
    row = Row(0, "1+1", "2", columns={"question": "1+1", "level": 3})
    options = {"system_prompt": "hi", "template_text": "Q {prompt}", "template_options": {"level": 1}}
    assert encoded(made, row, template=OWN, **options) == ["(hi)(Q 1+1)3"]
    path = tmp_path / "own.jinja"
    path.write_text(OWN)
    assert encoded(made, row, template=str(path), **options) == ["(hi)(Q 1+1)3"]


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{{ problem.lvel }}", {}, r"the problem has no column 'lvel'; its columns: level; correct it"),
        (
            "{{ messages[9].x.y }}",
            {},
            r'data\.template = "\{\{ messages.*refuses the conversation: .*correct it',
        ),
        ("{{ 1 }}", {}, r"mentions neither messages nor problem, so all prompts were the same"),
        ("nowhere.jinja", {}, r'data\.template = "nowhere\.jinja" cannot be read: .*; name a file'),
        (
            "{{ problem.level }}",
            {"system_prompt": "hi"},
            r"data\.system_prompt would have no effect: .*messages",
        ),
        ("{{ problem.__class__ }}{{ ''.__class__.mro() }}", {}, r"refuses the conversation: .*unsafe"),
    ],
)
def test_a_template_of_ones_own_that_does_not_work_is_told(template, options, message):
    data = FileData(source="file", path="x.jsonl", template=template, **options)
    with pytest.raises(RapoError, match=message):
        encode_template([Row(0, "1", "", columns={"level": 1})], tokenizer(), data)
