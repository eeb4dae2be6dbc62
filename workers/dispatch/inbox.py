"""Where the threads of the links leave replies and news for the model's thread, and wake it."""

import threading
from collections import deque
from typing import NamedTuple

from workers.dispatch.header import Header, ReplyFrame
from workers.dispatch.link_set import OpenLink, Peer

_SILENT = 1 << 62


class Arrived(NamedTuple):
    """A reply, and when it came."""

    peer: Peer
    opened: OpenLink
    header: Header
    frame: ReplyFrame
    at_s: float


class Inbox:
    """Replies and lost links from any thread, taken by one.

    The one that takes says how many replies are worth waking it for; news always are.
    """

    def __init__(self) -> None:
        self.replies: deque[Arrived] = deque()
        self.lost: deque[tuple[OpenLink, float]] = deque()  # and when that was noticed
        self.has_news = False  # of links, Views, deadlines or closing
        self._bell = threading.Lock()  # taken while silent: releasing it rings
        self._bell.acquire()
        self._ring_at = _SILENT

    def put(self, arrived: Arrived) -> None:
        """Leave a reply."""
        self.replies.append(arrived)
        if len(self.replies) >= self._ring_at:
            self._ring()

    def tell(self) -> None:
        """Leave news."""
        self.has_news = True
        self._ring()

    def listen(self, num_replies: int, timeout_s: float) -> None:
        """Wait until so many replies are here, or news; a time-out is news too."""
        self._ring_at = num_replies
        # Looked at after the threshold is set, since whoever came before did not ring.
        if (
            not self.has_news
            and len(self.replies) < num_replies
            and not self._bell.acquire(timeout=timeout_s)
        ):
            self.has_news = True
        self._ring_at = _SILENT

    def _ring(self) -> None:
        if self._bell.locked():
            try:
                self._bell.release()
            except RuntimeError:  # somebody else rang in between
                return
