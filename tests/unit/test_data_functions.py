"""Problems from a function of the user's own, which is found beside the configuration."""

import json
import sys
from pathlib import Path

import pytest

from megatron_rapo.config import load_config
from megatron_rapo.config.data import FunctionData
from megatron_rapo.data import functions
from megatron_rapo.data.load import load_prompts, load_training_prompts
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.held_out import load_held_out
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer(vocab_size=200)
TOKENIZER.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
HERE = '{"question": "1+1", "answer": 2}'


def function_data(body, tmp_path, request, **options):
    """A module with this body, of a name that no other test's has; data that name its `problems`."""
    module = f"my_data_{abs(hash((request.node.nodeid, body))) % 10**12}"
    (tmp_path / f"{module}.py").write_text(body)
    options = {"template": "plain", "template_text": "{prompt}", "label": "mine"} | options
    return FunctionData(source="function", problems=f"{module}:problems", **options)


def load(data, folder, split="train", count=None, **options):
    return load_prompts(
        data, TOKENIZER, max_prompt_tokens=500, split=split, count=count, code=[folder], **options
    )


def test_a_function_of_ones_own_is_a_source(tmp_path, request):
    body = """
import numpy as np

def problems():
    yield {"question": "1+1", "answer": 2, "id": "first", "level": np.int64(3), "grid": np.eye(2)}
    yield {"prompt": "2+2", "answer": "4"}
    yield {"messages": [{"role": "user", "content": "3+3"}], "answer": 6.0}
"""
    data = function_data(body, tmp_path, request, template="chat")
    first, second, third = load(data, tmp_path)
    assert [prompt.question for prompt in (first, second, third)] == ["1+1", "2+2", "3+3"]
    assert [prompt.answer for prompt in (first, second, third)] == ["2", "4", "6.0"]
    assert (first.id, second.id, first.source) == ("first", "1", "mine")
    assert first.columns == {
        "question": "1+1", "answer": 2, "id": "first", "level": 3, "grid": [[1.0, 0.0], [0.0, 1.0]],
    }  # fmt: skip
    assert TOKENIZER.decode(third.token_ids) == "user:3+3 "


def test_a_function_is_given_what_it_has_parameters_for(tmp_path, request):
    body = """
def problems(split, *, seed=0, count=None):
    return [{"question": f"{split} {seed} {number}", "answer": 1} for number in range(count or 5)]
"""
    data = function_data(body, tmp_path, request, seed=7, count=3)
    assert [prompt.question for prompt in load(data, tmp_path)] == [f"train 7 {n}" for n in range(3)]
    held_out = load(data, tmp_path, split="test", count=2)
    assert [prompt.question for prompt in held_out] == ["test 7 0", "test 7 1"]


def test_the_working_directory_is_the_same_afterwards(tmp_path, request, monkeypatch):
    """A run's relative paths begin there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    body = f"import os\nos.chdir('/')\ndef problems():\n    os.chdir('/usr')\n    yield {HERE}\n"
    load(function_data(body, tmp_path, request), tmp_path)
    assert Path.cwd() == tmp_path / "here"


def test_no_more_are_taken_than_asked_for(tmp_path, request, monkeypatch):
    body = """
import itertools

def problems():
    return ({"question": str(number), "answer": number} for number in itertools.count())
"""
    assert len(load(function_data(body, tmp_path, request, count=4), tmp_path)) == 4
    monkeypatch.setattr(functions, "MOST", 100)
    data = function_data(body, tmp_path, request)
    with pytest.raises(RapoError, match=r"gives more than 100 problems; set data\.count to how many to take"):
        load(data, tmp_path)


def test_rows_are_dropped_and_reported_as_those_of_files(tmp_path, request):
    body = f"def problems():\n    return [{HERE}, {{'question': ' '}}, {{'question': 'q'}}]\n"
    data = function_data(body, tmp_path, request)
    report = load(data, tmp_path).report
    assert (report.without_question, report.without_answer) == ((1,), (2,))
    assert report.source == f"{data.problems} ({tmp_path / data.problems.split(':')[0]}.py:1)"
    assert len(load(data, tmp_path, needs_answers=False)) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("problems = 3", r"problems = \"my_data_\d+:problems\" is 3, which cannot be called"),
        (f"\ndef problems(n, split):\n    return [{HERE}]", r"\.py:2\) has the parameter n, but only"),
        ("\ndef problems():\n    raise KeyError('x')", r"\.py:2\) fails; mend it:(.|\n)*line 3(.|\n)*'x'"),
        (f"def problems():\n    yield {HERE}\n    1 / 0", r"fails; mend it:(.|\n)*ZeroDivisionError"),
        ("async def problems():\n    return []", r"\.py:1\) is async; make it a plain function"),
        ("async def problems():\n    yield 1", r"is async; make it a plain function"),
        ("def problems():\n    return 'text'", r"returns 'text' \(str\); let it return a list"),
        (f"def problems():\n    return {HERE}", r"\(dict\); let it return a list of mappings"),
        ("def problems():\n    pass", r"returns None \(NoneType\)"),
        ("def problems():\n    return []", r"returns no problems; let it return at least one"),
        (f"def problems():\n    return [{HERE}, 'q']", r", row 1, is 'q' \(str\); let each be a mapping"),
        ("def problems():\n    return [{1: 2}]", r", row 0, is \{1: 2\} \(dict\)"),
        ("class DataFrame(list):\n    pass\ndef problems():\n    return DataFrame('ab')", r"to_dict\("),
        ("def problems():\n    return [{'text': 'q'}]", r"returns mappings with text; let each have"),
        (
            "def problems():\n    return [{'question': 'q', 'answer': 1, 'x': {1, 2}}]",
            r", row 0: field 'x' has \{1, 2\} \(set\), which rewards in other processes cannot be given",
        ),
        (
            "def problems():\n    return [{'question': 'q', 'answer': [1]}]",
            r", row 0: field 'answer' is \[1\], a list; let it be one text or number",
        ),
        (
            "def problems():\n    return [{'question': 3, 'answer': 1}]",
            r", row 0: field 'question' is no list of messages; let it be a text",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_by_function_file_line_and_row(tmp_path, request, body, message):
    data = function_data(body, tmp_path, request)
    with pytest.raises(RapoError, match=message):
        load(data, tmp_path)


def test_a_seed_that_the_function_does_not_take_is_refused(tmp_path, request):
    data = function_data(f"def problems():\n    return [{HERE}]", tmp_path, request, seed=3)
    with pytest.raises(
        RapoError, match=r"data\.seed = 3 has no effect: .* has no parameter seed; give it one"
    ):
        load(data, tmp_path)


def test_held_out_problems_need_a_split_or_a_table_of_their_own(tmp_path, request):
    data = function_data(f"def problems():\n    return [{HERE}]", tmp_path, request)
    with pytest.raises(RapoError, match=r"has no parameter split, so none of its problems are held out"):
        load(data, tmp_path, split="test")
    assert len(load(data, tmp_path, split="test", option="evaluate.data")) == 1


def test_a_project_outside_the_package_adds_a_data_source(tmp_path, monkeypatch):
    """No file of ours knows it: the configuration and a module beside it are all there is."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "own_source.py").write_text("""
def problems(split):
    start = {"train": 0, "test": 100}[split]
    return [{"question": f"{n}+1", "answer": n + 1, "n": n} for n in range(start, start + 8)]
""")
    (project / "run.toml").write_text(f"""
[run]
directory = {json.dumps(str(tmp_path / "run"))}
steps = 1
[model]
path = "models/tiny"
[data]
source = "function"
problems = "own_source:problems"
template = "plain"
[rollout]
prompts_per_step = 4
max_response_tokens = 8
[evaluate]
problems = 3
k = [1]
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    config = load_config([project / "run.toml"])
    prompts = load_training_prompts(config, TOKENIZER).prompts
    assert [prompt.columns["n"] for prompt in prompts] == list(range(8))
    assert prompts[0].source == "problems"
    (held_out,) = load_held_out(config, TOKENIZER)
    assert [prompt.columns["n"] for prompt in held_out.prompts] == [100, 101, 102]
    monkeypatch.delitem(sys.modules, "own_source")
