"""A link over a Gloo group of two members, on host memory.

What Gloo does, and what this file does about it (each has a test in tests/ranks/test_gloo_traps):
there is no poll that leaves the link alive, so `receive` blocks a thread of its own; a Work that is
dropped before it is done wedges the link, so every Work is kept until waited for; a message longer
than the posted receive aborts the process, so sizes are checked before sending; closing does not
wake a blocked receive, but a second receive that times out closes the pair, which does; a message
of which only a part arrived is never reported, so every wait has a deadline.
"""

import contextlib
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from workers.dispatch.header import VERSION, Frame, Header, ReplyFrame, RequestFrame
from workers.dispatch.options import LinkTerms
from workers.errors import DispatchError, LinkClosedError

_MESSAGES = 0  # the tag of all messages; they arrive in order
_CLOSING = 1  # the tag of the receive that closes the pair
_AT_ONCE = timedelta(milliseconds=1)


class GlooLink:
    """A `Link` over one two-member `ProcessGroupGloo`; `rank` 0 is the gateway, 1 the worker."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        terms: LinkTerms,
        *,
        incarnation: int,
        pin_memory: bool = False,
    ) -> None:
        self.incarnation = incarnation
        self._group = group
        self._peer = 1 - rank
        self.terms = terms
        self._pin_memory = pin_memory
        self._timeout = timedelta(seconds=terms.link_timeout_s)
        self._sending: dict[int, list[tuple[dist.Work, Frame]]] = {}
        self._receiving: dist.Work | None = None
        self._closing: dist.Work | None = None
        self._closed = False
        self._send_lock = threading.Lock()

    def send(self, frame: Frame, header: Header) -> None:
        """See `Link`."""
        message = frame.message(header.num_rows)
        if self.terms.version != VERSION:
            header = header._replace(version=self.terms.version)
        frame.seal(header, payload_checksum=self.terms.payload_checksum)
        # Held until the Work is kept: the answer may be here before `send` has returned.
        with self._send_lock:
            if self._closed:
                raise LinkClosedError("the link is closed")
            sending = self._sending.setdefault(header.buffer, [])
            assert all(used is not frame for _, used in sending), f"{header.buffer} is in use"
            try:
                work = self._group.send([message], self._peer, _MESSAGES)
            except RuntimeError as error:
                raise LinkClosedError(f"the link broke: {error}") from error
            sending.append((work, frame))

    def receive(self, frame: Frame) -> Header:
        """See `Link`."""
        try:
            return self._receive(frame)
        except RuntimeError as error:
            self.close()
            raise LinkClosedError(f"the link broke: {error}") from error
        except DispatchError:
            self.close()
            raise

    def _receive(self, frame: Frame) -> Header:
        if self._closed:
            raise LinkClosedError("the link is closed")
        work = self._group.recv([frame.data], self._peer, _MESSAGES)
        self._receiving = work
        work.wait(self._timeout)  # the peer; ends by its death, by close, or by the time-out
        header = frame.open()
        with self._send_lock:
            sent = self._sending.pop(header.buffer, ())
        for work, _ in sent:
            work.wait(self._timeout)  # the peer has it, or it would not have answered
        return header

    def close(self) -> None:
        """See `Link`."""
        with self._send_lock:
            if self._closed:
                return
            self._closed = True
            undelivered = [work for sent in self._sending.values() for work, _ in sent]
        with contextlib.suppress(RuntimeError):  # its time-out is what closes the pair
            self._closing = self._group.recv([torch.empty(1)], self._peer, _CLOSING)
            self._closing.wait(_AT_ONCE)
        for work in undelivered:
            with contextlib.suppress(RuntimeError):  # nobody counts on it any more
                work.wait(_AT_ONCE)

    def request_frame(self, capacity_rows: int | None = None) -> RequestFrame:
        """See `Link`."""
        capacity = self.terms.capacity_rows if capacity_rows is None else capacity_rows
        return RequestFrame(self.terms.shape, capacity, pin_memory=self._pin_memory)

    def reply_frame(self, capacity_rows: int | None = None) -> ReplyFrame:
        """See `Link`."""
        capacity = self.terms.capacity_rows if capacity_rows is None else capacity_rows
        return ReplyFrame(self.terms.shape, capacity, pin_memory=self._pin_memory)
