"""Engines as a run opens them: what its options say reaches the pool of each head, and the publisher."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.config import RunConfig, validate
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import RapoError
from megatron_rapo.experience import engines as opening
from megatron_rapo.experience.engines import open_engines, open_own_engines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.publish import opening as publishing
from tests.models import make_hf_model
from tests.stand_in import stand_ins

SOON = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def architecture(model):
    return read_architecture(model)


def configuration(model, tmp_path, *, weights: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    values = {
        "run": {"directory": str(tmp_path / "run"), "steps": 3},
        "model": {"path": str(model)},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 64, **rollout},
        "weights": weights or {},
    }
    return validate(values, source="test")


def given(urls: list[str]) -> dict[str, Any]:
    return {"kind": "sglang", "urls": urls}


def place(*, is_main: bool, is_head: bool, told: Any = None) -> Any:
    """A rank; `told` is what the main rank shares with another one."""
    return cast(
        Any,
        SimpleNamespace(
            is_main=is_main,
            is_head=is_head,
            data_rank=0 if is_main else 1,
            share_from_main=lambda mine: mine if is_main else told,
        ),
    )


def test_an_engine_that_falls_silent_is_out_after_three_intervals(model, architecture, tmp_path):
    with stand_ins(2) as (servers, urls):
        config = configuration(model, tmp_path, engine=given(urls), health_interval_s=0.3)
        with open_own_engines(config, architecture) as pool:
            began = time.monotonic()
            servers[0].go_on.clear()
            while len(pool.urls) == 2:
                assert time.monotonic() - began < SOON
                time.sleep(0.02)
            assert time.monotonic() - began > 0.6
            assert "it was silent 3 times in a row" in pool.failures[urls[0]]


def test_options_reach_the_pool(model, architecture, tmp_path, monkeypatch):
    made: dict[str, Any] = {}

    class Noted:
        def __init__(self, urls, connect, **options):
            made.update(options, urls=urls, connect=connect)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def wait_until_healthy(self, timeout):
            made["healthy within"] = timeout

    monkeypatch.setattr(opening, "EnginePool", Noted)
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    options = {
        "engine": given(urls),
        "prompts_per_request": 3,
        "request_timeout_s": 77.0,
        "requests_per_engine": 5,
        "minimum_engines": 2,
        "health_interval_s": 9.0,
        "startup_timeout_s": 66.0,
        "restarts": 1,
    }
    with open_own_engines(configuration(model, tmp_path, **options), architecture):
        pass
    reviver = made.pop("reviver")
    assert (reviver._restarts, reviver._startup_timeout) == (1, 66.0)
    assert made == {
        "urls": urls,
        "connect": SGLangClient,
        "vocab_size": architecture.vocabulary,
        "prompts_per_request": 3,
        "request_timeout": 77.0,
        "head": 0,
        "requests_per_engine": 5,
        "minimum_engines": 2,
        "health_interval": 9.0,
        "diagnose": None,
        "router": None,
        "note": None,
        "healthy within": 66.0,
    }


def test_each_head_has_a_pool_and_only_the_main_rank_brings_engines_back(model, architecture, tmp_path):
    with stand_ins(2) as (_, urls):
        config = configuration(model, tmp_path, engine=given(urls))
        for is_main, is_head in [(True, True), (False, True), (False, False)]:
            rank = place(is_main=is_main, is_head=is_head, told=urls)
            with open_engines(config, rank, architecture) as shared:
                assert (shared.pool is not None) == is_head
                assert (shared._reviver is not None) == is_main
                if shared.pool is not None:
                    assert shared.pool.urls == urls


def test_a_server_named_twice_is_refused(model, architecture, tmp_path):
    urls = ["http://127.0.0.1:7000", "http://localhost:7000"]
    with (
        pytest.raises(RapoError, match="7000"),
        open_own_engines(configuration(model, tmp_path, engine=given(urls)), architecture),
    ):
        pass


@pytest.mark.parametrize("colocated", [False, True])
def test_colocated_engines_are_offloaded_while_the_trainer_works(colocated, model, architecture, tmp_path):
    with stand_ins(1) as ([server], urls):
        config = configuration(model, tmp_path, engine=given(urls))
        rollout = config.rollout.model_copy(update={"colocated": colocated})
        config = config.model_copy(update={"rollout": rollout})
        here = place(is_main=True, is_head=True)
        with open_engines(config, here, architecture) as shared, shared.offloaded():
            pass
        asked = [path for path, _ in server.asked if path.endswith("_memory_occupation")]
        expected = ["/release_memory_occupation", "/resume_memory_occupation"]
        assert asked == (expected if colocated else [])


@pytest.mark.parametrize(
    ("weights", "dtype", "tolerance"),
    [({}, "bfloat16", 0.05), ({}, "float32", 1e-3), ({"probe_tolerance": 0.2}, "bfloat16", 0.2)],
)
def test_the_publisher_has_the_tolerance_of_the_options(
    weights, dtype, tolerance, model, tmp_path, monkeypatch
):
    """By the type's own where none is set; none for the doctor, who judges himself and records nothing."""
    config = configuration(model, tmp_path, weights=weights)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    config.run.directory.mkdir()
    monkeypatch.setattr(publishing, "open_transport", lambda *_: None)
    policy = SimpleNamespace(chunks=[], architecture=None)
    engines = SimpleNamespace(pool=None)
    prompts = SimpleNamespace(prompts=[Prompt(n, "", (1,), "") for n in range(5)])
    rank = place(is_main=True, is_head=True)

    def opened(**options: Any) -> Any:
        return publishing.open_publisher(
            config, cast(Any, policy), rank, cast(Any, engines), cast(Any, prompts), **options
        )

    publisher = opened()
    assert (publisher._tolerance, publisher._dtype) == (tolerance, dtype)
    assert publisher._record is not None
    assert publisher._prompts == prompts.prompts[:2]
    assert (opened(trusting=True)._tolerance, opened(trusting=True)._record) == (None, None)
