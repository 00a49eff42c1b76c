"""Chats continued by the model's own template: as it writes them, or not at all."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from renderers.configs import DefaultRendererConfig

from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.rendering import Rendering
from megatron_rapo.environments.template_renderer import TemplateRenderer
from megatron_rapo.errors import RapoError
from megatron_rapo.tools.described import load_tools
from tests.dialogues import TOKENIZERS, byte_level, qwen25
from tests.unit.test_tool_use import INJECTION, USERS, config

SCHEMAS = [tool.schema for tool in load_tools(["calculator"], [])]
ASKED = {"role": "user", "content": "What is 2 + 3?"}
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}
WRITTEN = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'


def rendering(tokenizer: Any, **options: Any) -> Rendering:
    renderer = TemplateRenderer(tokenizer, DefaultRendererConfig(**options))
    return Rendering(renderer, tokenizer, SCHEMAS, "template")


def ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tools=SCHEMAS, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("It is 5.", {"role": "assistant", "content": "It is 5."}),
        (WRITTEN, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        (
            f"I ask.\n{WRITTEN}\n{WRITTEN}",
            {"role": "assistant", "content": "I ask.", "tool_calls": [CALL, CALL]},
        ),
        ("Ä 🙂<think>x</think> \n", {"role": "assistant", "content": "Ä 🙂<think>x</think> \n"}),
    ],
)
@pytest.mark.parametrize(
    "behind",
    [
        [{"role": "user", "content": "Are you sure? 🙂\n"}],
        [{"role": "tool", "content": "5"}],
        [{"role": "tool", "content": "error: no"}, {"role": "tool", "content": "\n6 "}],
    ],
)
def test_qwen25_s_turns_are_what_its_template_writes(
    said: str, message: dict[str, Any], behind: list[dict[str, Any]]
) -> None:
    """The template's rendering of the whole is the independent truth."""
    tokenizer, form = qwen25(), rendering(qwen25())
    prompt = ids(tokenizer, [ASKED])
    sampled = [*tokenizer.encode(said), tokenizer.eos_token_id]
    given = form.continuation(prompt, sampled, behind)
    assert given is not None
    assert [*prompt, *sampled, *given] == ids(tokenizer, [ASKED, message, *behind])


def test_qwen25_s_calls_are_read() -> None:
    tokenizer, form = qwen25(), rendering(qwen25())
    parsed = form.parse(ids(tokenizer, [ASKED]), [*tokenizer.encode(WRITTEN), tokenizer.eos_token_id])
    [call] = parsed.tool_calls
    assert (call.name, call.arguments, call.status) == ("calculator", {"expression": "2+3"}, "ok")


def test_a_tool_cannot_speak_for_the_user() -> None:
    tokenizer, form = qwen25(), rendering(qwen25())
    sampled = [*tokenizer.encode(WRITTEN), tokenizer.eos_token_id]
    given = form.continuation(ids(tokenizer, [ASKED]), sampled, [{"role": "tool", "content": INJECTION}])
    assert given is not None
    ends = [token for token in given if token == tokenizer.eos_token_id]
    assert len(ends) == 1, "the template's own"


def test_a_turn_that_did_not_end_is_not_continued() -> None:
    tokenizer, form = qwen25(), rendering(qwen25())
    for sampled in ([], tokenizer.encode("It is"), [*tokenizer.encode("It is"), tokenizer.pad_token_id]):
        assert form.continuation(ids(tokenizer, [ASKED]), sampled, [{"role": "user", "content": "?"}]) is None


# What templates do that cannot be continued: each rewrites, hides, or leads on by, what was said.
REWRITES = {
    "takes reasoning out": ("message.content", "message.content.split('</think>')[-1]"),
    "trims": ("message.content + '<|im_end|>'", "(message.content | upper) + '<|im_end|>'"),
    "tells how much was said": (
        "{%- if add_generation_prompt %}",
        "{{- messages[1].content | length if messages | length > 1 }}{%- if add_generation_prompt %}",
    ),
    "takes no such message": (
        "{%- if add_generation_prompt %}",
        "{%- if messages | length > 1 %}{{ raise_exception('one question alone') }}{% endif %}"
        "{%- if add_generation_prompt %}",
    ),
}


@pytest.mark.parametrize("what", REWRITES)
def test_a_template_that_cannot_be_continued_is_refused(what: str) -> None:
    tokenizer = deepcopy(qwen25())
    old, new = REWRITES[what]
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(RapoError, match=r'renderer = "template": the template rewrites what the policy said'):
        rendering(tokenizer).check_continues({"role": "user", "content": "Are you sure?"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "users_of_test.py").write_text(USERS)
    (tmp_path / "data.jsonl").write_text('{"question": "2+3?", "answer": "5"}\n' * 4)
    qwen25().save_pretrained(tmp_path / "Qwen2.5-3B-Instruct")
    return tmp_path


def test_qwen25_is_opened_with_its_template_and_auto_says_so(folder: Path) -> None:
    for environment in (
        {"use": "tool_use", "tools": ["calculator"], "options": {"renderer": "template"}},
        {"use": "conversation", "options": {"user": "users_of_test:reply", "renderer": "template"}},
    ):
        open_environment(config(folder, environment, model="Qwen2.5-3B-Instruct"))
    auto = config(folder, {"use": "tool_use", "tools": ["calculator"]}, model="Qwen2.5-3B-Instruct")
    with pytest.raises(RapoError, match=r'"template", which is exact where .* as Qwen2\.5\'s does'):
        open_environment(auto)


def test_calls_that_cannot_be_read_are_refused_before_the_run(folder: Path) -> None:
    tokenizer = deepcopy(TOKENIZERS["tiny"]())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content ~ tools | length }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "mine")
    environment = {"use": "tool_use", "tools": ["calculator"], "options": {"renderer": "template"}}
    with pytest.raises(RapoError, match=r"has no token <tool_call>; set renderer_options"):
        open_environment(config(folder, environment, model="mine"))


def test_plain_texts_are_no_chats(folder: Path) -> None:
    environment = {"use": "tool_use", "tools": ["calculator"], "options": {"renderer": "template"}}
    with pytest.raises(RapoError, match="continues chats, and data begins none"):
        open_environment(config(folder, environment, model="Qwen2.5-3B-Instruct", template="plain"))


def test_the_template_writes_what_the_family_s_renderer_does() -> None:
    """Where both are to be had: Qwen3's, of the tests' tokenizer."""
    tokenizer, form = byte_level(), rendering(byte_level())
    prompt = ids(tokenizer, [ASKED])
    sampled = [*tokenizer.encode("It is 5."), tokenizer.eos_token_id]
    given = form.continuation(prompt, sampled, [{"role": "user", "content": "Sure?"}])
    assert given is not None
    assert tokenizer.decode(given) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
