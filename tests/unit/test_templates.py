"""Prompt tokens: plain text, the tokenizer's own habits, and its chat template."""

from datetime import UTC, datetime

import pytest
from tokenizers.processors import TemplateProcessing

from megatron_rapo.config.data import FileData
from megatron_rapo.data.templates import encode_chat, encode_plain, encode_template
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
    "body", ["{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ messages[7].x.y }}", "{% for %}", "{{ [].pop() }}"]
)
def test_a_template_that_fails_is_told(body):
    made = tokenizer(chat_template=CHAT_TEMPLATE + body)
    with pytest.raises(
        RapoError,
        match=r'chat template of .* refuses the conversation: .+; set evaluate.data.template = "plain"',
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
    (ids,) = encode_template(["1 + 1 = x"], made, data)
    text = "Q(1 + 1 = x)"
    assert made.decode(ids) == (text if template == "plain" else f"user:{text}\nassistant:")


def test_the_configured_system_prompt_comes_first():
    made = tokenizer(chat_template=CHAT_TEMPLATE)
    data = FileData(source="file", path="x.jsonl", template_text="{prompt}", system_prompt="be brief")
    (ids,) = encode_template(["1+1"], made, data)
    assert made.decode(ids) == "system:be brief\nuser:1+1\nassistant:"


def test_braces_in_the_question_are_no_placeholders():
    made = tokenizer()
    made.add_tokens(["{", "}"])
    data = FileData(source="file", path="x.jsonl", template="plain", template_text="{{{prompt}}}")
    (ids,) = encode_template(["{0}{prompt}"], made, data)
    assert "".join(made.convert_ids_to_tokens(ids)) == "{{0}{prompt}}"


def test_a_template_is_told_the_day_and_no_time():
    made = tokenizer(chat_template="{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}")
    (ids,) = encode_chat(["1"], made, None, date="2026-02-03")
    assert made.decode(ids) == "2026-02-03 00:00:00 1"
    (ids,) = encode_chat(["1"], made, None)
    assert made.decode(ids) == f"{datetime.now(UTC).date()} 00:00:00 1"
