"""A cable to a front door that can be cut while streams run through it."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

_READ_BYTES = 65_536


@dataclass(slots=True, eq=False)
class _Strand:
    """One connection: its end at the client and its end at the front door."""

    client: asyncio.StreamWriter
    door: asyncio.StreamWriter
    endpoint: str  # the front door's
    is_held: bool = False  # the front door's end stays open whatever becomes of the other
    is_silent: bool = False  # nothing comes through any more


class Cable:
    """Passes connections on to an endpoint, byte for byte.

    Args:
        endpoint: HOST:PORT, or what chooses it for each new connection, as a Kubernetes Service
            does.
    """

    def __init__(self, endpoint: str | Callable[[], str]) -> None:
        self._endpoint = endpoint
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self._strands: set[_Strand] = set()

    async def lay(self) -> str:
        """Listen, and return the HOST:PORT at which the endpoint is reached."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    @property
    def endpoints(self) -> list[str]:
        """Where the connections lead that clients have now."""
        return [strand.endpoint for strand in self._strands if not strand.is_held]

    def cut(self, *, one_end: bool = False, to: str = "") -> int:
        """Reset all connections, or their client's end only; returns how many there were.

        After a cut at one end the front door still believes in its clients. Only those `to` one
        endpoint, where it is given.
        """
        whole = [s for s in self._strands if not s.is_held and to in ("", s.endpoint)]
        for strand in whole:
            strand.is_held = one_end
            strand.client.transport.abort()
            if not one_end:
                strand.door.transport.abort()
        return len(whole)

    def silence(self, *, to: str = "") -> int:
        """Lose all that is said from now on, and tell neither end; returns in how many connections.

        As where a machine on the way is gone: each end finds out by its own keepalive.
        """
        whole = [s for s in self._strands if not s.is_held and to in ("", s.endpoint)]
        for strand in whole:
            strand.is_held = strand.is_silent = True
        return len(whole)

    async def close(self) -> None:
        """Cut everything and listen no more."""
        for strand in self._strands:
            strand.client.transport.abort()
            strand.door.transport.abort()
        for task in self._passing:
            task.cancel()
        if self._passing:
            await asyncio.wait(self._passing)
        if self._server is not None:
            self._server.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        endpoint = self._endpoint if isinstance(self._endpoint, str) else self._endpoint()
        host, _, port = endpoint.rpartition(":")
        try:
            door_reader, door_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        strand = _Strand(writer, door_writer, endpoint)
        self._strands.add(strand)
        for way in (
            self._pass(reader, door_writer, strand),
            self._pass(door_reader, writer, strand),
        ):
            task = asyncio.create_task(way)
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, strand: _Strand
    ) -> None:
        """Pass bytes on until one end closes or breaks, and then close the other one."""
        with contextlib.suppress(OSError):
            while data := await source.read(_READ_BYTES):
                if not strand.is_silent:
                    sink.write(data)
                    await sink.drain()
        if not (strand.is_held and sink is strand.door):
            sink.close()
            self._strands.discard(strand)
