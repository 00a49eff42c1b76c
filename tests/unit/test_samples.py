"""What a step sampled: kept on disk as it was, chosen, and shown with sampled tokens told apart."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from megatron_rapo.cli import main
from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Sample
from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.episode.environment import Transcript, Turn
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.folder import writing_to
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.record.start import begin
from megatron_rapo.report.browsing import browser_of
from megatron_rapo.report.sources import Sources
from megatron_rapo.samples.choosing import choose
from megatron_rapo.samples.recorder import SampleRecorder
from megatron_rapo.samples.show import show
from megatron_rapo.samples.store import Recorded, drop_after, read_step, steps_of, write_part
from tests.episodes import scored_response
from tests.unit.test_record import MODEL, VERSIONS, config, identity, run_until

C, W, T = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(load_tokenizer(MODEL))


def of(*outcomes: Outcome, name: str = "p0") -> Group:
    episodes = [scored_response(one, [10 + place, 20]) for place, one in enumerate(outcomes)]
    return Group(Problem(name, f"{name}?", "42", "sums"), tuple(episodes))


def placement(rank: int = 0, heads: int = 1, *, is_head: bool = True) -> Any:
    layout = SimpleNamespace(data_parallel=heads)
    return SimpleNamespace(is_main=rank == 0, is_head=is_head, data_rank=rank, layout=layout)


def samples_of(run: RunConfig, groups: list[Group]) -> list[list[Sample]]:
    return make_samples(groups, run.new_method(), 59, 2)


def batch_of(groups: list[Group], drawn: list[Group], rank: int = 0, heads: int = 1) -> Batch:
    """What the head of replica `rank` has: of all groups the brief ones, and whole those that it sampled."""
    brief = {id(group): group.brief() for group in drawn}
    places = range(rank, len(drawn), heads)
    whole = {place: drawn[place] for place in places}
    sampled = Shared([brief[id(group)] for group in drawn], [p % heads for p in range(len(drawn))], whole)
    chosen = [brief[id(group)] for group in groups]
    return Batch(chosen, sampled, 0, first=100, temperature=0.7)


def record(run: RunConfig, step: int, groups: list[Group], drawn: list[Group] | None = None) -> None:
    batch = batch_of(groups, drawn or groups)
    with SampleRecorder(run, placement()) as recorder:
        recorder.record(step, batch, samples_of(run, batch.groups))


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    return read_step(steps_of(run)[step])


def tool_episode() -> ScoredEpisode:
    """Two turns, with a tool's answer between."""
    transcript = Transcript([5, 6])
    for tokens, version in (([7, 8], 3), ([9], 4)):
        log_probs = np.array([-0.25] * len(tokens), np.float32)
        versions = np.full(len(tokens), version, np.int32)
        transcript.add_turn(Turn(np.array(tokens, np.int32), log_probs, versions, "stop", ""))
        transcript.add_given([11])
    episode = Episode((transcript.sequence(),), "the answer", truncated=True, facts={"calls": 1.0})
    return ScoredEpisode(episode, Verification(W, "41", reward=-0.5, facts={"format": 0.1}))


def rebuilt_episode() -> ScoredEpisode:
    """Two sequences; the second's context is the prompt and part of what the first one sampled."""
    one, other = (
        TokenSequence.of_response(
            prompt, np.array(tokens, np.int32), np.array([-1.0] * 2, np.float32), version=0
        )
        for prompt, tokens in (([5, 6], [7, 8]), ([5, 6, 8], [9, 10]))
    )
    return ScoredEpisode(Episode((one, other), "the answer"), Verification(W))


# What is kept


def test_an_episode_is_kept_token_for_token(tmp_path: Path) -> None:
    scored, problem = tool_episode(), Problem("p7", "6·7?", "42", "sums")
    timeout = ScoredEpisode(Episode((), ""), Verification(T, why="not done within 5 s"))
    write_part(
        tmp_path, 12, 0, [Recorded(3, n, 0.7, problem, one, True) for n, one in enumerate((scored, timeout))]
    )
    [path] = steps_of(tmp_path)[12]
    assert path.name == "step_000012-000.parquet"
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    row, unknown = rows(tmp_path, 12)
    [kept] = row.pop("sequences")
    [given] = scored.episode.sequences
    for name in ("token_ids", "sampled", "log_probs", "versions"):
        np.testing.assert_array_equal(np.array(kept[name], getattr(given, name).dtype), getattr(given, name))
    assert row == {
        "step": 12,
        "draw": 3,
        "number": 0,
        "temperature": 0.7,
        "problem": "p7",
        "source": "sums",
        "question": "6·7?",
        "gold": "42",
        "outcome": "wrong",
        "reward": -0.5,
        "facts": {"format": 0.1},
        "extracted": "41",
        "why": None,
        "trace": None,
        "length": 3,
        "given": 2,
        "truncated": True,
        "trained": True,
        "text": "the answer",
        "environment_facts": {"calls": 1.0},
    }
    assert (unknown["reward"], unknown["why"], unknown["sequences"]) == (None, "not done within 5 s", [])


def test_a_text_that_utf8_has_not_is_kept(tmp_path: Path) -> None:
    scored = tool_episode()
    scored = replace(scored, episode=replace(scored.episode, answer="a\ud800b"))
    write_part(tmp_path, 1, 0, [Recorded(0, 0, 0.7, Problem("p", "?"), scored, False)])
    assert rows(tmp_path, 1)[0]["text"] == "a?b"


def test_what_was_trained_on_is_told(tmp_path: Path) -> None:
    """Not what is unknown, or was left out by dynamic sampling or the method."""
    run = config(tmp_path)
    taught, left = of(C, W, T, name="a"), of(W, W, W, name="b")
    record(run, 1, [taught], [left, taught])
    found = [(row["draw"], row["number"], row["problem"], row["trained"]) for row in rows(tmp_path, 1)]
    assert found == [
        *((100, number, "b", False) for number in range(3)),
        *((101, number, "a", number != 2) for number in range(3)),
    ]


def test_an_episodes_own_temperature_is_told(tmp_path: Path) -> None:
    group = of(C, W)
    flatter = replace(group.episodes[1], guide=Guide(temperature=1.5))
    record(config(tmp_path), 1, [replace(group, episodes=(group.episodes[0], flatter))])
    assert [row["temperature"] for row in rows(tmp_path, 1)] == [0.7, 1.5]


def test_what_the_method_leaves_out_is_not_trained_on(tmp_path: Path) -> None:
    run = config(tmp_path, algorithm={"mask_truncated": True})
    group = of(C, W)
    cut = replace(group.episodes[1].episode, truncated=True)
    group = replace(group, episodes=(group.episodes[0], replace(group.episodes[1], episode=cut)))
    record(run, 1, [group])
    assert [row["trained"] for row in rows(tmp_path, 1)] == [True, False]


def test_heads_write_their_shares_and_other_ranks_nothing(tmp_path: Path) -> None:
    run, groups = config(tmp_path), [of(C, W, name=name) for name in "abc"]
    for rank, is_head in ((0, True), (1, True), (1, False)):
        with SampleRecorder(run, placement(rank, 2, is_head=is_head)) as recorder:
            batch = batch_of(groups, groups, rank, 2)
            recorder.record(1, batch, samples_of(run, batch.groups))
    files = steps_of(tmp_path)[1]
    assert [[row["problem"] for row in read_step([file])] for file in files] == [list("aacc"), list("bb")]
    assert [(row["draw"], row["number"]) for row in rows(tmp_path, 1)] == [
        (d, n) for d in (100, 101, 102) for n in (0, 1)
    ]


@pytest.mark.parametrize(
    ("observe", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({"samples_every": 2}, [2, 4]),
        ({"samples_every": 0}, []),
        ({"samples_keep": 2}, [3, 4]),
    ],
)
def test_which_steps_are_kept(tmp_path: Path, observe: dict[str, Any], kept: list[int]) -> None:
    run = config(tmp_path, observe=observe)
    for step in range(1, 5):
        record(run, step, [of(C, W)])
    assert list(steps_of(tmp_path)) == kept


@pytest.mark.parametrize(
    ("observe", "said"),
    [
        ({"samples_every": 11}, "samples_every = 11 is beyond run.steps = 10"),
        ({"samples_every": 0, "samples_keep": 3}, "samples_every = 0 keeps none"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, observe: dict[str, Any], said: str) -> None:
    with pytest.raises(RapoError, match=said):
        config(tmp_path, observe=observe)


def test_a_run_that_goes_on_drops_what_it_samples_again(tmp_path: Path) -> None:
    run = config(tmp_path)
    for step in (1, 2, 3):
        record(run, step, [of(C, W)])
    unfinished = tmp_path / "samples/step_000002-001.partial"
    unfinished.touch()
    drop_after(tmp_path, 2)
    assert list(steps_of(tmp_path)) == [1, 2]
    assert not unfinished.exists()
    record(run, 2, [of(W, C, W)])
    assert len(rows(tmp_path, 2)) == 3


def test_a_start_leaves_the_samples_of_the_steps_that_it_goes_on_after(tmp_path: Path) -> None:
    run = config(tmp_path)
    run_until(run, 2)
    for step in (1, 2, 3):
        record(run, step, [of(C, W)])
    begin(run, identity(run), VERSIONS, 2)
    assert list(steps_of(tmp_path)) == [1, 2]
    begin(run, identity(run), VERSIONS, None)
    assert list(steps_of(tmp_path)) == []


def test_a_start_without_a_checkpoint_keeps_its_samples_with_its_records(tmp_path: Path) -> None:
    run = config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    record(run, 1, [of(C, W)])
    begin(run, identity(run), VERSIONS, None)
    assert (list(steps_of(tmp_path)), list(steps_of(tmp_path / "earlier/001"))) == ([], [1])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    partial = tmp_path / "samples/step_000001-000.partial"
    partial.symlink_to("/dev/full")
    with (
        pytest.raises(RapoError, match=r"run.directory = .* cannot be written to: .*No space left on device"),
        writing_to(tmp_path, "run.directory"),
    ):
        record(config(tmp_path), 1, [of(C, W)])
    assert list((tmp_path / "samples").iterdir()) == []


# What is chosen


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(f'[model]\npath = "{MODEL}"\n')
    for step in (1, 2, 4):
        record(config(tmp_path), step, [of(C, W, T, name="a"), of(W, C, C, name="b")])
    return tmp_path


def test_the_newest_step_is_chosen_in_the_order_of_its_prompts(run: Path) -> None:
    chosen = choose(run, step=None, kind=None, problem=None, count=4)
    assert (chosen.step, chosen.matching, chosen.outcomes) == (4, 6, {"right": 3, "wrong": 2, "unknown": 1})
    assert [(row["problem"], row["number"]) for row in chosen.rows] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
    ]


@pytest.mark.parametrize(
    ("kind", "problem", "found"),
    [
        ("right", None, [("a", 0), ("b", 1), ("b", 2)]),
        ("wrong", None, [("a", 1), ("b", 0)]),
        ("unknown", None, [("a", 2)]),
        ("right", "b", [("b", 1), ("b", 2)]),
        (None, "a", [("a", 0), ("a", 1), ("a", 2)]),
    ],
)
def test_kinds_and_problems_are_chosen(
    run: Path, kind: str | None, problem: str | None, found: list[tuple[str, int]]
) -> None:
    chosen = choose(run, step=1, kind=kind, problem=problem, count=8)
    assert [(row["problem"], row["number"]) for row in chosen.rows] == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "3"], "has no samples of step 3; choose one of 1 to 2, 4"),
        (["--problem", "z"], "step 4 of {run} has no problem 'z'; choose one of a, b, or another --step"),
        (
            ["--unknown", "--problem", "b"],
            "no unknown response to problem b; of the step's responses are 3 right, ",
        ),
        (
            ["--wrong", "--right"],
            "--right and --wrong exclude each other; give one, or none for all responses",
        ),
        (["--count", "0"], "--count 0 shows nothing; give 1 or more"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(
    run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samples", str(run), *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(run=run) in line


def test_a_folder_without_samples_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for prepare in (lambda: None, lambda: (tmp_path / "config.toml").touch()):
        prepare()
        assert main(["samples", str(tmp_path)]) == 1
        said += capsys.readouterr().err.splitlines()
    assert main(["samples", str(tmp_path / "nowhere")]) == 1
    said += capsys.readouterr().err.splitlines()
    assert [
        part in line
        for part, line in zip(("is no run", "has no samples", "is no directory"), said, strict=True)
    ] == [True] * 3


def test_a_damaged_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = steps_of(run)[4]
    path.write_bytes(path.read_bytes()[:100])
    assert main(["samples", str(run)]) == 1
    assert f"error: {path} cannot be read: " in capsys.readouterr().err


# The report


def test_the_report_has_the_first_and_newest_step(run: Path) -> None:
    browser, notes = browser_of(Sources((run,), ()))
    assert browser is not None
    assert (browser.shown, browser.sampled, notes) == (12, 12, ())
    assert browser.data["models"] == [f"{run.name}, step 1", f"{run.name}, step 4"]
    first, second = browser.data["problems"]
    assert [first[name] for name in ("id", "dataset", "question", "answer")] == [
        "a",
        "training: sums",
        "a?",
        "42",
    ]
    found = [(one["model"], one["sample"], one["outcome"], one["reward"]) for one in first["responses"]]
    assert found == [
        (m, n, *r) for m in (0, 1) for n, r in enumerate((("correct", 1), ("wrong", 0), ("timeout", None)))
    ]
    assert [one["sample"] for one in second["responses"]] == [1, 2, 0] * 2


def test_the_report_reads_samples_of_earlier_versions(run: Path) -> None:
    """They have no column of what was given."""
    for path in (path for paths in steps_of(run).values() for path in paths):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["given"]), path)
    browser, _ = browser_of(Sources((run,), ()))
    assert browser is not None and browser.shown == 12


def test_the_report_keeps_data_sets_apart(tmp_path: Path) -> None:
    """Whose problems may have the same names."""
    groups = [replace(of(C, W), problem=Problem("0", f"{source}?", source=source)) for source in ("x", "y")]
    record(config(tmp_path), 1, groups)
    browser, _ = browser_of(Sources((tmp_path,), ()))
    assert browser is not None
    found = [(one["dataset"], one["question"], one["sampled"]) for one in browser.data["problems"]]
    assert found == [("training: x", "x?", 2), ("training: y", "y?", 2)]


def test_the_report_tells_given_tokens_from_sampled_ones(tmp_path: Path, texts: TokenTexts) -> None:
    (tmp_path / "config.toml").write_text(f'[model]\npath = "{MODEL}"\n')
    write_part(tmp_path, 3, 0, [Recorded(3, 1, 0.7, Problem("p7", "?"), tool_episode(), True)])
    browser, _ = browser_of(Sources((tmp_path,), ()))
    assert browser is not None
    [response] = browser.data["problems"][0]["responses"]
    assert response["tokens"] == texts([7, 8, 11, 9, 11])
    assert response["log_probs"] == [-0.25, -0.25, None, -0.25, None]
    told = [response[name] for name in ("length", "given", "turns", "reward")]
    assert told == [3, 2, 2, -0.5]
    assert browser.has_given and "starts" not in response


def test_the_report_has_the_context_of_each_further_sequence(tmp_path: Path, texts: TokenTexts) -> None:
    (tmp_path / "config.toml").write_text(f'[model]\npath = "{MODEL}"\n')
    write_part(tmp_path, 3, 0, [Recorded(3, 1, 0.7, Problem("p7", "?"), rebuilt_episode(), True)])
    browser, _ = browser_of(Sources((tmp_path,), ()))
    assert browser is not None
    [response] = browser.data["problems"][0]["responses"]
    assert response["tokens"] == texts([7, 8, 5, 6, 8, 9, 10])
    assert response["log_probs"] == [-1, -1, None, None, None, -1, -1]
    assert [response[name] for name in ("starts", "length", "given", "turns")] == [[0, 2], 4, 3, 2]


def test_the_report_shows_no_more_tokens_than_its_rule_says(tmp_path: Path, texts: TokenTexts) -> None:
    """What was given counts as well; a sequence that begins in the gap begins behind it."""
    scored = rebuilt_episode()
    many = replace(scored, episode=replace(scored.episode, sequences=scored.episode.sequences * 400))
    write_part(tmp_path, 3, 0, [Recorded(3, 1, 0.7, Problem("p7", "?"), many, True)])
    (tmp_path / "config.toml").write_text(f'[model]\npath = "{MODEL}"\n')
    browser, _ = browser_of(Sources((tmp_path,), ()))
    assert browser is not None
    [response] = browser.data["problems"][0]["responses"]
    shown, gap = len(response["tokens"]), response["cut_at"]
    assert (shown, response["cut"]) == (1024, many.episode.tokens - 2 - 1024)
    lengths = [len(one) - (2 if n == 0 else 0) for n, one in enumerate(many.episode.sequences)]
    begins = np.cumsum([0, *lengths[:-1]])
    behind = begins[begins >= gap + response["cut"]] - response["cut"]
    assert response["starts"][-len(behind) :] == behind.tolist()
    assert max(response["starts"][: -len(behind)]) == gap


# What is shown


def shown(
    row: dict[str, Any], texts: TokenTexts | None, *, colour: bool = False, tokens: bool = False
) -> str:
    chosen = SimpleNamespace(step=3, rows=[row], matching=2, outcomes={"right": 0, "wrong": 2, "unknown": 0})
    file = io.StringIO()
    system: Any = "truecolor" if colour else None
    console = Console(file=file, color_system=system, force_terminal=colour, width=100, highlight=False)
    show(chosen, texts, console, tokens=tokens)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    write_part(
        tmp_path, 3, 0, [Recorded(3, 1, 0.7, Problem("p7", "6·7?", "42", "sums"), tool_episode(), False)]
    )
    return rows(tmp_path, 3)[0]


def test_sampled_tokens_are_marked_where_there_is_no_colour(row: dict[str, Any], texts: TokenTexts) -> None:
    pieces = texts([5, 6, 7, 8, 11, 9, 11])
    page = shown(row, texts)
    assert f"⟦{pieces[2]}{pieces[3]}⟧{pieces[4]}⟦{pieces[5]}⟧{pieces[6]}\n" in page
    for told in (
        *("problem p7 · sums", pieces[0] + pieces[1], "gold answer: 42", "response 1 · wrong · reward -0.5"),
        *("3 tokens · weights of step 3 to 4 · truncated · not trained on", "answer: 41"),
        *("format = 0.1, environment/calls = 1", "the first 1 of 2 that match (--count)"),
    ):
        assert told in page


def test_sampled_tokens_are_coloured_where_there_is_colour(row: dict[str, Any], texts: TokenTexts) -> None:
    pieces, page = texts([5, 6, 7, 8, 11]), shown(row, texts, colour=True)
    assert f"\x1b[1;36m{pieces[2]}{pieces[3]}\x1b[0m\x1b[2m{pieces[4]}\x1b[0m" in page
    assert "⟦" not in page


def test_each_token_has_a_line(row: dict[str, Any], texts: TokenTexts) -> None:
    lines = [line.split() for line in shown(row, texts, tokens=True).splitlines()]
    assert ["3", "8", "-0.2500", "3", texts([8])[0]] in lines
    assert ["4", "11", "given", texts([11])[0]] in lines


def test_without_a_tokenizer_the_text_is_shown(row: dict[str, Any]) -> None:
    page = shown(row, None)
    assert "the run's tokenizer is not on this machine" in page
    assert "6·7?" in page
    assert "the answer" in page


def test_a_response_cannot_steer_the_terminal(row: dict[str, Any]) -> None:
    page = shown({**row, "text": "\x1b]0;owned\x07 [red]x[/red]\r"}, None)
    assert "\\x1b]0;owned\\x07 [red]x[/red]\\x0d" in page


def test_the_command_shows_a_run(run: Path, capsys: pytest.CaptureFixture[str], texts: TokenTexts) -> None:
    assert main(["samples", str(run), "--wrong", "--count", "1"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("step 4 · 6 responses: 3 right · 2 wrong · 1 unknown · the first 1 of 2")
    first, second = texts([7, 8, 11, 20])[2:]
    assert f"⟦{first}{second}⟧" in page
