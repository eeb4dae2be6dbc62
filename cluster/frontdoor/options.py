"""The front door's settings."""

from dataclasses import dataclass

from cluster.frontdoor.tls import TlsFiles
from cluster.ownership.directory import MAX_DEATHS


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoorOptions:
    """What can be set at a front door.

    `name` tells front doors apart at the gateways. At `health_listen` health alone is answered, in
    cleartext; with `shares_port` further front doors on this node may take the same ports. Without
    `api_keys_file` and `tls.client_ca` everybody may call; `operators` may change the cluster.
    `max_requests` bounds the requests in flight, `max_waiting` those of them that have no token
    yet. `default_max_tokens` bounds a completion whose max_tokens is unset. `gateway_wait_s` is how
    long a request waits while no gateway can take it. `expected_tokens` stands for the length of a
    completion when gateways are compared, and fetching a prefix of a prompt from another gateway
    counts like computing `prefix_fetch_tokens` of it; with 0 none is fetched. A gateway that says
    nothing for `gateway_silence_s` is taken for lost; it tells its load several times in that time.
    A request with which `max_deaths` gateways died in a row, less than 8 tokens further each time,
    is failed. With `experts_in_gateway` there are no expert workers whose coverage health would
    depend on.
    """

    name: str = "frontdoor"
    listen: str = "127.0.0.1:0"
    health_listen: str = ""
    shares_port: bool = False
    tls: TlsFiles | None = None
    api_keys_file: str = ""
    operators: tuple[str, ...] = ()
    max_requests: int = 1024
    max_waiting: int = 256
    retry_after_s: float = 1.0
    max_message_bytes: int = 16 * 2**20
    default_max_tokens: int = 32_768
    max_sequences: int = 16
    max_stop_strings: int = 16
    max_stop_string_length: int = 256
    max_logprobs: int = 20
    gateway_wait_s: float = 60.0
    gateway_retry_s: float = 0.05
    gateway_silence_s: float = 2.0
    max_deaths: int = MAX_DEATHS
    reconnect_s: float = 0.2
    expected_tokens: int = 256
    prefix_fetch_tokens: int = 1024
    keepalive_s: float = 20.0
    experts_in_gateway: bool = False
