"""The gateway before real engines: what passes is theirs, token for token, whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.agents.plan import Plan
from megatron_rapo.agents.processes import AgentProcesses
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.environments.program import Program
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.episode.environment import Environment
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.gateway.server import Gateway
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling
from tests.leftovers import nothing_left
from tests.models import SHAPE, make_hf_model, make_tokenizer

VOCABULARY = SHAPE["vocab_size"]
TESTS = Path(__file__).parents[1]
PROMPTS = [Prompt(number, "?", (2 + number, 7, 9), str(number), draw=number) for number in range(4)]
SAMPLING = Sampling(2, 40, temperature=0.7, weight_version=1, seed=3)


async def judge(answer: str, problem: Problem) -> Verification:
    return Verification(Outcome.WRONG)


class Engines:
    """Two embedded servers, and a pool of them."""

    def __init__(self, pool: EnginePool, model: Path) -> None:
        self.pool, self.model = pool, model

    def play(self, count: int = 4, most: int = 6, sampling: Sampling = SAMPLING) -> list[TokenSequence]:
        """The sequences of a program's episodes, of so many turns."""
        plan = Plan(
            "agents:turns", Path(sys.executable), (TESTS,), json.dumps({"count": count, "most": most})
        )
        return self.run(
            Program(AgentProcesses(plan, 2), Gateway("policy", VOCABULARY, 4), self.model, 4), sampling
        )

    def run(self, environment: Environment, sampling: Sampling = SAMPLING) -> list[TokenSequence]:
        options = EnvironmentOptions(use="program", options={}, max_turns=4)
        episodes = EpisodeRunner(environment, options, make_tokenizer(), 1.0, VOCABULARY)
        with Runner(episodes, self.pool) as runner:
            groups = runner.run(PROMPTS, sampling, judge)
        assert all(one.reward is not None for group in groups if group for one in group.episodes)
        return [one.episode.sequences[0] for group in groups if group for one in group.episodes]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("engines")
    model = make_hf_model(folder / "policy")
    launcher = EmbeddedLauncher(model, device="cpu", dtype="float32", threads=1)
    with (
        nothing_left(),
        LocalServers(launcher, EmbeddedClient, count=2, log_directory=folder, startup_timeout=300) as servers,
        EnginePool(
            servers.urls,
            EmbeddedClient,
            vocab_size=VOCABULARY,
            prompts_per_request=2,
            request_timeout=120,
            diagnose=servers.diagnose,
        ) as pool,
    ):
        pool.wait_until_healthy(300)
        pool.update_weights(model, 1)
        yield Engines(pool, model)


def same(one: Sequence[TokenSequence], other: Sequence[TokenSequence]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        a.token_ids.tolist() == b.token_ids.tolist()
        and a.sampled.tolist() == b.sampled.tolist()
        and a.log_probs[a.sampled].tolist() == b.log_probs[b.sampled].tolist()
        for a, b in zip(one, other, strict=True)
    )


def test_what_passed_is_what_the_model_says_and_repeats_and_outlives_an_engine(engines: Engines) -> None:
    sequences = engines.play()
    assert len(sequences) == 8 and {tuple(np.unique(s.versions)) for s in sequences} == {(-1, 1)}
    assert all(np.count_nonzero(np.diff(s.sampled.astype(int)) == 1) >= 1 for s in sequences)
    reference = AutoModelForCausalLM.from_pretrained(engines.model, dtype=torch.float32)
    for sequence in sequences:
        with torch.inference_mode():
            rows = reference(torch.from_numpy(sequence.token_ids)[None].long()).logits[0, :-1]
        told = (rows / 0.7).log_softmax(-1).gather(-1, torch.from_numpy(sequence.token_ids)[1:, None].long())
        sampled = sequence.sampled[1:]
        np.testing.assert_allclose(sequence.log_probs[1:][sampled], told[:, 0].numpy()[sampled], atol=1e-4)

    assert same(engines.play(), sequences), "the same seeds draw the same"
    assert not same(engines.play(sampling=replace(SAMPLING, seed=4)), sequences)

    one_turn = engines.play(count=1, most=SAMPLING.max_response_tokens)
    assert same(one_turn, engines.run(SingleTurn())), "a turn by HTTP is a turn"

    first, _ = engines.pool.urls
    port = int(first.rsplit(":", 1)[1])
    [victim] = [
        process
        for process in psutil.Process().children()
        if any(connection.laddr.port == port for connection in process.net_connections())
    ]
    threading.Timer(0.4, os.kill, (victim.pid, signal.SIGKILL)).start()
    assert same(engines.play(), sequences), "and so where an engine is killed meanwhile"
    engines.play()  # so that it is asked, should it have been killed too late
    assert first in engines.pool.failures
    with pytest.raises(httpx.ConnectError):
        httpx.get(first, timeout=5)
