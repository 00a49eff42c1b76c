"""Answers, and how a request finds what it asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request, Response

from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.service import Service


def _service(request: Request) -> Service:
    return request.app.state.service


def _engine(request: Request) -> Engine:
    service = _service(request)
    if service.engine is None:
        raise HTTPException(503, "the model is being loaded; ask again")
    return service.engine


ServiceOf = Annotated[Service, Depends(_service)]
EngineOf = Annotated[Engine, Depends(_engine)]


def json_answer(content: Any, status: int = 200) -> Response:
    """JSON, encoded here: FastAPI would walk through every token's log-prob first."""
    return Response(json.dumps(content), status_code=status, media_type="application/json")
