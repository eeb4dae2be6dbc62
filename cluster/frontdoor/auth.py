"""Who calls: a tenant, by an API key in the metadata or by the client's certificate.

A file names the keys by their digests, so that whoever reads it cannot call:

    # TENANT: SHA-256 of one of its keys, in hex
    acme: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
"""

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import structlog

from cluster.frontdoor.files import WatchedFiles
from workers.clock import Clock
from workers.errors import ConfigError, PermissionDeniedError, UnauthenticatedError

_LOOK_S = 1.0
_LINE = re.compile(r"([^\s:#][^\s:]*)\s*:\s*([0-9a-fA-F]{64})")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a call comes from; the tenant is "" where nobody is asked who they are."""

    tenant: str
    is_operator: bool


def parse_keys(text: str) -> tuple[tuple[bytes, str], ...]:
    """Return (digest, tenant) of every line that is neither empty nor a comment.

    Raises ConfigError, which names the line but does not show it, for any other line.
    """
    keys: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"line {number}: write TENANT: SHA-256 of its key, in hex")
        tenant, digest = match[1], bytes.fromhex(match[2])
        if keys.setdefault(digest, tenant) != tenant:
            raise ConfigError(f"line {number}: the key of {tenant} is also that of {keys[digest]}")
    return tuple(keys.items())


class KeyFile:
    """The keys in a file, which is looked at again when a second has passed.

    While it cannot be read, or is malformed, the keys that it held before go on to hold.

    Raises:
        ConfigError: It cannot be read, or is malformed, from the beginning.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._files = WatchedFiles(path)
        self._clock = clock
        self._keys: tuple[tuple[bytes, str], ...] = ()
        self._looked_s = clock.now_s()
        self._read()

    def tenant_of(self, key: bytes) -> str | None:
        """Return whose key it is; takes as long for every key that is not known."""
        if self._clock.now_s() - self._looked_s >= _LOOK_S:
            self._looked_s = self._clock.now_s()
            try:
                self._read()
            except ConfigError as error:
                _log.error("the API keys of before go on to hold", reason=str(error))
        digest = hashlib.sha256(key).digest()
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def _read(self) -> None:
        try:
            contents = self._files.changed()
            if contents is None:
                return
            self._keys = parse_keys(contents[0].decode())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API keys of {self._path}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from error
        _log.info("API keys read", num_keys=len(self._keys))


class Authenticator:
    """Finds out whom a call comes from.

    Args:
        keys: Asked for a key of every caller; None asks for none.
        by_certificate: Whether, without keys, the client's certificate names the tenant.
        operators: Tenants that may change the cluster.
    """

    def __init__(
        self, keys: KeyFile | None, *, by_certificate: bool, operators: Collection[str]
    ) -> None:
        self._keys = keys
        self._by_certificate = by_certificate
        self._operators = frozenset(operators)

    @property
    def is_open(self) -> bool:
        """Whether everybody may call, and change the cluster."""
        return self._keys is None and not self._by_certificate

    def caller(
        self, metadata: Iterable[tuple[str, str | bytes]], identities: Sequence[bytes]
    ) -> Caller:
        """Return whom a call comes from.

        Args:
            metadata: Of the call.
            identities: Names in the client's certificate, which was verified; the first counts.

        Raises:
            UnauthenticatedError: There is no key, nobody has it, or there is no certificate.
        """
        if self.is_open:
            return Caller("", is_operator=True)
        tenant = self._by_key(dict(metadata)) if self._keys else _by_certificate(identities)
        return Caller(tenant, is_operator=tenant in self._operators)

    def operator(
        self, metadata: Iterable[tuple[str, str | bytes]], identities: Sequence[bytes]
    ) -> Caller:
        """Return whom a call comes from, if they may see and change the cluster.

        Raises:
            UnauthenticatedError: See `caller`.
            PermissionDeniedError: They may not.
        """
        caller = self.caller(metadata, identities)
        if not caller.is_operator:
            raise PermissionDeniedError(
                f"tenant {caller.tenant} is no operator of this cluster: its state is read and "
                "changed by those that front_doors.operators names"
            )
        return caller

    def _by_key(self, metadata: dict[str, str | bytes]) -> str:
        key = _key_of(metadata)
        if not key:
            raise UnauthenticatedError(
                "send an API key, as `authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        assert self._keys is not None
        tenant = self._keys.tenant_of(key)
        if tenant is None:
            raise UnauthenticatedError("this API key is not known; it may have been replaced")
        return tenant


def _by_certificate(identities: Sequence[bytes]) -> str:
    if not identities:
        raise UnauthenticatedError("the client's certificate bears no name; issue it with one")
    return identities[0].decode(errors="replace")


def _key_of(metadata: dict[str, str | bytes]) -> bytes:
    value = metadata.get("x-api-key") or metadata.get("authorization") or b""
    key = value.encode() if isinstance(value, str) else value
    return key[7:] if key[:7].lower() == b"bearer " else key
