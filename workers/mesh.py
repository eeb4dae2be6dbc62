"""The ranks of one gateway and the collectives between them.

A gateway's tensor-parallel group is one failure domain: collectives exist here and nowhere else.
Every call is made by all ranks of the group in the same order and ends by completion or by the
group's deadline; after an error every rank of the group exits and is replaced as a whole.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

MEET_S = 600.0  # for a rank to find the store and the others in it; collectives may take longer


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one group find each other: a TCPStore on `host`:`port`, under `prefix`."""

    host: str
    port: int
    prefix: str


class TensorParallelGroup:
    """The collectives of one gateway's T ranks; with T = 1 every call is local and free.

    Sums are taken in rank order, so a result does not depend on who arrived first.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        rendezvous: Rendezvous | None = None,
        *,
        timeout_s: float = 60.0,
        device: torch.device | None = None,
    ) -> None:
        if size > 1 and rendezvous is None:
            raise AssertionError("a group of several ranks needs a rendezvous")
        self.rank = rank
        self.size = size
        self._device = device or torch.device("cpu")
        self._host: dist.ProcessGroup | None = None  # CPU tensors
        self._group: dist.ProcessGroup | None = None  # the model's tensors
        if rendezvous is not None and size > 1:
            store = PrefixStore(
                rendezvous.prefix,
                TCPStore(
                    rendezvous.host,
                    rendezvous.port,
                    is_master=False,
                    timeout=timedelta(seconds=MEET_S),
                ),
            )
            self._host = make_gloo_group(store, rank, size, rendezvous.host, timeout_s)
            self._group = (
                self._host
                if self._device.type == "cpu"
                else make_nccl_group(store, rank, size, self._device, timeout_s)
            )

    def all_gather_rows(self, x_SD: Tensor) -> Tensor:
        """Return the ranks' rows, one after the other: [S, D] each -> [T * S, D]."""
        if self._group is None:
            return x_SD
        x_SD = x_SD.contiguous()
        parts = [torch.empty_like(x_SD) for _ in range(self.size)]
        self._group.allgather([parts], [x_SD]).wait()  # all ranks; ends by the group's deadline
        return torch.cat(parts)

    def reduce_scatter_rows(self, x_RD: Tensor) -> Tensor:
        """Sum the ranks' partial rows and return this rank's share: [T * S, D] -> [S, D]."""
        if self._group is None:
            return x_RD
        assert x_RD.shape[0] % self.size == 0, x_RD.shape
        x_RD = x_RD.contiguous()
        received = torch.empty_like(x_RD)
        # All ranks; each sends one chunk to every other. Ends by the group's deadline.
        self._group.alltoall_base(received, x_RD, [], []).wait()
        total, *others = received.chunk(self.size)
        for part in others:
            total = total + part
        return total

    def gather_columns(self, x_TV: Tensor) -> Tensor:
        """Return the ranks' columns side by side: [T, V / size] each -> [T, V]; on every rank."""
        if self._group is None:
            return x_TV
        x_TV = x_TV.contiguous()
        parts = [torch.empty_like(x_TV) for _ in range(self.size)]
        self._group.allgather([parts], [x_TV]).wait()  # all ranks; ends by the group's deadline
        return torch.cat(parts, dim=-1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, in rank order."""
        if self._group is None:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()  # all ranks; ends by the group's deadline
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Send rank 0's bytes to all ranks; the others pass None and get them.

        Two messages: the length, then the bytes. Raises RuntimeError when a rank is gone or the
        group's deadline passes.
        """
        if self._host is None:
            assert payload is not None
            return payload
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        length = torch.zeros(1, dtype=torch.int64)
        if self.rank == 0:
            assert payload is not None
            length[0] = len(payload)
        self._host.broadcast([length], options).wait()  # all ranks, rank 0 is the source
        body = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            if payload
            else torch.empty(int(length), dtype=torch.uint8)
        )
        self._host.broadcast([body], options).wait()  # all ranks, rank 0 is the source
        return payload if payload is not None else body.numpy().tobytes()

    def close(self) -> None:
        """Leave the group: the others' calls raise within milliseconds; none may follow here."""
        self._host = self._group = None


def make_gloo_device(host: str) -> object:
    """Make the device (one epoll thread) that the Gloo groups of a process may share.

    It is bound to this node's address: the default device binds whatever the host name resolves
    to, often loopback.
    """
    return dist.ProcessGroupGloo.create_device(hostname=host)


def make_gloo_group(
    store: Store,
    rank: int,
    size: int,
    host: str,
    timeout_s: float,
    *,
    device: object | None = None,
    num_threads: int = 1,
) -> dist.ProcessGroup:
    """Open a Gloo group over its own store prefix, on a device of its own unless one is given.

    `num_threads` run its collectives; point-to-point needs none. Raises RuntimeError when a peer
    does not come within `timeout_s`.
    """
    gloo: Any = dist.ProcessGroupGloo  # its options are private names; a test holds them
    options = gloo._Options()  # noqa: SLF001
    options._devices = [device or make_gloo_device(host)]  # noqa: SLF001
    options._threads = num_threads  # noqa: SLF001
    options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001
    group: dist.ProcessGroup = gloo(store, rank, size, options)
    return group


def make_nccl_group(
    store: Store, rank: int, size: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """Open an NCCL group on one device, connected at once; needs GPUs, not run on CPU machines."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001
    backend: Any = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
    backend.eager_connect_single_device(device)
    group: dist.ProcessGroup = backend
    return group
