"""Embedded servers with a fault planted between the wire and the engine, each in a thread of this process."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from megatron_rapo.embedded_server.app import create_app
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.service import Service

Send = Callable[[MutableMapping[str, Any]], Any]
Body = dict[str, Any]


class Fault:
    """ASGI middleware: changes what is asked of the engine, or what it answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await self.handle(scope, body, send)

    async def handle(self, scope: Any, body: bytes, send: Send) -> None:
        if scope["path"] == "/generate":
            request = json.loads(body)
            given = request["sampling_params"]
            for params in given if isinstance(given, list) else [given]:
                if params["temperature"] > 0:
                    self.change(params)
            body = json.dumps(request).encode()
            scope = with_length(scope, body)
        await self.pass_on(scope, body, send)

    def change(self, params: Body) -> None:
        """Of one sampled response."""

    async def pass_on(self, scope: Any, body: bytes, send: Send) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive, send)


def with_length(scope: Any, body: bytes) -> Any:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


class ScalesTwice(Fault):
    """The temperature is applied twice."""

    def change(self, params: Body) -> None:
        params["temperature"] **= 2


class CutsTail(Fault):
    """Top-p, which the request does not ask for."""

    def change(self, params: Body) -> None:
        params["top_p"] = 0.8


class KeepsAnswers(Fault):
    """Answers to the same question are kept over updates; only a flush while nothing is paused drops them."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.kept: dict[bytes, list[MutableMapping[str, Any]]] = {}
        self.paused = False

    async def handle(self, scope: Any, body: bytes, send: Send) -> None:
        path = scope["path"]
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
        if path == "/flush_cache" and not self.paused:
            self.kept.clear()
        if path != "/generate":
            await self.pass_on(scope, body, send)
            return
        if body not in self.kept:
            answer: list[MutableMapping[str, Any]] = []

            async def keep(message: MutableMapping[str, Any]) -> None:
                answer.append(message)

            await self.pass_on(scope, body, keep)
            self.kept[body] = answer
        for message in self.kept[body]:
            await send(dict(message))


class IgnoresWeights(Fault):
    """Updates succeed by name: the version changes, the weights do not."""

    model_path = Path()

    async def handle(self, scope: Any, body: bytes, send: Send) -> None:
        if scope["path"] == "/update_weights_from_disk":
            request = json.loads(body)
            request["model_path"] = str(self.model_path)
            body = json.dumps(request).encode()
            scope = with_length(scope, body)
        await self.pass_on(scope, body, send)


class TellsPrompts(Fault):
    """No fault: what an embedded server lacks, log-probs of a prompt's tokens, read in one go."""

    engine: Engine

    def plant(self, engine: Engine) -> None:
        self.engine = engine

    async def handle(self, scope: Any, body: bytes, send: Send) -> None:
        request = json.loads(body or b"null")
        if scope["path"] != "/generate" or "logprob_start_len" not in request:
            await self.pass_on(scope, body, send)
            return
        answer = json.dumps(
            [{"meta_info": {"input_token_logprobs": self.read(ids)}} for ids in request["input_ids"]]
        )
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer.encode()})

    @torch.inference_mode()
    def read(self, ids: list[int]) -> list[tuple[float | None, int, None]]:
        rows = self.engine._model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        told = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
        return [
            (None, ids[0], None),
            *((value, token, None) for value, token in zip(told, ids[1:], strict=True)),
        ]


class ComputesOtherwise(TellsPrompts):
    """Hidden states that are off, of prompts and of what is decoded."""

    decoding_alone = False

    def plant(self, engine: Engine) -> None:
        super().plant(engine)

        def disturb(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
            if self.decoding_alone and hidden.shape[1] > 1:
                return hidden
            return hidden * (1 + 0.3 * torch.cos(torch.arange(hidden.shape[-1])))

        engine._model.model.norm.register_forward_hook(disturb)


class DecodesOtherwise(ComputesOtherwise):
    """Hidden states that are off where a token is fed after a cache, and there alone."""

    decoding_alone = True


@contextmanager
def serving(model_path: Path, fault: type[Fault] | None = None) -> Iterator[str]:
    """An embedded server of the model with the fault, at the address that it yields."""
    service = Service()
    app: Any = create_app(service, None)
    if fault is not None:
        app = fault(app)
        if isinstance(app, IgnoresWeights):
            app.model_path = model_path

    def load() -> Engine:
        engine = Engine(model_path, "cpu", "float32")
        if isinstance(app, TellsPrompts):
            app.plant(engine)
        return engine

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        service.load(load).result(60)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def all_serving(engines: dict[str, tuple[Path, type[Fault] | None]]) -> Iterator[dict[str, str]]:
    """Several, by name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(serving(*engine)) for name, engine in engines.items()}
