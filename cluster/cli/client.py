"""What the client commands share: which front door, how it is reached, and who calls it."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from workers.errors import ConfigError, ExpertmeshError

_CONNECT_S = 10.0
_DEFAULT_SERVER = "127.0.0.1:50051"
_Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A front door, what its certificate is checked with, and what the caller shows.

    Without `tls_ca` the connection is cleartext.
    """

    address: str = _DEFAULT_SERVER
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key_file: Path | None = None

    def channel(self) -> grpc.Channel:
        """Open a channel; raises ConfigError when a file cannot be read."""
        credentials, metadata = self._credentials(), self._metadata()
        channel = (
            grpc.secure_channel(self.address, credentials)
            if credentials
            else grpc.insecure_channel(self.address)
        )
        return grpc.intercept_channel(channel, _Sign(metadata)) if metadata else channel

    def aio_channel(self) -> grpc.aio.Channel:
        """Open a channel for asyncio; raises ConfigError when a file cannot be read."""
        credentials, metadata = self._credentials(), self._metadata()
        sign: Any = [_SignOne(metadata), _SignMany(metadata)] if metadata else None
        if credentials:
            return grpc.aio.secure_channel(self.address, credentials, interceptors=sign)
        return grpc.aio.insecure_channel(self.address, interceptors=sign)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls_ca is None:
            if self.tls_cert or self.tls_key:
                raise ConfigError("--tls-cert and --tls-key need --tls-ca")
            return None
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("give --tls-cert and --tls-key together")
        return grpc.ssl_channel_credentials(
            _read(self.tls_ca),
            _read(self.tls_key) if self.tls_key else None,
            _read(self.tls_cert) if self.tls_cert else None,
        )

    def _metadata(self) -> _Metadata:
        if self.api_key_file is None:
            return ()
        key = _read(self.api_key_file).decode().strip()
        return (("authorization", f"Bearer {key}"),)


@contextlib.contextmanager
def channel_to(server: Server) -> Iterator[grpc.Channel]:
    """Open a channel and wait until it is connected.

    Raises:
        ExpertmeshError: Nobody listens there, or the connection is not trusted.
    """
    with server.channel() as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise ExpertmeshError(
                f"no front door answers at {server.address} within {_CONNECT_S:g} s: does one "
                "listen there, and with TLS or without as here (--tls-ca, --tls-cert)? Name "
                "another place with --server HOST:PORT"
            ) from error
        yield channel


def for_clients(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes `server: Server`, the options that describe one."""

    @functools.wraps(command)
    def called(
        *arguments: object,
        server: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        api_key_file: Path | None,
        **options: object,
    ) -> None:
        to = Server(
            address=server,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            api_key_file=api_key_file,
        )
        command(*arguments, server=to, **options)

    # typer reads the signature: `server` is replaced by what it is made of.
    signature = inspect.signature(command)
    kept = [p for name, p in signature.parameters.items() if name != "server"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in _OPTIONS.items()
    ]
    called.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
    return called


def _option(flag: str, text: str) -> Any:  # noqa: ANN401
    return Annotated[Path | None, typer.Option(flag, help=text)]


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "server": (
        Annotated[str, typer.Option("--server", help="HOST:PORT of a front door.")],
        _DEFAULT_SERVER,
    ),
    "tls_ca": (
        _option("--tls-ca", "PEM file that its certificate comes from; turns TLS on."),
        None,
    ),
    "tls_cert": (_option("--tls-cert", "PEM file of this client's certificate (mTLS)."), None),
    "tls_key": (_option("--tls-key", "PEM file of its private key."), None),
    "api_key_file": (_option("--api-key-file", "File that holds an API key."), None),
}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


class _Sign(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Sends metadata with every call."""

    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Call with the metadata."""
        return continuation(_signed(details, self._metadata), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Call with the metadata."""
        return continuation(_signed(details, self._metadata), request)


class _SignOne(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """As `_Sign`, for calls of asyncio that have one answer."""

    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Call with the metadata."""
        return await continuation(_signed(details, self._metadata), request)


class _SignMany(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """As `_Sign`, for calls of asyncio that are answered by a stream."""

    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Call with the metadata."""
        return await continuation(_signed(details, self._metadata), request)


def _signed(details: Any, metadata: _Metadata) -> Any:  # noqa: ANN401
    return details._replace(metadata=[*(details.metadata or ()), *metadata])
