"""What a run asks of an engine, of every kind alike. Weights are proven by what they sample.

Where kinds differ, the table of docs/engines.md says how, and the test holds them to it.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.engines.engine import Generation
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.bucket import lay_out
from tests.engines.conftest import CLIENTS, TOLERANCE
from tests.engines.kinds_table import cell
from tests.engines.servers import CONTEXT
from tests.engines.trainer import Broadcasting

PROMPTS = [[10, 20, 30], [5], [7, 8, 9, 10, 11]]
TOKENS = 600  # some seconds' worth
LONG = Generation((*PROMPTS[0],), TOKENS, 1.0, seed=5, ignore_eos=True)
EOS = 1
SOON_S = 60.0


def assert_serves(engine, checkpoint, other, version):
    """What it samples, and how it calls the weights, is of the one checkpoint and not of the other."""
    for prompt, answer in zip(PROMPTS, engine.greedy(PROMPTS), strict=True):
        assert checkpoint.gap(prompt, answer.token_ids, answer.log_probs) < TOLERANCE
        assert other.gap(prompt, answer.token_ids, answer.log_probs) > 1.0
        assert set(answer.versions) == {version}
    assert engine.ask(lambda client: client.weight_version()) == version


def begin(engine):
    engine.ask(lambda client: client.begin_update())


def end(engine, version):
    engine.ask(lambda client: client.end_update(version))


def hand_over(engine, tensors, version=None):
    engine.ask(lambda client: client.receive_handles(list(tensors.items()), 1, version, timeout=SOON_S))


def seconds_of_long(engine):
    """The least of three: the first of an engine compiles, and what else the machine does only adds."""

    def once():
        begun = time.monotonic()
        engine.generate(LONG)
        return time.monotonic() - begun

    return min(once() for _ in range(3))


async def held_midway(client, whole):
    """`LONG`, held by an update when it has some of its tokens; sooner if the engine has become faster."""
    for wait_s in (0.3 * whole, 0.1 * whole, 0.03 * whole):
        running = asyncio.create_task(client.generate([LONG]))
        await asyncio.sleep(wait_s)
        await client.begin_update()
        if not running.done():
            return running
        await client.end_update(0)
    raise AssertionError(f"a request of {whole:.2f} s had ended {wait_s:.2f} s after it began")


def test_it_says_what_it_is(engine, checkpoints):
    info = engine.ask(lambda client: client.info())
    assert info.model_path in [str(checkpoint.path) for checkpoint in checkpoints]
    assert (info.weight_version, info.tensor_parallel) == ("0", 1)
    assert info.dtype in ("bfloat16", "auto")
    assert re.fullmatch(r"(sglang|vllm|megatron_rapo\.embedded_server) \d+\.\d+\.\d+\S*", info.software)
    assert info.context_length == (
        CONTEXT if cell("tells its context length", engine.name) == "yes" else None
    )
    slices = cell("takes weights from several trainer ranks (`shard`)", engine.name)
    assert CLIENTS[engine.kind].takes_slices == (slices == "yes")
    engine.ask(lambda client: client.until_healthy(10))
    assert engine.ask(lambda client: client.silence(10)) is None


def test_a_batch_is_answered_in_order_with_log_probs(engine, checkpoints):
    assert_serves(engine, *checkpoints, version="0")
    lengths = (3, 5, 4)
    wanted = [Generation((*p,), n, 0.0, ignore_eos=True) for p, n in zip(PROMPTS, lengths, strict=True)]
    for n, answer, longer in zip(lengths, engine.generate(*wanted), engine.greedy(PROMPTS), strict=True):
        assert answer.token_ids.tolist() == longer.token_ids[:n].tolist()
        assert len(answer.log_probs) == n
        assert answer.finish == "length"


def test_a_stop_token_ends_a_response_and_belongs_to_it(engine):
    [whole] = engine.greedy(PROMPTS[:1])
    tokens = whole.token_ids.tolist()
    [answer] = engine.greedy(PROMPTS[:1], ignore_eos=False, stop=(tokens[5],))
    assert answer.token_ids.tolist() == tokens[: tokens.index(tokens[5]) + 1]
    assert (answer.finish, len(answer.log_probs)) == ("stop", len(answer.token_ids))


def test_the_models_own_end_belongs_to_a_response(engine):
    wanted = [Generation((*PROMPTS[0],), 1000, 1.0, seed=seed) for seed in range(8)]
    ended = [answer for answer in engine.generate(*wanted) if answer.finish == "stop"]
    assert ended
    for answer in ended:
        assert answer.token_ids.tolist().index(EOS) == len(answer.token_ids) - 1
        assert len(answer.log_probs) == len(answer.token_ids)


def largest_gap(logits, answer):
    """Of the log-probs of a response's tokens under these logits, in nats."""
    rows = logits.log_softmax(-1).gather(-1, torch.from_numpy(answer.token_ids)[:, None])[:, 0]
    return float((rows - torch.from_numpy(answer.log_probs)).abs().max())


def test_log_probs_are_those_at_the_temperature(engine, checkpoints):
    [answer] = engine.generate(Generation((*PROMPTS[0],), 20, 0.5, seed=1, ignore_eos=True))
    logits = checkpoints[0].logits(PROMPTS[0], answer.token_ids)
    assert largest_gap(logits / 0.5, answer) < 2 * TOLERANCE


def test_log_probs_of_a_filtered_distribution(engine, checkpoints):
    """Why a run samples with full support: what kinds report then is not of one distribution."""
    [answer] = engine.generate(Generation((*PROMPTS[0],), 40, 1.0, seed=1, top_k=2, ignore_eos=True))
    full = checkpoints[0].logits(PROMPTS[0], answer.token_ids)
    kept = full.masked_fill(full < full.topk(3).values[:, -1:] - 1e-6, -torch.inf)
    two = full.masked_fill(full < full.topk(2).values[:, -1:] - 1e-6, -torch.inf)
    gaps = {"full distribution": largest_gap(full, answer)}
    # Two tokens may be nearly alike, so that bf16 keeps another one.
    gaps["of what was kept"] = min(largest_gap(two, answer), largest_gap(kept, answer))
    assert min(gaps, key=gaps.__getitem__) == cell("log-probs with top-p or top-k", engine.name)


def test_a_seed_makes_the_same_sample(engine):
    wanted = [Generation((*PROMPTS[0],), 24, 1.0, seed=seed, ignore_eos=True) for seed in (7, 8, 9, 7)]
    alone = engine.generate(wanted[0])[0].token_ids.tolist()
    first, *others, again = (answer.token_ids.tolist() for answer in engine.generate(*wanted))
    assert first not in others
    same = "yes" if first == again == alone else "no"
    assert same == cell("a seed makes the same sample", engine.name).partition(" ")[0]


def test_log_probs_of_a_prompt(engine, checkpoints):
    sequences = [[10, 20, 30, 40, 50], [3, 4, 5]]
    found = engine.ask(lambda client: client.prompt_log_probs(sequences))
    assert ("no" if found is None else "yes") == cell("log-probs of prompts", engine.name)
    for sequence, told in zip(sequences, found or [], strict=False):
        logits = checkpoints[0].logits(sequence[:1], sequence[1:])
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0]
        assert np.abs(told - expected.numpy()).max() < TOLERANCE


def test_a_prompt_beyond_its_context_is_refused(engine, checkpoints):
    with pytest.raises(RapoError) as refused:
        engine.greedy([[5] * 5000])
    assert not isinstance(refused.value, EngineLost)
    assert_serves(engine, *checkpoints, "0")


def test_a_request_whose_client_is_gone(engine):
    """Whether it ends, or holds the engine up until it is complete."""

    async def scenario(client):
        running = asyncio.create_task(client.generate([LONG]))
        await asyncio.sleep(0.2 * whole)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        begun = time.monotonic()
        with suppress(RapoError):
            await client.flush_cache()  # refused while a request is under way, for some time
        await client.generate([Generation((5,), 1, 0.0)])
        return time.monotonic() - begun

    whole = seconds_of_long(engine)
    waited = [engine.ask(scenario) for _ in range(3)]
    # What else the machine does adds to a wait. It may also keep a request from being sent before it is
    # given up, which leaves nothing to wait for.
    told = cell("a request whose client is gone", engine.name)
    if told == "runs on":
        assert max(waited) >= 0.5 * whole
    else:  # SGLang looks now and then
        within = {"ends": 0.5 * whole, "ends within seconds": whole + 5.0}[told]
        assert min(waited) < within


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_by_broadcast(engine, checkpoints, dtype):
    first, second = checkpoints
    names = sorted(second.tensors)
    sent = {name: second.tensors[name].to(dtype) for name in names}
    halves = [{name: sent[name] for name in names[::2]}, {name: sent[name] for name in names[1::2]}]
    begin(engine)
    with Broadcasting(engine) as group:
        group.send(halves[0], None)
        group.send(halves[1], 7)
    end(engine, 7)
    assert_serves(engine, second, first, "7")
    assert_checksums(engine, second, "7")


def test_weights_in_memory_that_is_used_anew(engine, checkpoints):
    """What an engine has taken, it has: the trainer fills the same memory with the next tensors."""
    first, second = checkpoints
    largest = max(tensor.nbytes for tensor in second.tensors.values())
    flat = torch.empty(largest, dtype=torch.uint8).share_memory_()
    begin(engine)
    last = list(second.tensors)[-1]
    for name, tensor in second.tensors.items():
        view = flat[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        hand_over(engine, {name: view}, 5 if name == last else None)
        flat.fill_(255)
    end(engine, 5)
    assert_serves(engine, second, first, "5")
    assert_checksums(engine, second, "5")


def assert_checksums(engine, checkpoint, version):
    found = engine.ask(lambda client: client.weights_checksum())
    assert ("no" if found is None else "yes") == cell("checksums of its weights", engine.name)
    if found is not None:
        assert found == (version, {name: tensor_checksum(t) for name, t in checkpoint.tensors.items()})


def test_weights_by_disk_in_turn_with_generation(engine, checkpoints):
    """An update right after a request has ended is what can kill SGLang in another order of calls."""
    for round_ in range(10):
        checkpoint, other = checkpoints[round_ % 2], checkpoints[1 - round_ % 2]
        engine.ask(lambda client, c=checkpoint, v=round_: client.load_checkpoint(c.path, v))
        assert_serves(engine, checkpoint, other, str(round_))


def test_keys_and_values_of_other_weights_are_forgotten(engine, checkpoints):
    long = [3 + number % 50 for number in range(400)]
    engine.greedy([long], tokens=1)
    engine.ask(lambda client: client.load_checkpoint(checkpoints[1].path, 1))
    [answer] = engine.greedy([long], tokens=8)
    assert checkpoints[1].gap(long, answer.token_ids, answer.log_probs) < TOLERANCE


def test_an_update_holds_requests_back(engine, checkpoints):
    whole = seconds_of_long(engine)

    async def scenario(client):
        running = await held_midway(client, whole)
        held = asyncio.create_task(client.generate([Generation((5,), 1, 0.0)]))
        await asyncio.sleep(0.5)
        assert not held.done()
        assert not running.done()
        await client.receive_handles(list(checkpoints[1].tensors.items()), 1, 4, timeout=SOON_S)
        await client.end_update(4)
        return await asyncio.wait_for(asyncio.gather(running, held), SOON_S)

    [[long], [held]] = engine.ask(scenario)
    assert set(held.versions) == {"4"}
    assert len(long.token_ids) == TOKENS
    versions = {"one, of all tokens": {"4"}, "of each token": {"0", "4"}}
    assert set(long.versions) == versions[cell("weight version of a response", engine.name)]
    assert_serves(engine, checkpoints[1], checkpoints[0], "4")


def test_an_update_may_be_abandoned_and_begun_anew(engine, checkpoints):
    first, second = checkpoints
    begin(engine)
    engine.ask(lambda client: client.abandon_update())
    assert_serves(engine, first, second, "0")
    begin(engine)
    names = list(second.tensors)
    hand_over(engine, {names[0]: second.tensors[names[0]]})
    engine.ask(lambda client: client.abandon_update())
    begin(engine)
    hand_over(engine, second.tensors, 8)
    end(engine, 8)
    assert_serves(engine, second, first, "8")
    begin(engine)
    hand_over(engine, {names[0]: first.tensors[names[0]]})
    engine.anew()  # a trainer that knows nothing of the one before
    begin(engine)
    engine.ask(lambda client: client.abandon_update())
    begin(engine)
    begin(engine)
    hand_over(engine, first.tensors, 9)
    end(engine, 9)
    assert_serves(engine, first, second, "9")


def fails(engine, tensors, version=3):
    """An update of these tensors; how it failed, None if it did not."""
    try:
        begin(engine)
        hand_over(engine, tensors, version)
        end(engine, version)
    except RapoError as error:
        engine.ask(lambda client: client.abandon_update())
        return error
    return None


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("a tensor that is missing", lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight")),
        ("a tensor of unknown name", lambda tensors: tensors.update(other=torch.zeros(3))),
    ],
)
def test_an_update_that_is_not_the_models(engine, checkpoints, row, change):
    first, second = checkpoints
    tensors = dict(second.tensors)
    change(tensors)
    failed = fails(engine, tensors)
    assert ("taken" if failed is None else "refused") == cell(row, engine.name)
    engine.anew()  # what comes after is as if nothing had been
    assert fails(engine, second.tensors, 6) is None
    assert_serves(engine, second, first, "6")


def test_a_broadcast_of_another_shape_is_refused_and_the_engine_goes_on(engine, checkpoints):
    first, second = checkpoints
    begin(engine)
    with Broadcasting(engine) as group, pytest.raises(RapoError):
        group.send({"model.norm.weight": torch.zeros(63, dtype=torch.bfloat16)}, None, patiently=False)
    engine.ask(lambda client: client.abandon_update())
    engine.anew()
    assert fails(engine, second.tensors) is None
    assert_serves(engine, second, first, "3")


def test_an_unknown_group_is_refused(engine, checkpoints):
    begin(engine)
    layout = lay_out(["model.norm.weight"], [torch.bfloat16], [[128]])
    with pytest.raises(RapoError, match="nobody"):
        engine.ask(lambda client: client.receive_bucket(layout, "nobody", None, timeout=SOON_S))
    engine.ask(lambda client: client.abandon_update())
    engine.anew()
    assert fails(engine, checkpoints[1].tensors) is None
    assert_serves(engine, checkpoints[1], checkpoints[0], "3")


def test_memory_is_released_and_resumed(engine, checkpoints):
    first, second = checkpoints
    if cell("gives memory back", engine.name) == "on GPUs":
        with pytest.raises(RapoError, match="--enable-sleep-mode"):
            engine.ask(lambda client: client.release_memory())
        return
    engine.ask(lambda client: client.release_memory())
    engine.ask(lambda client: client.resume_memory())
    assert fails(engine, second.tensors, 1) is None
    assert_serves(engine, second, first, "1")


def test_a_wrong_key_is_refused(engine):
    for work in (
        lambda client: client.info(),
        lambda client: client.generate([Generation((5,), 1, 0.0)]),
        lambda client: client.begin_update(),
    ):
        engine.anew()
        with pytest.raises(RapoError, match="401"):
            engine.ask(work, key="wrong")


def test_many_requests_at_once(engine):
    """More than it has places for; each has its own answer."""
    lengths = [1 + number % 7 for number in range(200)]
    wanted = [Generation((5, 3 + n), n, 0.0, ignore_eos=True) for n in lengths]
    assert [len(answer.token_ids) for answer in engine.generate(*wanted)] == lengths
