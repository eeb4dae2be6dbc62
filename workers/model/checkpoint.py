"""Safetensors files, read by slices: headers first, then nothing but what is asked for.

The format is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes, row
major. We read it with positioned reads instead of a memory map: a file that shrinks under a map
kills the process, and a short read names the tensor.
"""

import hashlib
import itertools
import json
import math
import operator
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.published import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts from the start of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of one directory: a single file, or several with an index.

    Opening reads and checks every header: a missing or truncated file, an index that names what is
    not there and a tensor whose size does not fit raise CheckpointError. `read` may be called from
    several threads.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.tensors: Mapping[str, TensorInfo] = self._open()
        self.fingerprint = self._fingerprint()
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._bytes_read

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read a tensor or a slice of it, in the published dtype, from just the bytes it needs.

        Args:
            name: Published name.
            index: A slice with step 1 for each leading dimension; further dimensions are whole.

        Raises:
            CheckpointError: There is no such tensor, or its file ends too early by now.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory}: no tensor {name}")
        bounds = _bounds(info.shape, index)
        shape = tuple(len(b) for b in bounds)
        item = info.dtype.itemsize
        data = torch.empty(math.prod(shape) * item, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        for start, count in _runs(info.shape, bounds):
            self._read_into(view[done : done + count * item], name, info, start * item)
            done += count * item
        assert done == len(view), (name, index)
        with self._lock:
            self._bytes_read += done
        return data.view(info.dtype).view(shape)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_into(self, view: memoryview, name: str, info: TensorInfo, start: int) -> None:
        file = self._file(info.file)
        while view:
            count = os.preadv(file, [view], info.offset + start)
            if count == 0:
                raise CheckpointError(f"{self.directory / info.file}: ends within tensor {name}")
            view, start = view[count:], start + count

    def _file(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def _open(self) -> dict[str, TensorInfo]:
        index = self.directory / INDEX_FILE
        if not index.exists():
            return read_header(self.directory / SINGLE_FILE)
        file_of = read_json(index).section("weight_map").values
        if not all(isinstance(file, str) for file in file_of.values()):
            raise CheckpointError(f"{index}: weight_map does not map names of tensors to files")
        headers = {
            file: read_header(self.directory / file) for file in sorted(set(file_of.values()))
        }
        for name, file in file_of.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.directory / file}: has no tensor {name}, contrary to {INDEX_FILE}"
                )
        return {name: headers[file][name] for name, file in file_of.items()}

    def _fingerprint(self) -> str:
        """Name the weights: equal for copies of a checkpoint on any machine.

        A hash of the configuration, of every tensor's name, type, shape and place, and of the first
        and last bytes of every file's data, which tell two trainings of one architecture apart.
        """
        try:
            digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: config.json cannot be read: {error.strerror}"
            ) from error
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info}\n".encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            with (self.directory / file).open("rb") as opened:
                start = int.from_bytes(opened.read(8), "little")
                opened.seek(8 + start)
                digest.update(opened.read(_PROBE_BYTES))
                opened.seek(max(8 + start, opened.seek(0, os.SEEK_END) - _PROBE_BYTES))
                digest.update(opened.read(_PROBE_BYTES))
        return digest.hexdigest()[:16]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check one file's header; the tensors come in the order of their bytes.

    Raises CheckpointError when the file is missing, is no safetensors file, holds more or less data
    than its header says, or has a tensor whose bytes do not fit its type and shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(header) < max(length, 2):
        raise CheckpointError(
            f"{path}: is truncated or no safetensors file: {size} bytes, of which the header would "
            f"take {length}"
        )
    tensors = _parse_header(path, header)
    end = 8 + length
    for name, info in tensors.items():
        if info.offset != end:
            raise CheckpointError(
                f"{path}: tensor {name} begins at byte {info.offset}, expected {end}"
            )
        end += info.num_bytes
    if end != size:
        last = next(reversed(tensors), "its header")
        raise CheckpointError(f"{path}: has {size} bytes; {last} would end at byte {end}")
    return tensors


def _parse_header(path: Path, header: bytes) -> dict[str, TensorInfo]:
    """Read the entries, ordered by offset; that they leave no gap is checked by the caller."""
    sizes: dict[str, int] = {}
    tensors: dict[str, TensorInfo] = {}
    name = "(none)"
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(operator.index(n) for n in entry["shape"])
            tensors[name] = TensorInfo(
                path.name, _DTYPES[entry["dtype"]], shape, 8 + len(header) + begin
            )
            sizes[name] = end - begin
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: malformed header at tensor {name}: {error!r}; "
            f"known dtypes: {', '.join(_DTYPES)}"
        ) from error
    for name, info in tensors.items():
        if min(info.shape, default=0) < 0 or info.num_bytes != sizes[name]:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(info.shape)} and {info.dtype} needs "
                f"{info.num_bytes} bytes, its place has {sizes[name]}"
            )
    return dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[range, ...]:
    assert len(index) <= len(shape), (shape, index)
    bounds = tuple(range(*s.indices(n)) for s, n in zip(index, shape, strict=False))
    assert all(b.step == 1 for b in bounds), index
    return bounds + tuple(range(n) for n in shape[len(index) :])


def _runs(shape: tuple[int, ...], bounds: tuple[range, ...]) -> Iterator[tuple[int, int]]:
    """Yield the contiguous runs of a slice, in row-major order, as (first element, count)."""
    if not shape:
        yield 0, 1
        return
    # Dimensions taken whole at the end make one run together with the last one that is not.
    last = len(shape) - 1
    while last > 0 and len(bounds[last]) == shape[last]:
        last -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(last + 1)]
    count = len(bounds[last]) * strides[last]
    if count == 0:
        return
    for outer in itertools.product(*bounds[:last]):
        start = sum(i * stride for i, stride in zip(outer, strides, strict=False))
        yield start + bounds[last].start * strides[last], count
