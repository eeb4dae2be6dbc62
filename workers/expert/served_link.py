"""The worker's side of one link: frames to receive into, frames to answer from."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.dispatch.header import Flag, Header, Kind, ReplyFrame, RequestFrame
from workers.dispatch.link import Link
from workers.errors import DispatchError
from workers.placement import MemberId


class ServedLink:
    """A link to one gateway rank, with the frames of its calls.

    The gateway has at most `num_buffers` calls on a link, and uses a buffer again only when its
    reply is consumed; so there is always a frame to receive into and one to answer from.
    """

    def __init__(
        self,
        gateway: MemberId,
        rank: int,
        link: Link,
        num_buffers: int,
        on_settled: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_open = True
        self.settled: int | None = None  # the last call alone whose reply has come
        self._on_settled = on_settled
        self.gateway = gateway
        self.rank = rank
        self.link = link
        self._spare_frames = deque(link.request_frame() for _ in range(num_buffers + 1))
        self._reply_frames: dict[int, ReplyFrame] = {}
        self._begun_frames: dict[int, ReplyFrame] = {}
        self._pong_frame = link.reply_frame(0)

    def receive(self, num_layers: int) -> tuple[Header, RequestFrame] | None:
        """Wait for the next call, answering PINGs; None when the gateway says BYE.

        Raises LinkClosedError as `Link.receive` does, and DispatchError for a call that cannot be.
        """
        while True:
            frame = self._spare_frames.popleft()
            header = self.link.receive(frame)
            if header.kind == Kind.DATA:
                if header.layer >= num_layers:
                    raise DispatchError(f"a call of layer {header.layer} of {num_layers}")
                return header, frame
            self._spare_frames.append(frame)
            if header.kind == Kind.BYE:
                return None
            if header.kind == Kind.SETTLED:
                self.settled = header.message_id
                self._on_settled()
                continue
            if header.kind != Kind.PING:
                raise DispatchError(f"a message of kind {header.kind} where a call was due")
            self.link.send(self._pong_frame, header._replace(kind=Kind.PONG, num_rows=0))

    def close(self) -> None:
        """Close the link; nothing is waited for any more."""
        self.link.close()
        self.is_open = False
        self._on_settled()

    def reply_frame(self, buffer: int) -> ReplyFrame:
        """Return the frame from which a call on this buffer is answered."""
        frame = self._reply_frames.get(buffer)
        if frame is None:
            frame = self._reply_frames[buffer] = self.link.reply_frame()
        return frame

    def say_begun(self, header: Header) -> None:
        """Tell the gateway that a call of its is now computed, and nothing beside it.

        Raises LinkClosedError as `Link.send` does.
        """
        frame = self._begun_frames.get(header.buffer)
        if frame is None:
            frame = self._begun_frames[header.buffer] = self.link.reply_frame(0)
        self.link.send(frame, header._replace(kind=Kind.BEGUN, num_rows=0))

    def release(self, frame: RequestFrame) -> None:
        """Give back the frame of a call; before the call is answered."""
        self._spare_frames.append(frame)


@dataclass(slots=True, eq=False)
class Call:
    """A call that arrived and waits to be computed."""

    served: ServedLink
    header: Header
    frame: RequestFrame
    arrived_s: float

    @property
    def batch_key(self) -> tuple[int, int]:
        """Layer index and flags: calls that agree in both are computed together."""
        return self.header.layer, self.header.flags

    @property
    def is_alone(self) -> bool:
        """Whether workers may have ended by it, so that it must be computed by itself."""
        return bool(self.header.flags & Flag.ALONE)

    @property
    def is_settled(self) -> bool:
        """Whether its gateway has the reply, or is gone."""
        return self.served.settled == self.header.message_id or not self.served.is_open
