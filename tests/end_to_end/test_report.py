"""`megatron-rapo report` as one uses it: the command, then its page in Chromium, beside its numbers."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page
from transformers import AutoTokenizer

from megatron_rapo.episode.environment import Transcript, Turn
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.record.versions import record_versions
from megatron_rapo.samples.store import Recorded, write_part
from megatron_rapo.timeline.record import FOLDER
from tests.dialogues import TINY
from tests.end_to_end.chromium import browser, needs_chromium, opened
from tests.end_to_end.command import COMMAND
from tests.stored_evaluations import store_benchmarks, store_evaluation

HOSTILE = "<b>bold</b></script><script>document.title = 'taken'</script>"
SAMPLES = 8
PRINTED_WIDTH = int((210 - 2 * 14) / 25.4 * 96)  # CSS pixels of A4 within the page's margins
BASE = [0, 0, 0, 0, 1, 2, 6, 7, 8, 4] * 3
TRAINED = [5, 3, 0, 0, 6, 7, 8, 7, 8, 0] * 3

DIAGNOSED = {
    "data": "toy",
    "setting": "t1.0",
    "floor": math.log(1e-4),
    "diagnostics": {
        "responses": 2,
        "base_log_prob": [-3.0, -5.0],
        "model_log_prob": [-1.0, -2.0],
        "tokens_below_floor": 0.25,
        "responses_below_floor": 0.5,
        "forward_kl": [0.5, 0.25],
        "reverse_kl": [0.4, 0.2],
        "base_entropy": [1.0, 0.9],
        "model_entropy": [0.8, 0.7],
        "reaching": [2, 1],
    },
    "diversity": {
        "base": {"problems": 5, "answers": 1.5, "forms": 2.5},
        "model": {"problems": 6, "answers": 1.25, "forms": 2.0},
    },
}


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND), "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_timeline(run: Path) -> None:
    """Two ranks, steps of 10 s. The engine is busy for 2 of the rollout's 4."""
    phases = ((0.0, "between phases"), (1.0, "rollout"), (5.0, "update"), (9.0, "publish/send"))
    (run / FOLDER).mkdir()
    for rank in (0, 1):
        lines: list[list[object]] = [[0.0, 0, "load"], [1.0, 1, "rollout"], [5.0, 1, "update"]]
        lines += [[1.0, 5.0, "http://before:1", 8], [6.0, 0, "load"]]  # the run was started again
        for start, step in ((10.0 * step, step) for step in range(2, 42)):
            lines += [[start + at, step, phase] for at, phase in phases]
            lines += [[start + 2, start + 4, "http://one:1", 8]] if rank == 0 else []
        lines.append([420.0, 41, "between phases"])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / FOLDER / f"rank_{rank:05d}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a base and two checkpoints evaluated: where the report is, and what the command printed."""
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    steps = [{"step": step, "reward/mean": 0.1 + 0.01 * step, "loss/entropy": 1.0} for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "config.toml").write_text('[run]\nsteps = 40\n[model]\npath = "/models/not-here"\n')
    write_timeline(run)
    record_versions(run, None, {"python": "3.11.2", "torch": "2.12.0"})
    record_versions(run, 20, {"python": "3.11.2", "torch": "2.13.0"})
    half = [(before + after) // 2 for before, after in zip(BASE, TRAINED, strict=True)]
    for seed, (step, correct) in enumerate({0: BASE, 20: half, 40: TRAINED}.items()):
        store_evaluation(
            run / f"evaluations/step_{step:06d}",
            correct,
            samples=SAMPLES,
            step=step,
            run=str(run),
            seed=seed,
            text=f"step {step} says {HOSTILE} {{answer}}",
            question="question {place}: what comes after {place}? " + HOSTILE,
        )
    diagnosed = run / "evaluations/step_000040/comparison/diagnostics.json"
    diagnosed.parent.mkdir()
    diagnosed.write_text(json.dumps([DIAGNOSED]))
    command = report(run)
    assert command.returncode == 0, command.stderr
    return run / "report", command.stdout


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Browser, written: tuple[Path, str]) -> Iterator[Page]:
    """The page; at the end it must have complained of nothing, and asked for nothing but itself."""
    file = written[0] / "report.html"
    with opened(chromium, file) as found:
        yield found.page
        assert found.complaints == []
        assert found.requests == [file.resolve().as_uri()]


def numbers(directory: Path, name: str) -> list[dict[str, str]]:
    with (directory / "numbers" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_page_figures_numbers_and_summary(written: tuple[Path, str]) -> None:
    directory, printed = written
    assert (directory / "summary.txt").read_text() in printed
    assert str(directory / "report.html") in printed
    figures = sorted(path.name for path in (directory / "figures").iterdir())
    assert "training_reward_mean.png" in figures
    assert all((directory / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert numbers(directory, "training")[0]["reward/mean"] == "0.11"
    assert len(json.loads((directory / "numbers/report.json").read_text())["training"]) == 40


@needs_chromium
class TestPage:
    def test_sections_and_title(self, page: Page) -> None:
        assert page.title() == "Exploration report"  # not what a response's script would have made it
        headings = page.locator("h2").all_inner_texts()
        assert headings[:2] == ["Summary", "Training"]
        assert {"Responses", "Configuration and versions"} <= set(headings)
        links = page.locator("nav a").all()
        assert [page.locator(str(link.get_attribute("href"))).count() for link in links] == [1] * len(
            headings
        )

    def test_the_timeline_has_a_lane_for_each_rank_and_engine(
        self, page: Page, written: tuple[Path, str]
    ) -> None:
        section = page.locator("#timeline")
        assert section.locator("h3").inner_text() == "run, steps 39 to 41"
        drawn = section.locator(".drawing:visible svg text").all_text_contents()
        assert [text.strip() for text in drawn if text.split()[0] in ("rank", "engine", "step")] == [
            *("rank 0", "rank 1", "engine 0"),
            *("step 39", "step 40", "step 41"),
        ]
        assert section.locator(".legend li").all_inner_texts() == [
            "rollout",
            "update",
            "publish",
            "engine at work",
        ]
        bars = [row for row in numbers(written[0], "timeline") if row["lane"] == "engine 0"]
        assert [(row["begun"], row["ended"], row["what"]) for row in bars] == [
            (f"{at}", f"{at + 2}", "engine at work") for at in (2.0, 12.0, 22.0)
        ]
        assert section.locator("tbody tr").all_inner_texts() == [
            "engine 0 http://one:1\t20.0%\tupdate 40.0%, rollout 20.0%, between phases 10.0%, publish 10.0%"
        ]

    def test_a_curve_tells_its_values(self, page: Page) -> None:
        figure = page.locator("figure", has_text="mean reward").first
        figure.locator(".drawing").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert (
            figure.locator(".tip").inner_text() == "step 2\nmean reward: 0.115"
        )  # the mean of 0.11 and 0.12
        figure.locator(".drawing").hover()
        assert re.match(r"step (1[6-9]|2[0-3])\n", figure.locator(".tip").inner_text())

    def test_the_frontier_is_that_of_the_numbers(self, page: Page, written: tuple[Path, str]) -> None:
        table = page.get_by_role("region", name="Scores on toy").locator("table")
        ks = [
            int(text.removeprefix("pass@"))
            for text in table.locator("th").all_inner_texts()
            if "pass@" in text
        ]
        assert ks == [1, 2, 4, 8]
        rows = {
            cells[0]: cells
            for row in table.locator("tbody tr").all()
            if (cells := row.locator("th, td").all_inner_texts())
        }
        shown = {(model, k): cells[2 + place] for model, cells in rows.items() for place, k in enumerate(ks)}
        expected = {
            (row["model"], int(row["k"])): "{:.3f} [{:.3f}, {:.3f}]".format(
                *(float(row[f"pass_at_k{suffix}"]) for suffix in ("", "_low", "_high"))
            )
            for row in numbers(written[0], "frontier")
            if int(row["k"]) in ks
        }
        assert shown == expected
        assert shown["step 40", 8].startswith("0.700 ")  # 21 of 30 problems are solved at all
        assert shown["base", 1].startswith(f"{sum(BASE) / SAMPLES / len(BASE):.3f} ")

    def test_the_ledger_is_that_of_the_numbers(self, page: Page, written: tuple[Path, str]) -> None:
        section = page.locator("#ledger")
        shown = []
        while True:
            shown += [
                row.locator("td").all_inner_texts() for row in section.locator("#ledger-table tbody tr").all()
            ]
            if section.get_by_role("button", name="Next").is_disabled():
                break
            section.get_by_role("button", name="Next").click()
        expected = [
            [
                row["benchmark"],
                row["model"],
                f"{row['base_correct']}/{row['base_samples']}",
                f"{row['model_correct']}/{row['model_samples']}",
                row["change"],
                *("< 0.001" if float(row[name]) < 0.001 else f"{float(row[name]):.3f}" for name in "pq"),
                {"True": "yes", "False": "no"}[row["significant"]],
            ]
            for row in numbers(written[0], "ledger")
        ]
        assert [row[:-1] for row in shown] == expected
        last = expected[len(BASE) :]  # of step 40
        assert [row[2] for row in last] == [f"{count}/{SAMPLES}" for count in BASE]
        assert [row[3] for row in last] == [f"{count}/{SAMPLES}" for count in TRAINED]

    def test_the_ledger_sorts_and_filters(self, page: Page) -> None:
        section = page.locator("#ledger")
        status = section.locator("[role=status]")
        assert status.inner_text() == f"1–25 of {2 * len(BASE)} rows"
        section.locator("[name=model]").select_option("step 40")
        section.locator("[name=change]").select_option("newly solved")
        new = [after for before, after in zip(BASE, TRAINED, strict=True) if after and not before]
        assert status.inner_text() == f"1–{len(new)} of {len(new)} rows ({2 * len(BASE)} without filters)"
        heading = section.locator("th", has_text="model correct")
        for order, direction in ((sorted(new), "ascending"), (sorted(new)[::-1], "descending")):
            heading.get_by_role("button").press("Enter")
            assert heading.get_attribute("aria-sort") == direction
            cells = section.locator("#ledger-table tbody td:nth-child(5)").all_inner_texts()
            assert cells == [f"{count}/{SAMPLES}" for count in order]
        assert section.locator("[aria-sort]").count() == 1
        section.locator("input[type=search]").fill("comes after 11?")
        assert section.locator("#ledger-table tbody th").all_inner_texts() == [
            f"11 question 11: what comes after 11? {HOSTILE}"
        ]

    def test_the_ledger_leads_to_the_responses(self, page: Page) -> None:
        page.locator("#ledger-table tbody tr").nth(3).get_by_role("button").click()
        assert page.locator("#responses h3").inner_text() == "Problem 3"
        assert page.locator("#responses [role=status]").inner_text().startswith("Problem 1 of 1 ")

    def test_the_hard_subset_has_its_control(self, page: Page, written: tuple[Path, str]) -> None:
        cells = page.locator("#hard tbody tr").last.locator("td").all_inner_texts()
        row = numbers(written[0], "hard")[-1]
        assert cells[:4] == ["step 40", row["problems"], row["chosen_by"], row["k"]]
        for place, name in ((4, "control"), (5, "model")):
            assert cells[place].split()[0] == f"{float(row[f'{name}_pass_at_k']):.3f}"
        assert "the second half of the base's samples" in page.locator("#hard").inner_text()

    def test_diagnostics_are_those_that_the_comparison_left(
        self, page: Page, written: tuple[Path, str]
    ) -> None:
        section = page.locator("#diagnostics")
        assert section.locator("h3").inner_text() == "step 40 · toy"
        values = section.locator("dd.value").all_inner_texts()
        assert values == ["−4.0 nats", "50.0%", "2.00", "1.25"]
        assert "less than 0.0001 under the base" in section.inner_text()
        rows = numbers(written[0], "diagnostics")
        assert [(row["position"], row["forward_kl"], row["reaching"]) for row in rows] == [
            ("1", "0.5", "2"),
            ("2", "0.25", "1"),
        ]
        section.locator(".drawing").first.focus()
        page.keyboard.press("ArrowRight")
        assert section.locator(".tip").first.inner_text().split("\n") == [
            "position in the response 1",
            "KL(base ‖ model): 0.5",
            "KL(model ‖ base): 0.4",
        ]

    def test_the_answer_is_that_of_the_last_difference(self, page: Page, written: tuple[Path, str]) -> None:
        row = numbers(written[0], "differences")[-1]
        answer = page.locator(".answer").inner_text()
        low, mean = float(row["difference_low"]), float(row["difference"])
        assert f"a difference of {mean:+.3f} [{low:+.3f}, ".replace("-", "−") in answer
        said = "not told apart" if low <= 0 else "is beyond the base"
        assert said in answer
        assert answer in written[1]

    def test_the_frontier_tells_its_values(self, page: Page) -> None:
        drawing = page.locator("#frontier .drawing:visible").first
        drawing.focus()
        page.keyboard.press("ArrowLeft")  # from the end
        told = page.locator("#frontier .tip:visible").first.inner_text().split("\n")
        assert told[0] == "k 8"
        assert [line.split(":")[0] for line in told[1:]] == ["base", "step 20", "step 40"]
        assert told[3].startswith("step 40: 0.7 [")

    def test_the_browser_shows_prompt_response_outcome_and_reward(self, page: Page) -> None:
        section = page.locator("#responses")
        assert section.locator(".prompt p").first.inner_text() == f"question 0: what comes after 0? {HOSTILE}"
        assert section.locator(".prompt code").inner_text() == "1"
        heading = section.locator(".response header").first.inner_text()
        assert [*heading.split("\n")[:4]] == ["base", "wrong", "sample 0", "reward 0"]
        assert section.locator(".tokens").first.inner_text() == f"step 0 says {HOSTILE} 0"
        assert section.locator("b").count() == 0

    def test_the_browser_filters_and_pages(self, page: Page) -> None:
        section = page.locator("#responses")
        status, search = section.locator("[role=status]"), section.locator("input[type=search]")
        assert status.inner_text().startswith(f"Problem 1 of {len(BASE)} ")
        section.locator("[name=outcome]").select_option("correct")
        section.locator("[name=model]").select_option("step 40")
        solved = [place for place, count in enumerate(TRAINED) if count]
        assert status.inner_text().startswith(f"Problem 1 of {len(solved)} ")
        seen = []
        for _ in solved:
            seen.append(section.locator("h3").inner_text())
            assert set(section.locator(".response .badge").all_inner_texts()) == {"correct"}
            section.get_by_role("button", name="Next").click(force=True)
        assert seen == [f"Problem {place}" for place in solved]
        assert section.get_by_role("button", name="Next").is_disabled()
        section.get_by_role("button", name="Previous").click()
        assert section.locator("h3").inner_text() == seen[-2]
        search.fill("#7")
        assert section.locator("h3").inner_text() == "Problem 7"
        assert status.inner_text().startswith("Problem 1 of 1 ")
        search.fill("no such words")
        assert status.inner_text() == "No response passes these filters."
        assert section.locator(".response").count() == 0

    def test_the_page_says_how_many_of_how_many(self, page: Page, written: tuple[Path, str]) -> None:
        text = page.locator("#responses > p").first.inner_text()
        found = re.match(
            r"The page holds (\d+) of ([\d,]+) responses: for each problem and model, the first", text
        )
        assert found is not None
        assert int(found[2].replace(",", "")) == 3 * SAMPLES * len(BASE)
        data = json.loads(page.locator("#responses-data").inner_text())
        assert int(found[1]) == sum(len(problem["responses"]) for problem in data["problems"])

    def test_options_and_versions_are_shown(self, page: Page) -> None:
        text = page.locator("#configuration").inner_text()
        assert re.search(r"path\s+\"/models/not-here\"", text)
        assert re.search(r"torch\s+\"?2\.13\.0", text)

        training = page.locator("#configuration h3", has_text="Software of the training")
        shown = training.locator("xpath=following-sibling::div[1]").inner_text()
        assert re.search(r"torch\s+2\.12\.0; after step 20: 2\.13\.0", shown)

    @pytest.mark.parametrize("dark", [False, True])
    def test_a_narrow_window_scrolls_down_only(
        self, chromium: Browser, written: tuple[Path, str], dark: bool
    ) -> None:
        with opened(chromium, written[0] / "report.html", width=400, dark=dark) as found:
            width = found.page.evaluate("document.documentElement.scrollWidth")
            paper = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert width == 400
        assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 254, 251)")
        assert found.complaints == []


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that sampled an episode of two turns, and one of two sequences."""
    run = tmp_path_factory.mktemp("trajectories") / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'[run]\nsteps = 1\n[model]\npath = "{TINY}"\n')
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    encode = AutoTokenizer.from_pretrained(TINY).encode
    turns = Transcript(encode("3 4="))
    turns.add_turn(said(encode("3+4=")))
    turns.add_given(encode("7\n"))
    turns.add_turn(said(encode("7")))
    rounds = []
    for context, text in (("3 4=", "10\n"), ("3 4=10\n", "7")):
        rounds.append(Transcript(encode(context)))
        rounds[-1].add_turn(said(encode(text)))
    episodes = [(turns.sequence(),), tuple(one.sequence() for one in rounds)]
    problem, right = Problem("0", "3 4=", "7", "sums"), Verification(Outcome.CORRECT)
    rows = [
        Recorded(0, number, 1.0, problem, ScoredEpisode(Episode(sequences, "7"), right), trained=True)
        for number, sequences in enumerate(episodes)
    ]
    write_part(run, 1, 0, rows)
    command = report(run)
    assert command.returncode == 0, command.stderr
    return run / "report/report.html"


def said(token_ids: list[int]) -> Turn:
    log_probs = np.full(len(token_ids), -0.5, np.float32)
    return Turn(np.array(token_ids, np.int32), log_probs, np.zeros(len(token_ids), np.int32), "stop", "")


@needs_chromium
class TestTrajectories:
    def test_what_was_given_is_told_apart(self, chromium: Browser, trajectories: Path) -> None:
        with opened(chromium, trajectories) as found:
            one, other = found.page.locator(".response").all()
            told = one.locator("header").inner_text().split("\n")
            assert told[2:] == ["sample 0", "reward 1", "5 tokens", "2 given", "2 turns"]
            assert one.locator(".tokens").inner_text() == "3+4=7\n7"
            assert one.locator(".given").all_inner_texts() == ["7\n"]
            assert "framed was given" in found.page.locator(".heat").inner_text()
            told = other.locator("header").inner_text().split("\n")
            assert told[2:] == ["sample 1", "reward 1", "4 tokens", "7 given", "2 turns", "2 sequences"]
            assert other.locator(".sequence").all_inner_texts() == ["sequence 1 of 2", "sequence 2 of 2"]
            assert other.locator(".given").all_inner_texts() == ["3 4=10\n"]
        assert found.complaints == []

    @pytest.mark.parametrize("media", [{"media": "print"}, {"forced_colors": "active"}])
    def test_it_is_also_without_colours(
        self, chromium: Browser, trajectories: Path, media: dict[str, Any]
    ) -> None:
        """A frame in print, and where the system chooses the colours."""
        with opened(chromium, trajectories) as found:
            found.page.emulate_media(**media)
            frames = [
                span.evaluate("e => [getComputedStyle(e).borderTopWidth, getComputedStyle(e).borderTopStyle]")
                for span in found.page.locator(".tokens .given").all()
            ]
            sampled = found.page.locator(".tokens > span:not(.given)").first
            assert frames == [["1px", "solid"]] * 2
            assert sampled.evaluate("e => getComputedStyle(e).borderTopWidth") == "0px"


SEVERAL = {
    "sums": {"t1.0": ([0, 1, 4, 8, 0], [2, 3, 8, 8, 0]), "t0.6": ([0, 0, 6, 8, 1], [0, 5, 8, 6, 0])},
    "limits": {"t1.0": ([3, 0, 0, 7], [8, 0, 4, 7]), "t0.6": ([2, 2, 0, 8], [1, 1, 1, 8])},
}
"""Correct samples of 8, of the base and of step 20, by data set and setting; step 10 stands between."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three checkpoints on two data sets at two settings."""
    base = tmp_path_factory.mktemp("several")
    for step in (0, 10, 20):
        counts = {
            data: {setting: at_step(*pair, step=step) for setting, pair in settings.items()}
            for data, settings in SEVERAL.items()
        }
        store_benchmarks(
            base / f"step_{step}", counts, samples=SAMPLES, step=step, run="/runs/one", seed=step
        )
    command = report(*(base / f"step_{step}" for step in (0, 10, 20)), "--out", base / "report")
    assert command.returncode == 0, command.stderr
    return base / "report"


def at_step(before: list[int], after: list[int], *, step: int) -> list[int]:
    if step == 10:
        return [(old + new) // 2 for old, new in zip(before, after, strict=True)]
    return after if step else before


def pass_at(k: int, correct: list[int]) -> float:
    """Mean over problems of the share of k-subsets of the samples with a correct one."""
    wrong = [math.comb(SAMPLES - count, k) / math.comb(SAMPLES, k) for count in correct]
    return 1 - sum(wrong) / len(correct)


@needs_chromium
class TestSeveralBenchmarks:
    def test_each_data_set_and_setting_has_its_own_numbers(self, chromium: Browser, several: Path) -> None:
        with opened(chromium, several / "report.html") as found:
            for (data, setting), pair in {
                (data, setting): pair for data, at in SEVERAL.items() for setting, pair in at.items()
            }.items():
                name = f"{data}, {setting}"
                rows = table(found.page, f"Scores on {name}")
                assert list(rows) == ["base", "step 10", "step 20"]
                for model, step in (("base", 0), ("step 10", 10), ("step 20", 20)):
                    shown = [cell.split()[0] for cell in rows[model][1:5]]
                    expected = [pass_at(k, at_step(*pair, step=step)) for k in (1, 2, 4, 8)]
                    assert shown == [f"{value:.3f}" for value in expected]
                assert found.page.locator("figure", has_text=f"pass@k on {name}").count() == 1
                assert name in found.page.locator(".answer").inner_text()
            headings = found.page.locator("#summary h3").all_inner_texts()
            assert headings == [f"step 20 on {data}, {at}" for data in SEVERAL for at in ("t1.0", "t0.6")]
            assert found.page.locator(".answer p").count() == 4
        assert found.complaints == []

    def test_the_ledger_tells_them_apart(self, chromium: Browser, several: Path) -> None:
        with opened(chromium, several / "report.html") as found:
            section = found.page.locator("#ledger")
            section.locator("[name=benchmark]").select_option("sums, t0.6")
            section.locator("[name=model]").select_option("step 20")
            shown = [
                row.locator("td").all_inner_texts() for row in section.locator("#ledger-table tbody tr").all()
            ]
        before, after = SEVERAL["sums"]["t0.6"]
        assert [row[2] for row in shown] == [f"{count}/{SAMPLES}" for count in before]
        assert [row[3] for row in shown] == [f"{count}/{SAMPLES}" for count in after]
        assert [row[4] for row in shown] == ["unsolved", "newly solved", "kept", "kept", "lost"]
        changes = {
            (row["benchmark"], row["problem"]): row["change"]
            for row in numbers(several, "ledger")
            if row["model"] == "step 20"
        }
        assert len(changes) == sum(len(at["t1.0"][0]) for at in SEVERAL.values()) * 2
        assert changes["limits, t1.0", "2"] == "newly solved"
        assert changes["limits, t0.6", "2"] == "newly solved"
        assert changes["sums, t1.0", "4"] == "unsolved"

    def test_it_prints_without_loss(
        self, chromium: Browser, several: Path, written: tuple[Path, str]
    ) -> None:
        for directory, most in ((several, 14), (written[0], 12)):
            with opened(chromium, directory / "report.html", width=PRINTED_WIDTH) as found:
                found.page.emulate_media(media="print")
                beyond = found.page.evaluate(
                    """() => [...document.querySelectorAll("main *")].filter(
                        (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".unseen"),
                    ).map((e) => e.outerHTML.slice(0, 200))"""
                )
                assert beyond == []
                printed = found.page.pdf(format="A4")
            pages = len(re.findall(rb"/Type\s*/Page\b", printed))
            assert 3 <= pages <= most


def table(page: Page, region: str) -> dict[str, list[str]]:
    """The cells of each row behind its head, by the head."""
    rows = page.get_by_role("region", name=region, exact=True).locator("tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def test_two_runs_on_different_data(tmp_path: Path) -> None:
    store_evaluation(tmp_path / "one", BASE)
    store_evaluation(tmp_path / "other", BASE, question="another {place}")
    command = report(tmp_path / "one", tmp_path / "other")
    assert command.returncode == 1
    assert "were evaluated on different problems: toy" in command.stderr
    assert "Traceback" not in command.stderr
