"""The contract of a link: one gateway rank, one expert worker, messages both ways.

A link has one life, its incarnation: once closed or broken it is never used again, and a new one
takes its place. One broken link touches no other.
"""

from typing import Protocol

from workers.dispatch.header import Frame, Header, ReplyFrame, RequestFrame


class Link(Protocol):
    """Carries frames between two processes; the only thing that knows torch.distributed.

    Sends come from any thread, one at a time for each buffer; `receive` belongs to one thread. A
    frame belongs to the link from `send` until a message with the same `Header.buffer` has come
    back, or the link is closed; several frames of one buffer may be on their way.
    """

    incarnation: int

    def send(self, frame: Frame, header: Header) -> None:
        """Send header and rows; never waits for the peer.

        Raises LinkClosedError when the link is closed or broken, and DispatchError, before
        anything is sent, when the rows exceed the frame.
        """
        ...

    def receive(self, frame: Frame) -> Header:
        """Wait for the next message and return its header; its rows are in `frame`.

        Raises LinkClosedError when the link is closed by either side, breaks, brings a message
        that is damaged, or stays silent for the link's time-out.
        """
        ...

    def close(self) -> None:
        """Close the link from any thread; a blocked `receive` ends soon. Repeatable."""
        ...

    def request_frame(self, capacity_rows: int | None = None) -> RequestFrame:
        """Return a new frame for requests, of the agreed capacity unless a smaller one is given."""
        ...

    def reply_frame(self, capacity_rows: int | None = None) -> ReplyFrame:
        """Return a new frame for replies, of the agreed capacity unless a smaller one is given."""
        ...
