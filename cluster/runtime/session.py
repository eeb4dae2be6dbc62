"""A Ray cluster that is joined, or run on this machine, as long as a context lasts."""

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.node import Node

from cluster.runtime.names import NAMESPACE
from workers.errors import UnavailableError

_REACH_S = 10.0

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_session(address: str | None, *, logs_to_console: bool, num_gpus: int) -> Iterator[str]:
    """Join the Ray cluster at `address`, or run one on this machine as long as the context lasts.

    Yields the directory of Ray's session, where every process's log lies; "" where it is not known,
    since the address is that of a Ray client server (ray://HOST:PORT). A local cluster offers
    the custom resources that pools name in a real one, and starts no process before its time.
    """
    local: dict[str, Any] = {
        "num_cpus": 2,
        "num_gpus": num_gpus,
        "include_dashboard": False,
        "object_store_memory": 80 * 2**20,  # about the least; nothing large goes through it
        "resources": {"gateway": 1000, "expert_slot": 1_000_000, "frontdoor": 1000},
        "_system_config": {"enable_worker_prestart": False},
    }
    if not address:
        _leave_out_api_server()
    if address:
        _reach(address)
    client = address is not None and address.startswith("ray://")
    quiet: dict[str, Any] = {
        "log_to_driver": logs_to_console,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    options = {**({} if client else quiet), **({} if address else local)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    context = _joined(address or "local", options)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray puts its own in their place
    try:
        yield "" if client else str(context.address_info["session_dir"])
    finally:
        ray.shutdown()


def _joined(address: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 - Ray's own
    """Join Ray, once more where its node on this machine did not come up in time."""
    for is_last in (False, True):
        try:
            return ray.init(address=address, namespace=NAMESPACE, **options)
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
            log.warning("Ray's node did not come up; trying once more: %s", error)
            ray.shutdown()
    raise AssertionError


def _reach(address: str) -> None:
    """Raise UnavailableError when nobody listens at HOST:PORT, for which Ray would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a word that Ray knows, such as auto
    try:
        with socket.create_connection((host, int(port)), _REACH_S):
            pass
    except OSError as error:
        raise UnavailableError(f"no Ray cluster is reached at {address}: {error}") from error


def _leave_out_api_server() -> None:
    """Keep Ray from starting its dashboard's process, which nothing here uses.

    Even with the dashboard and reports of use switched off it asks the clouds' metadata addresses
    where it runs (`UsageStatsHead` of ray 2.60.0), and Ray has no setting against it.
    """

    def nothing(_node: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        del include_dashboard, raise_on_failure

    Node.start_api_server = nothing  # type: ignore[assignment]
