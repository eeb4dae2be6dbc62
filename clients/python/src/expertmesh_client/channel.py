"""How this client connects: load balancing, health, keepalive, credentials."""

import json
from collections.abc import Sequence
from pathlib import Path

import grpc

from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb

Targets = str | Sequence[str]

MAX_MESSAGE_BYTES = 16 * 2**20  # as a front door takes by default

_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
# Reading calls are safe to send again without a word; the streams are sent again by this package,
# which knows what of them has arrived.
_READING_METHODS = ("Tokenize", "Detokenize", "ListModels")


def service_config() -> str:
    """Return the gRPC service config, as JSON."""
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": _SERVICE},
            "methodConfig": [
                {
                    "name": [{"service": _SERVICE, "method": name} for name in _READING_METHODS],
                    "retryPolicy": {
                        "maxAttempts": 3,
                        "initialBackoff": "0.05s",
                        "maxBackoff": "1s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ],
            "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
        }
    )


def channel_options(max_message_bytes: int, server_name: str | None) -> list[tuple[str, str | int]]:
    """Return the options of a channel.

    A front door refuses pings that come more often than every 5 s. A peer that falls silent is
    given up after 15 s.
    """
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", service_config()),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),  # else 60 s, whatever the keepalive says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # which is how long connecting may take
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.dns_min_time_between_resolutions_ms", 5_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return what every call carries beside its message."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def tls_credentials(
    *,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
) -> grpc.ChannelCredentials:
    """Return credentials for TLS; with a certificate and its key, for mutual TLS.

    Without `ca_file` the roots that gRPC ships are trusted.

    Raises:
        ValueError: A certificate has no key, or a key no certificate.
        OSError: A file cannot be read.
    """
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file and key_file are given together, or neither is")

    def content(path: str | Path | None) -> bytes | None:
        return None if path is None else Path(path).read_bytes()

    return grpc.ssl_channel_credentials(content(ca_file), content(key_file), content(cert_file))


def targets_of(target: Targets) -> tuple[str, ...]:
    """Return the targets that a caller names, one or several.

    Raises:
        ValueError: There is none.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    if not targets or not all(targets):
        raise ValueError("name at least one target, as HOST:PORT or dns:///NAME:PORT")
    return targets
