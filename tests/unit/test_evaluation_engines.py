"""Evaluation whose engines fail: its samples are those without failures, by the recovery of training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.config import Evaluate, Rollout
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.config.evaluation import Setting
from megatron_rapo.config.verifiers import built_in
from megatron_rapo.data.prompts import LoadReport, Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import evaluator as evaluator_module
from megatron_rapo.evaluation import standalone
from megatron_rapo.evaluation.evaluator import Evaluator
from megatron_rapo.evaluation.held_out import HeldOut
from megatron_rapo.evaluation.manifest import SettingRecord
from megatron_rapo.evaluation.plan import Batch
from megatron_rapo.evaluation.sampler import Sampler
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling
from megatron_rapo.rollout.revival import Reviver
from tests.models import make_hf_model
from tests.runners import single_turns
from tests.stand_in import VOCAB, stand_ins

PROMPTS = tuple(Prompt(i, "?", (i, 7), "1") for i in range(6))
HELD_OUT = HeldOut("sums", PROMPTS, built_in("math"), LoadReport("sums.jsonl", 6, 6, (), (), (), 100, ()))
OTHER = HeldOut("more", PROMPTS[:2], built_in("math"), LoadReport("more.jsonl", 2, 2, (), (), (), 100, ()))
SAMPLES = 4
STEP = 3  # that the stand-ins have


@pytest.fixture(scope="module")
def reviver_of(tmp_path_factory):
    architecture = read_architecture(make_hf_model(tmp_path_factory.mktemp("model")))
    return lambda: Reviver(None, architecture, restarts=3, startup_timeout=20)


SETTING = Setting(temperature=0.6, top_p=0.95, top_k=5, max_response_tokens=4)
ALONE = SimpleNamespace(
    is_main=True,
    data_rank=0,
    layout=SimpleNamespace(data_parallel=1),
    share_from_heads=lambda mine: [mine],
    share_from_main=lambda mine: mine,
)


async def judge(text: str, problem: Problem) -> Verification:
    """Correct where the text is its problem's answer."""
    return Verification(Outcome.CORRECT if text == problem.answer else Outcome.WRONG, text or None)


def text_of(token_ids: Sequence[int]) -> str:
    """1 where the last token is odd."""
    return "1" if token_ids[-1] % 2 else ""


@contextmanager
def evaluator_of(
    directory, placement, pool, reviver=None, settings=(SETTING,), recover=None
) -> Iterator[Evaluator]:
    """One rank's; without a pool, of a rank that is no head."""
    rollout = Rollout(prompts_per_step=8, max_response_tokens=8)
    config = SimpleNamespace(
        run=SimpleNamespace(directory=directory, seed=11, steps=10, date="2026-11-28", code=[]),
        environment=EnvironmentOptions(),
        model=SimpleNamespace(path=directory),
        rollout=rollout,
        evaluate=Evaluate(samples=SAMPLES, k=[1, 2], batch=8),
        evaluation_settings=settings,
    )
    engines = SharedEngines(cast(Any, placement), pool, reviver)
    verifiers = {} if pool is None else {"math": SimpleNamespace(score=judge)}
    with nullcontext() if pool is None else single_turns(pool, text_of) as runner:
        collector = Collector(cast(Any, placement), engines, runner, None, recover)
        yield Evaluator(cast(Any, config), cast(Any, None), collector, cast(Any, verifiers))


@pytest.fixture(autouse=True)
def held_out(monkeypatch) -> None:
    monkeypatch.setattr(evaluator_module, "load_held_out", lambda *_: [HELD_OUT])


@contextmanager
def evaluation(directory, reviver=None, settings=(SETTING,), recover=None, request_timeout=60.0):
    """Stand-ins, their pool, and the evaluator of the one rank of a run."""
    with (
        engines_of(2) as (servers, urls),
        pool_of(urls, reviver, request_timeout) as pool,
        evaluator_of(directory, ALONE, pool, reviver, settings, recover) as evaluator,
    ):
        yield servers, pool, evaluator


@contextmanager
def engines_of(count):
    with stand_ins(count) as (servers, urls):
        for server in servers:
            server.version = str(STEP)
        yield servers, urls


def pool_of(urls, reviver=None, request_timeout=60.0) -> EnginePool:
    return EnginePool(
        urls,
        SGLangClient,
        vocab_size=VOCAB,
        prompts_per_request=1,
        request_timeout=request_timeout,
        reviver=reviver,
    )


def stored(directory) -> list[tuple[str, int, list[int]]]:
    """Each sample of the evaluation: problem, number, tokens."""
    samples = Evaluation.open(directory / "evaluations" / f"step_{STEP:06d}").samples(
        "sums", "t0.6-p0.95-k5-l4"
    )
    rows = samples.read(["problem", "sample", "token_ids"]).to_pylist()
    return sorted((row["problem"], row["sample"], list(row["token_ids"])) for row in rows)


def test_engines_are_asked_as_the_setting_says(tmp_path) -> None:
    with evaluation(tmp_path) as (servers, _, evaluator):
        evaluator.run(STEP)
        bodies = [body for server in servers for path, body in server.asked if path == "/generate"]
    assert sum(len(body["input_ids"]) for body in bodies) == len(PROMPTS) * SAMPLES
    for body in bodies:
        for params in body["sampling_params"]:
            asked = {name: params[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
            assert asked == {"temperature": 0.6, "top_p": 0.95, "top_k": 5, "max_new_tokens": 4}


def test_samples_are_the_same_when_all_engines_are_lost_on_the_way(tmp_path, reviver_of) -> None:
    with evaluation(tmp_path / "undisturbed") as (_, _, evaluator):
        undisturbed = evaluator.run(STEP)
    reviver, recovered = reviver_of(), []

    def recover(version: int) -> None:
        recovered.append(version)
        for server in servers:
            server.change = lambda answers: answers
        pool.update_weights(tmp_path, version)

    with evaluation(tmp_path / "disturbed", reviver, recover=recover) as (servers, pool, evaluator):
        for number, server in enumerate(servers):
            server.change = _fail_after(server, 2 + number)
        assert evaluator.run(STEP) == undisturbed
    assert recovered == [STEP]
    assert stored(tmp_path / "disturbed") == stored(tmp_path / "undisturbed")
    assert len(stored(tmp_path / "disturbed")) == len(PROMPTS) * SAMPLES


def test_an_engine_that_never_answers_is_named_and_others_draw_its_samples(tmp_path) -> None:
    with evaluation(tmp_path / "undisturbed") as (_, _, evaluator):
        undisturbed = evaluator.run(STEP)
    with evaluation(tmp_path / "disturbed", request_timeout=2.0) as (servers, pool, evaluator):
        silent = pool.urls[0]
        servers[0].fault, servers[0].faulty = "silent", "/generate"
        assert evaluator.run(STEP) == undisturbed
        servers[0].over.set()
        assert f"{silent}/generate was not answered within 2 s" in pool.failures[silent]
    assert stored(tmp_path / "disturbed") == stored(tmp_path / "undisturbed")


def test_engines_that_do_not_come_back_are_named(tmp_path) -> None:
    with evaluation(tmp_path) as (servers, pool, evaluator):
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


class Ranks:
    """What ranks that are threads share; of TP 2 and two replicas, ranks 0 and 2 are heads."""

    def __init__(self) -> None:
        self._barrier, self._box = threading.Barrier(4), {}

    def placement(self, rank: int) -> SimpleNamespace:
        def exchange(mine: object) -> dict[int, Any]:
            self._box[rank] = mine
            self._barrier.wait(timeout=20)
            shared = dict(self._box)
            self._barrier.wait(timeout=20)
            return shared

        return SimpleNamespace(
            is_main=rank == 0,
            data_rank=rank // 2,
            layout=SimpleNamespace(data_parallel=2),
            share_from_heads=lambda mine: [*map(exchange(mine).get, (0, 2))],
            share_from_main=lambda mine: exchange(mine)[0],
        )


def test_replicas_share_an_evaluation_between_them(tmp_path) -> None:
    """Every head samples its share of the problems; all ranks get the numbers of one rank alone."""
    with evaluation(tmp_path / "alone") as (_, _, evaluator):
        alone = evaluator.run(STEP)
    ranks = Ranks()
    with engines_of(2) as (servers, urls), pool_of(urls) as first, pool_of(urls) as second:
        pools = [first, None, second, None]

        def run(rank: int) -> Any:
            together = evaluator_of(tmp_path / "together", ranks.placement(rank), pools[rank])
            with together as evaluator:
                return evaluator.run(STEP)

        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(run, range(4)))
        bodies = [body for server in servers for path, body in server.asked if path == "/generate"]
    assert found == [alone] * 4
    assert 0 < alone["pass@1"] < 1
    assert sum(len(body["input_ids"]) for body in bodies) == len(PROMPTS) * SAMPLES
    assert stored(tmp_path / "together") == stored(tmp_path / "alone")


def test_metrics_are_named_by_data_set_and_setting_where_there_are_several(tmp_path, monkeypatch) -> None:
    with evaluation(tmp_path) as (_, _, evaluator):
        one = evaluator.run(STEP)
    k = {f"{kind}@{k}{end}" for kind in ("pass", "maj") for k in (1, 2) for end in ("", "_low", "_high")}
    assert one.keys() == k | {"response_tokens_mean", "truncated", "unknown"}
    for k in (1, 2):
        for kind in ("pass", "maj"):
            assert one[f"{kind}@{k}_low"] <= one[f"{kind}@{k}"] <= one[f"{kind}@{k}_high"]
    right = [rows[-1] % 2 for _, _, rows in stored(tmp_path)]
    assert one["pass@1"] == pytest.approx(sum(right) / len(right))
    assert one["response_tokens_mean"] == 2.0

    with evaluation(tmp_path, settings=(SETTING, Setting())) as (_, _, evaluator):
        several = evaluator.run(STEP)
    assert several.keys() == {f"sums/{s}/{name}" for s in (SETTING.name, "t1") for name in one}
    assert {name: several[f"sums/{SETTING.name}/{name}"] for name in one} == one
    monkeypatch.setattr(evaluator_module, "load_held_out", lambda *_: [HELD_OUT, OTHER])
    with evaluation(tmp_path) as (_, _, evaluator):
        several = evaluator.run(STEP)
    assert several.keys() == {f"{data}/{SETTING.name}/{name}" for data in ("sums", "more") for name in one}
    manifest = Evaluation.open(tmp_path / "evaluations" / f"step_{STEP:06d}").manifest
    assert (manifest.finished is not None, manifest.model.step, manifest.seed) == (True, STEP, 11)


class Episodes:
    """Notes what it is asked; prompt n's group waits for `go_on[n]`, or is as `fails[n]` says."""

    def __init__(self, batches: int) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.most = 0  # batches that were under way at a time
        self.go_on = [threading.Event() for _ in range(batches)]
        self.fails: dict[int, Any] = {}

    @contextmanager
    def begin(self, prompts: Sequence[Prompt], sampling: Sampling, judge: Any) -> Iterator[Any]:
        [prompt] = prompts
        self.begun.append(prompt.index)
        self.most = max(self.most, len(self.begun) - len(self.ended))

        def groups() -> list[Any]:
            assert self.go_on[prompt.index].wait(timeout=20)
            found = self.fails.get(prompt.index, prompt.index)
            if isinstance(found, Exception):
                raise found
            return [found]

        yield SimpleNamespace(groups=groups)
        self.ended.append(prompt.index)


POOL = SimpleNamespace(failures={"http://one": "gone"})


def drawing(episodes: Episodes) -> Iterator[tuple[int, Any]]:
    """(batch, its group) one after the other."""
    batches = [Batch((Prompt(i, "?", (i,), "1"),), 0, 1) for i in range(len(episodes.go_on))]
    sampler = Sampler(cast(Any, episodes), cast(Any, POOL), weight_version=STEP, seed=1)
    setting = SettingRecord(name="t1", temperature=1.0, max_response_tokens=4)
    generated = sampler.generated(batches, setting, judge)
    try:
        for batch, [found] in generated:
            yield batch.prompts[0].index, found
    finally:
        cast(Any, generated).close()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_engines_work_on_the_next_batches_while_one_is_judged() -> None:
    """Batches come in order, whichever is done first; no more than two are under way beside it."""
    episodes = Episodes(5)
    drawn = drawing(episodes)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(next, drawn)
        wait_until(lambda: episodes.begun == [0, 1, 2])
        episodes.go_on[1].set()
        time.sleep(0.05)
        assert not first.done()  # the second is, but it is not its turn
        episodes.go_on[0].set()
        assert first.result(timeout=20) == (0, 0)
        assert (episodes.begun, episodes.ended) == ([0, 1, 2], [0])
    for event in episodes.go_on:
        event.set()
    assert list(drawn) == [(n, n) for n in range(1, 5)]
    assert episodes.begun == episodes.ended == list(range(5))
    assert episodes.most == 3


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (RapoError("refused"), RapoError, "^refused$"),
        (None, TooFewEngines, r"too few engines .* to go on:\n  http://one: gone$"),  # a group left open
    ],
)
def test_after_an_error_what_is_under_way_is_given_up_not_waited_for(
    found: Any, error: type[RapoError], message: str
) -> None:
    """It has ended before engines may get weights anew; and no more is asked for than had been planned."""
    episodes = Episodes(5)
    episodes.fails[0] = found
    episodes.go_on[0].set()
    with pytest.raises(error, match=message) as failed:
        next(drawing(episodes))
    assert type(failed.value) is error
    assert episodes.begun == [0, 1, 2]
    assert sorted(episodes.ended) == [0, 1, 2]


@pytest.mark.parametrize("taken", [1, 2])
def test_whoever_stops_drawing_leaves_nothing_under_way(taken: int) -> None:
    episodes = Episodes(5)
    for event in episodes.go_on:
        event.set()
    drawn = drawing(episodes)
    assert [next(drawn)[0] for _ in range(taken)] == list(range(taken))
    cast(Any, drawn).close()
    assert sorted(episodes.ended) == episodes.begun == list(range(taken + 2))


def _fail_after(server, count: int):
    def change(answers):
        if sum(path == "/generate" for path, _ in server.asked) > count:
            raise ConnectionAbortedError  # the request ends without an answer
        return answers

    return change
