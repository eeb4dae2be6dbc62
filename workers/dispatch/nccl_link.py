"""A link between two GPUs: values over NCCL, and a Gloo link beside it that says what comes.

NCCL has neither tags nor a receive from anybody, and does not report a dead peer. So header, ids
and weights travel as a *doorbell* over a `GlooLink` of the same pair, and only the values over
NCCL, in buckets of a power of two of rows, one group for each direction (on one communicator a
reply would queue behind the next receive). A side receives only what a doorbell announced, and a
call is sent only on a buffer that the other side has free, so no kernel waits for an idle peer.
Death is seen by the doorbell's connection or by the deadline; the groups are then aborted from a
helper thread, since an abort may block. Source: reference to torchft's ProcessGroupNCCL.

Not run where this was written: there was no GPU.
"""

import threading
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from workers.clock import Clock
from workers.dispatch.gloo_link import GlooLink
from workers.dispatch.header import Frame, Header, ReplyFrame, RequestFrame
from workers.errors import LinkClosedError

_POLL_S = 20e-6


def bucket_of(num_rows: int, capacity_rows: int) -> int:
    """Return how many rows travel for `num_rows`: the next power of two, at most the capacity."""
    return min(capacity_rows, 1 << max(0, num_rows - 1).bit_length())


class NcclPair(NamedTuple):
    """The two NCCL groups of a link, one for each direction, as one side sees them."""

    outgoing: dist.ProcessGroup
    incoming: dist.ProcessGroup


def open_nccl_pair(store: Store, rank: int, device: torch.device, timeout_s: float) -> NcclPair:
    """Open both groups of a link whose doorbell is open; the peer does the same.

    Raises RuntimeError when the peer does not come within `timeout_s`.
    """
    requests = _open_group(PrefixStore("requests", store), rank, device, timeout_s)
    replies = _open_group(PrefixStore("replies", store), rank, device, timeout_s)
    return NcclPair(requests, replies) if rank == 0 else NcclPair(replies, requests)


def _open_group(
    store: Store, rank: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001 - as in workers/mesh.py
    options.config.blocking = False
    options.config.max_ctas = 2  # small kernels, so that links do not wait for each other's
    backend: Any = dist.ProcessGroupNCCL(store, rank, 2, options)
    backend.eager_connect_single_device(device)
    group: dist.ProcessGroup = backend
    return group


class NcclLink:
    """A `Link` whose frames hold their values in GPU memory; `rank` 0 is the gateway."""

    def __init__(
        self, doorbell: GlooLink, pair: NcclPair, rank: int, *, device: torch.device, clock: Clock
    ) -> None:
        self.incarnation = doorbell.incarnation
        self._doorbell = doorbell
        self._pair = pair
        self._peer = 1 - rank
        self._terms = doorbell.terms
        self._device = device
        self._clock = clock
        self._receives: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sends: dict[int, dist.Work] = {}
        self._closed = threading.Event()

    def send(self, frame: Frame, header: Header) -> None:
        """See `Link`. The values are taken in the order of the current stream."""
        if header.num_rows:
            header = header._replace(capacity=bucket_of(header.num_rows, frame.capacity))
            values = frame.values_CH[: header.capacity].view(torch.uint8)
            try:
                self._sends[header.buffer] = self._pair.outgoing.send([values], self._peer, 0)
            except RuntimeError as error:
                raise LinkClosedError(f"the link broke: {error}") from error
        self._doorbell.send(frame, header)

    def receive(self, frame: Frame) -> Header:
        """See `Link`. The values are in place when this returns."""
        header = self._doorbell.receive(frame)
        self._sends.pop(header.buffer, None)
        if header.num_rows:
            self._receive_values(frame, header.capacity)
        return header

    def _receive_values(self, frame: Frame, num_rows: int) -> None:
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._receives):
                values = frame.values_CH[:num_rows].view(torch.uint8)
                self._pair.incoming.recv([values], self._peer, 0).wait()  # the stream waits
                arrived.record()
            in_time = self._wait_for(arrived)
        except RuntimeError as error:
            self.close()
            raise LinkClosedError(f"the link broke: {error}") from error
        if not in_time:
            self.close()
            raise LinkClosedError("the values of a message did not arrive")

    def _wait_for(self, arrived: "torch.cuda.Event") -> bool:
        """Wait for an event on the device, the link's end or its time-out; whether it came."""
        deadline_s = self._clock.now_s() + self._terms.link_timeout_s
        while not arrived.query():  # type: ignore[no-untyped-call]
            if self._clock.now_s() > deadline_s or self._closed.wait(_POLL_S):
                return False
        return True

    def close(self) -> None:
        """See `Link`. The groups are aborted in the background."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._doorbell.close()
        threading.Thread(target=self._abort, name="nccl-abort", daemon=True).start()

    def _abort(self) -> None:
        for group in self._pair:
            group.abort()

    def request_frame(self, capacity_rows: int | None = None) -> RequestFrame:
        """See `Link`."""
        capacity = self._terms.capacity_rows if capacity_rows is None else capacity_rows
        return RequestFrame(self._terms.shape, capacity, device=self._device)

    def reply_frame(self, capacity_rows: int | None = None) -> ReplyFrame:
        """See `Link`."""
        capacity = self._terms.capacity_rows if capacity_rows is None else capacity_rows
        return ReplyFrame(self._terms.shape, capacity, device=self._device)
