"""The routes by which weights and memory change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from megatron_rapo.embedded_server.answers import EngineOf, ServiceOf, json_answer
from megatron_rapo.embedded_server.unpickle import load_named_tensors
from megatron_rapo.embedded_server.weight_requests import (
    DTYPES,
    BeginUpdateRequest,
    DestroyGroupRequest,
    EndUpdateRequest,
    InitGroupRequest,
    MemoryRequest,
    RenameRequest,
    UpdateFromDiskRequest,
    UpdateFromDistributedRequest,
    UpdateFromShardsRequest,
    UpdateFromTensorRequest,
)
from megatron_rapo.errors import RapoError
from megatron_rapo.wire.access import is_loopback
from megatron_rapo.wire.bucket import lay_out
from megatron_rapo.wire.slices import message_bytes, unpack

weight_routes = APIRouter()


def _own_peer(request: Request) -> None:
    """Without a key, only this machine is trusted with what is unpickled or connected to."""
    host = request.client.host if request.client else ""
    if request.app.state.api_key is None and not is_loopback(host):
        raise HTTPException(
            403, f"{host or 'an unknown peer'} is not this machine, and the server has no API key"
        )


peers_only = [Depends(_own_peer)]


async def _done(work: Awaitable[None], message: str) -> Response:
    """SGLang's answer to a change of weights."""
    try:
        await work
    except RapoError as error:
        return json_answer({"success": False, "message": str(error)}, status=400)
    return json_answer({"success": True, "message": message})


@weight_routes.post("/update_weights_from_disk")
async def update_weights_from_disk(
    body: UpdateFromDiskRequest, service: ServiceOf, engine: EngineOf
) -> Response:
    if body.abort_all_requests:
        service.abort()

    def job() -> None:
        engine.load_checkpoint(Path(body.model_path), body.weight_version)

    return await _done(service.work(job), "weights updated")


@weight_routes.post("/init_weights_update_group", dependencies=peers_only)
async def init_weights_update_group(body: InitGroupRequest, service: ServiceOf, _: EngineOf) -> Response:
    # In a thread of its own: a trainer that does not come holds up nothing else.
    joining = asyncio.to_thread(
        service.groups.join,
        body.group_name,
        body.master_address,
        body.master_port,
        body.rank_offset,
        body.world_size,
        body.backend,
    )
    return await _done(joining, f"joined the group {body.group_name!r}")


@weight_routes.post("/destroy_weights_update_group")
async def destroy_weights_update_group(
    body: DestroyGroupRequest, service: ServiceOf, _: EngineOf
) -> Response:
    return await _done(
        service.work(lambda: service.groups.leave(body.group_name)), f"left the group {body.group_name!r}"
    )


@weight_routes.post("/begin_weight_update")
async def begin_weight_update(body: BeginUpdateRequest, service: ServiceOf, engine: EngineOf) -> Response:
    return await _done(service.work(engine.weights.begin), "the update has begun")


@weight_routes.post("/end_weight_update")
async def end_weight_update(body: EndUpdateRequest, service: ServiceOf, engine: EngineOf) -> Response:
    service.sender_memory.end_update()
    return await _done(service.work(engine.weights.end), "the update has ended")


@weight_routes.post("/update_weights_from_distributed", dependencies=peers_only)
async def update_weights_from_distributed(
    body: UpdateFromDistributedRequest, service: ServiceOf, engine: EngineOf
) -> Response:
    if body.abort_all_requests:
        service.abort()
    layout = lay_out(body.names, [DTYPES[name] for name in body.dtypes], body.shapes)

    def job() -> None:
        # All that can be refused is refused before the server enters a collective.
        service.groups.check(body.group_name)
        engine.weights.check(dict(zip(body.names, body.shapes, strict=True)))
        named = service.groups.receive(
            body.group_name, layout, flattened=body.load_format is not None, device=engine.device
        )
        engine.write_weights(named, body.weight_version)

    return await _done(service.work(job), f"{len(layout)} tensors updated")


@weight_routes.post("/update_weights_from_shards", dependencies=peers_only)
async def update_weights_from_shards(
    body: UpdateFromShardsRequest, service: ServiceOf, engine: EngineOf
) -> Response:
    """An extension of SGLang's contract: trainer ranks send what they hold, without gathering it first."""
    if body.abort_all_requests:
        service.abort()
    dtype = DTYPES[body.dtype]

    def job() -> None:
        service.groups.check(body.group_name)
        places = [[engine.weights.place(one) for one in message.slices] for message in body.messages]
        for message, targets in zip(body.messages, places, strict=True):
            nbytes = message_bytes(targets, dtype)
            flat = service.groups.receive_from(body.group_name, message.source, nbytes, engine.device)
            engine.weights.write_slices(message.slices, unpack(flat, targets, dtype), None)
        engine.weights.write_slices([], [], body.weight_version)

    return await _done(service.work(job), f"{len(body.messages)} messages taken")


@weight_routes.post("/update_weights_from_tensor", dependencies=peers_only)
async def update_weights_from_tensor(
    body: UpdateFromTensorRequest, service: ServiceOf, engine: EngineOf
) -> Response:
    if body.abort_all_requests:
        service.abort()

    def job() -> None:
        engine.weights.check({})
        named = load_named_tensors(body.serialized_named_tensors[0], flattened=body.load_format is not None)
        service.sender_memory.keep(tensor for _, tensor in named)
        engine.write_weights(named, body.weight_version)

    return await _done(service.work(job), "tensors updated")


@weight_routes.post("/update_weight_version")
async def update_weight_version(body: RenameRequest, service: ServiceOf, engine: EngineOf) -> Response:
    if body.abort_all_requests:
        service.abort()
    return await _done(
        service.work(lambda: engine.weights.rename(body.new_version)), f"the version is {body.new_version}"
    )


@weight_routes.get("/weights_checksum")
async def weights_checksum(service: ServiceOf, engine: EngineOf) -> Response:
    """An extension of SGLang's contract: `tensor_checksum` of each tensor, as decimal text."""
    checksums, version = await service.work(lambda: (engine.weights.checksums(), engine.weight_version))
    texts = {name: str(value) for name, value in checksums.items()}
    return json_answer({"weight_version": version, "checksums": texts})


@weight_routes.post("/release_memory_occupation")
async def release_memory_occupation(body: MemoryRequest, service: ServiceOf, engine: EngineOf) -> Response:
    await service.work(lambda: engine.release(body.named))
    return json_answer(None)


@weight_routes.post("/resume_memory_occupation")
async def resume_memory_occupation(body: MemoryRequest, service: ServiceOf, engine: EngineOf) -> Response:
    await service.work(lambda: engine.resume(body.named))
    return json_answer(None)
