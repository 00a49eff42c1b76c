"""Weights that come to the embedded server in parts, wrongly, or not at all; called in process."""

import asyncio
import base64
import os
import pickle
import subprocess
import sys
import time

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.embedded_server.app import create_app
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.service import Service
from megatron_rapo.embedded_server.unpickle import load_named_tensors
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.engine import Generation
from megatron_rapo.errors import EngineLost, RapoError
from tests.models import make_hf_model

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_hf_model(root / str(seed), seed=seed, initializer_range=0.2) for seed in range(2)]


@pytest.fixture(scope="module")
def new(checkpoints):
    """The second checkpoint's tensors."""
    return load_file(checkpoints[1] / "model.safetensors")


def serving(checkpoint):
    service = Service()
    service.load(lambda: Engine(checkpoint, "cpu", "float32")).result(timeout=60)
    return service


@pytest.fixture
def service(checkpoints):
    service = serving(checkpoints[0])
    yield service
    service.close()


def ask(service, work, *, api_key=None, peer="127.0.0.1"):
    """What `work` makes of a client of this service, which it reaches from the address `peer`."""

    async def run():
        transport = httpx.ASGITransport(create_app(service, api_key), client=(peer, 1))
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with httpx.AsyncClient(transport=transport, headers=headers, timeout=30) as http:
            return await work(EmbeddedClient(http, "http://127.0.0.1", timeout=30))

    return asyncio.run(run())


def post(service, path, body=None, **options):
    return ask(service, lambda client: client.post(path, body or {}), **options)


def send(service, tensors, version=None):
    text = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    post(
        service,
        "/update_weights_from_tensor",
        {"serialized_named_tensors": [text], "weight_version": version},
    )


def greedy(service):
    wanted = Generation(tuple(PROMPT), 12, temperature=0.0, ignore_eos=True)
    [answer] = ask(service, lambda client: client.generate([wanted]))
    [version] = answer.versions
    return answer.token_ids.tolist(), version


def expected(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    return ids[0, len(PROMPT) :].tolist()


def halves(tensors):
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::2]} for i in range(2)]


def test_an_update_that_dies_half_way_stops_generation_until_a_whole_one(service, checkpoints, new):
    first, second = halves(new)
    post(service, "/begin_weight_update")
    send(service, first, version="1")
    with pytest.raises(EngineLost, match=r"not whole: 25 of 51 tensors .*send a whole update"):
        greedy(service)
    with pytest.raises(RapoError, match="has ended, but the weights are not whole"):
        post(service, "/end_weight_update")
    assert ask(service, lambda client: client.weight_version()) == "default"
    with pytest.raises(RapoError, match="not whole"):
        post(service, "/update_weight_version", {"new_version": "1"})

    # The other half, of what may be another version, does not make them whole.
    post(service, "/begin_weight_update")
    send(service, second, version="2")
    with pytest.raises(RapoError, match="26 of 51"):
        post(service, "/end_weight_update")

    post(service, "/begin_weight_update")
    send(service, first)
    send(service, second, version="3")
    post(service, "/end_weight_update")
    assert greedy(service) == (expected(checkpoints[1]), "3")


def test_a_checkpoint_makes_half_updated_weights_whole(service, checkpoints, new):
    post(service, "/begin_weight_update")
    send(service, halves(new)[0])
    ask(service, lambda client: client.abandon_update())
    ask(service, lambda client: client.load_checkpoint(checkpoints[0], 4))
    assert greedy(service) == (expected(checkpoints[0]), "4")


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("model.norm.weight", [63], "model.norm.weight has shape [63] in place of [64]"),
        ("model.extra.weight", [64], "model.extra.weight is not in the model"),
    ],
)
@pytest.mark.parametrize("route", ["tensor", "distributed"])
def test_a_request_with_a_wrong_tensor_changes_nothing(service, new, route, name, shape, named):
    before = ask(service, lambda client: client.weights_checksum())
    right = "model.embed_tokens.weight"
    post(service, "/begin_weight_update")
    service.groups._groups["g"] = None  # refused before anyone looks at it
    with pytest.raises(RapoError) as refused:
        if route == "tensor":
            send(service, {right: new[right], name: torch.zeros(shape)}, version="1")
        else:
            body = {
                "names": [right, name],
                "dtypes": ["float32"] * 2,
                "shapes": [list(new[right].shape), shape],
            }
            post(service, "/update_weights_from_distributed", {**body, "group_name": "g"})
    assert named in str(refused.value)
    post(service, "/end_weight_update")
    assert ask(service, lambda client: client.weights_checksum()) == before
    assert greedy(service)[1] == "default"


def test_updates_follow_one_another(service):
    with pytest.raises(RapoError, match="no update is under way"):
        post(service, "/end_weight_update")
    post(service, "/begin_weight_update")
    with pytest.raises(RapoError, match="an update is under way"):
        post(service, "/begin_weight_update")


def test_a_tied_matrix_is_taken_under_either_name(tmp_path):
    models = [
        make_hf_model(tmp_path / str(seed), tied=True, seed=seed, initializer_range=0.2) for seed in range(2)
    ]
    tensors = load_file(models[1] / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    service = serving(models[0])
    post(service, "/begin_weight_update")
    send(service, tensors, version="1")
    post(service, "/end_weight_update")
    found = greedy(service), ask(service, lambda client: client.weights_checksum())
    service.close()
    tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    sums = {name: tensor_checksum(values) for name, values in tensors.items()}
    assert found == ((expected(models[1]), "1"), ("1", sums))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_taken_one_by_one_and_a_stale_one_is_noticed(tmp_path, family):
    options = {"family": family, "initializer_range": 0.2}
    models = [make_hf_model(tmp_path / str(seed), seed=seed, **options) for seed in range(2)]
    tensors = load_file(models[1] / "model.safetensors")
    [stale, *_] = [name for name in sorted(tensors) if ".experts.3." in name]
    service = serving(models[0])
    try:
        before = greedy(service)
        post(service, "/begin_weight_update")
        send(service, {name: values for name, values in tensors.items() if name != stale}, version="1")
        with pytest.raises(RapoError, match=rf"1 of {len(tensors)} tensors have not come \({stale}\)"):
            ask(service, lambda client: client.end_update(1))
        with pytest.raises(EngineLost, match=stale):
            greedy(service)
        for _ in range(2):
            post(service, "/begin_weight_update")
            send(service, tensors, version="1")
            ask(service, lambda client: client.end_update(1))
            after, found = greedy(service), ask(service, lambda client: client.weights_checksum())
            ask(service, lambda client: client.release_memory())
            model = service.engine._model
            assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
            post(service, "/resume_memory_occupation", {"tags": ["weights", "kv_cache"]})
    finally:
        service.close()
    assert before == (expected(models[0]), "default") and after == (expected(models[1]), "1")
    assert found == ("1", {name: tensor_checksum(values) for name, values in tensors.items()})


def test_released_weights_are_gone_and_must_come_anew(service, checkpoints, new):
    ask(service, lambda client: client.release_memory())
    model = service.engine._model
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
    with pytest.raises(EngineLost, match="memory of kv_cache, weights is released"):
        greedy(service)
    for refused in (
        lambda: ask(service, lambda client: client.load_checkpoint(checkpoints[1], 1)),
        lambda: (post(service, "/begin_weight_update"), send(service, new)),
        # Before what was sent is unpickled: handles of shared memory would be kept.
        lambda: post(service, "/update_weights_from_tensor", {"serialized_named_tensors": ["no pickle"]}),
        lambda: ask(service, lambda client: client.weights_checksum()),
    ):
        with pytest.raises(RapoError, match="memory of the weights is released"):
            refused()
    post(service, "/resume_memory_occupation", {"tags": ["weights"]})
    with pytest.raises(EngineLost, match="memory of kv_cache is released"):
        greedy(service)
    post(service, "/resume_memory_occupation", {"tags": ["kv_cache"]})
    with pytest.raises(EngineLost, match="51 of 51"):
        greedy(service)
    ask(service, lambda client: client.begin_update())
    send(service, new, version="5")
    ask(service, lambda client: client.end_update(1))
    assert greedy(service) == (expected(checkpoints[1]), "5")


def test_a_released_cache_needs_no_update(service, checkpoints):
    post(service, "/release_memory_occupation", {"tags": ["kv_cache"]})
    post(service, "/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert greedy(service) == (expected(checkpoints[0]), "default")


TRAINER = """
import os, sys
import torch.distributed as dist
from datetime import timedelta
from torch.distributed import distributed_c10d as c10d
store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
print(store.port, flush=True)
store = c10d.PrefixStore("g", store)
limit = timedelta(seconds=60)
c10d._new_process_group_helper(2, 0, [], c10d.Backend("gloo"), store, group_name="g", timeout=limit)
sys.stdin.readline()
os._exit(9)
"""


def test_a_trainer_that_dies_in_a_broadcast_frees_the_server(service, checkpoints, new):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        group = {"master_address": "127.0.0.1", "master_port": int(trainer.stdout.readline())}
        group |= {"rank_offset": 1, "world_size": 2, "group_name": "g", "backend": "gloo"}
        post(service, "/init_weights_update_group", group)
        with pytest.raises(RapoError, match="exists already"):
            post(service, "/init_weights_update_group", group)
        post(service, "/begin_weight_update")
        body = {
            "names": list(new),
            "dtypes": ["float32"] * len(new),
            "shapes": [list(values.shape) for values in new.values()],
            "group_name": "g",
            "load_format": "flattened_bucket",
        }

        async def die_meanwhile(client):
            receiving = asyncio.create_task(client.post("/update_weights_from_distributed", body))
            await asyncio.sleep(0.3)
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            await receiving

        started = time.monotonic()
        with pytest.raises(RapoError, match="broke"):
            ask(service, die_meanwhile)
        assert time.monotonic() - started < 20
        with pytest.raises(RapoError, match="no group 'g'"):
            post(service, "/update_weights_from_distributed", body)
        post(service, "/end_weight_update")
        assert greedy(service) == (expected(checkpoints[0]), "default")
    finally:
        trainer.kill()
        trainer.communicate()


def test_a_group_that_nobody_opens_is_refused_and_holds_nothing_up(service, checkpoints, monkeypatch):
    monkeypatch.setattr("megatron_rapo.embedded_server.broadcast.TIMEOUT_S", 2.0)
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}

    async def meanwhile(client):
        joining = asyncio.create_task(client.post("/init_weights_update_group", {**group, "backend": "gloo"}))
        await client.generate([Generation(tuple(PROMPT), 1, 1.0)])
        assert not joining.done()
        await joining

    with pytest.raises(RapoError, match="cannot join"):
        ask(service, meanwhile)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weights_from_tensor", {"serialized_named_tensors": [""]}),
        (
            "/init_weights_update_group",
            {"master_address": "192.0.2.1", "master_port": 1, "rank_offset": 1, "world_size": 1},
        ),
        ("/update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": []}),
    ],
)
def test_without_a_key_another_machine_is_no_peer(service, path, body):
    with pytest.raises(RapoError, match=r"403.*192\.0\.2\.9"):
        post(service, path, body, peer="192.0.2.9")
    for options in ({"peer": "192.0.2.9", "api_key": "secret"}, {}):
        with pytest.raises(RapoError) as refused:
            post(service, path, body, **options)
        assert "403" not in str(refused.value)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def encoded(content):
    return base64.b64encode(pickle.dumps(content)).decode()


def test_a_pickle_that_calls_something_else_is_refused_before_the_call(tmp_path):
    victim = tmp_path / "victim"
    hidden = tmp_path / "nested"
    torch.save(Calls(os.mkdir, str(victim)), hidden)
    for content in (
        Calls(os.mkdir, str(victim)),
        [("a", Calls(eval, f"__import__('os').mkdir({str(victim)!r})"))],
        [("a", Calls(torch.load, str(hidden), None, None))],
        [("a", Calls(torch.storage._load_from_bytes, hidden.read_bytes()))],
        [("a", Calls(torch.multiprocessing.reductions.rebuild_storage_fd, torch.UntypedStorage, 3, 8))],
        [("a", Calls(getattr, "", "join"))],
    ):
        with pytest.raises(RapoError):
            load_named_tensors(encoded(content), flattened=False)
        assert not victim.exists()
    with pytest.raises(RapoError, match=r"posix\.mkdir"):
        load_named_tensors(encoded(Calls(os.mkdir, str(victim))), flattened=False)
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(victim))))
    assert victim.exists()  # such a pickle does what it says where nobody looks


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "no base64!",
        base64.b64encode(b"no pickle").decode(),
        encoded([("a", torch.zeros(2))])[:-24],
        encoded({"a": torch.zeros(2)}),
        encoded([torch.zeros(2)]),
        encoded([("a", 1)]),
        encoded({"flattened_tensor": torch.zeros(2), "metadata": [1]}),
        encoded(None),
    ],
)
def test_what_holds_no_named_tensors_is_refused(text, flattened):
    with pytest.raises(RapoError):
        load_named_tensors(text, flattened=flattened)
