"""A cable to a front door that can be cut while streams run through it."""

import asyncio
import contextlib

_READ_BYTES = 65_536


class Cable:
    """Passes connections on to an endpoint, byte for byte."""

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self._ends: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []

    async def lay(self) -> str:
        """Listen, and return the HOST:PORT at which the endpoint is reached."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def cut(self, *, one_end: bool = False) -> int:
        """Reset all connections, or their client's end only; returns how many there were.

        After a cut at one end the front door still believes in its clients.
        """
        ends, self._ends = self._ends, []
        for client, door in ends:
            client.transport.abort()
            if not one_end:
                door.transport.abort()
        return len(ends)

    async def close(self) -> None:
        """Cut everything and listen no more."""
        self.cut()
        for task in self._passing:
            task.cancel()
        if self._passing:
            await asyncio.wait(self._passing)
        if self._server is not None:
            self._server.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            door_reader, door_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = (writer, door_writer)
        self._ends.append(ends)
        for source, sink in ((reader, door_writer), (door_reader, writer)):
            task = asyncio.create_task(_pass(source, sink))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass bytes on until one side ends, and then end the other one."""
    with contextlib.suppress(OSError):
        while data := await source.read(_READ_BYTES):
            sink.write(data)
            await sink.drain()
        sink.write_eof()
