"""A TCP proxy that cuts the connections that it carries, wherever they are in what they say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_CHUNK_BYTES = 64  # small, so that a cut falls inside of messages too


class CuttingProxy:
    """Carries connections to `upstream`; None refuses them.

    `budget` says for each new connection after how many bytes from the server it is cut; None for
    never. A cut is a reset, as when a machine is gone.
    """

    def __init__(self, upstream: str | None, budget: Callable[[], int | None]) -> None:
        self.upstream = upstream
        self.num_cuts = 0
        self._budget = budget
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Cut every connection that is open."""
        self.num_cuts += bool(self._writers)
        for writer in self._writers:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until an end closes it, or it is cut."""
        if self.upstream is None:
            writer.transport.abort()
            return
        host, _, port = self.upstream.rpartition(":")
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        pumps = [
            asyncio.create_task(self._pump(reader, up_writer, None)),
            asyncio.create_task(self._pump(up_reader, writer, self._budget())),
        ]
        self._tasks |= set(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for end in (writer, up_writer):
            end.transport.abort()
        self._writers -= {writer, up_writer}
        self._tasks -= set(pumps)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if budget is not None:
                    data, budget = data[:budget], budget - len(data)
                writer.write(data)
                await writer.drain()
                if budget is not None and budget <= 0:
                    self.num_cuts += 1
                    return


@asynccontextmanager
async def cutting_proxy(
    upstream: str | None, budget: Callable[[], int | None] = lambda: None
) -> AsyncIterator[tuple[CuttingProxy, str]]:
    """Listen on a free port; yields the proxy and its address."""
    proxy = CuttingProxy(upstream, budget)
    server = await asyncio.start_server(proxy.carry, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield proxy, f"127.0.0.1:{port}"
    finally:
        server.close()
        proxy.cut()
        await server.wait_closed()
