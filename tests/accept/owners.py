"""Which gateway has a request just now: directories of request ids are asked, as peers ask them.

No client can ask that, and no page tells it. A harness opens a session with a gateway under a name
of its own and asks for a request that another call has: it is refused, and hears who owns it.
Nothing changes by the question while that call lives, so only requests that are in full swing are
asked for; a claim that is granted all the same is given back at once.
"""

import asyncio
from collections.abc import AsyncIterator, Collection

import grpc

from cluster.ownership.directory import directories_of
from cluster.pb.expertmesh.v1 import cluster_pb2, gateway_pb2, gateway_pb2_grpc
from workers.placement import MemberId

NAME = "observer"
ANSWER_S = 2.0


async def owners_of(
    request_ids: Collection[str], gateways: Collection[cluster_pb2.Member]
) -> dict[str, str]:
    """Return NAME.INCARNATION of the gateway that runs each request, of those that a call has.

    All the given gateways must serve: the first of them by the order of an id keeps its claim.
    """
    endpoints = {MemberId(member.name, member.incarnation): member.endpoint for member in gateways}
    by_directory: dict[str, list[str]] = {}
    for request_id in request_ids:
        directory = directories_of(request_id, endpoints)[0]
        by_directory.setdefault(endpoints[directory], []).append(request_id)
    asked = (_ask(endpoint, ids) for endpoint, ids in by_directory.items())
    return {key: owner for found in await asyncio.gather(*asked) for key, owner in found.items()}


async def _ask(endpoint: str, request_ids: list[str]) -> dict[str, str]:
    """Ask one directory; what it does not answer in time is left out."""
    owners: dict[str, str] = {}
    try:
        async with asyncio.timeout(ANSWER_S), grpc.aio.insecure_channel(endpoint) as channel:
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Session()
            await _say(call, hello=gateway_pb2.Hello(front_door=NAME))
            for ticket, request_id in enumerate(request_ids):
                await _say(call, claim=gateway_pb2.Claim(request_id=request_id, ticket=ticket))
            left = len(request_ids)
            async for claimed in _answers(call):
                request_id = request_ids[claimed.ticket]
                if claimed.assignment:  # nobody had it
                    await _say(call, release=_release(request_id, claimed.assignment))
                elif claimed.is_known and claimed.owner:
                    owners[request_id] = claimed.owner
                left -= 1
                if not left:
                    break
            await call.done_writing()
    except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
        pass  # the gateway is gone; so nobody knows
    return owners


async def _answers(call) -> AsyncIterator[gateway_pb2.Claimed]:
    """Yield answers to questions, of all that a gateway tells."""
    async for response in call:
        if response.WhichOneof("report") == "claimed":
            yield response.claimed


async def _say(call, **command) -> None:
    await call.write(gateway_pb2.SessionRequest(**command))


def _release(request_id: str, assignment: int) -> gateway_pb2.Release:
    return gateway_pb2.Release(request_id=request_id, assignment=assignment)
