"""The report's building blocks: sources, curves, drawings, tokens, and that what others wrote is escaped."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import Manifest
from megatron_rapo.report.build import build_report
from megatron_rapo.report.drawing import Line, Mark, Plot, draw_svg
from megatron_rapo.report.numbers import tables
from megatron_rapo.report.page import render
from megatron_rapo.report.responses import EvaluatedSamples, Sampled, browse
from megatron_rapo.report.sources import open_sources
from megatron_rapo.report.theme import DARK, LIGHT
from megatron_rapo.report.training import TrainingRun, running_mean, training_plots
from tests.stored_evaluations import store_evaluation
from tests.unit.stored import store

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" \u2028 \''


def write_run(directory: Path, steps: int = 3) -> Path:
    directory.mkdir(parents=True)
    lines = [{"step": step, "reward/mean": step / 10, "loss/total": None} for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.toml").write_text('[run]\nsteps = 3\n[model]\npath = "nowhere"\n')
    return directory


class TestSources:
    def test_a_runs_evaluations_are_found_and_step_0_is_the_base(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        for step in (20, 0, 10):
            store_evaluation(run / f"evaluations/step_{step:06d}", [1, 2], step=step, run=str(run))
        sources = open_sources([run])
        assert sources.runs == (run,)
        assert [model.label for model in sources.models] == ["base", "step 10", "step 20"]

    def test_without_steps_the_first_is_the_base(self, tmp_path: Path) -> None:
        for name in ("zeta", "alpha"):
            store_evaluation(tmp_path / name, [1, 2], model=f"/models/{name}")
        sources = open_sources([tmp_path / "zeta", tmp_path / "alpha"])
        assert [model.label for model in sources.models] == ["zeta (base)", "alpha"]

    def test_models_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        directories = [tmp_path / name for name in ("first", "second", "third")]
        for directory in directories:
            store_evaluation(directory, [1, 2], model="/models/same")
        labels = [model.label for model in open_sources(directories).models]
        assert labels == ["same (base)", "same (second)", "same (third)"]

    def test_a_runs_unfinished_evaluation_is_left_out(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        for step in (0, 5):
            store_evaluation(run / f"evaluations/step_{step:06d}", [1, 2], step=step, run=str(run))
        unfinished = run / "evaluations/step_000005"
        manifest = Manifest.read(unfinished)
        manifest.model_copy(update={"finished": None}).write(unfinished)
        sources = open_sources([run])
        assert [model.label for model in sources.models] == ["base"]
        assert sources.left_out == (unfinished,)
        with pytest.raises(RapoError, match=f"{unfinished} is not finished"):
            build_report(open_sources([run, unfinished]))

    def test_neither_run_nor_evaluation(self, tmp_path: Path) -> None:
        with pytest.raises(RapoError, match=r"neither a run .* nor an evaluation"):
            open_sources([tmp_path])
        with pytest.raises(RapoError, match="is no directory"):
            open_sources([tmp_path / "absent"])

    def test_the_same_twice_is_refused(self, tmp_path: Path) -> None:
        store_evaluation(tmp_path / "one", [1, 2])
        (tmp_path / "link").symlink_to(tmp_path / "one")
        with pytest.raises(RapoError, match="given twice"):
            open_sources([tmp_path / "one", tmp_path / "link"])

    @pytest.mark.parametrize("text", ["", '{"step": 1', "no json\n"])
    def test_a_run_without_a_whole_step_is_refused(self, tmp_path: Path, text: str) -> None:
        run = write_run(tmp_path / "run")
        (run / "metrics.jsonl").write_text(text)
        with pytest.raises(RapoError, match=r"metrics\.jsonl"):
            build_report(open_sources([run]))


class TestCurves:
    def test_the_running_mean_leaves_gaps_out(self) -> None:
        assert running_mean([1.0, None, 3.0, 5.0], window=2) == [1.0, 1.0, 3.0, 4.0]
        assert running_mean([None], window=2) == [None]

    def test_a_metric_that_was_never_finite_has_no_plot(self) -> None:
        steps = [{"step": 1, "reward/mean": 0.5, "loss/total": None}]
        assert [plot.name for plot in training_plots([TrainingRun("run", steps)])] == ["training_reward_mean"]

    def test_runs_share_a_plot(self) -> None:
        steps = [{"step": 1, "reward/mean": 0.5}]
        (plot,) = training_plots([TrainingRun("one", steps), TrainingRun("two", steps)])
        assert [line.label for line in plot.lines] == ["one", "two"]
        assert len({line.colour for line in plot.lines}) == 2

    def test_the_memory_of_phases_is_one_plot_of_each_run(self) -> None:
        steps = [
            {"step": 1, "memory/rollout_gib": 1.0, "memory/update_gib": 3.0},
            {"step": 2, "memory/rollout_gib": 2.0, "memory/update_gib": 4.0, "memory/checkpoint_gib": 5.0},
        ]
        (plot,) = training_plots([TrainingRun("run", steps)])
        assert [(line.label, list(line.x), list(line.y)) for line in plot.lines] == [
            ("rollout", [1, 2], [1.0, 2.0]),
            ("update", [1, 2], [3.0, 4.0]),
            ("checkpoint", [2], [5.0]),
        ]
        both = training_plots([TrainingRun("one", steps), TrainingRun("two", steps)])
        assert [plot.title for plot in both] == ["memory by phase, GiB, one", "memory by phase, GiB, two"]

    def test_each_data_set_and_setting_has_a_plot_of_its_own(self) -> None:
        steps = [
            {"step": step}
            | {
                f"evaluate/{at}pass@{k}{end}": (step + k) / 100
                for at in ("aime24/t1.0/", "math/t1.0/")
                for k in (1, 4)
                for end in ("", "_low", "_high")
            }
            for step in (0, 5)
        ]
        plots = training_plots([TrainingRun("run", steps)])
        assert [plot.title for plot in plots] == ["pass@k on aime24, t1.0", "pass@k on math, t1.0"]
        assert len({plot.name for plot in plots}) == 2
        assert [(line.label, list(line.y)) for line in plots[1].lines] == [
            ("pass@1", [0.01, 0.06]),
            ("pass@4", [0.04, 0.09]),
        ]

    def test_the_mean_reward_on_held_out_problems_has_a_plot(self) -> None:
        names = [f"evaluate/{name}{end}" for name in ("reward", "pass@1") for end in ("", "_low", "_high")]
        steps = [{"step": step, **dict.fromkeys(names, step / 10)} for step in (0, 5)]
        plots = training_plots([TrainingRun("run", steps)])
        assert [(plot.name, plot.title) for plot in plots] == [
            ("training_mean_reward", "mean reward on held-out problems"),
            ("training_pass_at_k", "pass@k on held-out problems"),
        ]
        assert [(line.label, list(line.y)) for line in plots[0].lines] == [("reward", [0.0, 0.5])]


class TestDrawing:
    PLOT = Plot(
        "name",
        "title",
        "description",
        "k",
        "pass@k",
        (Line("base", "base", [1, 2, 4], [0.1, None, 0.5], [0.0, 0.1, 0.4], [0.2, 0.3, 0.6]),),
        scale="log2",
        share=True,
    )

    @pytest.mark.parametrize(
        ("values", "limits"), [([0.1, None, 0.5], (-0.02, 1.02)), ([-1.0, 0.0, 3.0], None)]
    )
    def test_a_share_runs_from_0_to_1_and_shows_what_lies_outside(
        self, values: list[float | None], limits: tuple[float, float] | None
    ) -> None:
        lines = (Line("reward", "base", [1, 2, 4], values),)
        low, high = draw_svg(replace(self.PLOT, lines=lines), 320, 200).told["ylim"]
        if limits:
            assert (low, high) == pytest.approx(limits)
        assert low < min(y for y in values if y is not None)
        assert high > max(y for y in values if y is not None)

    def test_colours_are_the_themes(self) -> None:
        svg = draw_svg(self.PLOT, 320, 200).svg
        assert "stroke: var(--base)" in svg
        assert not [colour for colour in LIGHT.values() if colour in svg]
        assert LIGHT.keys() == DARK.keys()
        assert len(set(LIGHT.values())) == len(LIGHT)

    def test_a_drawing_carries_nothing_into_the_document(self) -> None:
        wide, narrow = draw_svg(self.PLOT, 320, 200).svg, draw_svg(self.PLOT, 160, 100).svg
        ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (wide, narrow)]
        assert ids[0].isdisjoint(ids[1])
        assert "<style" not in wide
        assert "<?xml" not in wide

    def test_the_pointer_is_told_where_values_are(self) -> None:
        told = draw_svg(self.PLOT, 320, 200).told
        left, top, right, bottom = told["box"]
        assert 0 < left < right <= 320
        assert 0 <= top < bottom < 200
        assert told["lines"][0]["y"] == [0.1, None, 0.5]

    def test_a_name_is_no_formula(self) -> None:
        plot = Plot("n", "t", "d", "x", "y", (Line("a", "base", [1], [1]),), marks=(Mark(1.0, "$run_1$"),))
        assert "$run_1$" in draw_svg(plot, 320, 200).svg


def test_the_frontier_marks_each_models_crossover_in_its_colour(tmp_path: Path) -> None:
    """The best solves all problems at any k, two others half of them, the base 7/8 of its k/8."""
    always = np.zeros((8, 8), dtype=bool)
    always[:4] = True
    seldom = np.zeros_like(always)
    seldom[:7, 0] = True
    for name, right in {"base": seldom, "one": always, "best": np.ones_like(always), "two": always}.items():
        store(tmp_path / name, right, seed=len(name))
    names = ["base", "one", "best", "two"]
    report = build_report(open_sources([tmp_path / name for name in names]))
    [benchmark] = report.benchmarks
    [drawn] = benchmark.figures
    # 4/8 at any k against 7/8 · k/8.
    assert drawn.plot.marks == (
        Mark(5.0, "one: crossover at k = 5", "series-1"),
        Mark(5.0, "two: crossover at k = 5", "series-3"),
    )
    lines = {line.label: line.colour for line in drawn.plot.lines}
    assert (lines["one"], lines["two"]) == ("series-1", "series-3")
    for drawing in drawn.drawings:
        found = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(?:one|two): crossover', drawing.svg)
        places = [float(y) for y in found]
        assert len(places) == 2 and abs(places[0] - places[1]) > 8


class TestTokens:
    @pytest.mark.parametrize("text", ["2+3*4=14", "(25-3)*2"])
    def test_texts_join_to_the_whole(self, text: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained("examples/models/tiny-countdown")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert TokenTexts(tokenizer)(ids) == [tokenizer.decode([token]) for token in ids]

    def test_a_character_of_several_tokens_stands_at_its_first(self) -> None:
        texts = ["a", "é", "", "∑", "", "", "😀", "", "", "", "b"]
        assert TokenTexts(_Bytes())(list("aé∑😀b".encode())) == texts

    def test_half_a_character_stays_as_the_tokenizer_has_it(self) -> None:
        assert TokenTexts(_Bytes())(list("aé".encode())[:-1]) == ["a", "\ufffd"]

    def test_a_tokenizer_that_strips_a_leading_space(self) -> None:
        assert TokenTexts(_Words())([0, 1, 0]) == ["one", " two", " one"]

    @pytest.mark.parametrize("strips_spaces", [False, True])
    @pytest.mark.parametrize("byte_tokens", ["ByteLevel", "ByteFallback"])
    def test_characters_that_are_cut_keep_the_texts_of_all_tokens(
        self, byte_tokens: str, strips_spaces: bool
    ) -> None:
        tokenizer = _byte_tokenizer(byte_tokens, strips_spaces)
        texts_of = TokenTexts(tokenizer)
        generator = random.Random(0)
        ids = tokenizer.encode("ab 答案 é🐕 c", add_special_tokens=False)
        cases = [
            ids[:i] + ids[j:] for i, j in itertools.combinations_with_replacement(range(len(ids) + 1), 2)
        ]
        cases += [generator.choices(range(256), k=generator.randrange(1, 40)) for _ in range(50)]
        for case in cases:
            texts = texts_of(case)
            assert len(texts) == len(case)
            assert "".join(texts) == tokenizer.decode(case, clean_up_tokenization_spaces=False)

    @pytest.mark.parametrize("byte_tokens", ["ByteLevel", "ByteFallback"])
    def test_in_a_cut_response_whole_characters_stand_where_they_are(self, byte_tokens: str) -> None:
        tokenizer = _byte_tokenizer(byte_tokens, strips_spaces=True)
        ids = [
            token for text in ("x", "答") * 20 for token in tokenizer.encode(text, add_special_tokens=False)
        ]
        texts = TokenTexts(tokenizer)(ids[:-1])
        assert texts[:76] == ["x", "答", "", ""] * 19
        assert texts[76] == "x" and set(texts[77:]) <= {"\ufffd", ""} and len(texts) == 79


def test_a_response_is_shown_with_its_reward_and_of_older_parts_with_what_its_outcome_earns(
    tmp_path: Path,
) -> None:
    """Parts that were written before rewards were kept lack the column."""
    correct = np.array([[True, False]])
    evaluation = store(tmp_path / "e", correct)
    samples = evaluation.samples("sums", "t1")
    [part] = samples.parts()
    whole = pyarrow.parquet.read_table(part)

    def rewards() -> list[float]:
        [problem] = browse([Sampled("m", "sums", EvaluatedSamples(samples), None)]).data["problems"]
        return [response["reward"] for response in problem["responses"]]

    given = whole.drop_columns(["reward", "given", "sequences"])
    pyarrow.parquet.write_table(given, part)
    assert rewards() == [1.0, 0.0]
    pyarrow.parquet.write_table(given.append_column("reward", pyarrow.array([1.5, 0.25])), part)
    assert rewards() == [1.5, 0.25]


class _Bytes:
    def decode(self, ids: list[int], **options: bool) -> str:
        return bytes(ids).decode(errors="replace")


class _Words:
    def decode(self, ids: list[int], **options: bool) -> str:
        return " ".join(["one", "two"][token] for token in ids)


def _byte_tokenizer(byte_tokens: str, strips_spaces: bool) -> PreTrainedTokenizerFast:
    """256 tokens of a byte each: as GPT-2's, or as sentencepiece's, beside which there are letters."""
    if byte_tokens == "ByteLevel":
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = [decoders.ByteLevel()]
    else:
        tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "x"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if strips_spaces else []
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_an_adaptive_budget_says_what_it_saved(tmp_path: Path) -> None:
    """Problems that are always, never and once correct: they end after 2, 8 and 8 of 8 samples."""
    correct = np.zeros((3, 8), dtype=bool)
    correct[0], correct[2, 5] = True, True
    there = np.ones_like(correct)
    there[0, 2:] = False
    for seed, name in enumerate(("base", "model")):
        store(tmp_path / name, correct, there=there, adaptive=2, seed=seed)
    store(tmp_path / "fixed", correct, seed=5)
    report = build_report(open_sources([tmp_path / name for name in ("base", "model", "fixed")]))
    [benchmark] = report.benchmarks
    assert [score.statistics.drawn for score in benchmark.scores] == [18, 18, 24]
    assert [round(score.pass_at(1).mean, 6) for score in benchmark.scores] == [0.375] * 3
    page = render(report)
    for name in ("base", "model"):
        assert f"{name} had an adaptive budget: a problem was done with 2 correct samples" in page
    assert page.count("18 of 24 samples were drawn (25% saved)") == 2
    assert "fixed had an adaptive budget" not in page
    assert "exact distribution of the likelihood ratio" in page


@pytest.mark.parametrize(("partial", "shown"), [(0.5, True), (0.0, False)])
def test_a_mean_reward_is_a_column_where_it_says_more_than_pass_at_1(
    tmp_path: Path, partial: float, shown: bool
) -> None:
    correct = np.array([[True, False], [False, False]])
    for seed, name in enumerate(("base", "model")):
        store(tmp_path / name, correct, rewards=np.where(correct, 1.0, partial), seed=seed)
    report = build_report(open_sources([tmp_path / "base", tmp_path / "model"]))
    assert (">reward</th>" in render(report)) == shown
    assert render(report).count("0.625 <span") == (2 if shown else 0)
    assert [row.get("reward") for row in tables(report)["scores"]] == [0.625 if shown else None] * 2


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    store_evaluation(
        tmp_path / "one",
        [1],
        text=HOSTILE + "{answer}",
        question=HOSTILE + "{place}",
        model=f"/models/{HOSTILE}",
    )
    page = render(build_report(open_sources([tmp_path / "one"])))
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "\u2028" not in re.findall(r'id="responses-data">(.*?)</script>', page)[0]


def test_the_page_asks_for_nothing_else(tmp_path: Path) -> None:
    page = render(build_report(open_sources([write_run(tmp_path / "run")])))
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page.replace('xlink:href="#', ""))
    assert "url(http" not in page
    assert "default-src 'none'" in html.unescape(page)


def test_the_summary_speaks_of_the_last_model_of_each_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("rapo", "grpo")]
    store_evaluation(runs[0] / "evaluations/step_000000", [0, 1, 2], step=0, run=str(runs[0]))
    for run, right in zip(runs, ([8, 8, 8], [2, 2, 2]), strict=True):
        for step in (1, 3):
            store_evaluation(run / f"evaluations/step_{step:06d}", right, step=step, run=str(run), seed=step)
    report = build_report(open_sources(runs))
    assert [headline.benchmark for headline in report.headlines] == [
        "rapo step 3 on toy",
        "grpo step 3 on toy",
    ]
    first, second = report.answer.splitlines()
    assert "rapo step 3" in first and "pass@8 is 1.000" in first
    assert "grpo step 3" in second
    assert "step 1" not in report.answer


def test_the_summary_speaks_of_every_model_that_is_of_no_run(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("base", "one", "two")]
    for directory in directories:
        store_evaluation(directory, [1, 2], model=f"/models/{directory.name}")
    report = build_report(open_sources(directories))
    assert [headline.benchmark for headline in report.headlines] == ["one on toy", "two on toy"]
