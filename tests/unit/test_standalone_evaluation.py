"""`megatron-rapo evaluate` from the command line's words to the table, with engines that are stand-ins.

What every sample says follows from its seed, so all numbers are known beforehand.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from megatron_rapo.config.reward import Reward
from megatron_rapo.config.verifiers import RewardPlan
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import command, plan, progress, standalone
from megatron_rapo.evaluation.command import Request, run
from megatron_rapo.evaluation.manifest import ModelRecord
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.rollout.requests import sample_seed
from tests.stand_in import StandIn, stand_ins

MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"
SEED, LONGEST = 18, 6
GOLDS = ["0", "1", "2", "3", "4"]  # of problems 0, 1, …
ZERO, SPACE = 12, 3  # token ids of the tiny model


def digits(seed: int) -> int:
    return seed // 11 % 5


def length(seed: int) -> int:
    return 1 + seed % LONGEST


def judged(digit: str, gold: str) -> Verification:
    """One in five samples is right, another has no answer, or cannot be verified."""
    kind = (int(digit) - int(gold)) % 5
    if kind == 1:
        return Verification(Outcome.TIMEOUT if gold == "2" else Outcome.WRONG, None)
    return Verification(Outcome.CORRECT if kind == 0 else Outcome.WRONG, digit)


def expected(problem: int, sample: int) -> dict[str, Any]:
    """A row of the store."""
    seed = sample_seed(SEED, Prompt(problem, "", (), ""), sample)
    verification = judged(str(digits(seed)), GOLDS[problem])
    return {
        "problem": str(problem),
        "sample": sample,
        "outcome": verification.outcome.value,
        "extracted": verification.extracted,
        "length": length(seed),
        "truncated": length(seed) == LONGEST,
        "seed": seed,
        "text": str(digits(seed)) + " " * (length(seed) - 1),
        "token_ids": [ZERO + digits(seed)] + [SPACE] * (length(seed) - 1),
        "log_probs": [-0.25 * (place + 1) for place in range(length(seed))],
    }


def correct(samples: int) -> np.ndarray:
    """`[problems, samples]`"""
    rows = [[expected(p, n)["outcome"] == Outcome.CORRECT for n in range(samples)] for p in range(len(GOLDS))]
    return np.array(rows)


class FakeVerifier:
    """Judges by `judged`, in this process."""

    opened: ClassVar[list[tuple[str, int, float]]] = []

    @classmethod
    def configured(cls, plan: RewardPlan, options: Reward) -> FakeVerifier:
        cls.opened.append((str(plan), options.workers, options.time_limit_s))
        return cls()

    def __enter__(self) -> FakeVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def score(self, response: str, problem: Problem) -> Verification:
        return judged(response[0], problem.answer)


def answers(server: StandIn) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    def generate(body: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for params in body["sampling_params"]:
            seed = params["sampling_seed"]
            tokens = [ZERO + digits(seed)] + [SPACE] * (length(seed) - 1)
            meta = {
                "finish_reason": {"type": "length" if len(tokens) == LONGEST else "stop"},
                "weight_version": server.version,
                "output_token_logprobs": [[-0.25 * (i + 1), token, None] for i, token in enumerate(tokens)],
            }
            found.append({"text": "", "output_ids": tokens, "meta_info": meta})
        return server.change(found)

    return generate


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[StandIn], list[str]]]:
    monkeypatch.setattr(standalone, "Verifier", FakeVerifier)
    FakeVerifier.opened = []
    with stand_ins(2) as (servers, urls):
        for server in servers:
            server.generate = answers(server)
        yield servers, urls


def request(tmp_path: Path, urls: list[str], **said: Any) -> Request:
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"{gold}+0=", "answer": gold} for gold in GOLDS]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = [
        "rollout.engine.kind=sglang",
        f"rollout.engine.urls={json.dumps(urls)}",
        f"run.seed={SEED}",
        "evaluate.batch=8",
        "reward.workers=3",
        "reward.time_limit_s=2.5",
        *said.pop("settings", []),
    ]
    defaults = {"model": MODEL, "data": [str(data)], "template": "plain", "samples": 6, "k": [1, 2, 6]}
    defaults |= {"max_response_tokens": LONGEST, "out": tmp_path / "out"}
    return Request(**{**defaults, **said}, settings=settings)


def stored(directory: Path, setting: str = "t1") -> list[dict[str, Any]]:
    samples = Evaluation.open(directory).samples("sums", setting)
    rows = [row for batch in samples.stream(list(expected(0, 0))) for row in batch.to_pylist()]
    return sorted(rows, key=lambda row: (row["problem"], row["sample"]))


def asked_for(servers: list[StandIn]) -> int:
    bodies = [body for server in servers for path, body in server.asked if path == "/generate"]
    return sum(len(body["sampling_params"]) for body in bodies)


def test_samples_and_numbers_are_those_of_the_seeds(
    tmp_path: Path, engines: tuple[list[StandIn], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    servers, urls = engines
    settings = ["evaluate.settings=[{}, {temperature=0.6}]"]
    run(request(tmp_path, urls, settings=settings))
    out = tmp_path / "out"
    rows = [expected(problem, sample) for problem in range(len(GOLDS)) for sample in range(6)]
    for setting in ("t1", "t0.6"):
        assert stored(out, setting) == rows
    assert asked_for(servers) == 2 * len(rows)
    loads = [body for server in servers for path, body in server.asked if path.startswith("/update_weights")]
    assert [(body["model_path"], body["weight_version"]) for body in loads] == [(str(MODEL), "0")] * 2
    assert FakeVerifier.opened == [("math", 3, 2.5)] * 2
    evaluation = Evaluation.open(out)
    assert evaluation.manifest.finished is not None
    assert (evaluation.manifest.seed, evaluation.manifest.samples) == (SEED, 6)
    prompts = {tuple(problem.prompt_ids) for problem in evaluation.problems("sums")}
    bodies = [body for server in servers for path, body in server.asked if path == "/generate"]
    assert {tuple(ids) for body in bodies for ids in body["input_ids"]} == prompts

    right, wrong = correct(6), [row for row in rows if row["outcome"] == Outcome.WRONG]
    [first, second] = json.loads((out / "results.json").read_text())
    assert (first["setting"], second["setting"]) == ("t1", "t0.6")
    assert first["statistics"] == second["statistics"]
    found = first["statistics"]
    assert (found["problems"], found["samples"], found["drawn"]) == (5, [6, 6], 30)
    for k in (1, 2, 6):
        shares = [
            np.mean([line[list(chosen)].any() for chosen in combinations(range(6), k)]) for line in right
        ]
        assert found["pass_at_k"][str(k)]["mean"] == pytest.approx(np.mean(shares))
    assert found["mean"]["mean"] == pytest.approx(right.mean())
    assert found["majority_at_k"]["6"]["mean"] == pytest.approx(np.mean([majority(p) for p in range(5)]))
    times = Counter(row["outcome"] for row in rows)
    assert found["outcomes"] == pytest.approx({o.value: times[o.value] / 30 for o in Outcome})
    assert found["unextracted"] == sum(row["extracted"] is None for row in wrong) / 30
    assert found["truncated"] == sum(row["truncated"] for row in rows) / 30
    lengths = np.array([row["length"] for row in rows])
    assert found["lengths"] == pytest.approx(
        {
            "mean": lengths.mean(),
            "median": np.median(lengths),
            "p95": np.quantile(lengths, 0.95),
            "longest": 6,
        }
    )

    with (out / "results.csv").open() as file:
        table = {(row["setting"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(table) == 2 * (1 + 3 + 3 + 4 + 2 + 4)
    for name, value in (("pass@2", found["pass_at_k"]["2"]), ("mean@6", found["mean"])):
        cells = [float(table["t0.6", name][column]) for column in ("value", "low", "high")]
        assert cells == pytest.approx([value["mean"], value["low"], value["high"]])
    assert float(table["t1", "truncated"]["value"]) == found["truncated"]
    assert (table["t1", "tokens longest"]["value"], table["t1", "tokens longest"]["low"]) == ("6", "")

    said = capsys.readouterr().out
    assert "sums t1 · 5 problems × 6 samples\n" in said
    estimate = found["pass_at_k"]["2"]
    assert (
        f"  pass@2           {estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in said
    )
    assert f"{times['timeout'] / 30:.2%} of the samples could not be verified" in said
    assert "60/60 samples" in said and f"correct {times['correct'] / 30:.1%}" in said
    assert f"{out}  samples, results.json, results.csv\n" in said
    unread = [row for row in wrong if row["extracted"] is None]
    assert said.count("no answer was found in (sums t1), for example:") == 1
    told = [f"  {row['problem']} #{row['sample']}: …{row['text']!r}" for row in unread]
    assert sum(said.count(line) for line in told) == 2 * 3  # of each setting three
    assert "going on" not in said and "sufficed" not in said


def majority(problem: int) -> float:
    """maj@6: the most frequent answer's share of being right."""
    votes = Counter(
        row["extracted"] for row in (expected(problem, n) for n in range(6)) if row["extracted"] is not None
    )
    leaders = [vote for vote, number in votes.items() if number == max(votes.values())]
    return (GOLDS[problem] in leaders) / len(leaders)


def test_an_evaluation_that_failed_goes_on_where_it_stood(
    tmp_path: Path,
    engines: tuple[list[StandIn], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is there is neither asked for again nor changed; more samples may be asked for."""
    servers, urls = engines
    judge = FakeVerifier.score

    async def fail(self: FakeVerifier, response: str, problem: Problem) -> Verification:
        if problem.id == "2":  # of the third batch
            raise RapoError("the verifier cannot start")
        return await judge(self, response, problem)

    monkeypatch.setattr(FakeVerifier, "score", fail)
    with pytest.raises(RapoError, match="cannot start"):
        run(request(tmp_path, urls))
    out = tmp_path / "out"
    before = stored(out)
    assert len(before) == 12 and Evaluation.open(out).manifest.finished is None
    for server in servers:
        server.asked.clear()
    monkeypatch.setattr(FakeVerifier, "score", judge)
    capsys.readouterr()
    run(request(tmp_path, urls))
    said = capsys.readouterr().out
    assert f"{out} has 12 of 30 samples; going on\n" in said and "\n30/30 samples" in said
    assert asked_for(servers) == 18
    assert stored(out) == [expected(problem, sample) for problem in range(5) for sample in range(6)]

    run(request(tmp_path, urls))
    assert asked_for(servers) == 18  # nothing is left
    assert "going on" not in capsys.readouterr().out
    assert Evaluation.open(out).manifest.finished is not None
    run(request(tmp_path, urls, samples=7, k=[7]))
    assert "has 30 of 35 samples" in capsys.readouterr().out
    assert asked_for(servers) == 23
    assert json.loads((out / "results.json").read_text())[0]["statistics"]["samples"] == [7, 7]

    tools = ["environment.use=tool_use", 'environment.tools=["calculator"]']
    with pytest.raises(RapoError, match=r"differs in the environment \(\{\}, now \{.*calculator"):
        run(request(tmp_path, urls, samples=7, k=[7], settings=tools))


def test_an_adaptive_budget_stops_at_the_last_correct_sample_that_it_needs(
    tmp_path: Path,
    engines: tuple[list[StandIn], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blocks of one sample in batches of one problem: no problem has more than those under way beyond it."""
    servers, urls = engines
    monkeypatch.setattr(plan, "BLOCK", 1)
    most, stop = 24, 2
    options = {"samples": most, "k": [1, 8], "stop_after_correct": stop}
    run(request(tmp_path, urls, **options))
    right = correct(most)
    needed = [int(np.argmax(line.cumsum() >= stop)) + 1 if line.sum() >= stop else most for line in right]
    assert min(needed) < most / 2
    drawn = Counter(row["problem"] for row in stored(tmp_path / "out"))
    for problem, number in enumerate(needed):
        assert number <= drawn[str(problem)] <= min(number + 2, most)
    total = drawn.total()
    said = capsys.readouterr().out
    saved = f"{1 - total / (5 * most):.0%} were saved"
    assert f"{total:,} of {5 * most:,} samples sufficed: {saved}\n" in said

    def unbiased(line: np.ndarray, number: int, k: int) -> float:
        """What the first samples before the one that stopped it say (Girshick, Mosteller and Savage)."""
        found = int(line[:number].sum())
        if found < stop:
            return float(pass_at_k(np.array([found]), most, k)[0])
        return float(pass_at_k(np.array([stop - 1]), number - 1, k)[0]) if number > k else 1.0

    [result] = json.loads((tmp_path / "out/results.json").read_text())
    for k in (1, 8):
        truth = np.mean([unbiased(line, number, k) for line, number in zip(right, needed, strict=True)])
        assert result["statistics"]["pass_at_k"][str(k)]["mean"] == pytest.approx(truth)
    assert result["statistics"]["mean"] == result["statistics"]["pass_at_k"]["1"]
    assert result["statistics"]["majority_at_k"] == {}
    for server in servers:
        server.asked.clear()
    run(request(tmp_path, urls, **options))  # what is on disk closes problems, too
    assert asked_for(servers) == 0


@pytest.mark.parametrize("exported", [True, False])
def test_a_model_that_was_exported_for_it_is_removed(
    tmp_path: Path,
    engines: tuple[list[StandIn], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    exported: bool,
) -> None:
    """And no other one; it is what engines are given."""
    servers, urls = engines
    model = shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "out/model-step_000003" if exported else model

    def open_model(given: Path, directory: Path) -> tuple[Path, ModelRecord]:
        assert (given, directory) == (model, tmp_path / "out")
        if exported:
            shutil.copytree(model, path)
        return path, ModelRecord(path=str(given), fingerprint="f")

    monkeypatch.setattr(command, "open_model", open_model)
    run(request(tmp_path, urls, model=model))
    loads = [b for s in servers for p, b in s.asked if p.startswith("/update_weights_from")]
    assert [body["model_path"] for body in loads] == [str(path)] * 2
    assert model.exists() and not list((tmp_path / "out").glob("model-*"))


@pytest.mark.parametrize(("longest", "refused"), [(256 - 35, False), (256 - 34, True)])
def test_responses_for_which_the_model_has_no_positions_are_refused(
    tmp_path: Path, engines: tuple[list[StandIn], list[str]], longest: int, refused: bool
) -> None:
    """Prompts are of 35 tokens."""
    servers, urls = engines
    options = request(tmp_path, urls, max_response_tokens=longest)
    if refused:
        with pytest.raises(RapoError, match=rf"= {longest} and .* 35 tokens .* 256 positions; .* most 221$"):
            run(options)
        assert asked_for(servers) == 0
    else:
        run(options)


def test_progress_tells_now_and_then_what_came_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    told = progress.SampleProgress(total=1200, present=1000)
    assert told.line() == "1,000/1,200 samples ·  · 0 tok/s · elapsed 0:00:00 · left 0:00:00"

    def sample(outcome: Outcome, tokens: int) -> Any:
        return type("Sample", (), {"outcome": outcome, "length": tokens})()

    clock.now += 9
    told.add([sample(Outcome.CORRECT, 300), sample(Outcome.WRONG, 600)] * 20, "sums t1")
    assert capsys.readouterr().err == ""
    clock.now += 1
    told.add([sample(Outcome.TIMEOUT, 200)] * 10, "sums t1")
    line = (
        "1,050/1,200 samples · correct 40.0%, wrong 40.0%, timeout 20.0% · 2,000 tok/s · elapsed 0:00:10 · "
        "left 0:00:30"
    )
    assert capsys.readouterr().err == f"sums t1 · {line}\n"
    clock.now += 5
    told.add([], "sums t1")
    assert capsys.readouterr().err == ""  # the last line was 5 s ago
    clock.now += 5
    told.add([], "sums t1")
    assert capsys.readouterr().err.startswith("sums t1 · 1,050/1,200 samples")
