"""One contract, kept by the embedded server and by SGLang. Weights are proven by what they sample."""

from __future__ import annotations

import asyncio
import re

import pytest
import torch

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.engines.engine import Generation
from megatron_rapo.errors import RapoError
from tests.engines.conftest import TOLERANCE, generate
from tests.engines.servers import EMBEDDED
from tests.engines.trainer import Group, pickled, sglangs_names

PROMPTS = [[10, 20, 30], [5], [7, 8, 9, 10, 11]]
TOKENS = 1500  # some seconds' worth
LONG = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}


def assert_serves(engine, checkpoint, other, version):
    """What it samples, and how it calls the weights, is of the one checkpoint and not of the other."""
    for prompt, answer in zip(PROMPTS, engine.greedy(PROMPTS), strict=True):
        assert checkpoint.gap(prompt, answer) < TOLERANCE
        assert other.gap(prompt, answer) > 1.0
        assert answer["meta_info"]["weight_version"] == version
    assert engine.ask(lambda client: client.weight_version()) == version


def begin(engine):
    engine.ask(lambda client: client.begin_update())


def end(engine):
    engine.ask(lambda client: client.end_update(0))


def test_it_says_what_it_is(engine, checkpoints):
    info = engine.ask(lambda client: client.info())
    assert info.model_path in [str(checkpoint.path) for checkpoint in checkpoints]
    assert (info.weight_version, info.tensor_parallel) == ("0", 1)
    assert engine.ask(lambda client: client.has_sessions())
    assert info.dtype in ("bfloat16", "auto")
    assert re.fullmatch(r"(sglang|megatron_rapo\.embedded_server) \d+\.\d+\.\d+\S*", info.software)
    engine.ask(lambda client: client.until_healthy(10))


def test_a_batch_is_answered_in_order_with_log_probs(engine, checkpoints):
    assert_serves(engine, *checkpoints, version="0")
    params = [{"max_new_tokens": n, "temperature": 0, "ignore_eos": True} for n in (3, 5, 4)]
    answers = engine.ask(lambda client: generate(client, PROMPTS, params))
    whole = engine.greedy(PROMPTS)
    for n, answer, longer in zip((3, 5, 4), answers, whole, strict=True):
        assert answer["output_ids"] == longer["output_ids"][:n]
        assert [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
        assert answer["meta_info"]["finish_reason"]["type"] == "length"


def test_a_stop_token_ends_a_response_and_belongs_to_it(engine):
    [whole] = engine.greedy(PROMPTS[:1])
    stop = whole["output_ids"][5]
    [answer] = engine.greedy(PROMPTS[:1], ignore_eos=False, stop_token_ids=[stop])
    assert answer["output_ids"] == whole["output_ids"][: whole["output_ids"].index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_log_probs_are_those_at_the_temperature(engine, checkpoints):
    params = {"max_new_tokens": 20, "temperature": 0.5, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    [answer] = engine.ask(lambda client: generate(client, PROMPTS[:1], [params]))
    tokens = torch.tensor([[*PROMPTS[0], *answer["output_ids"]]])
    with torch.inference_mode():
        rows = (checkpoints[0].model(tokens).logits[0, 2:-1] / 0.5).log_softmax(-1)
    expected = rows.gather(-1, tokens[0, 3:, None])[:, 0]
    reported = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    assert float((reported - expected).abs().max()) < 2 * TOLERANCE


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flattened", [False, True])
def test_weights_by_broadcast(engine, checkpoints, flattened, dtype):
    first, second = checkpoints
    sent = {name: values.to(dtype) for name, values in second.tensors.items()}
    names = sorted(sent)
    halves = [{name: sent[name] for name in names[::2]}, {name: sent[name] for name in names[1::2]}]
    begin(engine)
    group = Group(engine, f"weights-{flattened}-{dtype}")
    group.send(halves[0], flattened=flattened)
    group.send(halves[1], flattened=flattened, weight_version="7")
    end(engine)
    group.close()
    assert_serves(engine, second, first, "7")
    assert_checksums(engine, second, "7")


@pytest.mark.parametrize("way", ["in-band", "shared memory", "bucket"])
def test_weights_by_pickle(engine, checkpoints, way):
    first, second = checkpoints
    shared = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with sglangs_names():
            fields = pickled(second.tensors, way)
        begin(engine)
        engine.post("/update_weights_from_tensor", {**fields, "flush_cache": False, "weight_version": "8"})
        end(engine)
    finally:
        torch.multiprocessing.set_sharing_strategy(shared)
    assert_serves(engine, second, first, "8")
    assert_checksums(engine, second, "8")


def assert_checksums(engine, checkpoint, version):
    found = engine.ask(lambda client: client.weights_checksum())
    if engine.kind != EMBEDDED:
        assert found is None
        return
    assert found == (version, {name: tensor_checksum(t) for name, t in checkpoint.tensors.items()})


def test_weights_by_disk_in_turn_with_generation(engine, checkpoints):
    """An update right after a request has ended is what can kill SGLang in another order of calls."""
    for round_ in range(10):
        checkpoint, other = checkpoints[round_ % 2], checkpoints[1 - round_ % 2]
        engine.ask(lambda client, c=checkpoint, v=round_: client.load_checkpoint(c.path, v))
        assert_serves(engine, checkpoint, other, str(round_))


def test_an_update_may_be_abandoned_and_begun_anew(engine, checkpoints):
    first, second = checkpoints
    begin(engine)
    engine.ask(lambda client: client.abandon_update())
    assert_serves(engine, first, second, "0")
    begin(engine)
    begin(engine)  # of a trainer that knows nothing of the one before
    engine.post("/update_weights_from_tensor", {**pickled(second.tensors, "in-band"), "flush_cache": False})
    end(engine)
    engine.post("/update_weight_version", {"new_version": "9"})
    assert_serves(engine, second, first, "9")


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights", "kv_cache"]])
def test_memory_is_released_and_resumed(engine, checkpoints, tags):
    first, second = checkpoints
    if tags == ["weights", "kv_cache"]:
        engine.ask(lambda client: client.release_memory())
        engine.ask(lambda client: client.resume_memory())
    else:
        for change in ("release", "resume"):
            path, body = f"/{change}_memory_occupation", {"tags": tags}
            engine.ask(lambda c, p=path, b=body: c._exchange.request("POST", p, b, timeout=60))
    if tags == ["kv_cache"]:
        assert_serves(engine, first, second, "0")
    begin(engine)
    fields = pickled(second.tensors, "in-band")
    engine.post("/update_weights_from_tensor", {**fields, "flush_cache": False, "weight_version": "1"})
    end(engine)
    assert_serves(engine, second, first, "1")


def test_weights_outside_an_update_are_refused(engine, checkpoints):
    with pytest.raises(RapoError, match="begin_weight_update"):
        engine.post("/update_weights_from_tensor", pickled(checkpoints[1].tensors, "in-band"))
    assert_serves(engine, *checkpoints, "0")


def test_an_unknown_group_is_refused(engine, checkpoints):
    begin(engine)
    body = {"names": ["model.norm.weight"], "dtypes": ["bfloat16"], "shapes": [[64]], "group_name": "nobody"}
    with pytest.raises(RapoError, match="nobody"):
        engine.post("/update_weights_from_distributed", body)
    with pytest.raises(RapoError):
        engine.post("/destroy_weights_update_group", {"group_name": "nobody"})
    engine.ask(lambda client: client.abandon_update())
    assert_serves(engine, *checkpoints, "0")


def test_a_broadcast_of_another_shape_is_refused_and_the_engine_goes_on(engine, checkpoints):
    first, second = checkpoints
    begin(engine)
    group = Group(engine, "wrong")
    with pytest.raises(RapoError):
        if engine.kind == EMBEDDED:  # it refuses before the broadcast, which then never ends
            engine.post(
                "/update_weights_from_distributed",
                {
                    "names": ["model.norm.weight"],
                    "dtypes": ["bfloat16"],
                    "shapes": [[63]],
                    "group_name": "wrong",
                },
            )
        else:
            group.send({"model.norm.weight": torch.zeros(63, dtype=torch.bfloat16)}, flattened=False)
    group.send(second.tensors, flattened=True, weight_version="3")
    end(engine)
    group.close()
    assert_serves(engine, second, first, "3")


def test_what_a_run_asks_is_understood(engine, checkpoints):
    """The operations as they are, without a body of the test's own."""
    wanted = [Generation((*prompt,), 8, 0.0, ignore_eos=True) for prompt in PROMPTS]
    begin(engine)
    tensors = list(checkpoints[1].tensors.items())
    for part, version in ((tensors[:9], None), (tensors[9:], 5)):
        engine.ask(lambda client, p=part, v=version: client.receive_handles(p, 1, v, timeout=60))
    end(engine)
    assert_serves(engine, checkpoints[1], checkpoints[0], "5")
    for answer, raw in zip(engine.ask(lambda c: c.generate(wanted)), engine.greedy(PROMPTS), strict=True):
        assert answer.token_ids.tolist() == raw["output_ids"][:8]
        assert (set(answer.versions), answer.finish) == ({"5"}, "length")
    sampled = Generation((*PROMPTS[0],), 8, 0.7, seed=3, top_p=0.9, top_k=5, stop=(1,))
    assert len(engine.ask(lambda client: client.generate([sampled]))[0].token_ids) in range(1, 9)


def test_a_wrong_key_is_refused(engine):
    for work in (
        lambda client: client.info(),
        lambda client: generate(client, [[5]], [{}]),
        lambda client: client.post("/begin_weight_update", {}),
    ):
        with pytest.raises(RapoError, match="401"):
            engine.ask(work, key="wrong")
