"""Messages between a gateway rank and an expert worker: a header in row 0, then rows.

All rows of a message have one stride, so that a message is a prefix of its frame and every view
is made once:

    row 0    header, 64 bytes
    request  [ hidden values: H x compute dtype | mask | K expert ids, -1 none | K weights ]
    reply    [ partial sum: H x float32 | mask | row of the request ]

Everything but the values is 32 bits wide: masks and ids are integers, weights are float32. Bit k of
a mask says that expert k of the request's row is asked for, or is in the sum. Pre-summed replies
hold one row per row of the request, in order; bit-stable ones one row per (row, expert). Shape
legend: C capacity in rows, H hidden size, K experts a row, R rows of a message.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.options import MessageShape
from workers.errors import DispatchError

VERSION = 2
OLDEST_VERSION = 1  # had neither queue depth nor payload checksum: zero, and not looked at
HEADER_BYTES = 64

_SHORT_ROWS = 64  # rows of a message whose views are kept
_MAGIC = b"XMSH"
_BODY = struct.Struct("<4sHBBqIHBBIIIBBHqI8x")
_CHECKSUM = struct.Struct("<I")


class Kind(IntEnum):
    """What a message is."""

    DATA = 1
    REPLY = 2
    STALE = 3  # a reply without the pairs whose experts the worker does not hold
    PING = 4
    PONG = 5
    BYE = 6
    BEGUN = 7  # the call that it names is now computed, and nothing beside it
    SETTLED = 8  # the reply to that call has come


class Flag(IntEnum):
    """Bits of `Header.flags`."""

    ROW_PER_EXPERT = 1  # a request for one reply row per (row, expert)
    ALONE = 2  # to be computed with nothing else, after a BEGUN; who does not know it just computes


class Status(IntEnum):
    """How the sender is."""

    OK = 0
    DRAINING = 1


class Header(NamedTuple):
    """What row 0 says; a reply echoes the request's header but for kind, status and row count.

    `buffer` names the pair of buffers that the call occupies on both sides: a message on it proves
    that the other side has received what was sent to it on that buffer before.
    """

    kind: int
    message_id: int
    incarnation: int
    layer: int = 0
    micro_batch: int = 0
    attempt: int = 0
    term: int = 0
    num_rows: int = 0
    capacity: int = 0
    buffer: int = 0
    flags: int = 0
    status: int = 0
    view_version: int = 0
    queue_depth: int = 0
    payload_checksum: int = 0
    version: int = VERSION

    def pack_into(self, raw: memoryview) -> None:
        """Write the header and its checksum into the first 64 bytes."""
        current = self.version >= VERSION
        _BODY.pack_into(
            raw, 0, _MAGIC, self.version, self.kind, self.status, self.message_id,
            self.incarnation, self.layer, self.micro_batch, self.attempt, self.term, self.num_rows,
            self.capacity, self.buffer, self.flags, self.queue_depth if current else 0,
            self.view_version, self.payload_checksum if current else 0,
        )  # fmt: skip
        _CHECKSUM.pack_into(raw, _BODY.size, zlib.crc32(raw[: _BODY.size]))

    @classmethod
    def unpack_from(cls, raw: memoryview) -> "Header":
        """Read and verify a header.

        Raises DispatchError when the bytes are not a header, were changed on the way, or are of a
        version that this side does not speak.
        """
        (
            magic, version, kind, status, message_id, incarnation, layer, micro_batch, attempt,
            term, num_rows, capacity, buffer, flags, queue_depth, view_version, payload_checksum,
        ) = _BODY.unpack_from(raw, 0)  # fmt: skip
        if magic != _MAGIC:
            raise DispatchError(f"not a message: it begins with {magic!r}")
        if not OLDEST_VERSION <= version <= VERSION:
            raise DispatchError(f"message version {version}, spoken {OLDEST_VERSION} to {VERSION}")
        if _CHECKSUM.unpack_from(raw, _BODY.size)[0] != zlib.crc32(raw[: _BODY.size]):
            raise DispatchError("the checksum of a message header does not match")
        return cls(
            kind, message_id, incarnation, layer, micro_batch, attempt, term, num_rows, capacity,
            buffer, flags, status, view_version, queue_depth, payload_checksum, version,
        )  # fmt: skip


class RowLayout(NamedTuple):
    """How a row is laid out: H values, then 32-bit words."""

    num_values: int
    dtype: torch.dtype
    num_words: int

    @property
    def value_bytes(self) -> int:
        """Bytes of the values, padded to whole 8 bytes."""
        return -(-self.num_values * self.dtype.itemsize // 8) * 8

    @property
    def stride_bytes(self) -> int:
        """Bytes from one row to the next."""
        return -(-(self.value_bytes + 4 * self.num_words) // HEADER_BYTES) * HEADER_BYTES


def request_layout(shape: MessageShape) -> RowLayout:
    """Return the layout of a request row: hidden values, mask, K ids, K weights."""
    return RowLayout(shape.hidden_size, shape.dtype, 1 + 2 * shape.top_k)


def reply_layout(shape: MessageShape) -> RowLayout:
    """Return the layout of a reply row: float32 partial, mask, row."""
    return RowLayout(shape.hidden_size, torch.float32, 2)


class RequestRows(NamedTuple):
    """The first R rows of a request."""

    values_RH: Tensor
    masks_R: NDArray[np.uint32]
    ids_RK: NDArray[np.int32]
    weights_RK: NDArray[np.float32]


class ReplyRows(NamedTuple):
    """The first R rows of a reply."""

    values_RH: Tensor
    masks_R: NDArray[np.uint32]
    rows_R: NDArray[np.int32]


class Frame:
    """One message in memory, with views over it that are made once for short messages.

    `values_CH` are the values, `words_CW` everything else. With `device`, the values live in memory
    of their own there, and only header and words are in `data`, which stays on the host.
    """

    def __init__(
        self,
        layout: RowLayout,
        capacity: int,
        *,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.capacity = capacity
        value_bytes = layout.value_bytes if device is None else 0
        self._stride = layout.stride_bytes
        if device is not None:
            self._stride = RowLayout(0, layout.dtype, layout.num_words).stride_bytes
        self.data = torch.empty(
            (capacity + 1) * self._stride, dtype=torch.uint8, pin_memory=pin_memory
        )
        rows = self.data.view(capacity + 1, self._stride)[1:]
        raw_rows: NDArray[np.uint8] = rows.numpy()
        self.raw = memoryview(self.data.numpy())  # type: ignore[arg-type]
        self.words_CW: NDArray[np.int32] = raw_rows[
            :, value_bytes : value_bytes + 4 * layout.num_words
        ].view(np.int32)
        self._messages: dict[int, Tensor] = {}  # views for the lengths that were used
        self.values_CH: Tensor = (
            rows[:, : layout.num_values * layout.dtype.itemsize].view(layout.dtype)
            if device is None
            else torch.empty((capacity, layout.num_values), dtype=layout.dtype, device=device)
        )

    def message(self, num_rows: int) -> Tensor:
        """Return the bytes of the message: header and `num_rows` rows.

        Raises DispatchError when the rows exceed the capacity, which would abort the receiver.
        """
        if not 0 <= num_rows <= self.capacity:
            raise DispatchError(f"{num_rows} rows in a frame of {self.capacity}")
        message = self._messages.get(num_rows)
        if message is None:
            message = self.data[: (num_rows + 1) * self._stride]
            if num_rows <= _SHORT_ROWS:
                self._messages[num_rows] = message
        return message

    def checksum(self, num_rows: int) -> int:
        """Return the checksum of the rows in `data`; never 0, which stands for none."""
        return zlib.crc32(self.raw[self._stride : (num_rows + 1) * self._stride]) or 1

    def seal(self, header: Header, *, payload_checksum: bool = False) -> None:
        """Write the header of a message whose rows are in place."""
        if payload_checksum:
            header = header._replace(payload_checksum=self.checksum(header.num_rows))
        header.pack_into(self.raw)

    def open(self) -> Header:
        """Read the header of a received message and verify what it promises.

        Raises DispatchError when header or rows were changed or do not fit.
        """
        header = Header.unpack_from(self.raw)
        if header.num_rows > self.capacity:
            raise DispatchError(f"a message of {header.num_rows} rows for {self.capacity}")
        if header.payload_checksum and header.payload_checksum != self.checksum(header.num_rows):
            raise DispatchError(f"the rows of message {header.message_id} were changed on the way")
        return header


class RequestFrame(Frame):
    """A frame for requests."""

    def __init__(
        self,
        shape: MessageShape,
        capacity: int,
        *,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(request_layout(shape), capacity, pin_memory=pin_memory, device=device)
        self._top_k = shape.top_k
        self._rows: dict[int, RequestRows] = {}

    def rows(self, num_rows: int) -> RequestRows:
        """Return views of the first rows."""
        rows = self._rows.get(num_rows)
        if rows is None:
            words_RW = self.words_CW[:num_rows]
            rows = RequestRows(
                self.values_CH[:num_rows],
                words_RW[:, 0].view(np.uint32),
                words_RW[:, 1 : 1 + self._top_k],
                words_RW[:, 1 + self._top_k :].view(np.float32),
            )
            if num_rows <= _SHORT_ROWS:
                self._rows[num_rows] = rows
        return rows


class ReplyFrame(Frame):
    """A frame for replies."""

    def __init__(
        self,
        shape: MessageShape,
        capacity: int,
        *,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(reply_layout(shape), capacity, pin_memory=pin_memory, device=device)
        self._rows: dict[int, ReplyRows] = {}

    def rows(self, num_rows: int) -> ReplyRows:
        """Return views of the first rows."""
        rows = self._rows.get(num_rows)
        if rows is None:
            words_RW = self.words_CW[:num_rows]
            rows = ReplyRows(
                self.values_CH[:num_rows], words_RW[:, 0].view(np.uint32), words_RW[:, 1]
            )
            if num_rows <= _SHORT_ROWS:
                self._rows[num_rows] = rows
        return rows
