"""Rollouts that lose too many engines: what is missing is sampled once the engines are back."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.revival import Reviver
from tests.models import make_hf_model
from tests.rounds import collect
from tests.runners import single_turns
from tests.stand_in import VOCAB, stand_ins

PROMPTS = [Prompt(10 + i, "", (i, 7), "", draw=i) for i in range(8)]


@pytest.fixture(scope="module")
def reviver_of(tmp_path_factory):
    architecture = read_architecture(make_hf_model(tmp_path_factory.mktemp("model")))
    return lambda: Reviver(None, architecture, restarts=3, startup_timeout=20)


def make_collector(pool, runner, reviver=None, recover=None):
    """Of the one rank of a run."""
    placement = SimpleNamespace(
        is_main=True,
        is_head=True,
        data_rank=0,
        layout=SimpleNamespace(data_parallel=1),
        share_from_heads=lambda mine: [mine],
        share_from_main=lambda mine: mine,
    )
    engines = SharedEngines(cast(Any, placement), pool, reviver)
    return Collector(cast(Any, placement), engines, runner, judge, recover)


async def judge(answer, problem):
    return Verification(Outcome.CORRECT)


def make_pool(urls, reviver=None):
    return EnginePool(
        urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60, reviver=reviver
    )


def sample(collector, phase=lambda name: nullcontext()):
    sampled = collect(collector, PROMPTS, chosen=Sampling(1.0, 2, 8), weight_version=3, seed=5, phase=phase)
    return [
        (group.problem, [one.episode.sequences[0].token_ids.tolist() for one in group.episodes])
        for _, group in sorted(sampled.whole.items())
    ]


def test_what_is_missing_is_sampled_once_engines_are_back(reviver_of, tmp_path):
    with stand_ins(1) as (_, urls), make_pool(urls) as pool, single_turns(pool) as runner:
        undisturbed = sample(make_collector(pool, runner))
    assert [problem for problem, _ in undisturbed] == [prompt.problem for prompt in PROMPTS]
    assert [[len(tokens) for tokens in responses] for _, responses in undisturbed] == [[4, 4]] * 8

    reviver = reviver_of()
    with stand_ins(2) as (servers, urls), make_pool(urls, reviver) as pool, single_turns(pool) as runner:
        recovered = []
        phases = []

        @contextmanager
        def phase(name):
            phases.append(name)
            yield
            phases.pop()

        def fail_after(server, count):
            def change(answers):
                if sum(path == "/generate" for path, _ in server.asked) > count:
                    raise ConnectionAbortedError  # the request ends without an answer
                return answers

            server.change = change

        def recover(version):
            assert phases == ["publish"], "what watches for hangs knows that engines may take their time"
            recovered.append(version)
            for server in servers:
                fail_after(server, 10**6)
            collector.engines.revive()
            pool.update_weights(tmp_path, version)

        collector = make_collector(pool, runner, reviver, recover)
        fail_after(servers[0], 1)
        fail_after(servers[1], 2)
        assert sample(collector, phase) == undisturbed
        assert recovered == [3]
        assert collector.engines.metrics()["engines/returned"] >= 1


def test_without_a_way_back_the_error_names_each_engine():
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool, single_turns(pool) as runner:
        for server in servers:
            server.answers["/generate"] = (500, b"out of memory")
        with pytest.raises(RapoError, match="too few engines are left") as failed:
            sample(make_collector(pool, runner))
        assert all(url in str(failed.value) for url in urls)
        assert str(failed.value).count("out of memory") == 2
