"""Who calls: API keys in the metadata, each of one tenant."""

import hmac
from collections.abc import Iterable, Sequence

from workers.errors import UnauthenticatedError

_LOOPBACK = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


class Authenticator:
    """Finds the tenant of a call.

    Args:
        api_keys: (key, tenant) pairs; without any, everybody may call.
        loopback_without_key: Whether callers on this machine need a key.
    """

    def __init__(self, api_keys: Sequence[tuple[str, str]], *, loopback_without_key: bool) -> None:
        self._api_keys = tuple((key.encode(), tenant) for key, tenant in api_keys)
        self._loopback_without_key = loopback_without_key

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> str:
        """Return the tenant of a call; "" for a caller without a key, where that is allowed.

        Raises:
            UnauthenticatedError: There is no key, or nobody has it.
        """
        key = _key_of(dict(metadata))
        if not key:
            on_loopback = self._loopback_without_key and peer.startswith(_LOOPBACK)
            if on_loopback or not self._api_keys:
                return ""
            raise UnauthenticatedError(
                "send an API key, as `authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        if not self._api_keys:
            return ""
        for known, tenant in self._api_keys:
            if hmac.compare_digest(known, key):
                return tenant
        raise UnauthenticatedError("this API key is not known")


def _key_of(metadata: dict[str, str | bytes]) -> bytes:
    value = metadata.get("x-api-key") or metadata.get("authorization") or b""
    key = value.encode() if isinstance(value, str) else value
    return key[7:] if key[:7].lower() == b"bearer " else key
