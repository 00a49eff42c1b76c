"""The engines that the tests here run against, and what their weights must answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.engine import Generation
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.vllm.client import VLLMClient
from tests.engines.servers import EMBEDDED, KEY, SGLANG_CPU, SGLANG_GPU, VLLM_CPU, running, tail, why_not
from tests.models import load_reference, make_hf_model

# bf16 activations against fp32 ones of the same weights; another checkpoint's log-probs differ by nats.
TOLERANCE = 0.4
CLIENTS = {
    EMBEDDED: EmbeddedClient,
    SGLANG_CPU: SGLangClient,
    SGLANG_GPU: SGLangClient,
    VLLM_CPU: VLLMClient,
}


class Checkpoint:
    """A HF model, and what transformers makes of it."""

    def __init__(self, path):
        self.path = path
        self.tensors = load_file(path / "model.safetensors")
        self.model = load_reference(path)

    def logits(self, prompt, token_ids):
        """`[tokens, vocabulary]`, that each of `token_ids` is drawn from."""
        with torch.inference_mode():
            return self.model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]

    def gap(self, prompt, token_ids, log_probs):
        """How far a greedy answer is from transformers', in nats: of its log-probs, and of its choices."""
        rows = self.logits(prompt, token_ids).log_softmax(-1)
        expected = rows.gather(-1, torch.tensor([*token_ids])[:, None])[:, 0]
        reported = torch.tensor([*map(float, log_probs)])
        return max(float((expected - reported).abs().max()), float((rows.amax(-1) - expected).max()))


class Engine:
    """A running engine, behind plain calls."""

    def __init__(self, kind, url, log):
        self.kind, self.url, self._log = kind, url, log
        self._runner = asyncio.Runner()
        # As `http_client`, but with the certificates left unread, which takes longer than a test.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(trust_env=False, verify=False, timeout=None, limits=limits)
        self._client = None

    @property
    def name(self):
        """Of its kind."""
        return self.kind.partition("-")[0]

    def anew(self):
        """A client of its kind that knows nothing from before, as a trainer has that is started."""
        self._client = CLIENTS[self.kind](self._http, self.url, timeout=60)

    def ask(self, work, key=KEY):
        """What `work` makes of its client."""
        self._http.headers["Authorization"] = f"Bearer {key}"
        try:
            return self._runner.run(work(self._client))
        except Exception as error:
            error.add_note(f"the engine's log ends with:\n{tail(self._log)}")
            raise

    def generate(self, *wanted):
        return self.ask(lambda client: client.generate(wanted))

    def greedy(self, prompts, tokens=12, **more):
        return self.generate(
            *(Generation(tuple(prompt), tokens, 0.0, **{"ignore_eos": True, **more}) for prompt in prompts)
        )

    def close(self):
        """Ends connections."""
        self._runner.run(self._http.aclose())
        self._runner.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two of one architecture, in bf16."""
    root = tmp_path_factory.mktemp("models")
    # vLLM's kernels for CPUs have no heads of 16.
    options = {"initializer_range": 0.2, "dtype": torch.bfloat16, "max_position_embeddings": 4096}
    options |= {"head_dim": 32, "hidden_size": 128}
    return [Checkpoint(make_hf_model(root / str(seed), seed=seed, **options)) for seed in range(2)]


@pytest.fixture(scope="session", params=[EMBEDDED, SGLANG_CPU, SGLANG_GPU, VLLM_CPU])
def server(request, checkpoints, tmp_path_factory):
    """One start of each kind for a file of tests."""
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
    server.anew()
    server.ask(lambda client: client.load_checkpoint(checkpoints[0].path, 0))
    return server
