"""One call's hold on its request: its assignment numbers, the gateway before, and deaths."""

from collections.abc import Callable
from dataclasses import replace

from cluster.frontdoor.admission import Job
from cluster.frontdoor.gateways import GatewayPool, GatewaySession
from cluster.frontdoor.ownership import Ownership
from cluster.ownership.directory import GRANT, HARMLESS_TOKENS, Claim, grant_of, is_suspect
from workers.errors import ExpertmeshError
from workers.placement import MemberId


class Tenure:
    """Begins with a grant of the directory, and ends when the call does or another one has a grant.

    Args:
        job: The request.
        pool: The gateways.
        ownership: The claims of this front door.
        on_lost: Called when another call has taken the request over.
        on_cancel: Called when somebody wants the request to end.
    """

    def __init__(
        self,
        job: Job,
        pool: GatewayPool,
        ownership: Ownership,
        *,
        on_lost: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        request = job.request
        self._pool = pool
        self._ownership = ownership
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._must_ask = job.is_named  # else the id was drawn here: nobody else can have it yet
        self._takes_over = job.takes_over
        self._claim = Claim(
            request_id=request.request_id,
            assignment=request.assignment,
            owner="",
            front_door=pool.options.name,
            resume_window_s=request.resume_window_s,
        )
        self._newest = 0  # the highest number that was heard of
        self._former: tuple[str, int] | None = None  # a gateway that may still hold an assignment
        self._lost_at: set[MemberId] = set()
        self._earlier_deaths = 0  # which another call has counted
        self._tokens_at_loss: int | None = None  # None where it is not known
        self._has_begun = False

    @property
    def assignment(self) -> int:
        """The number of the newest submission."""
        return self._claim.assignment

    @property
    def claim(self) -> Claim:
        """What the call claims now."""
        return replace(self._claim, deaths=self.num_deaths, died_at=self._tokens_at_loss)

    @property
    def snapshot_holder(self) -> str:
        """The gateway that keeps snapshots of the request, as far as was heard."""
        return self._claim.snapshot_holder

    @property
    def num_deaths(self) -> int:
        """How many gateways died with the request in a row; one that is back has not died."""
        gone = sum(self._pool.is_gone(gateway) for gateway in self._lost_at)
        return self._earlier_deaths + gone

    @property
    def is_suspect(self) -> bool:
        """Whether one more death would be blamed on the request."""
        return is_suspect(self.num_deaths, self._pool.options.max_deaths)

    @property
    def former(self) -> GatewaySession | None:
        """The session of a gateway that may still run the request, or keep it."""
        return self._pool.find(self._former[0]) if self._former else None

    async def begin(self) -> bool:
        """Take the request at its directory, unless this call has it; returns whether it has.

        It has not while no directory can be reached.

        Raises:
            DuplicateRequestError: Another call that lives has it.
            ExpertmeshError: Too many gateways died with it.
        """
        if not self._has_begun:
            await self._take()
        if self.num_deaths >= self._pool.options.max_deaths:
            raise ExpertmeshError(
                f"{self.num_deaths} gateways died with request {self._claim.request_id}: it is not "
                "tried again"
            )
        return self._has_begun

    def count(self) -> int:
        """Return the number of one more submission."""
        self._claim = replace(self._claim, assignment=self.assignment + 1)
        return self.assignment

    def submitted(self, session: GatewaySession) -> None:
        """Note where the request is: directories are told, and the gateway before lets go."""
        self._claim = replace(self._claim, owner=str(session.member.id))
        self._ownership.hold(self)
        former = self.former
        if self._former is not None and former is not None and former is not session:
            former.let_go(self._claim.request_id, self._former[1])
        self._former = None

    def reached(self, num_tokens: int) -> None:
        """Note how far the request is: what it has left behind was not its doing.

        What kills a gateway does so again where it did before.

        Args:
            num_tokens: So far, of the running sequence that has the fewest.
        """
        before = self._tokens_at_loss
        if before is not None and num_tokens - before >= HARMLESS_TOKENS:
            self._lost_at, self._earlier_deaths, self._tokens_at_loss = set(), 0, None

    def lost_at(self, gateway: MemberId, num_tokens: int) -> None:
        """Note that the gateway of the newest submission can no longer be reached.

        Args:
            gateway: The gateway.
            num_tokens: So far, of the running sequence that has the fewest.
        """
        self.reached(num_tokens)
        self._tokens_at_loss = num_tokens
        self._lost_at.add(gateway)
        self._former = (str(gateway), self.assignment)

    def kept_at(self, holder: str) -> None:
        """Note which gateway keeps snapshots: whoever takes over is to find them."""
        if self._has_begun and holder != self.snapshot_holder:
            self._claim = replace(self._claim, snapshot_holder=holder)
            self._ownership.hold(self)

    def doubted(self, newer: int) -> None:
        """A gateway knows a newer assignment: somebody has the request, or a directory forgot."""
        self._has_begun, self._newest = False, newer

    def superseded(self) -> None:
        """See `Holder`."""
        self._has_begun = False
        self._on_lost()

    def cancel(self) -> None:
        """See `Holder`."""
        self._on_cancel()

    def end(self, *, keep_s: float, has_ended_well: bool) -> None:
        """Give the claim up; it is remembered for `keep_s`, its deaths unless all went well."""
        if self._has_begun:
            deaths = 0 if has_ended_well else self.num_deaths
            self._ownership.release(replace(self.claim, resume_window_s=keep_s, deaths=deaths))

    async def _take(self) -> None:
        claim = self._claim
        if not self._must_ask:
            self._claim = replace(claim, assignment=GRANT)
        else:
            grant = await self._ownership.take(
                self, above=self._newest, held=claim.assignment, takes_over=self._takes_over
            )
            if grant is None:
                return
            self._claim = replace(claim, assignment=grant.assignment)
            if grant.previous is not None:
                is_own = grant_of(grant.previous.assignment) == grant_of(claim.assignment)
                self._inherit(grant.previous, is_own=is_own)
        self._has_begun, self._must_ask, self._takes_over = True, True, False
        self._ownership.hold(self)

    def _inherit(self, known: Claim, *, is_own: bool) -> None:
        """Go on from what the claim before says; of its own deaths this call knows more."""
        self._former = (known.owner, known.assignment)
        self._claim = replace(self._claim, snapshot_holder=known.snapshot_holder)
        if not is_own and known.deaths > self._earlier_deaths:
            self._earlier_deaths = known.deaths
            at = [n for n in (self._tokens_at_loss, known.died_at) if n is not None]
            self._tokens_at_loss = max(at, default=None)
