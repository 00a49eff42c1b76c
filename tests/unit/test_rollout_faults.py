"""Engines that fail, as stand-ins: what a batch holds in the end, who is out and why, who comes back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.revival import Reviver
from tests.models import make_hf_model
from tests.pools import generate_groups
from tests.stand_in import VOCAB, stand_ins

SOON = 60.0  # seconds in which anything happens, also on a machine that is very busy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf_model(tmp_path_factory.mktemp("model"), seed=0)


def make_reviver(model, restarts=3, startup_timeout=SOON):
    return Reviver(None, read_architecture(model), restarts=restarts, startup_timeout=startup_timeout)


def make_pool(urls, **options):
    defaults = {"vocab_size": VOCAB, "prompts_per_request": 1, "request_timeout": 60}
    return EnginePool(urls, SGLangClient, **{**defaults, **options})


def generate(pool, count=8, version=3):
    prompts = [Prompt(100 + i, "", (i, 7), "", draw=i) for i in range(count)]
    return generate_groups(
        pool,
        prompts,
        responses_per_prompt=3,
        max_response_tokens=8,
        temperature=0.5,
        weight_version=version,
        seed=11,
    )


def tokens(groups):
    return [
        (group.prompt.index, [response.token_ids.tolist() for response in group.responses])
        for group in groups
    ]


@pytest.fixture(scope="module")
def undisturbed():
    """What the batch is when nothing fails."""
    with stand_ins(2) as (_, urls), make_pool(urls) as pool:
        groups = generate(pool)
        assert pool.resent == 0
        return tokens(groups)


def break_engine(server, fault):
    """Makes `/generate` fail from now on; the pool's options that this fault needs."""
    if fault == "status 500":
        server.answers["/generate"] = (500, b"out of memory")
    elif fault == "no JSON":
        server.answers["/generate"] = (200, b"<html>")
    elif fault == "other weights":
        server.version = "2"
    elif fault == "slow":
        server.go_on.clear()
        return {"request_timeout": 5}  # which the other engine must keep on such a machine
    elif fault == "hangs":  # while its request may take long
        server.go_on.clear()
        return {"health_interval": 1.0}  # as long as the other engine may be silent, three times in a row
    else:
        server.fault = fault
    return {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status 500", "answered status 500: out of memory"),
        ("no JSON", "answered not JSON"),
        ("other weights", "version '2' in place of 3"),
        ("slow", "not answered within 5 s"),
        ("hangs", "it was silent 3 times in a row"),
        ("truncated", "connection was lost"),
        ("reset", "connection was lost"),
        ("closed", "connection was lost"),
    ],
)
def test_a_batch_is_the_same_when_an_engine_fails(fault, reason, undisturbed, capfd):
    with stand_ins(2) as (servers, urls):
        options = break_engine(servers[0], fault)
        started = time.monotonic()
        with make_pool(urls, **options) as pool:
            groups = generate(pool)
            assert time.monotonic() - started < SOON
            assert pool.urls == urls[1:]
            assert reason in pool.failures[urls[0]]
            assert pool.resent == 4  # the load was even when the engine failed
            assert tokens(generate(pool)) == undisturbed
            generations = [path for path, _ in servers[0].asked if path == "/generate"]
            assert len(generations) <= pool.resent, "nothing more is asked of an engine that is out"
    assert tokens(groups) == undisturbed
    assert capfd.readouterr().out.count(f"engine {urls[0]} is out (1 of 2 are left): ") == 1


def test_requests_go_to_the_least_loaded_engine_within_a_bound():
    with stand_ins(2) as (servers, urls), make_pool(urls, requests_per_engine=2) as pool:
        servers[0].go_on.clear()
        sampled = threading.Thread(target=generate, args=(pool, 12))
        sampled.start()
        deadline = time.monotonic() + SOON
        while len(servers[1].asked) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [len(server.asked) for server in servers] == [2, 10]
        servers[0].go_on.set()
        sampled.join(SOON)
        assert [len(server.asked) for server in servers] == [2, 10]


def test_all_responses_to_a_prompt_are_asked_of_one_engine():
    with stand_ins(3) as (servers, urls), make_pool(urls) as pool:
        generate(pool)
        for server in servers:
            for _, body in server.asked:
                assert len(body["input_ids"]) == 3
                assert len({tuple(prompt) for prompt in body["input_ids"]}) == 1


def test_without_engines_the_round_ends_with_what_it_has():
    with stand_ins(2) as (servers, urls), make_pool(urls, minimum_engines=2) as pool:
        servers[0].fault = "closed"
        servers[1].go_on.clear()
        threading.Timer(0.3, servers[1].go_on.set).start()
        groups = generate(pool)
        assert pool.urls == urls[1:]
        # Four of the requests were at each engine when the first was lost.
        assert [group is None for group in groups] == [True, False] * 4
        with pytest.raises(RapoError, match=r"1 of 2 engines are left, where rollout\.minimum_engines = 2"):
            pool.revive()


def test_an_engine_that_is_mended_comes_back_with_the_weights_of_the_next_update(
    model, tmp_path, undisturbed
):
    with stand_ins(2) as (servers, urls), make_pool(urls, reviver=make_reviver(model)) as pool:
        servers[0].fault = "closed"
        generate(pool)
        servers[0].fault = None
        assert pool.urls == urls[1:]
        without = pool.membership
        assert tokens(generate(pool)) == undisturbed
        revive_until(pool, 2)
        assert pool.urls == urls and (without, pool.membership) == (1, 2)
        servers[0].asked.clear()
        pool.update_weights(tmp_path, 4)
        assert [path for path, _ in servers[0].asked].count("/update_weights_from_disk") == 1
        assert tokens(generate(pool, version=4)) == undisturbed
        assert any(path == "/generate" for path, _ in servers[0].asked)


def revive_until(pool, live):
    """What a publication a step does: engines come back in the background."""
    deadline = time.monotonic() + SOON
    while len(pool.urls) < live:
        assert time.monotonic() < deadline, pool.failures
        pool.revive()
        time.sleep(0.02)


def test_an_engine_comes_back_a_bounded_number_of_times(model):
    reviver = make_reviver(model, restarts=2)
    with stand_ins(1) as ([server], urls), make_pool(urls, reviver=reviver) as pool:
        server.answers["/generate"] = (500, b"always")
        for _ in range(2):
            assert generate(pool, 1) == [None]
            pool.revive()
            assert pool.urls == urls
        assert generate(pool, 1) == [None]
        with pytest.raises(RapoError, match=r"0 of 1 engines are left(.|\n)*http://.*status 500: always"):
            pool.revive()
        assert reviver.returned == 2


def test_what_other_heads_lost_is_lost_for_all(model):
    with stand_ins(2) as (_, urls):
        reviver = make_reviver(model, restarts=0)
        with make_pool(urls, reviver=reviver) as main, make_pool(urls) as other:
            main.revive({urls[1]: "it answers too late"})
            assert main.failures == {urls[1]: "another head lost it: it answers too late"}
            other.use(main.urls)
            assert other.urls == urls[:1]


def test_an_engine_that_did_not_get_the_weights_is_out_and_keeps_its_place(model):
    with stand_ins(2) as (_, urls), make_pool(urls, reviver=make_reviver(model)) as pool:
        pool.use(urls[1:])
        assert (pool.urls, pool.failures) == (urls[1:], {urls[0]: "it did not get the current weights"})
        revive_until(pool, 2)
        assert pool.urls == urls


def test_an_engine_with_another_model_is_refused_by_name(model, tmp_path):
    other = make_hf_model(tmp_path / "other", seed=0, intermediate_size=96)
    with stand_ins(2) as (servers, urls), make_pool(urls, reviver=make_reviver(model)) as pool:
        pool.wait_until_healthy(SOON)
        servers[0].model_path = str(other)
        with pytest.raises(RapoError, match=rf"{urls[0]} serves {other}.*feed_forward 96 in place of"):
            pool.wait_until_healthy(SOON)
        servers[0].fault = "closed"
        generate(pool)
        deadline = time.monotonic() + SOON
        while "serves" not in pool.failures[urls[0]]:
            assert time.monotonic() < deadline
            pool.revive()
            time.sleep(0.02)
        assert pool.urls == urls[1:]


# Weight updates


@pytest.mark.parametrize("fault", ["closed", "reset", "truncated"])
def test_an_engine_lost_in_an_update_does_not_keep_the_others_from_it(fault, tmp_path):
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        servers[0].fault, servers[0].faulty = fault, "/update_weights_from_disk"
        pool.update_weights(tmp_path, 4)
        assert pool.urls == urls[1:]
        assert servers[1].version == "4"


def test_where_too_few_are_left_in_an_update_others_come_back_for_it(model, tmp_path):
    with stand_ins(1) as ([server], urls), make_pool(urls, reviver=make_reviver(model)) as pool:
        server.fault, server.faulty = "closed", "/update_weights_from_disk"
        mended = threading.Timer(0.2, setattr, (server, "fault", None))
        server.answers["/health"] = (503, b"")
        ready = threading.Timer(0.4, server.answers.clear)
        mended.start()
        ready.start()
        pool.update_weights(tmp_path, 4)
        assert (pool.urls, server.version) == (urls, "4")


def test_a_refused_update_is_final_and_leaves_engines_in(tmp_path):
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        refusal = b'{"success": false, "message": "another shape"}'
        servers[0].answers["/update_weights_from_disk"] = (400, refusal)
        with pytest.raises(RapoError, match="another shape") as refused:
            pool.update_weights(tmp_path, 4)
        assert not isinstance(refused.value, EngineLost)
        assert pool.urls == urls


async def post_piece(engine, body):
    return await engine.post("/piece", body, timeout=SOON)


def test_an_update_in_pieces_reaches_all_engines_in_order():
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        assert pool.tensor_parallel() == [1, 1]
        pool.begin_update()
        answers = pool.each(post_piece, [{"n": 0}, {"n": 1}])
        assert answers.result(SOON) == [{}, {}]
        for server in servers:
            server.version = "4"
        pool.end_update(4)
        for number, server in enumerate(servers):
            assert [body for path, body in server.asked if path == "/piece"] == [{"n": number}]
            paths = [path for path, _ in server.asked]
            assert paths.index("/pause_generation") < paths.index("/piece")
            assert paths.index("/piece") < paths.index("/continue_generation")
        with pytest.raises(RapoError, match="version '4' after an update to 5"):
            pool.begin_update()
            pool.end_update(5)


@pytest.mark.parametrize("hung", [False, True])
def test_a_piece_that_an_engine_fails_to_take_is_known_at_once(hung):
    with stand_ins(2) as (servers, urls), make_pool(urls) as pool:
        pool.begin_update()
        servers[0].fault, servers[0].faulty = "closed", "/piece"
        servers[1].go_on = threading.Event()  # it waits for a broadcast that does not come
        if not hung:
            servers[1].go_on.set()
        started = time.monotonic()
        with pytest.raises(EngineLost, match=urls[0]):
            pool.each(post_piece, [{}, {}]).result(SOON)
        assert time.monotonic() - started < SOON
        assert pool.urls == urls[1:]
        servers[1].go_on.set()
        pool.abandon_update()
        assert servers[1].asked[-1][0] == "/continue_generation"
        with pytest.raises(EngineLost, match="2 parts for 1 live"):
            pool.each(post_piece, [{}, {}]).result(SOON)
        pool.begin_update()
        assert pool.each(post_piece, [{}]).result(SOON) == [{}]


def test_silence_in_an_update_is_not_taken_for_death():
    with stand_ins(1) as ([server], urls), make_pool(urls, health_interval=0.05) as pool:
        pool.begin_update()
        server.go_on.clear()
        answers = pool.each(post_piece, [{}])
        time.sleep(1.0)  # twenty looks
        server.go_on.set()
        assert answers.result(SOON) == [{}]
        assert pool.urls == urls


def test_models_whose_folder_is_not_here_are_taken_on_trust(model):
    with stand_ins(1) as ([server], urls), make_pool(urls, reviver=make_reviver(model)) as pool:
        server.model_path = str(Path("/another/machine"))
        pool.wait_until_healthy(SOON)
