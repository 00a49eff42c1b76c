"""Loading prompts: what is kept, what is dropped and reported, and what is refused."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rapo.config.data import ArithmeticData, CountdownData, FileData
from megatron_rapo.data.golds import split
from megatron_rapo.data.load import load_prompts
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.data.sources import read_file
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.math_answers import is_correct
from tests.models import make_tokenizer

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
TOKENIZER = make_tokenizer(vocab_size=200)


def load(data, *, max_prompt_tokens=10_000, split="train", count=None):
    return load_prompts(data, TOKENIZER, max_prompt_tokens=max_prompt_tokens, split=split, count=count)


def file_data(path, **options):
    return FileData(source="file", path=path, **{"template": "plain", "template_text": "{prompt}", **options})


def jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder, rows):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = [
    {"problem": "one", "gold": "1"},
    {"problem": "two", "gold": None},
    {"problem": "three", "gold": "  "},
    {"problem": "one ", "gold": "1"},
    {"problem": "a long one", "gold": "5"},
    {"problem": " ", "gold": "6"},
    {"problem": None, "gold": "7"},
]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_rows_are_kept_or_dropped_and_reported(tmp_path, write):
    data = file_data(write(tmp_path, ROWS), prompt_field="problem", answer_field="gold")
    loaded = load(data, max_prompt_tokens=5)
    assert [(prompt.index, prompt.question, prompt.answer) for prompt in loaded] == [
        (0, "one", "1"),
        (3, "one ", "1"),
    ]
    assert [TOKENIZER.decode(prompt.token_ids) for prompt in loaded] == ["one", "one "]
    report = loaded.report
    assert (report.rows, report.kept) == (7, 2)
    assert report.without_answer == (1, 2)
    assert report.without_question == (5, 6)
    assert report.too_long == (4,)
    assert report.duplicates == ((0, 3),)


def test_the_report_reads_as_a_line_for_each_finding(tmp_path):
    data = file_data(jsonl(tmp_path, ROWS), prompt_field="problem", answer_field="gold")
    assert str(load(data, max_prompt_tokens=5).report).splitlines() == [
        f"{data.path}: 2 prompts from 7 rows",
        "  dropped 2 without a question: rows 5, 6",
        "  dropped 2 without an answer: rows 1, 2",
        "  dropped 1 longer than 5 tokens: rows 4",
        "  kept 1 questions that occur more than once: rows 0=3",
    ]


def test_a_clean_file_has_nothing_to_report_and_many_rows_are_abbreviated(tmp_path):
    clean = load(file_data(jsonl(tmp_path, [{"question": "q", "answer": "a"}])))
    assert str(clean.report) == f"{tmp_path / 'rows.jsonl'}: 1 prompts from 1 rows"
    rows = [{"question": f"q{i}", "answer": "" if i < 9 else "a"} for i in range(10)]
    assert "dropped 9 without an answer: rows 0, 1, 2, 3, 4, …" in str(
        load(file_data(jsonl(tmp_path, rows))).report
    )


def test_a_prompt_of_exactly_the_limit_is_kept(tmp_path):
    data = file_data(jsonl(tmp_path, [{"question": "12345", "answer": "1"}]))
    assert len(load(data, max_prompt_tokens=5)) == 1
    with pytest.raises(RapoError, match=r"longer than 4 tokens: rows 0"):
        load(data, max_prompt_tokens=4)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_numbers_as_answers_become_text(tmp_path, write):
    rows = [{"question": "q", "answer": 27}, {"question": "r", "answer": 12}]
    assert [prompt.answer for prompt in load(file_data(write(tmp_path, rows)))] == ["27", "12"]
    rows = [{"question": "q", "answer": 0}, {"question": "r", "answer": 0.5}]
    assert [float(prompt.answer) for prompt in load(file_data(write(tmp_path, rows)))] == [0, 0.5]


def test_nan_is_a_missing_answer(tmp_path):
    rows = [{"question": "q", "answer": float("nan")}, {"question": "r", "answer": 1.5}]
    assert load(file_data(parquet(tmp_path, rows))).report.without_answer == (0,)


def test_blank_lines_are_no_rows_and_odd_line_separators_end_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"question": "a", "answer": "1"}\r\n\n'
        + '{"question": "b\u2028c", "answer": "2"}'.encode()
    )
    assert [(prompt.index, prompt.question) for prompt in load(file_data(path))] == [
        (0, "a"),
        (1, "b\u2028c"),
    ]


def test_count_takes_the_first_usable_prompts_of_a_file(tmp_path):
    rows = [{"question": f"q{i}", "answer": "" if i == 1 else "a"} for i in range(5)]
    path = jsonl(tmp_path, rows)
    assert [prompt.index for prompt in load(file_data(path), count=3)] == [0, 2, 3]
    with pytest.raises(RapoError, match=r"5 prompts were asked for, but 4 are usable"):
        load(file_data(path), count=5)


def write(folder, text, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "q", "answer": "a"}\n{"question"\n', r"rows\.jsonl:2 is not JSON"),
        (b'{"question": "\xff", "answer": "a"}\n', r"rows\.jsonl:1 is not JSON.*utf-8"),
        (b"[" * 100_000, r"rows\.jsonl:1 is not JSON: maximum recursion depth"),
        (('"' + "é" * 40 + '"').encode(), r"rows\.jsonl:1 is not a JSON object but '\"éé"),
        (b'\n["question"]\n', r"rows\.jsonl:2 is not a JSON object but '\[\"question\"\]"),
        (b"", r"has no rows"),
        (b'{"text": "q", "label": "a"}\n', r"no field 'question'; set data.prompt_field .*: label, text"),
        (
            b'{"question": "q", "label": "a"}\n',
            r"no field 'answer'; set data.answer_field .*: label, question",
        ),
        (b'{"question": [1], "answer": "a"}\n', r"row 0: field 'question' is \[1\], not text"),
        (b'{"question": "q", "answer": ["a"]}\n', r"row 0: field 'answer' is \['a'\]"),
        (b'{"question": "q", "answer": ""}\n', r"no prompt is usable(.|\n)*without an answer: rows 0"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(RapoError, match=message):
        load(file_data(write(tmp_path, content)))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "1\ud800", "answer": "1"}, "question"),
        ({"question": "1", "answer": "\udfff"}, "answer"),
        ({"question": "1", "answer": "1", "id": "x\ud800"}, "id"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(tmp_path, row, field):
    path = jsonl(tmp_path, [{"question": "1", "answer": "1"}, row])
    with pytest.raises(
        RapoError, match=rf"row 1: field '{field}' has '\\ud.* no character; correct or remove"
    ):
        load(file_data(path))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    array = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": array, "answer": array}), path)
    with pytest.raises(RapoError, match=r"not valid Parquet: .*utf-8.*; write it again"):
        load(file_data(path))


def test_damaged_parquet_is_refused(tmp_path):
    path = parquet(tmp_path, [{"question": f"q{i}" * 50, "answer": "a"} for i in range(100)])
    content = bytearray(path.read_bytes())
    content[10:300] = bytes(290)
    path.write_bytes(content)
    with pytest.raises(RapoError, match=r"not valid Parquet: .*; write it again"):
        load(file_data(path))


def test_errors_name_the_table_that_was_set(tmp_path):
    path = jsonl(tmp_path, [{"question": "q", "text": "a"}])
    with pytest.raises(RapoError, match=r"set evaluate\.data\.answer_field to one of its fields"):
        load_prompts(
            file_data(path),
            TOKENIZER,
            max_prompt_tokens=9,
            split="test",
            count=None,
            option="evaluate.data",
        )


def test_a_missing_file_and_a_false_parquet_are_refused(tmp_path):
    with pytest.raises(RapoError, match=r"none\.jsonl does not exist; correct data.path"):
        load(file_data(tmp_path / "none.jsonl"))
    with pytest.raises(RapoError, match="not valid Parquet"):
        load(file_data(write(tmp_path, b"no parquet", "rows.parquet")))


def test_a_row_without_the_answer_field_counts_as_without_an_answer(tmp_path):
    loaded = load(file_data(jsonl(tmp_path, [{"question": "q"}, {"question": "r", "answer": "1"}])))
    assert loaded.report.without_answer == (0,)


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (countdown, CountdownData(source="countdown", problems=20, seed=3)),
        (arithmetic, ArithmeticData(source="arithmetic", problems=20, seed=3)),
    ],
)
def test_a_generated_tasks_question_is_the_whole_prompt(task, data):
    loaded = load(data)
    assert [(prompt.question, prompt.answer) for prompt in loaded] == [
        (problem.question, problem.answer) for problem in task.generate(data, 3, "train", 20)
    ]
    assert all(TOKENIZER.decode(prompt.token_ids) == prompt.question for prompt in loaded)
    test = load(data, split="test", count=5)
    assert len(test) == 5
    assert not {prompt.question for prompt in test} & {prompt.question for prompt in loaded}
    other = load(data.model_copy(update={"seed": 4}), split="test", count=5)
    assert [prompt.question for prompt in other] != [prompt.question for prompt in test]


def test_a_tokenizer_that_knows_no_character_of_a_prompt_is_refused(tmp_path):
    data = file_data(jsonl(tmp_path, [{"question": "ааа", "answer": "1"}]))
    with pytest.raises(RapoError, match="has no token for any character of 'ааа'"):
        load(data)


@pytest.mark.parametrize(
    ("name", "rows", "kept"),
    [
        ("simplerl_math_lv3to5_8k", 8523, 8521),
        ("math500", 500, 500),
        ("aime24", 30, 30),
        ("aime25", 30, 30),
        ("amc23", 40, 40),
        ("gsm8k_test", 1319, 1319),
        ("minerva_math", 272, 272),
    ],
)
def test_the_fields_usual_files_load_as_they_are(name, rows, kept):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    loaded = load(file_data(path))
    assert (loaded.report.rows, loaded.report.kept) == (rows, kept)
    if name == "simplerl_math_lv3to5_8k":
        assert loaded.report.without_answer == (5054, 5158)
        assert loaded.report.duplicates == ((1769, 4007), (4237, 4465))
        assert loaded[5054].index == 5055


def test_a_problem_is_named_by_its_id_or_its_row(tmp_path):
    path = tmp_path / "named.jsonl"
    rows = [
        {"question": "1?", "answer": 1, "id": "one", "nr": 7},
        {"question": "2?", "answer": 2, "nr": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row.name for row in read_file(FileData(source="file", path=path))] == ["one", None]
    assert Prompt(3, "", (1,), "").id == "3"
    assert Prompt(3, "", (1,), "", name="one").id == "one"
    with pytest.raises(RapoError, match=r"row 1: field 'nr' is None.*set data.id_field"):
        read_file(FileData(source="file", path=path, id_field="nr"))


def test_a_gold_answer_that_no_response_can_match_is_told_and_dropped(tmp_path):
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(["1", "bad", "2", "bad"])]
    asked = []

    def judge(data, golds):
        asked.append((data.path, list(golds)))
        return ["ValueError: it is bad" if gold == "bad" else None for gold in golds]

    data = file_data(jsonl(tmp_path, rows))
    loaded = load_prompts(data, TOKENIZER, max_prompt_tokens=99, split="train", count=2, judge=judge)
    assert asked == [(data.path, ["1", "bad", "2", "bad"])]
    assert [prompt.index for prompt in loaded] == [0, 2]
    assert str(loaded.report).splitlines()[1:] == [
        "  dropped 2 whose answer no response can match: rows 1, 3",
        "    row 1: ValueError: it is bad",
        "    row 3: ValueError: it is bad",
    ]
    with pytest.raises(RapoError, match="3 prompts were asked for, but 2 are usable"):
        load_prompts(data, TOKENIZER, max_prompt_tokens=99, split="train", count=3, judge=judge)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_prompt_keeps_all_columns_of_its_row(tmp_path, write):
    row = {"question": "q", "answer": 7, "level": 3, "extra": {"tags": ["a", "b"], "none": None}}
    (prompt,) = load(file_data(write(tmp_path, [row]), label="mine"))
    assert prompt.columns == row
    assert prompt.columns["question"] is prompt.question  # not stored twice
    problem = prompt.problem
    assert (problem.id, problem.question, problem.answer, problem.source) == ("0", "q", "7", "mine")
    assert problem.token_ids == prompt.token_ids
    assert dict(problem) == row
    assert hash(prompt) == hash(prompt)


def test_generated_problems_have_columns_too():
    (prompt,) = load(CountdownData(source="countdown", numbers=3), count=1)
    numbers, _, target = prompt.question.rstrip(":").partition("=")
    assert prompt.problem["numbers"] == [int(number) for number in numbers.split()]
    assert prompt.problem["target"] == int(target)
    assert prompt.problem["question"] == prompt.question
    assert prompt.source == "countdown"
    (prompt,) = load(ArithmeticData(source="arithmetic", terms=2, operators="+"), count=1)
    assert sum(prompt.problem["numbers"]) == int(prompt.answer)
    assert prompt.problem["operators"] == ["+"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, r"field 'answer' is True, no text and no number; set data\.answer_field"),
        ({"a": 1}, r"no text and no number"),
        (float("inf"), r"field 'answer' has inf, no finite number"),
        (["1", "2"], r'a list; set data\.answer_lists to "any"'),
    ],
)
def test_an_answer_that_is_no_text_and_no_number_is_refused(tmp_path, answer, message):
    with pytest.raises(RapoError, match=message):
        read_file(file_data(jsonl(tmp_path, [{"question": "q", "answer": answer}])))


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("several", ["any", "all"])
def test_lists_of_answers_load_as_declared(tmp_path, write, several):
    rows = [{"question": "q", "answer": ["1", "(2,3)", " "]}, {"question": "r", "answer": ["7"]}]
    rows += [{"question": "s", "answer": []}]
    loaded = load(file_data(write(tmp_path, rows), answer_lists=several))
    assert [split(prompt.answer) for prompt in loaded] == [(several, ["1", "(2,3)"]), ("any", ["7"])]
    assert loaded.report.without_answer == (2,)


def test_lists_of_answers_that_are_declared_but_not_there_are_refused(tmp_path):
    data = file_data(jsonl(tmp_path, [{"question": "q", "answer": "1"}]), answer_lists="any")
    with pytest.raises(RapoError, match=r"data\.answer_lists = 'any' has no effect: .* remove it"):
        load(data)


def test_floats_as_answers_are_read_back_by_the_verifier(tmp_path):
    rows = [{"question": "q", "answer": answer} for answer in (1e22, 2.5e-7, 0.1)]
    golds = [row.answer for row in read_file(file_data(jsonl(tmp_path, rows)))]
    assert golds == ["1e+22", "2.5e-07", "0.1"]
    responses = [r"\boxed{10^{22}}", r"\boxed{2.5\times10^{-7}}", r"\boxed{\frac{1}{10}}"]
    assert all(map(is_correct, responses, golds))
