"""The embedded server's HTTP contract, called in process."""

import asyncio
import threading
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rapo.embedded_server.app import create_app
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.service import Service
from tests.models import EOS, make_hf_model

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of one architecture."""
    root = tmp_path_factory.mktemp("models")
    return [make_hf_model(root / str(seed), seed=seed, initializer_range=0.2) for seed in range(2)]


@pytest.fixture
def service(checkpoints):
    service = Service()
    service.load(lambda: Engine(checkpoints[0], "cpu", "float32")).result(timeout=60)
    yield service
    service.close()


@asynccontextmanager
async def connect(service, api_key=None, **options):
    transport = httpx.ASGITransport(create_app(service, api_key), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://engine", timeout=30, **options
    ) as http:
        yield http


def call(service, method, path, body=None, **options):
    """One request; returns its response."""

    async def request():
        async with connect(service, **options) as http:
            return await http.request(method, path, json=body)

    return asyncio.run(request())


def generate(service, **body):
    response = call(service, "POST", "/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(service, path, body):
    response = call(service, "POST", path, body)
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def greedy(**more):
    return {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, **more}


def test_a_response_has_sglangs_shape(service):
    answer = generate(service, input_ids=PROMPT, sampling_params=greedy(), return_logprob=True, rid="mine")
    assert set(answer) == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 8, 0)
    assert meta["weight_version"] == "default"
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[i, None] for i in answer["output_ids"]]
    assert all(entry[0] < 0 for entry in meta["output_token_logprobs"])
    assert answer["text"] == service.engine.tokenizer.decode(answer["output_ids"], skip_special_tokens=True)


def test_log_probs_come_only_where_asked_for(service):
    assert "output_token_logprobs" not in generate(service, input_ids=PROMPT)["meta_info"]


def test_a_batch_is_answered_in_order_with_each_prompts_parameters(service):
    prompts = [[5, 6, 7], [9], [20, 21]]
    params = [greedy(max_new_tokens=n) for n in (3, 5, 4)]
    answers = generate(service, input_ids=prompts, sampling_params=params)
    assert [len(answer["output_ids"]) for answer in answers] == [3, 5, 4]
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [3, 1, 2]
    for prompt, param, answer in zip(prompts, params, answers, strict=True):
        assert (
            generate(service, input_ids=prompt, sampling_params=param)["output_ids"] == answer["output_ids"]
        )


def test_n_responses_to_a_prompt_differ_and_repeat_with_the_seed(service):
    params = {"n": 3, "max_new_tokens": 12, "sampling_seed": 7, "ignore_eos": True}
    answers = generate(service, input_ids=PROMPT, sampling_params=params)
    outputs = [tuple(answer["output_ids"]) for answer in answers]
    assert len(set(outputs)) == 3
    again = generate(service, input_ids=PROMPT, sampling_params=params)
    assert [tuple(answer["output_ids"]) for answer in again] == outputs
    other = generate(service, input_ids=PROMPT, sampling_params={**params, "sampling_seed": 70})
    assert not set(outputs) & {tuple(answer["output_ids"]) for answer in other}


def test_without_a_seed_responses_differ(service):
    params = {"max_new_tokens": 20, "ignore_eos": True}
    first, second = (generate(service, input_ids=PROMPT, sampling_params=params) for _ in range(2))
    assert first["output_ids"] != second["output_ids"]


def test_text_is_tokenized_and_stopped_text_is_without_the_stop_token(service):
    by_text = generate(service, text="12+3", sampling_params=greedy())
    ids = service.engine.tokenizer("12+3")["input_ids"]
    by_ids = generate(service, input_ids=ids, sampling_params=greedy())
    assert by_text["output_ids"] == by_ids["output_ids"]
    stop = by_ids["output_ids"][4]
    stopped = generate(
        service,
        text="12+3",
        sampling_params=greedy(ignore_eos=False, stop_token_ids=[stop], max_new_tokens=30),
    )
    cut = stopped["output_ids"].index(stop)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["output_ids"] == by_ids["output_ids"][: cut + 1]
    assert stopped["text"] == service.engine.tokenizer.decode(stopped["output_ids"][:-1])


def test_the_eos_token_ends_a_response_unless_ignored(service):
    assert service.engine.eos_ids == {EOS}
    for seed in range(50):
        params = {"max_new_tokens": 50, "sampling_seed": seed}
        answer = generate(service, input_ids=PROMPT, sampling_params=params)
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            break
    assert answer["output_ids"].index(EOS) == len(answer["output_ids"]) - 1
    longer = generate(service, input_ids=PROMPT, sampling_params={**params, "ignore_eos": True})
    assert longer["output_ids"][: len(answer["output_ids"])] == answer["output_ids"]
    assert len(longer["output_ids"]) == 50


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input_ids": PROMPT, "sampling_params": {"bogus": 1}}, "bogus"),
        ({"input_ids": PROMPT, "sampling_params": {"min_p": 0.1}}, "min_p"),
        ({"input_ids": PROMPT, "stream": True}, "stream"),
        ({"input_ids": PROMPT, "sampling_params": {"top_p": 0}}, "top_p = 0"),
        ({"input_ids": PROMPT, "sampling_params": {"top_k": 0}}, "top_k = 0"),
        ({"input_ids": PROMPT, "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"input_ids": [5, 61]}, "token id 61 is outside the vocabulary of 61"),
        ({"input_ids": [5, -1]}, "token id -1"),
        ({"input_ids": [[5], []]}, "a prompt is empty"),
        ({"input_ids": []}, "a prompt is empty"),
        ({"text": []}, "no prompt"),
        ({"input_ids": [5] * 500, "sampling_params": {"max_new_tokens": 13}}, "context of 512"),
        ({}, "either text or input_ids"),
        ({"text": "1", "input_ids": PROMPT}, "either text or input_ids"),
        ({"input_ids": [[5], [6]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
    ],
)
def test_what_it_cannot_do_is_refused(service, body, named):
    assert named in refusal(service, "/generate", body)


def test_while_the_model_loads_it_is_not_healthy(checkpoints):
    service, go_on = Service(), threading.Event()

    def slow_engine():
        assert go_on.wait(timeout=30)
        return Engine(checkpoints[0], "cpu", "float32")

    loading = service.load(slow_engine)
    for method, path, body in [("GET", "/health", None), ("POST", "/generate", {"input_ids": PROMPT})]:
        assert call(service, method, path, body).status_code == 503
    go_on.set()
    loading.result(timeout=60)
    for path in ("/health", "/health_generate"):
        assert call(service, "GET", path).status_code == 200
    service.close()


def test_with_a_key_only_health_is_open(service):
    bearer = {"Authorization": "Bearer secret"}
    for path in ("/model_info", "/health_generate", "/flush_cache"):
        assert call(service, "GET", path, api_key="secret").status_code == 401
        assert (
            call(service, "GET", path, api_key="secret", headers={"Authorization": "Bearer x"}).status_code
            == 401
        )
        assert call(service, "GET", path, api_key="secret", headers=bearer).status_code == 200
    assert call(service, "GET", "/health", api_key="secret").status_code == 200


def test_info_names_model_and_version(service, checkpoints):
    info = call(service, "GET", "/model_info").json()
    assert (info["model_path"], info["weight_version"]) == (str(checkpoints[0]), "default")
    assert (info["vocab_size"], info["context_length"]) == (61, 512)
    info = call(service, "GET", "/server_info").json()
    assert (info["device"], info["dtype"]) == ("cpu", "float32")


def update(service, path, version, **more):
    return call(
        service,
        "POST",
        "/update_weights_from_disk",
        {"model_path": str(path), "weight_version": version, **more},
    )


def test_updated_weights_sample_under_their_version(service, checkpoints):
    response = update(service, checkpoints[1], "7", flush_cache=False)
    assert (response.status_code, response.json()["success"]) == (200, True)
    answer = generate(service, input_ids=PROMPT, sampling_params=greedy())
    assert answer["meta_info"]["weight_version"] == "7"
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[1], dtype=torch.float32)
    expected = reference.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8, eos_token_id=None
    )
    assert answer["output_ids"] == expected[0, 3:].tolist()
    assert call(service, "GET", "/model_info").json()["weight_version"] == "7"


def test_sharded_checkpoints_are_read_whole(service, checkpoints, tmp_path):
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(checkpoints[1]).save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    update(service, checkpoints[1], "1")
    expected = generate(service, input_ids=PROMPT, sampling_params=greedy(max_new_tokens=30))["output_ids"]
    update(service, checkpoints[0], "2")
    assert (
        generate(service, input_ids=PROMPT, sampling_params=greedy(max_new_tokens=30))["output_ids"]
        != expected
    )
    assert update(service, sharded, "3").status_code == 200
    assert (
        generate(service, input_ids=PROMPT, sampling_params=greedy(max_new_tokens=30))["output_ids"]
        == expected
    )


def broken(checkpoint, path, kind):
    """A copy of the checkpoint that must be refused."""
    path.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    last = "model.norm.weight"
    if kind == "missing":
        del tensors[last]
    elif kind == "unexpected":
        tensors["model.extra.weight"] = tensors[last].clone()
    elif kind == "shape":
        tensors[last] = tensors[last][:-1].clone()
    save_file(tensors, path / "model.safetensors")
    if kind == "truncated":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-100])
    if kind == "empty folder":
        (path / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing", "model.norm.weight is missing"),
        ("unexpected", "model.extra.weight is not in the model"),
        ("shape", "model.norm.weight has shape [63] in place of [64]"),
        ("truncated", "cannot read"),
        ("empty folder", "holds neither"),
    ],
)
def test_a_refused_update_changes_nothing(service, checkpoints, tmp_path, kind, named):
    before = generate(service, input_ids=PROMPT, sampling_params=greedy(max_new_tokens=30))
    response = update(service, broken(checkpoints[1], tmp_path / "broken", kind), "9")
    assert (response.status_code, response.json()["success"]) == (400, False)
    assert named in response.json()["message"]
    after = generate(service, input_ids=PROMPT, sampling_params=greedy(max_new_tokens=30))
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == "default"


def test_tied_checkpoints_are_updated_whole(tmp_path):
    first, second = (
        make_hf_model(tmp_path / str(i), tied=True, seed=i, initializer_range=0.2) for i in range(2)
    )
    service = Service()
    service.load(lambda: Engine(first, "cpu", "float32")).result(timeout=60)
    assert update(service, second, "1").status_code == 200
    answer = generate(service, input_ids=PROMPT, sampling_params=greedy())
    service.close()
    reference = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32)
    expected = reference.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8, eos_token_id=None
    )
    assert answer["output_ids"] == expected[0, 3:].tolist()


LONG = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}


async def until_working(service):
    async with asyncio.timeout(10):
        while await service.idle(timeout=0):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("mode", "first"), [("retract", "1"), ("in_place", "default")])
def test_while_paused_nothing_starts(service, checkpoints, mode, first):
    """A retracted request is made anew afterwards, one in place comes to its end: never half and half."""

    async def scenario():
        async with connect(service) as http:
            running = asyncio.create_task(http.post("/generate", json=LONG))
            await until_working(service)
            await http.post("/pause_generation", json={"mode": mode})
            held = asyncio.create_task(http.post("/generate", json={"input_ids": PROMPT}))
            if mode == "in_place":
                assert (await http.get("/flush_cache?timeout=0")).status_code == 400  # one still runs
            assert (await http.get("/flush_cache?timeout=20")).status_code == 200
            update = {"model_path": str(checkpoints[1]), "weight_version": "1"}
            assert (await http.post("/update_weights_from_disk", json=update)).status_code == 200
            assert not held.done()
            await http.post("/continue_generation", json={})
            return [(await one).json() for one in (running, held)]

    before, after = asyncio.run(scenario())
    assert before["meta_info"]["weight_version"] == first
    assert before["meta_info"]["completion_tokens"] == 500
    assert after["meta_info"]["weight_version"] == "1"


def test_a_held_request_can_be_aborted(service):
    async def scenario():
        async with connect(service) as http:
            await http.post("/pause_generation", json={"mode": "retract"})
            held = asyncio.create_task(http.post("/generate", json={**LONG, "rid": "held"}))
            while not service._requests:
                await asyncio.sleep(0.001)
            await http.post("/abort_request", json={"rid": "held"})
            return (await asyncio.wait_for(held, 20)).json()

    assert asyncio.run(scenario())["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/abort_request", {"rid": "long"}),
        ("/abort_request", {"abort_all": True}),
        ("/pause_generation", {"mode": "abort"}),
        ("/pause_generation", None),
    ],
)
def test_an_aborted_request_is_answered_with_what_it_has(service, path, body):
    async def scenario():
        async with connect(service) as http:
            running = asyncio.create_task(http.post("/generate", json={**LONG, "rid": "long"}))
            await until_working(service)
            assert (await http.post("/abort_request", json={"rid": "another"})).status_code == 200
            assert (await http.post(path, json=body)).status_code == 200
            return (await running).json()

    answer = asyncio.run(scenario())
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"]) < 500


def test_a_request_that_nobody_waits_for_is_not_decoded_on(service, monkeypatch):
    decoded, decode, begun = [], service.engine.generate, threading.Event()

    def generate(*arguments):
        begun.set()
        decoded.extend(decode(*arguments))

    monkeypatch.setattr(service.engine, "generate", generate)

    async def scenario():
        async with connect(service) as http:
            running = asyncio.create_task(http.post("/generate", json={**LONG, "input_ids": [PROMPT] * 50}))
            await asyncio.to_thread(begun.wait, 60)  # before that, it would not be decoded at all
            running.cancel()
            await asyncio.wait([running])
            assert await service.idle(timeout=60)

    asyncio.run(scenario())
    assert [completion.finish for completion in decoded] == ["abort"] * 50


def test_a_failure_in_decoding_is_a_500_that_says_what(service, monkeypatch):
    def fail(samples, aborted):
        raise FloatingPointError("the model's log-probs are not finite")

    monkeypatch.setattr(service.engine, "generate", fail)
    response = call(service, "POST", "/generate", {"input_ids": PROMPT})
    assert response.status_code == 500
    assert "log-probs are not finite" in response.json()["error"]["message"]
