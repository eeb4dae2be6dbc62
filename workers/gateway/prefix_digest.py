"""Names for prefixes of prompts, by which front doors and gateways speak of them."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

_DIGEST_BYTES = 8  # two prefixes that are named alike cost a detour, never a wrong token


def prefix_digests(
    salt: str, token_ids: Sequence[int], lengths: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """Yield (length, digest) of the first tokens, for rising lengths up to the tokens' number."""
    hasher = hashlib.blake2b(salt.encode() + b"\0", digest_size=_DIGEST_BYTES)
    done = 0
    for length in lengths:
        assert done <= length <= len(token_ids), (done, length)
        hasher.update(array("I", token_ids[done:length]).tobytes())
        done = length
        yield length, int.from_bytes(hasher.copy().digest(), "little")


def prefix_digest(salt: str, token_ids: Sequence[int]) -> int:
    """Return the digest of all of the tokens."""
    ((_, digest),) = prefix_digests(salt, token_ids, [len(token_ids)])
    return digest
