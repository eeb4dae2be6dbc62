"""The directory of request ids: which gateway keeps a claim, and the claims that one keeps. Pure.

An assignment number has two parts. The directory grants the upper one to a call; below it the call
counts its own submissions. So a call goes on to another gateway without asking, and whoever takes
the request over has a higher number than anything that the call before may still count to.

See docs/decisions/0005-requests-are-claimed-at-two-gateways.md for what happens when a directory is
lost.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from workers.placement import MemberId

GRANT = 1 << 20  # submissions that one call may count
MAX_DEATHS = 3  # of gateways, with the same request
HARMLESS_TOKENS = 8  # whoever has come so far since one death is not blamed for it after another
NUM_DIRECTORIES = 2  # the first grants, the second knows when the first is lost
_SPENT_S = 10.0  # in which a token of a call that has ended may still arrive
_MEMORY_S = 600.0  # for how long it is known that gateways died with a request


def directories_of(request_id: str, gateways: Iterable[MemberId]) -> list[MemberId]:
    """Return the gateways in the order in which they are the directory of a request id.

    By rendezvous hash: a gateway that goes or comes changes the order of no two others.
    """
    return sorted(gateways, key=lambda gateway: (weight_of(request_id, gateway), gateway))


def weight_of(request_id: str, gateway: MemberId) -> bytes:
    """Return the place of a gateway in the order that is a request id's own."""
    return hashlib.blake2b(f"{gateway}/{request_id}".encode(), digest_size=8).digest()


def grant_of(assignment: int) -> int:
    """Return the number that the directory granted, of which the assignment is one submission."""
    return assignment // GRANT * GRANT


def is_suspect(deaths: int, max_deaths: int = MAX_DEATHS) -> bool:
    """Whether one more death would be blamed on a request: it runs beside no other such one."""
    return deaths == max_deaths - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Who has a request: the front door of its client's call, and the gateway that runs it.

    `deaths` counts the gateways that died with it, the last of them at `died_at` tokens, as
    far as that is known; `snapshot_holder` keeps snapshots of it. For `resume_window_s` it is kept
    when the front door is gone.
    """

    request_id: str
    assignment: int
    owner: str
    front_door: str
    resume_window_s: float = 0.0
    deaths: int = 0
    died_at: int | None = None
    snapshot_holder: str = ""

    @property
    def fence(self) -> tuple[int, str]:
        """What orders the claims to one request; the name matters only between two directories."""
        return (grant_of(self.assignment), self.front_door)


@dataclass(frozen=True, slots=True)
class Grant:
    """What an asking call gets: a number, or 0 where another call has the request; who had it."""

    assignment: int
    previous: Claim | None = None


@dataclass(slots=True)
class _Entry:
    claim: Claim
    until_s: float | None = None  # None while its call lives


class Directory:
    """The claims of one gateway. They are soft: front doors renew them wherever they belong."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._spent: dict[str, tuple[int, float]] = {}  # numbers that were just given up, until

    def __len__(self) -> int:
        return len(self._entries)

    def ask(self, claim: Claim, *, above: int, held: int, takes_over: bool) -> Grant:
        """Grant a request to a call, with a higher number than all before and than `above`.

        Refused while another call has it, unless that one is to lose it. `held` is the number that
        the asking call has already, or 0.
        """
        entry = self._entries.get(claim.request_id)
        previous = entry.claim if entry else None
        if entry is not None and entry.until_s is None and not takes_over:
            is_own = held and grant_of(held) == grant_of(entry.claim.assignment)
            if not is_own:
                return Grant(0, previous)
        known = previous or claim
        spent, _ = self._spent.get(claim.request_id, (0, 0.0))
        number = grant_of(max(above, known.assignment, spent)) + GRANT
        deadlier = max(claim, known, key=lambda asked: asked.deaths)
        granted = replace(
            claim,
            assignment=number,
            owner=claim.owner or known.owner,
            deaths=deadlier.deaths,
            died_at=deadlier.died_at,
            snapshot_holder=claim.snapshot_holder or known.snapshot_holder,
        )
        self._entries[claim.request_id] = _Entry(granted)
        return Grant(number, previous)

    def renew(self, claim: Claim) -> Claim | None:
        """Take what a front door says it has; return the claim that lost to another, if one did."""
        entry = self._entries.get(claim.request_id)
        if entry is not None and entry.claim.fence > claim.fence:
            return claim
        self._entries[claim.request_id] = _Entry(claim)
        return entry.claim if entry and entry.claim.fence < claim.fence else None

    def release(self, claim: Claim, now_s: float) -> None:
        """Let a call give its claim up; an older number than the known one changes nothing.

        What is known is kept for the claim's window, and longer while it counts deaths.
        """
        entry = self._entries.get(claim.request_id)
        if entry is not None and entry.claim.fence <= claim.fence:
            entry.claim = replace(entry.claim, deaths=claim.deaths, died_at=claim.died_at)
            self._orphan(entry, claim.resume_window_s, now_s)

    def front_door_gone(self, name: str, now_s: float) -> None:
        """Keep the claims of a front door for their windows."""
        for entry in list(self._entries.values()):
            if entry.claim.front_door == name and entry.until_s is None:
                self._orphan(entry, entry.claim.resume_window_s, now_s)

    def find(self, request_id: str) -> Claim | None:
        """Return the claim to a request."""
        entry = self._entries.get(request_id)
        return entry.claim if entry else None

    def is_held(self, request_id: str) -> bool:
        """Whether a call that lives has the request."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.until_s is None

    def tick(self, now_s: float) -> None:
        """Forget what has been kept for long enough."""
        over = [
            request_id
            for request_id, entry in self._entries.items()
            if entry.until_s is not None and entry.until_s <= now_s
        ]
        self._spent = {key: spent for key, spent in self._spent.items() if spent[1] > now_s}
        for request_id in over:
            self._forget(request_id, now_s)

    def _orphan(self, entry: _Entry, keep_s: float, now_s: float) -> None:
        if entry.claim.deaths:
            keep_s = max(keep_s, _MEMORY_S)
        if keep_s <= 0:
            self._forget(entry.claim.request_id, now_s)
        else:
            entry.until_s = now_s + keep_s

    def _forget(self, request_id: str, now_s: float) -> None:
        """Forget a claim, but for its number: tokens under it may be on their way still."""
        before, _ = self._spent.get(request_id, (0, 0.0))
        number = max(before, self._entries.pop(request_id).claim.assignment)
        self._spent[request_id] = number, now_s + _SPENT_S


def newest(claims: Collection[Claim]) -> Claim | None:
    """Return the claim with the highest number, if there is one."""
    return max(claims, key=lambda claim: claim.assignment, default=None)
