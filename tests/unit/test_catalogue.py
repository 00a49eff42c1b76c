"""The record of what metrics mean: what is written has an entry, and the page is made of it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from megatron_rapo.config.reward import TAKEN
from megatron_rapo.observe import document
from megatron_rapo.observe.catalogue import Metric, groups, metrics, recorded
from tests.written_metrics import of_environments, of_evaluations, of_rollouts, of_updates, of_users_own

DOCS = Path(__file__).parents[2] / "docs"


def built_in(name: str) -> list[Metric]:
    """The entries that a metric has, but for those of users' own names."""
    return [metric for metric in recorded(name) if not metric.own]


def test_the_page_is_current() -> None:
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == document.render(), (
        "python -m megatron_rapo.observe.document > docs/metrics.md"
    )


def test_the_page_is_printed_by_its_module_alone(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(document.__file__), run_name="__main__")
    assert capsys.readouterr().out == document.render()


def test_what_is_written_has_one_entry(tmp_path: Path) -> None:
    written = of_rollouts() | of_updates() | of_environments() | set(of_evaluations(tmp_path))
    assert len(written) > 80
    assert {name: built_in(name) for name in written if len(built_in(name)) != 1} == {}


def test_what_is_recorded_is_written(tmp_path: Path) -> None:
    """In groups that are written without a run; of the others, tests/end_to_end/test_train.py asks."""
    written = (
        of_rollouts() | of_updates() | of_environments() | of_users_own() | set(of_evaluations(tmp_path))
    )
    told = {name.partition("/")[0] for name in written}
    assert {entry for entry in metrics() if entry.group in told} == {recorded(name)[0] for name in written}


def test_what_users_tell_has_the_entry_of_its_group() -> None:
    assert {name: [metric.name for metric in recorded(name)] for name in of_users_own()} == {
        "reward/own": ["reward/<name>"],
        "environment/own": ["environment/<fact>"],
        "method/own": ["method/<name>"],
        "loss/own": ["loss/<name>"],
    }


def test_names_that_rewards_cannot_take_are_those_that_are_recorded() -> None:
    names = {metric.name for metric in metrics() if metric.group == "reward" and "<" not in metric.name}
    assert names == {f"reward/{name}" for name in TAKEN}


@pytest.mark.parametrize(
    ("name", "logged", "others"),
    [
        ("a/mean", ["a/mean"], ["a/means", "b/a/mean", "a.mean"]),
        ("a/<name>", ["a/x", "a/x.y-z"], ["a/", "a/x/y"]),
        ("a/[<set>/<way>/]p@<k>[_low|_high]", ["a/p@1", "a/s/w/p@8_low", "a/p@2_high"], ["a/s/p@1", "a/p"]),
    ],
)
def test_a_name_stands_for_what_is_logged(name: str, logged: list[str], others: list[str]) -> None:
    metric = Metric(name, "share", "tokens", "It is.", "It is not.")
    assert all(map(metric.names, logged))
    assert not any(map(metric.names, others))


def test_entries_are_whole() -> None:
    assert {metric.group for metric in metrics()} == set(groups())
    assert len({metric.name for metric in metrics()}) == len(metrics())
    for metric in metrics():
        for text in (metric.unit, metric.over, metric.meaning, metric.wrong):
            assert text and "\n" not in text, metric
        assert metric.meaning.endswith((".", ")")), metric


def test_links_of_the_page_lead_somewhere() -> None:
    for page, _, heading in re.findall(r"\]\((\w+\.md)(#([\w-]+))?\)", document.render()):
        text = (DOCS / page).read_text(encoding="utf-8")
        titles = [re.sub(r"[^\w -]", "", title).lower() for title in re.findall(r"^#+ (.*)$", text, re.M)]
        assert not heading or heading in [title.replace(" ", "-") for title in titles], f"{page}#{heading}"


def test_metrics_that_the_page_names_are_recorded() -> None:
    """Its advice names other metrics."""
    named = set(re.findall(r"`([a-z]+/[\w@]+)`", " ".join(metric.wrong for metric in metrics())))
    assert named
    assert [name for name in named if name.partition("/")[0] in groups() and not built_in(name)] == []
