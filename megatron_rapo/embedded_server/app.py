"""The embedded server's HTTP face: the part of SGLang's contract that training needs."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from megatron_rapo import __version__
from megatron_rapo.embedded_server.answers import EngineOf, ServiceOf, json_answer
from megatron_rapo.embedded_server.engine import CannotGenerate
from megatron_rapo.embedded_server.protocol import (
    AbortRequest,
    ContinueRequest,
    GenerateRequest,
    PauseRequest,
    SamplingParams,
    to_answer,
    to_samples,
)
from megatron_rapo.embedded_server.service import Service
from megatron_rapo.embedded_server.weight_routes import weight_routes
from megatron_rapo.errors import RapoError


def create_app(service: Service, api_key: str | None) -> FastAPI:
    """The application; with a key, every request but /health must carry it as `Authorization: Bearer KEY`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="megatron_rapo embedded rollout server", version=__version__, lifespan=lifespan)
    app.state.service, app.state.api_key = service, api_key
    app.include_router(_open_routes)
    for routes in (_routes, weight_routes):
        app.include_router(routes, dependencies=[Depends(_check_key)])
    app.add_exception_handler(CannotGenerate, _on_unavailable)
    app.add_exception_handler(RapoError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    return app


def _check_key(request: Request) -> None:
    key = request.app.state.api_key
    given = request.headers.get("authorization", "")
    if key is not None and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise HTTPException(401, "send the server's API key as the header Authorization: Bearer KEY")


_open_routes, _routes = APIRouter(), APIRouter()


@_open_routes.get("/health")
async def health(engine: EngineOf) -> Response:
    return Response()


@_routes.get("/health_generate")
async def health_generate(service: ServiceOf, engine: EngineOf) -> Response:
    request = GenerateRequest(input_ids=[0], sampling_params=SamplingParams(max_new_tokens=1, temperature=0))
    await service.generate(to_samples(request, engine), rid=None)
    return Response()


@_routes.get("/model_info")
async def model_info(engine: EngineOf) -> dict[str, Any]:
    return {
        "model_path": str(engine.model_path),
        "is_generation": True,
        "weight_version": engine.weight_version,
        "vocab_size": engine.vocab_size,
        "context_length": engine.context_length,
    }


@_routes.get("/server_info")
async def server_info(engine: EngineOf) -> dict[str, Any]:
    return {
        "server": "megatron_rapo.embedded_server",
        "version": __version__,
        "tp_size": 1,
        **engine.computing(),
    }


@_routes.post("/generate")
async def generate(body: GenerateRequest, service: ServiceOf, engine: EngineOf) -> Response:
    samples = to_samples(body, engine)
    completions, version = await service.generate(samples, body.rid)
    return json_answer(to_answer(body, samples, completions, version, engine))


@_routes.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(service: ServiceOf, timeout: float = 0.0) -> Response:
    if not await service.idle(timeout):
        raise HTTPException(400, f"requests are still running after {timeout} s; pause, or wait longer")
    return Response("nothing is cached beyond a request\n")


@_routes.post("/pause_generation")
async def pause_generation(service: ServiceOf, body: PauseRequest | None = None) -> dict[str, str]:
    service.pause((body or PauseRequest()).mode)
    return {"status": "ok", "message": "generation is paused"}


@_routes.post("/continue_generation")
async def continue_generation(service: ServiceOf, body: ContinueRequest | None = None) -> dict[str, str]:
    service.resume()
    return {"status": "ok", "message": "generation goes on"}


@_routes.post("/abort_request")
async def abort_request(body: AbortRequest, service: ServiceOf) -> Response:
    if body.rid is None and not body.abort_all:
        raise RapoError("send rid, or abort_all = true")
    service.abort(None if body.abort_all else body.rid)
    return Response()


def _error(message: str, status: int) -> Response:
    return json_answer({"error": {"message": message}}, status)


async def _on_refusal(request: Request, error: Exception) -> Response:
    return _error(str(error), 400)


async def _on_unavailable(request: Request, error: Exception) -> Response:
    return _error(str(error), 503)


async def _on_malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [
        f"{'.'.join(map(str, e['loc']))} = {str(e.get('input'))[:100]}: {e['msg']}"
        for e in error.errors()[:5]
    ]
    return _error("; ".join(problems), 400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _error(str(error.detail), error.status_code)


async def _on_failure(request: Request, error: Exception) -> Response:
    return _error(f"{type(error).__name__}: {error}", 500)
