"""Evaluation whose engines fail: its samples are those without failures, by the recovery of training."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.config import Evaluate, Rollout
from megatron_rapo.config.evaluation import Setting
from megatron_rapo.data.prompts import LoadReport, Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate import evaluator as evaluator_module
from megatron_rapo.evaluate import standalone
from megatron_rapo.evaluate.evaluator import Evaluator
from megatron_rapo.evaluate.held_out import HeldOut
from megatron_rapo.evaluate.sampler import TooFewEngines
from megatron_rapo.evaluate.store import Evaluation
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.model.architecture import read_architecture
from megatron_rapo.reward.outcome import Outcome, Verification
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.revival import Reviver
from tests.models import make_hf_model
from tests.stand_in import VOCAB, stand_ins

PROMPTS = tuple(Prompt(i, "?", (i, 7), "1") for i in range(6))
HELD_OUT = HeldOut("sums", PROMPTS, "math", LoadReport("sums.jsonl", 6, 6, (), (), (), 100, ()))
SAMPLES = 4
STEP = 3  # that the stand-ins have


@pytest.fixture(scope="module")
def reviver_of(tmp_path_factory):
    architecture = read_architecture(make_hf_model(tmp_path_factory.mktemp("model")))
    return lambda: Reviver(None, architecture, restarts=3, startup_timeout=20)


@contextmanager
def evaluation(directory, monkeypatch, reviver=None, **options):
    """Stand-ins, their pool, and the evaluator of the one rank of a run."""
    placement = SimpleNamespace(
        is_main=True,
        data_rank=0,
        layout=SimpleNamespace(data_parallel=1),
        share_from_heads=lambda mine: [mine],
        share_from_main=lambda mine: mine,
    )
    rollout = Rollout(prompts_per_step=8, max_response_tokens=8)
    evaluate = Evaluate(samples=SAMPLES, k=[1], batch=8)
    settings = [Setting(temperature=0.6, top_p=0.95, top_k=5, max_response_tokens=4)]
    run = SimpleNamespace(directory=directory, seed=11, steps=10, date="2026-11-28")
    model = SimpleNamespace(path=directory)
    config = SimpleNamespace(
        run=run, model=model, rollout=rollout, evaluate=evaluate, evaluation_settings=settings
    )
    monkeypatch.setattr(evaluator_module, "load_held_out", lambda *_: [HELD_OUT])
    verifier = SimpleNamespace(verify=lambda pairs: [Verification(Outcome.CORRECT, "1") for _ in pairs])
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["1"] * len(ids))
    defaults = {"vocab_size": VOCAB, "prompts_per_request": 1, "request_timeout": 60.0, "reviver": reviver}
    with stand_ins(2) as (servers, urls), EnginePool(urls, **{**defaults, **options}) as pool:
        for server in servers:
            server.version = str(STEP)
        engines = SharedEngines(cast(Any, placement), pool, reviver)
        collector = Collector(rollout, cast(Any, placement), cast(Any, tokenizer), engines, None)
        yield (
            servers,
            pool,
            Evaluator(cast(Any, config), cast(Any, tokenizer), collector, {"math": cast(Any, verifier)}),
        )


def stored(directory) -> list[tuple[str, int, list[int]]]:
    """Each sample of the evaluation: problem, number, tokens."""
    samples = Evaluation.open(directory / "evaluations" / f"step_{STEP:06d}").samples(
        "sums", "t0.6-p0.95-k5-l4"
    )
    rows = samples.read(["problem", "sample", "token_ids"]).to_pylist()
    return sorted((row["problem"], row["sample"], list(row["token_ids"])) for row in rows)


def test_engines_are_asked_as_the_setting_says(tmp_path, monkeypatch) -> None:
    with evaluation(tmp_path, monkeypatch) as (servers, _, evaluator):
        evaluator.run(STEP)
        bodies = [body for server in servers for path, body in server.asked if path == "/generate"]
    assert sum(len(body["input_ids"]) for body in bodies) == len(PROMPTS) * SAMPLES
    for body in bodies:
        for params in body["sampling_params"]:
            asked = {name: params[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
            assert asked == {"temperature": 0.6, "top_p": 0.95, "top_k": 5, "max_new_tokens": 4}


def test_samples_are_the_same_when_all_engines_are_lost_on_the_way(tmp_path, monkeypatch, reviver_of) -> None:
    with evaluation(tmp_path / "undisturbed", monkeypatch) as (_, _, evaluator):
        undisturbed = evaluator.run(STEP)
    reviver, recovered = reviver_of(), []
    with evaluation(tmp_path / "disturbed", monkeypatch, reviver) as (servers, pool, evaluator):
        for number, server in enumerate(servers):
            server.change = _fail_after(server, 2 + number)

        def recover(version: int) -> None:
            recovered.append(version)
            for server in servers:
                server.change = lambda answers: answers
            pool.update_weights(tmp_path, version)

        evaluator.collector.recover = recover
        assert evaluator.run(STEP) == undisturbed
    assert recovered == [STEP]
    assert stored(tmp_path / "disturbed") == stored(tmp_path / "undisturbed")
    assert len(stored(tmp_path / "disturbed")) == len(PROMPTS) * SAMPLES


def test_engines_that_do_not_come_back_are_named(tmp_path, monkeypatch) -> None:
    with evaluation(tmp_path, monkeypatch) as (servers, pool, evaluator):
        for server in servers:
            server.answers["/generate"] = (500, b"out of memory")
        with pytest.raises(RapoError, match="too few engines are left to sample from") as failed:
            evaluator.run(STEP)
        assert all(url in str(failed.value) for url in pool.failures)
        assert str(failed.value).count("out of memory") == 2


def test_an_evaluation_of_its_own_brings_engines_back_and_draws_what_is_missing(tmp_path) -> None:
    sample = SimpleNamespace(problem="0", sample=0)
    drawn: list[list[int]] = []
    loaded: list[tuple[object, int]] = []

    class OnceTooFew:
        pool = SimpleNamespace(update_weights=lambda path, version: loaded.append((path, version)))

        def draw(self, batches, *_):
            drawn.append(list(batches))
            yield [sample]
            if not loaded:
                raise TooFewEngines("too few")

    taken: list[object] = []
    work = SimpleNamespace(
        batches=lambda: [len(taken)], setting=None, store=None, take=taken.append, held_out=HELD_OUT
    )
    work.setting = SimpleNamespace(name="t1")
    progress = SimpleNamespace(add=lambda *_: None)
    standalone._draw(*(cast(Any, part) for part in (work, OnceTooFew(), None, progress, tmp_path)))
    assert loaded == [(tmp_path, standalone.WEIGHT_VERSION)]
    assert drawn == [[0], [1]]  # planned anew, from what is there


def _fail_after(server, count: int):
    def change(answers):
        if sum(path == "/generate" for path, _ in server.asked) > count:
            raise ConnectionAbortedError  # the request ends without an answer
        return answers

    return change
