"""A front door that does what a script says, one line for each call that it gets."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cluster.pb.expertmesh.v1 import inference_pb2, inference_pb2_grpc

Line = Callable[[Any, Any], Awaitable[Any]]


def refuses(code: grpc.StatusCode, message: str = "scripted", **metadata: str) -> Line:
    """End the call with a status."""

    async def line(request, context):
        pairs = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        await context.abort(code, message, pairs)

    return line


def says(*token_ids: int, then: Line | None = None) -> Line:
    """Go on behind what the request has with these tokens; end the sequence, or do what is next."""

    async def line(request, context):
        has = sum(len(point.token_ids) for point in request.resume_from)
        await context.write(inference_pb2.GenerateResponse(request_id=request.request_id, seed=5))
        for number, token_id in enumerate(token_ids, has):
            response = inference_pb2.GenerateResponse(
                first_token_index=number, token_ids=[token_id], text=f"<{token_id}>"
            )
            if then is None and number == has + len(token_ids) - 1:
                response.finish.reason = inference_pb2.FINISH_REASON_LENGTH
            await context.write(response)
        if then is not None:
            await then(request, context)

    return line


async def ends(request, context) -> None:
    """End the call as if all had been said."""


class ScriptedDoor(inference_pb2_grpc.InferenceServiceServicer):
    """Answers calls by its script; keeps the requests."""

    def __init__(self, script: Sequence[Line]) -> None:
        self.requests: list[Any] = []
        self._script = iter(script)

    async def Generate(self, request, context):  # type: ignore[override]
        self.requests.append(request)
        await next(self._script)(request, context)

    async def Tokenize(self, request, context):
        self.requests.append(request)
        return await next(self._script)(request, context)


@asynccontextmanager
async def scripted_door(*script: Line) -> AsyncIterator[tuple[ScriptedDoor, str]]:
    """Listen on a free port; yields the front door and its address."""
    door = ScriptedDoor(script)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(door, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield door, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
