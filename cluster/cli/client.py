"""What the client commands share: a channel, and the optional fields of a request."""

import contextlib
from collections.abc import Iterator

import grpc

from workers.errors import ExpertmeshError

_CONNECT_S = 10.0


@contextlib.contextmanager
def channel_to(server: str) -> Iterator[grpc.Channel]:
    """Open a channel and wait until it is connected.

    Raises:
        ExpertmeshError: Nobody listens there.
    """
    with grpc.insecure_channel(server) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise ExpertmeshError(
                f"no front door answers at {server} within {_CONNECT_S:g} s: is `expertmesh serve` "
                "running there? Name another place with --server HOST:PORT"
            ) from error
        yield channel
