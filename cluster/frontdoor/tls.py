"""The certificates of a front door, read again for new connections when their files change."""

import ssl
from dataclasses import dataclass

import grpc
import structlog

from cluster.frontdoor.files import WatchedFiles
from workers.errors import ConfigError

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files; with `client_ca` clients must show a certificate that it issued."""

    cert: str
    key: str
    client_ca: str = ""


class Certificates:
    """Keeps the certificates in use; open connections live on with those that they began with.

    Raises:
        ConfigError: A file cannot be read, or certificate and key do not belong together.
    """

    def __init__(self, paths: TlsFiles) -> None:
        self._paths = paths
        self._files = WatchedFiles(*filter(None, (paths.cert, paths.key, paths.client_ca)))
        configuration = self._read()
        assert configuration is not None
        self._first = configuration

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of a server's port."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self.renewed,  # type: ignore[arg-type]  # the stubs do not know that None is allowed
            require_client_authentication=bool(self._paths.client_ca),
        )

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what changed since the last call; None when nothing did, or it is unusable.

        gRPC asks before every handshake, in a thread of its own.
        """
        try:
            configuration = self._read()
        except ConfigError as error:
            _log.error("the certificates of before go on to be shown", reason=str(error))
            return None
        if configuration is not None:
            _log.info("certificates read again", cert=self._paths.cert)
        return configuration

    def _read(self) -> grpc.ServerCertificateConfiguration | None:
        paths = self._paths
        try:
            contents = self._files.changed()
            if contents is None:
                return None
            check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            check.load_cert_chain(paths.cert, paths.key, password=lambda: "")  # never ask for one
            if paths.client_ca:
                check.load_verify_locations(paths.client_ca)
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            named = ", ".join(str(path) for path in self._files.paths)
            raise ConfigError(f"the certificates in {named} cannot be used: {error}") from error
        chain, key, *client_ca = contents
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], root_certificates=client_ca[0] if client_ca else None
        )
