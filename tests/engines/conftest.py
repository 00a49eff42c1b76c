"""The engines that the conformance suite runs against, and what their weights must answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.sglang.client import SGLangClient
from tests.engines.servers import EMBEDDED, KEY, SGLANG_CPU, SGLANG_GPU, running, tail, why_not
from tests.models import make_hf_model

# bf16 activations against fp32 ones of the same weights; another checkpoint's log-probs differ by nats.
TOLERANCE = 0.4


class Checkpoint:
    """A HF model, and what transformers makes of it."""

    def __init__(self, path):
        self.path = path
        self.tensors = load_file(path / "model.safetensors")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def gap(self, prompt, answer):
        """How far a greedy answer is from transformers', in nats: of its log-probs, and of its choices."""
        tokens = torch.tensor([[*prompt, *answer["output_ids"]]])
        with torch.inference_mode():
            rows = self.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = rows.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        reported = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        return max(float((expected - reported).abs().max()), float((rows.amax(-1) - expected).max()))


async def generate(client, prompts, params, **more):
    """SGLang's answers as they are."""
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True, **more}
    return await client.post("/generate", body)


class Engine:
    """A running engine, behind plain calls."""

    def __init__(self, kind, url, log):
        self.kind, self.url, self._log = kind, url, log
        self._runner = asyncio.Runner()
        # As `http_client`, but with the certificates left unread, which takes longer than a test.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(trust_env=False, verify=False, timeout=None, limits=limits)

    def ask(self, work, key=KEY):
        """What `work` makes of a client of its kind, which knows nothing from before."""
        self._http.headers["Authorization"] = f"Bearer {key}"
        try:
            kind = EmbeddedClient if self.kind == EMBEDDED else SGLangClient
            return self._runner.run(work(kind(self._http, self.url, timeout=60)))
        except Exception as error:
            error.add_note(f"the engine's log ends with:\n{tail(self._log)}")
            raise

    def close(self):
        """Ends connections."""
        self._runner.run(self._http.aclose())
        self._runner.close()

    def post(self, path, body):
        return self.ask(lambda client: client.post(path, body))

    def greedy(self, prompts, **more):
        params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
        return self.ask(lambda client: generate(client, prompts, [params] * len(prompts)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two of one architecture, in bf16."""
    root = tmp_path_factory.mktemp("models")
    options = {"initializer_range": 0.2, "dtype": torch.bfloat16, "max_position_embeddings": 4096}
    return [Checkpoint(make_hf_model(root / str(seed), seed=seed, **options)) for seed in range(2)]


@pytest.fixture(scope="session", params=[EMBEDDED, SGLANG_CPU, SGLANG_GPU])
def server(request, checkpoints, tmp_path_factory):
    """One start of each kind for the whole session."""
    kind = request.param
    if reason := why_not(kind):
        pytest.skip(reason)
    log = Path(tmp_path_factory.mktemp("logs")) / f"{kind}.log"
    with running(kind, checkpoints[0].path, log) as url:
        engine = Engine(kind, url, log)
        yield engine
        engine.close()


@pytest.fixture
def engine(server, checkpoints):
    """The server, idle, on the first checkpoint as version `0`."""
    server.ask(lambda c: c._exchange.request("POST", "/abort_request", {"abort_all": True}, timeout=60))
    server.ask(lambda client: client.load_checkpoint(checkpoints[0].path, 0))
    return server
