"""docs/data.md: each of its configurations, with the data above it, loads as the page says."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rapo.config import validate
from megatron_rapo.data.load import load_training_prompts
from tests.models import make_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    "{% if enable_thinking is defined %}thinks {{ enable_thinking }}{% endif %}"
)


def blocks() -> list[tuple[str, dict[str, str]]]:
    """Of each ```toml block: its section's heading, and the text of the last block of each other kind."""
    found, last, heading = [], {}, ""
    for title, kind, text in re.findall(r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S):
        heading = title or heading
        if kind:
            last[kind] = text
        if kind == "toml":
            found.append((heading, dict(last)))
    return found


@pytest.mark.parametrize(("heading", "given"), blocks(), ids=lambda value: str(value)[:20])
def test_an_example_loads(heading, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    values = tomllib.loads(given["toml"])
    source = values["data"]["source"]
    if source == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("the extra gym is not installed")
    rows = [json.loads(line) for line in given["jsonl"].splitlines()]
    if values["data"].get("format") is None and source == "file":
        rows = [{"question": "What is 6 · 7?", "answer": "42", "level": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "my_data.py").write_text(given.get("python", ""))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    values |= {
        "run": {"directory": "run", "steps": 1, "code": [str(tmp_path)]},
        "model": {"path": "models/tiny"},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
    }
    if source != "function":
        del values["run"]["code"]
    tokenizer = make_tokenizer(vocab_size=200)
    tokenizer.chat_template = CHAT_TEMPLATE
    loaded = load_training_prompts(validate(values, source=heading), tokenizer)
    first = loaded.prompts[0]
    text = tokenizer.decode(first.token_ids)
    if source == "file":
        assert (first.question, first.answer) == ("What is 6 · 7?", "42")
        assert first.columns == rows[0]
        assert "What is 6" in text
    if heading.startswith("Prompts"):
        expected = (
            "Level 3: What is 6 7?\nAnswer:"
            if "template" in values["data"]
            else "system:You are a careful mathematician.user:Problem: What is 1 + 1?"
            "assistant:It is boxed2.user:Problem: What is 6 7?thinks False"
        )
        assert re.sub(r"[^\w+:.\n]", "", text) == re.sub(r"[^\w+:.\n]", "", expected)
    counts = {"function": 100, "reasoning_gym": 200, "mixture": 200, "file": 1}
    assert len(loaded.prompts) == counts[source]
    if source == "function":
        assert (first.answer, first.problem["level"]) == ("1234", 1)


def test_the_page_has_an_example_of_each_source_and_format():
    tables = [tomllib.loads(given["toml"])["data"] for _, given in blocks()]
    assert {table["source"] for table in tables} >= {"file", "function", "reasoning_gym", "mixture"}
    assert {table.get("format") for table in tables} == {None, "verl", "slime", "messages"}
