"""The pool, against a stand-in server that records what it is asked and answers as it is told."""

import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.identity import check_distinct
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Ask, Request, Sampling, check_tokens, name_of, sample_seed
from tests.pools import generate_groups
from tests.stand_in import VOCAB, stand_ins


@pytest.fixture
def engine():
    """One stand-in and a pool of it."""
    with stand_ins(1) as ([stand_in], urls), make_pool(urls) as pool:
        yield stand_in, pool


def make_pool(urls, **options):
    defaults = {"vocab_size": VOCAB, "prompts_per_request": 2, "request_timeout": 60}
    return EnginePool(urls, SGLangClient, **{**defaults, **options})


def make_prompts(count):
    return [Prompt(index=100 + i, question="", token_ids=(i, 7), answer="") for i in range(count)]


def generate(pool, prompts=None, **options):
    defaults = {
        "responses_per_prompt": 3,
        "max_response_tokens": 8,
        "temperature": 0.5,
        "weight_version": 3,
        "seed": 11,
    }
    return generate_groups(pool, make_prompts(1) if prompts is None else prompts, **{**defaults, **options})


def test_groups_come_in_prompt_order_from_all_servers():
    prompts = make_prompts(7)
    with stand_ins(3) as (servers, urls), make_pool(urls) as pool:
        servers[0].go_on.clear()  # the first request is answered last
        threading.Timer(0.3, servers[0].go_on.set).start()
        groups = generate(pool, prompts)
        assert [len(server.asked) for server in servers] == [2, 1, 1]
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert len(group.responses) == 3
        for number, response in enumerate(group.responses):
            expected = [group.prompt.token_ids[0], sample_seed(11, group.prompt, number) % VOCAB]
            assert response.token_ids.tolist() == expected
            assert response.log_probs.tolist() == [-0.25, -0.5]
            assert (response.token_ids.dtype, response.log_probs.dtype) == (np.int32, np.float32)
            assert (response.weight_version, response.finish_reason) == (3, "stop")


def test_requests_run_at_the_same_time():
    with stand_ins(1) as ([server], urls), make_pool(urls, prompts_per_request=1, request_timeout=60) as pool:
        server.together = threading.Barrier(6)
        assert len(generate(pool, make_prompts(6))) == 6


def test_a_request_repeats_its_prompts_and_asks_for_full_support(engine):
    stand_in, pool = engine
    generate(pool, make_prompts(2))
    [(path, body)] = stand_in.asked
    assert path == "/generate"
    assert body["input_ids"] == [[0, 7]] * 3 + [[1, 7]] * 3
    assert body["return_logprob"] is True
    seeds = [params.pop("sampling_seed") for params in body["sampling_params"]]
    assert len(set(seeds)) == 6
    assert (
        body["sampling_params"] == [{"max_new_tokens": 8, "temperature": 0.5, "top_p": 1.0, "top_k": -1}] * 6
    )


def test_responses_do_not_depend_on_how_prompts_are_spread():
    prompts = make_prompts(9)
    outcomes = []
    for servers, size, heads in [(1, 9, 1), (2, 2, 1), (2, 1, 3)]:
        groups = {}
        with stand_ins(servers) as (_, urls):
            for head in range(heads):
                with make_pool(urls, prompts_per_request=size, head=head) as pool:
                    for group in generate(pool, prompts[head::heads]):
                        groups[group.prompt.index] = [r.token_ids.tolist() for r in group.responses]
        outcomes.append(groups)
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_heads_begin_at_different_servers():
    with stand_ins(2) as (servers, urls):
        for head in range(2):
            with make_pool(urls, head=head) as pool:
                generate(pool)
        assert [len(server.asked) for server in servers] == [1, 1]


def test_seeds_differ_by_step_prompt_draw_and_response_and_fit_31_bits():
    prompts = [Prompt(index, "", (1,), "", draw) for index in range(10) for draw in range(5)]
    seeds = {sample_seed(s, prompt, r) for s in range(10) for prompt in prompts for r in range(16)}
    assert len(seeds) >= 7998  # 8,000 draws of 2³¹ collide 0.015 times on average
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    # The same in every version and on every machine.
    assert sample_seed(1, Prompt(23, "", (1,), "", 5), 4) == 1105569562


def test_a_prompt_that_a_batch_holds_twice_is_sampled_anew(engine):
    stand_in, pool = engine
    generate(pool, [Prompt(7, "", (1,), "", draw) for draw in (3, 8)])
    [(_, body)] = stand_in.asked
    assert len({params["sampling_seed"] for params in body["sampling_params"]}) == 6


def test_a_group_that_is_gone_on_with_is_the_one_that_was_asked_for_at_once(engine):
    stand_in, pool = engine
    generate(pool, make_prompts(1), responses_per_prompt=5, top_p=0.9, top_k=7)
    generate(pool, make_prompts(1), responses_per_prompt=2)
    generate(pool, make_prompts(1), responses_per_prompt=3, first_response=2)
    whole, start, rest = (body["sampling_params"] for _, body in stand_in.asked)
    assert [p["sampling_seed"] for p in start + rest] == [p["sampling_seed"] for p in whole]
    assert {(p["top_p"], p["top_k"]) for p in whole} == {(0.9, 7)}
    assert {(p["top_p"], p["top_k"]) for p in rest} == {(1.0, -1)}


@pytest.mark.parametrize(
    ("token_ids", "named"), [((1, 50), "token id 50"), ((-1, 2), "token id -1"), ((), "is empty")]
)
def test_a_prompt_outside_the_vocabulary_is_not_sent(engine, token_ids, named):
    stand_in, pool = engine
    with pytest.raises(RapoError, match=f"prompt 9 .*{named}"):
        generate(pool, [*make_prompts(1), Prompt(9, "", token_ids, "")])
    assert stand_in.asked == []


def test_a_turn_outside_the_vocabulary_is_named_with_its_prompt():
    prompt, sampling = Prompt(9, "", (1,), ""), Sampling(1, 8, 1.0, weight_version=3, seed=0)
    asks = [Ask(name_of(prompt, turn), (1, 50 * turn), 0, 8) for turn in range(2)]
    check_tokens(Request(tuple(asks[:1]), sampling), VOCAB)
    with pytest.raises(RapoError, match=r"^prompt 9, turn 1, has token id 50, but"):
        check_tokens(Request(tuple(asks), sampling), VOCAB)


def one(change):
    """Applies a change to the last of the answers."""

    def apply(answers):
        change(answers[-1], answers[-1]["meta_info"])
        return answers

    return apply


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a, m: m["output_token_logprobs"].pop(), "2 tokens and 1 log-probs"),
        (lambda a, m: m["output_token_logprobs"].reverse(), "not of the same tokens"),
        (lambda a, m: m["output_token_logprobs"][0].__setitem__(0, float("nan")), "not finite"),
        (lambda a, m: m["output_token_logprobs"][0].__setitem__(0, float("-inf")), "not finite"),
        (lambda a, m: m["output_token_logprobs"][0].__setitem__(0, None), "not finite"),
        (
            lambda a, m: (a.update(output_ids=[50]), m.update(output_token_logprobs=[[-1, 50, None]])),
            "from 50 to 50, but the policy's vocabulary has 50",
        ),
        (
            lambda a, m: (a.update(output_ids=[-1]), m.update(output_token_logprobs=[[-1, -1, None]])),
            "from -1 to -1",
        ),
        (lambda a, m: (a.update(output_ids=[]), m.update(output_token_logprobs=[])), "sent 0 tokens"),
        (
            lambda a, m: (a.update(output_ids=[1] * 9), m.update(output_token_logprobs=[[-1, 1, None]] * 9)),
            "sent 9 tokens where 1 to 8",
        ),
    ],
)
def test_a_response_that_cannot_be_trained_on_is_refused(engine, change, named):
    stand_in, pool = engine
    generate(pool)
    stand_in.change = one(change)
    with pytest.raises(RapoError, match=r"http://127\.0\.0\.1") as refused:
        generate(pool)
    assert named in str(refused.value)


def test_a_truncated_response_is_kept_as_such(engine):
    stand_in, pool = engine
    stand_in.change = one(lambda a, m: m.update(finish_reason={"type": "length", "length": 8}))
    [group] = generate(pool)
    assert [response.finish_reason == "length" for response in group.responses] == [False, False, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a, m: m.update(weight_version="4"), "version '4' in place of 3"),
        (lambda a, m: m.update(weight_version="default"), "version 'default' in place of 3"),
        (
            lambda a, m: m.update(weight_versions=[{"version": "3"}, {"version": "2"}]),
            "version '2' in place of 3",
        ),
        (lambda a, m: m.update(finish_reason={"type": "abort", "message": "gone"}), "gone"),
        (lambda a, m: m.pop("output_token_logprobs"), "lacks what SGLang sends"),
        (lambda a, m: m.pop("weight_version"), "lacks what SGLang sends"),
        (lambda a, m: a.pop("output_ids"), "lacks what SGLang sends"),
        (lambda a, m: a.update(meta_info=None), "lacks what SGLang sends"),
    ],
)
def test_an_engine_whose_responses_are_of_other_weights_or_none_is_out(engine, change, named):
    stand_in, pool = engine
    stand_in.change = one(change)
    assert generate(pool) == [None]
    assert_out(pool, named)


def assert_out(pool, *named):
    """The pool's one engine is out, for a reason that names all this."""
    assert pool.urls == []
    [(url, reason)] = pool.failures.items()
    assert all(text in reason for text in [url, *named])
    with pytest.raises(RapoError, match="0 of 1 engines are left") as too_few:
        pool.revive()
    assert reason in str(too_few.value)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ((500, b'{"error": "out of memory"}'), ["status 500", "out of memory"]),
        ((200, b"<html>"), ["not JSON", "<html>"]),
        ((200, b'{"text": ""}'), ["not a list of 3 responses"]),
        ((200, b"[]"), ["not a list of 3 responses"]),
    ],
)
def test_an_engine_with_an_unusable_answer_is_out(engine, answer, named):
    stand_in, pool = engine
    stand_in.answers["/generate"] = answer
    assert generate(pool) == [None]
    assert_out(pool, "/generate", *named)


@pytest.mark.parametrize(
    ("answer", "named"), [((401, b""), "RAPO_ENGINE_API_KEY"), ((400, b'{"error": "too long"}'), "too long")]
)
def test_a_refusal_ends_the_round_at_once_and_keeps_the_engine(answer, named):
    with stand_ins(2) as (servers, urls), make_pool(urls, prompts_per_request=1) as pool:
        servers[0].answers["/generate"] = answer
        servers[1].go_on.clear()
        started = time.monotonic()
        with pytest.raises(RapoError, match=named):
            generate(pool, make_prompts(2))
        assert time.monotonic() - started < 20
        assert pool.urls == urls


def test_a_lost_connection_is_named_with_its_reason():
    with stand_ins(1) as ([server], urls):
        server.fault = "closed"
        with make_pool(urls) as pool:
            generate(pool)
            assert_out(pool, "/generate", "connection was lost")
        with make_pool(urls, diagnose=lambda url: f"{url} ran out of memory") as pool:
            generate(pool)
            assert_out(pool, "ran out of memory")


def test_a_server_that_is_not_there_is_named():
    with stand_ins(1) as (_, urls):
        pass
    with make_pool(urls) as pool:
        generate(pool)
        assert_out(pool, "cannot connect", "check that the server runs")


def test_an_update_reaches_all_servers_in_the_safe_order(tmp_path):
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        pool.update_weights(tmp_path, 12)
        for server in servers:
            assert [path for path, _ in server.asked] == [
                "/pause_generation",
                "/flush_cache",
                "/update_weights_from_disk",
                "/continue_generation",
                "/model_info",
            ]
            assert server.asked[0][1] == {"mode": "retract"}
            assert server.asked[2][1] == {
                "model_path": str(tmp_path),
                "weight_version": "12",
                "flush_cache": False,
                "abort_all_requests": False,
            }
        assert generate(pool, weight_version=12)


def test_the_path_of_an_update_is_absolute(engine, monkeypatch, tmp_path):
    stand_in, pool = engine
    monkeypatch.chdir(tmp_path)
    pool.update_weights(Path("weights"), 1)
    assert stand_in.asked[2][1]["model_path"] == str(tmp_path / "weights")


@pytest.mark.parametrize(
    ("path", "answer", "named"),
    [
        ("/flush_cache", (400, b"busy"), "busy"),
        ("/update_weights_from_disk", (400, b'{"success": false, "message": "no shape"}'), "no shape"),
        ("/update_weights_from_disk", (200, b'{"success": false, "message": "no shape"}'), "no shape"),
        ("/model_info", (200, b'{"weight_version": "11"}'), "version '11' after an update to 12"),
        ("/model_info", (200, b"{}"), "no weight_version"),
    ],
)
def test_an_update_that_failed_is_an_error_and_leaves_no_server_paused(
    engine, path, answer, named, tmp_path, monkeypatch
):
    monkeypatch.setattr("megatron_rapo.engines.sglang.updates.FLUSH_TIMEOUT_S", 0.2)
    stand_in, pool = engine
    stand_in.answers[path] = answer
    with pytest.raises(RapoError) as failed:
        pool.update_weights(tmp_path, 12)
    assert named in str(failed.value)
    paths = [path for path, _ in stand_in.asked]
    assert paths.count("/pause_generation") == paths.count("/continue_generation") == 1


def test_it_waits_until_servers_are_healthy():
    with stand_ins(1) as ([server], urls), make_pool(urls) as pool:
        server.unready = 3
        pool.wait_until_healthy(60)
        assert [path for path, _ in server.asked] == ["/health"] * 4
        server.answers["/health"] = (503, b"")
        with pytest.raises(RapoError, match=r"not ready within 0.3 s \((status 503|ReadTimeout)\)"):
            pool.wait_until_healthy(0.3)


def test_the_key_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("RAPO_ENGINE_API_KEY", "secret")
    with stand_ins(1) as ([server], urls), make_pool(urls) as pool:
        generate(pool)
    assert server.keys == ["Bearer secret"]


def test_one_server_by_two_names_of_its_host_is_refused(monkeypatch):
    hosts = {"node1": ["10.0.0.1"], "node1.cluster": ["fd00::1", "10.0.0.1"], "node2": ["10.0.0.2"]}

    def resolve(host, port, **_):
        if host not in hosts:
            raise socket.gaierror(f"{host} is not known")
        return [(0, 0, 0, "", (address, port)) for address in hosts[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    check_distinct(["http://node1:1", "http://node1.cluster:2", "http://node2:1", "http://other:1"])
    with pytest.raises(RapoError, match=r"http://node1:1 and http://node1.cluster:1 are the same server"):
        check_distinct(["http://node1:1", "http://node2:1", "http://node1.cluster:1"])
