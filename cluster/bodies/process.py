"""What every process has: logs, a metrics page, the newest View and an end."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry

from cluster.config import TelemetrySection
from cluster.control.ports import Opened
from cluster.runtime.nodes import node_name
from cluster.telemetry import ViewGauges, configure_logging, serve_metrics
from workers.placement import MemberId, Role, View

_log = structlog.get_logger()
_Result = TypeVar("_Result")


class Process:
    """What every body has: logs, a metrics page, the newest View and an end."""

    def __init__(
        self, role: Role, member: MemberId, telemetry: TelemetrySection, *, metrics_port: int = 0
    ) -> None:
        configure_logging(role.value, str(member), telemetry.log_level)
        self.registry = CollectorRegistry()
        self.order = (0, 0)
        self._view_gauges = ViewGauges(self.registry, str(member))
        self._metrics = (telemetry.metrics_host, metrics_port)

    def opened(self, **more: Any) -> Opened:  # noqa: ANN401
        """Describe this process, with its metrics page served."""
        host, port = self._metrics
        return Opened(
            pid=os.getpid(),
            node=node_name(),
            metrics=serve_metrics(self.registry, host, port),
            **more,
        )

    def note(self, view: View) -> None:
        """Remember the order of an adopted View."""
        if view.order > self.order:
            self.order = view.order
            self._view_gauges.set(view.term, view.version, len(view.uncovered()))


def own_port(port: int, host: str, rank: int = 0) -> int:
    """Return a configured port for a member that has a node to itself, else 0, a free one.

    Members of a cluster on one machine, which have its `host`, share the node; so do the ranks of
    a gateway, of which the first takes the port.
    """
    return 0 if host or rank else port


def _log_failure(future: "Future[None]") -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("background work failed", why=repr(error))


class LoopThread:
    """An asyncio loop in a thread of its own, since the bodies' methods are synchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="asyncio", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _Result], *, timeout_s: float) -> _Result:
        """Run a coroutine on the loop and wait; raises TimeoutError."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the loop and return at once; its failure is logged."""
        asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(_log_failure)

    def soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the loop, after all that was asked for before; returns at once."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def call(
        self, function: Callable[..., _Result], *arguments: object, timeout_s: float
    ) -> _Result:
        """Call a function on the loop and wait; raises TimeoutError."""

        async def called() -> _Result:
            return function(*arguments)

        return self.run(called(), timeout_s=timeout_s)
