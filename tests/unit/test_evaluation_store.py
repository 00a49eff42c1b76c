"""Samples on disk: what is written is read back, counts are right, and half of a part is none."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import DataRecord, Manifest, ModelRecord, SettingRecord
from megatron_rapo.evaluation.store import (
    Evaluation,
    Problem,
    SampleStore,
    StoredSample,
    begin,
    remove,
    write_problems,
)
from megatron_rapo.fingerprint import fingerprint, weights_fingerprint

PROBLEMS = [Problem("a", "1+1?", "2", (1, 2)), Problem("b", "2+2?", "4", (3,)), Problem("c", "?", "5", (4,))]
MANIFEST = Manifest(
    model=ModelRecord(path="models/base", run="runs/one", step=3),
    data=(DataRecord(name="sums", source="sums.jsonl", problems=3, fingerprint="00"),),
    settings=(SettingRecord(name="t1", temperature=1.0, max_response_tokens=8),),
    samples=4,
    seed=7,
    verifier={"sums": "math"},
    prompts={"sums": "11"},
    environment={"use": "a:b", "options": {"guesses": 1}},
    code={"a:b": "20"},
    versions={},
    started="2026-01-01T00:00:00+00:00",
)


def sample(problem: str, number: int, outcome: Outcome = Outcome.WRONG, tokens: int = 3) -> StoredSample:
    return StoredSample(
        problem,
        number,
        outcome,
        extracted="2" if number % 2 else None,
        truncated=tokens == 8,
        seed=number + 100,
        text=f"{problem}{number}",
        token_ids=np.arange(tokens, dtype=np.int32),
        log_probs=-np.arange(tokens, dtype=np.float32),
        reward=None if outcome is Outcome.TIMEOUT else number / 4,
    )


@pytest.fixture
def stored(tmp_path: Path) -> Evaluation:
    MANIFEST.write(tmp_path)
    write_problems(tmp_path / "sums", PROBLEMS)
    return Evaluation.open(tmp_path)


def test_what_is_written_is_read_back(stored: Evaluation) -> None:
    samples = stored.samples("sums", "t1")
    written = [sample("b", 1, Outcome.CORRECT), sample("a", 0), sample("b", 0, Outcome.TIMEOUT, tokens=8)]
    samples.write(written[:2])
    samples.write(written[2:])
    assert stored.manifest == MANIFEST
    assert stored.manifest.model.label == "one step 3"
    assert list(stored) == [("sums", "t1")]
    assert stored.problems("sums") == tuple(PROBLEMS)
    assert samples.present() == {("b", 1), ("a", 0), ("b", 0)}
    columns = [
        "problem",
        "sample",
        "outcome",
        "reward",
        "extracted",
        "seed",
        "text",
        "token_ids",
        "log_probs",
    ]
    rows = [row for batch in samples.stream(columns) for row in batch.to_pylist()]
    for row, expected in zip(rows, written, strict=True):
        assert (row["problem"], row["sample"], row["text"]) == (
            expected.problem,
            expected.sample,
            expected.text,
        )
        assert row["outcome"] == expected.outcome.value
        assert row["extracted"] == expected.extracted
        assert row["reward"] == expected.reward
        assert row["token_ids"] == expected.token_ids.tolist()
        assert row["log_probs"] == expected.log_probs.tolist()
    only = [
        row["sample"]
        for batch in samples.stream(["sample"], problems=["b"], outcome=Outcome.TIMEOUT)
        for row in batch.to_pylist()
    ]
    assert only == [0]
    assert sum(batch.num_rows for batch in samples.stream(["sample"], problems=[])) == 0


def test_counts_are_those_of_the_rows_whatever_the_parts(stored: Evaluation) -> None:
    generator = np.random.default_rng(0)
    outcomes = list(Outcome)
    written = [
        sample(problem, number, outcomes[generator.integers(4)], tokens=int(generator.integers(1, 9)))
        for problem in "cab"  # the parts meet the problems in another order than the data set
        for number in range(50)
    ][:130]
    samples = stored.samples("sums", "t1")
    for start in range(0, len(written), 37):
        samples.write(written[start : start + 37], writer=start % 2)
    counts = samples.counts()
    assert counts.problems == ("a", "b", "c")
    assert len(samples.parts()) == 4
    for place, name in enumerate(counts.problems):
        mine = [one for one in written if one.problem == name]
        by_outcome = Counter(one.outcome for one in mine)
        assert counts.samples[place] == len(mine)
        for outcome in Outcome:
            assert getattr(counts, outcome.value)[place] == by_outcome[outcome]
        assert counts.tokens[place] == sum(len(one.token_ids) for one in mine)
        assert counts.truncated[place] == sum(one.truncated for one in mine)
        assert counts.unextracted[place] == sum(
            one.outcome is Outcome.WRONG and one.extracted is None for one in mine
        )


def test_nothing_sampled_yet_counts_as_zero(stored: Evaluation) -> None:
    counts = stored.samples("sums", "t1").counts()
    assert counts.samples.tolist() == counts.correct.tolist() == [0, 0, 0]


def test_half_of_a_part_is_none(stored: Evaluation) -> None:
    samples = stored.samples("sums", "t1")
    samples.write([sample("a", 0)])
    (samples.directory / "part-000-000001.partial").write_bytes(b"PAR1 and then the kill came")
    assert samples.present() == {("a", 0)}
    samples.write([sample("a", 1)])
    assert samples.present() == {("a", 0), ("a", 1)}


def test_a_sample_that_is_there_twice_is_an_error(stored: Evaluation) -> None:
    samples = stored.samples("sums", "t1")
    samples.write([sample("a", 0), sample("a", 1)])
    samples.write([sample("a", 1)], writer=1)
    with pytest.raises(RapoError, match=r"sample 1 of problem a 2 times.*into another directory"):
        samples.present()
    with pytest.raises(RapoError, match="two processes wrote to it"):
        Evaluation.open(stored.directory)


def test_samples_of_unknown_problems_are_an_error(stored: Evaluation) -> None:
    samples = stored.samples("sums", "t1")
    samples.write([sample("z", 0)])
    with pytest.raises(RapoError, match=r"\['z'\]: these parts belong to another evaluation"):
        samples.counts()


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"is no evaluation: it has no evaluation.json"):
        Evaluation.open(tmp_path)
    values = json.loads(MANIFEST.model_dump_json()) | {"format": 1, "temperature": 3}
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    with pytest.raises(RapoError, match=r"not a manifest of format 1"):
        Evaluation.open(tmp_path)


def test_fingerprints_differ_where_what_they_are_of_does(tmp_path: Path) -> None:
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    (tmp_path / "config.json").write_text("{}")
    content = bytearray(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    first = weights_fingerprint(tmp_path)
    assert weights_fingerprint(tmp_path) == first
    content[-1] = 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_fingerprint(tmp_path) != first


def test_counts_read_neither_texts_nor_tokens(stored: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = stored.samples("sums", "t1")
    samples.write([sample("a", 0)])
    read: list[str] = []
    original = SampleStore.read
    monkeypatch.setattr(SampleStore, "read", lambda self, c: read.extend(c) or original(self, c))
    samples.counts()
    assert not {"text", "token_ids", "log_probs"} & set(read)
    assert pyarrow.parquet.read_metadata(samples.parts()[0]).num_rows == 1


def test_an_evaluation_of_a_version_that_noted_no_environment_goes_on() -> None:
    MANIFEST.going_on_from(changed(environment=None), Path("out"))


def changed(**changes: Any) -> Manifest:
    return MANIFEST.model_copy(update=changes)


OTHER_DATA = DataRecord(name="more", source="more.jsonl", problems=1, fingerprint="22")
COLD = SettingRecord(name="t0.5", temperature=0.5, max_response_tokens=8)


@pytest.mark.parametrize(
    "now",
    [
        changed(started="2026-02-02T00:00:00+00:00"),
        changed(samples=5),
        changed(settings=(*MANIFEST.settings, COLD)),
        changed(
            data=(*MANIFEST.data, OTHER_DATA),
            prompts={"sums": "11", "more": "12"},
            verifier={"sums": "math", "more": "integer"},
        ),
        changed(versions={"torch": "9"}, finished="then", model=ModelRecord(path="elsewhere")),
    ],
    ids=["the same", "more samples", "another setting", "another data set", "elsewhere"],
)
def test_an_evaluation_may_go_on_as_the_same_or_with_more(now: Manifest) -> None:
    found = now.going_on_from(MANIFEST, Path("out"))
    assert found == now.model_copy(update={"started": MANIFEST.started})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelRecord(path="m", fingerprint="v")},
            "in the model (models/base, fingerprint None, now m, fingerprint v)",
        ),
        ({"seed": 8}, "in the seed (7, now 8)"),
        ({"adaptive": 2}, "in the adaptive budget (none, now 2)"),
        (
            {"data": (MANIFEST.data[0].model_copy(update={"fingerprint": "01"}),)},
            "in data set sums (sums.jsonl, fingerprint 00, now sums.jsonl, fingerprint 01)",
        ),
        ({"prompts": {"sums": "12"}}, "in the prompts of sums (fingerprint 11, now fingerprint 12)"),
        (
            {"prompts": {"sums": "12"}, "date": "2026-01-02"},
            "now fingerprint 12 of a chat template on 2026-01-02)",
        ),
        ({"verifier": {"sums": "integer"}}, "in the verifier of sums (math, now integer)"),
        (
            {"environment": {"use": "a:b", "options": {"guesses": 2}}},
            'in the environment ({"use": "a:b", "options": {"guesses": 1}}, now {"use": "a:b", "options": '
            '{"guesses": 2}})',
        ),
        ({"code": {"a:b": "21"}}, "in the code of a:b (fingerprint 20, now fingerprint 21)"),
        (
            {"settings": (MANIFEST.settings[0].model_copy(update={"top_k": 3}),)},
            "in setting t1 (name='t1' temperature=1.0 top_p=1.0 top_k=-1 max_response_tokens=8, now",
        ),
        ({"settings": (COLD,)}, "out was begun with setting t1, which is not asked for now; name it again"),
        ({"samples": 3}, "out was begun with 4 samples a problem, more than the 3 of now; ask for no fewer"),
    ],
)
def test_samples_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RapoError, match=re.escape(message)):
        changed(**changes).going_on_from(MANIFEST, Path("out"))


def test_models_have_short_names() -> None:
    assert ModelRecord(path="models/Qwen").label == "Qwen"
    assert ModelRecord(path="runs/one/model", run="runs/one", step=7).label == "one step 7"


def test_what_cannot_be_written_is_told_and_leaves_no_half(
    stored: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = stored.samples("sums", "t1")
    samples.write([])
    assert not samples.directory.exists()  # nothing is no part
    samples.write([sample("a", 0)])

    def full(table: object, where: Path, **options: object) -> None:
        where.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(RapoError, match=r"part-002-000000\.parquet: .*No space left .* intact: free space"):
        samples.write([sample("a", 1)], writer=2)
    assert [path.name for path in samples.directory.iterdir()] == ["part-000-000000.parquet"]
    with pytest.raises(RapoError, match=r"cannot be written to .*: No space left on device; free space"):
        begin(stored.directory, MANIFEST, {"sums": PROBLEMS})


def test_an_evaluation_is_removed_whole(stored: Evaluation) -> None:
    remove(stored.directory)
    assert not stored.directory.exists()
    remove(stored.directory)


def test_problems_that_cannot_be_read_are_told(stored: Evaluation) -> None:
    (stored.directory / "sums/problems.parquet").write_bytes(b"PAR1")
    with pytest.raises(RapoError, match=r"problems\.parquet cannot be read: .*into another directory"):
        Evaluation.open(stored.directory)
