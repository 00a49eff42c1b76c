"""The gateway's HTTP face: vLLM's generate route, a key before each path, and errors as vLLM writes them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from megatron_rapo.episode.environment import Turn
from megatron_rapo.gateway.protocol import Asked, Heard, answer_of
from megatron_rapo.gateway.route import Refusal, Route

SESSION = "x-session-id"
"""The header that tells agents of one episode apart."""

_CLIENT_GONE = 499  # of no standard; nobody reads it
_KINDS = {400: "BadRequestError", 404: "NotFoundError"}


def create_app(routes: Mapping[str, Route], model: str) -> FastAPI:
    """The application.

    Args:
        routes: of the episodes that are played, by key.
        model: the name that requests call the policy by.
    """
    app = FastAPI(title="megatron_rapo gateway", openapi_url=None)
    app.state.routes, app.state.model = routes, model
    app.include_router(_paths)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    return app


def _route(key: str, request: Request) -> Route:
    route = request.app.state.routes.get(key)
    if route is None:
        raise Refusal(404, "no episode has this key: it is over, or there was none")
    return route


RouteOf = Annotated[Route, Depends(_route)]
_paths = APIRouter(prefix="/{key}")


@_paths.get("/v1/models")
async def models(route: RouteOf, request: Request) -> dict[str, Any]:
    card = {"id": request.app.state.model, "object": "model", "max_model_len": route.max_tokens}
    return {"object": "list", "data": [card]}


@_paths.post("/inference/v1/generate")
async def generate(route: RouteOf, asked: Asked, request: Request) -> JSONResponse:
    model = request.app.state.model
    if asked.model not in (None, model):
        raise Refusal(404, f"the model {asked.model!r:.100} does not exist; the policy is called {model!r}")
    session = request.headers.get(SESSION, "")
    turn = await _while_wanted(route.begin(asked), request, route)
    route.record.add(session, asked.token_ids, turn)
    return JSONResponse(answer_of(asked, turn, asked.request_id or f"{route.key[:8]}-{route.turns}"))


@_paths.post("/recorded")
async def recorded(route: RouteOf, heard: Heard) -> dict[str, Any]:
    return {"answer": await route.recorded(heard.question, heard.answer)}


@_paths.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
async def other(route: RouteOf, path: str) -> None:
    raise Refusal(
        404,
        f"there is no /{path:.100}: texts are not exact in tokens, so only token ids pass, at "
        "/inference/v1/generate (and /v1/models tells the longest sequence, /recorded keeps an answer)",
    )


async def _while_wanted(working: asyncio.Task[Turn], request: Request, route: Route) -> Turn:
    """What is being sampled, unless the client hangs up or the episode ends before."""
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if route.over:
            raise Refusal(404, "the episode is over")
        if gone.done():
            raise Refusal(_CLIENT_GONE, "the client is gone")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(request: Request, message: str, status: int, param: str | None = None) -> JSONResponse:
    route = request.app.state.routes.get(request.path_params.get("key"))
    if route is not None and status != _CLIENT_GONE:
        route.refused += 1
    kind = _KINDS.get(status, "InternalServerError")
    told = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": told}, status)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _error(request, str(error), error.status)


async def _on_malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(map(str, first["loc"][1:]))  # behind "body"
    return _error(request, f"{param or 'body'}: {first['msg']}", 400, param or None)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(request, str(error.detail), error.status_code)


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return _error(request, f"{type(error).__name__}: {error}", 500)
