"""The day that chat templates are told: a run and its evaluations keep that of their first start."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig, to_toml, validate
from megatron_rapo.config.date import recorded_date, with_date
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import standalone
from megatron_rapo.evaluation.compare import compare
from megatron_rapo.evaluation.manifest import Manifest, ModelRecord
from megatron_rapo.evaluation.standalone import evaluate
from megatron_rapo.evaluation.store import Evaluation

MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"


def configuration(tmp_path: Path, template: str = "chat", **run: Any) -> RunConfig:
    path = tmp_path / "set.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(3))
    )
    data = {"source": "file", "path": str(path), "template": template, "template_text": "{prompt}"}
    return validate(
        {
            "run": {"directory": str(tmp_path / "run"), "steps": 1, **run},
            "model": {"path": str(tmp_path / "model")},
            "data": data,
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "evaluate": {"samples": 2, "k": [1], "data": [data]},
        },
        "test",
    )


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list whose last day is today."""
    days = ["2026-01-01"]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls.fromisoformat(days[-1])

    monkeypatch.setattr("megatron_rapo.config.date.datetime", Clock)
    return days


def test_a_run_keeps_the_day_of_its_first_start(tmp_path: Path, today: list[str]) -> None:
    first = with_date(configuration(tmp_path), recorded_date(tmp_path / "run"))
    assert first.run.date == "2026-01-01"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(to_toml(first))
    today.append("2026-01-02")
    assert with_date(configuration(tmp_path), recorded_date(tmp_path / "run")) == first
    asked = configuration(tmp_path, date="2025-12-31")
    assert with_date(asked, recorded_date(tmp_path / "run")).run.date == "2025-12-31"


def test_prompts_without_a_chat_template_have_no_day(tmp_path: Path) -> None:
    assert with_date(configuration(tmp_path, "plain")).run.date is None
    with pytest.raises(RapoError, match=r"run\.date = '2026-01-01' would have no effect"):
        configuration(tmp_path, "plain", date="2026-01-01")


@pytest.mark.parametrize("date", ["2026-13-01", "today", "20260101", ""])
def test_what_is_no_day_is_refused(tmp_path: Path, date: str) -> None:
    with pytest.raises(RapoError, match=r"run\.date = .* is no day; write it like"):
        configuration(tmp_path, date=date)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run")
    with pytest.raises(RapoError, match="cannot be read"):
        recorded_date(tmp_path)


class Stop(Exception):
    """Instead of engines."""


def test_an_evaluation_goes_on_the_next_day(
    tmp_path: Path, today: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    template = "{{ strftime_now('%d') }} {{ messages[0].content }}"
    (tmp_path / "model/chat_template.jinja").write_text(template)

    def no_engines(*arguments: object) -> None:
        raise Stop

    monkeypatch.setattr(standalone, "open_own_engines", no_engines)

    def start(name: str, *, run: str | None = None, **options: Any) -> Manifest:
        model = ModelRecord(path="model", run=run, step=None if run is None else 1, fingerprint="f")
        with pytest.raises(Stop):
            evaluate(configuration(tmp_path, **options), model, tmp_path / name)
        return Manifest.read(tmp_path / name)

    first = start("one")
    assert first.date == "2026-01-01"
    today.append("2026-01-02")
    assert start("one").prompts == first.prompts
    other = start("other")
    assert other.prompts != first.prompts
    with pytest.raises(
        RapoError, match=r"differ in the prompts of set .*on 2026-01-01 .*on 2026-01-02.*run\.date=2026-01-01"
    ):
        compare(Evaluation.open(tmp_path / "one"), Evaluation.open(tmp_path / "other"), [1])
    assert start("third", date="2026-01-01").prompts == first.prompts
    with pytest.raises(
        RapoError, match=r"differs in the prompts of set .*on 2026-01-01, now .*on 2026-01-03"
    ):
        evaluate(
            configuration(tmp_path, date="2026-01-03"),
            ModelRecord(path="m", fingerprint="f"),
            tmp_path / "one",
        )
    # The weights of a run are evaluated on the day of the run.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text('[run]\ndate = "2026-01-01"\n')
    assert start("of a run", run=str(tmp_path / "run")).prompts == first.prompts
