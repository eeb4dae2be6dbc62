"""What a process that opens NCCL groups must find in its environment before it imports torch."""

from collections.abc import Mapping
from types import MappingProxyType

# By default the library kills the process when an operation fails or is late; and a group of two
# takes hundreds of MB that links do not need.
NCCL_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_PROPAGATE_ERROR": "0",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": "10",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "NCCL_MAX_NCHANNELS": "2",
        "NCCL_BUFFSIZE": "1048576",
    }
)
