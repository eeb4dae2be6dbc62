"""Safetensors files, read by slices: headers first, then nothing but what is asked for.

The format is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes, row
major. We read it with positioned reads instead of a memory map: a file that shrinks under a map
kills the process, and a short read names the tensor.
"""

import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.config import read_json

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
        view = memoryview(data.numpy())
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
            return dict(read_header(self.directory / SINGLE_FILE))
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise CheckpointError(f"{index}: has no weight_map")
        headers = {f: dict(read_header(self.directory / f)) for f in sorted(set(file_of.values()))}
        for name, file in file_of.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.directory / file}: no tensor {name}, which {index.name} places there"
                )
        return {name: headers[file][name] for name, file in file_of.items()}

    def _fingerprint(self) -> str:
        """Name the weights: equal for copies of a checkpoint on any machine.

        A hash of the configuration, of every tensor's name, type, shape and place, and of the first
        and last bytes of every file's data, which tell two trainings of one architecture apart.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
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


def read_header(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Read and check one file's header.

    Raises CheckpointError when the file is missing, is no safetensors file, holds more or less data
    than its header says, or has a tensor whose bytes do not fit its type and shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: is truncated or no safetensors file: {size} bytes, of which the "
                    f"header would take {length}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header is no JSON: {error}") from error
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        info = TensorInfo(
            path.name, _dtype(path, name, entry), tuple(entry["shape"]), 8 + length + begin
        )
        if begin != end or stop - begin != info.num_bytes:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(info.shape)} lies in bytes {begin} to "
                f"{stop} of the data; expected {end} to {end + info.num_bytes}"
            )
        end = stop
        yield name, info
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header asks for {8 + length + end}")


def _dtype(path: Path, name: str, entry: Mapping[str, Any]) -> torch.dtype:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {entry['dtype']}; known: {', '.join(_DTYPES)}"
        )
    return dtype


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
