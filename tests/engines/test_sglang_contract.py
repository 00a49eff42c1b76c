"""SGLang's routes, as SGLang has them and as the embedded server keeps them."""

from __future__ import annotations

import asyncio

import pytest
import torch

from megatron_rapo.errors import RapoError
from tests.engines.conftest import TOLERANCE
from tests.engines.servers import SPEAK_SGLANG
from tests.engines.trainer import Group, pickled, sglangs_names

pytestmark = pytest.mark.parametrize("server", SPEAK_SGLANG, indirect=True, scope="session")

PROMPTS = [[10, 20, 30], [5], [7, 8, 9, 10, 11]]
TOKENS = 600  # some seconds' worth
LONG = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}
GREEDY = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


async def generate(client, prompts, params, **more):
    """SGLang's answers as they are."""
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True, **more}
    return await client.post("/generate", body)


def post(engine, path, body):
    return engine.ask(lambda client: client.post(path, body))


def tell(engine, path, body):
    """Posts what is answered with a status alone."""
    return engine.ask(lambda client: client._exchange.request("POST", path, body, timeout=60))


@pytest.fixture(autouse=True)
def idle(engine):
    tell(engine, "/abort_request", {"abort_all": True})


def assert_serves(engine, checkpoint, other, version):
    answers = engine.ask(lambda client: generate(client, PROMPTS, [GREEDY] * len(PROMPTS)))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        log_probs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert checkpoint.gap(prompt, answer["output_ids"], log_probs) < TOLERANCE
        assert other.gap(prompt, answer["output_ids"], log_probs) > 1.0
        assert answer["meta_info"]["weight_version"] == version


def begin(engine):
    engine.ask(lambda client: client.begin_update())


def end(engine):
    engine.ask(lambda client: client.end_update(0))


def test_updates_stand_between_a_begin_and_an_end(engine):
    assert engine.ask(lambda client: client.has_sessions())


def test_a_stop_token_is_named(engine):
    ask = {"input_ids": PROMPTS[:1], "return_logprob": True}
    [whole] = post(engine, "/generate", {**ask, "sampling_params": [GREEDY]})
    stop = whole["output_ids"][5]
    params = [{**GREEDY, "ignore_eos": False, "stop_token_ids": [stop]}]
    [answer] = post(engine, "/generate", {**ask, "sampling_params": params})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def during_generation(engine, act):
    """The answer to a long request, during which `act` is done with a client."""

    async def scenario(client):
        running = asyncio.create_task(generate(client, PROMPTS[:1], [LONG], rid="long"))
        await asyncio.sleep(0.5)
        await act(client)
        [answer] = await asyncio.wait_for(running, 60)
        return answer

    return engine.ask(scenario)


@pytest.mark.parametrize("rid", ["long", None])
def test_an_aborted_request_is_answered_with_what_it_has(engine, rid):
    # A prompt of a batch has an id of its own, and the batch none.
    body = {"rid": "long_0"} if rid else {"abort_all": True}
    answer = during_generation(
        engine, lambda client: client._exchange.request("POST", "/abort_request", body, timeout=60)
    )
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) < TOKENS


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_holds_generation_back(engine, mode):
    async def act(client):
        await client.pause(mode)
        held = asyncio.create_task(generate(client, PROMPTS, [{"max_new_tokens": 1}] * 3))
        await asyncio.sleep(0.5)
        assert not held.done()
        if mode != "in_place":
            await client.flush_cache()
        await client.continue_generation()
        assert len(await asyncio.wait_for(held, 60)) == 3

    answer = during_generation(engine, act)
    finish = answer["meta_info"]["finish_reason"]["type"]
    assert (finish, len(answer["output_ids"]) < TOKENS) == (
        ("abort", True) if mode == "abort" else ("length", False)
    )


@pytest.mark.parametrize("flattened", [False, True])
def test_weights_by_broadcast(engine, checkpoints, flattened):
    first, second = checkpoints
    names = sorted(second.tensors)
    begin(engine)
    group = Group(engine, f"weights-{flattened}")
    group.send({name: second.tensors[name] for name in names[::2]}, flattened=flattened)
    rest = {name: second.tensors[name] for name in names[1::2]}
    group.send(rest, flattened=flattened, weight_version="7")
    end(engine)
    group.close()
    assert_serves(engine, second, first, "7")


@pytest.mark.parametrize("way", ["in-band", "shared memory", "bucket"])
def test_weights_by_pickle(engine, checkpoints, way):
    first, second = checkpoints
    shared = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with sglangs_names():
            fields = pickled(second.tensors, way)
        begin(engine)
        more = {"flush_cache": False, "weight_version": "8"}
        post(engine, "/update_weights_from_tensor", {**fields, **more})
        end(engine)
    finally:
        torch.multiprocessing.set_sharing_strategy(shared)
    assert_serves(engine, second, first, "8")


def test_a_version_may_be_named_afterwards(engine, checkpoints):
    begin(engine)
    fields = pickled(checkpoints[1].tensors, "in-band")
    post(engine, "/update_weights_from_tensor", {**fields, "flush_cache": False})
    end(engine)
    post(engine, "/update_weight_version", {"new_version": "9"})
    assert_serves(engine, checkpoints[1], checkpoints[0], "9")


def test_the_cache_alone_may_be_released(engine, checkpoints):
    for change in ("release", "resume"):
        tell(engine, f"/{change}_memory_occupation", {"tags": ["kv_cache"]})
    assert_serves(engine, *checkpoints, "0")


def test_weights_outside_an_update_are_refused(engine, checkpoints):
    with pytest.raises(RapoError, match="begin_weight_update"):
        post(engine, "/update_weights_from_tensor", pickled(checkpoints[1].tensors, "in-band"))
    assert_serves(engine, *checkpoints, "0")


def test_an_unknown_group_cannot_be_left(engine):
    with pytest.raises(RapoError):
        post(engine, "/destroy_weights_update_group", {"group_name": "nobody"})


def test_a_wrong_key_is_refused(engine):
    for work in (
        lambda client: generate(client, [[5]], [{}]),
        lambda client: client.post("/begin_weight_update", {}),
    ):
        with pytest.raises(RapoError, match="401"):
            engine.ask(work, key="wrong")
