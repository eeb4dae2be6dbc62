"""A call's hold on its request: numbers that rise, deaths that count, and no way around a fence."""

import pytest

from cluster.frontdoor.admission import Job
from cluster.frontdoor.tenure import Tenure
from cluster.ownership.directory import GRANT, Claim, Grant, grant_of
from workers.errors import ExpertmeshError
from workers.placement import MemberId
from workers.types import Request, Sampling, Stopping

REQUEST = Request(
    request_id="r",
    prompt_token_ids=(1,),
    sampling=Sampling(),
    stopping=Stopping(max_tokens=4),
    resume_window_s=5.0,
)


class Session:
    """A gateway's session that notes what it must free."""

    def __init__(self, name: str) -> None:
        self.member = type("Member", (), {"id": MemberId(name, 1)})
        self.freed: list[int] = []

    def let_go(self, request_id: str, assignment: int) -> None:
        self.freed.append(assignment)


class Pool:
    """Gateways by name; those in `dead` cannot be reached."""

    def __init__(self, *sessions: Session) -> None:
        self.options = type("Options", (), {"name": "door", "max_deaths": 3})
        self.sessions = {str(s.member.id): s for s in sessions}
        self.dead: set[MemberId] = set()

    def find(self, gateway: str) -> Session | None:
        return self.sessions.get(gateway)

    def is_gone(self, gateway: MemberId) -> bool:
        return gateway in self.dead


class Directories:
    """Grants what it is told to, and notes the claims."""

    def __init__(self, *grants: Grant | None) -> None:
        self.grants = list(grants)
        self.asked: list[dict[str, object]] = []
        self.held: list[Claim] = []
        self.released: list[Claim] = []

    async def take(self, holder, **question) -> Grant | None:
        self.asked.append(question)
        return self.grants.pop(0)

    def hold(self, holder) -> None:
        self.held.append(holder.claim)

    def release(self, claim: Claim) -> None:
        self.released.append(claim)


def tenure(pool: Pool, directories: Directories, **job) -> Tenure:
    return Tenure(
        Job(request=REQUEST, **job),
        pool,
        directories,
        on_lost=lambda: None,
        on_cancel=lambda: None,
    )


async def test_an_id_that_was_drawn_here_costs_no_question() -> None:
    directories = Directories()
    mine = tenure(Pool(), directories)

    assert await mine.begin()
    assert [mine.count(), mine.count()] == [GRANT + 1, GRANT + 2]
    assert not directories.asked


async def test_after_a_doubt_a_drawn_id_is_asked_for_too() -> None:
    directories = Directories(Grant(9 * GRANT))
    mine = tenure(Pool(), directories)
    await mine.begin()
    mine.doubted(8 * GRANT + 3)
    await mine.begin()

    assert directories.asked == [{"above": 8 * GRANT + 3, "held": GRANT, "takes_over": False}]
    assert mine.count() == 9 * GRANT + 1


async def test_a_request_is_taken_over_once_only() -> None:
    directories = Directories(Grant(2 * GRANT), Grant(5 * GRANT))
    mine = tenure(Pool(), directories, is_named=True, takes_over=True)
    await mine.begin()
    mine.doubted(4 * GRANT)
    await mine.begin()

    assert [question["takes_over"] for question in directories.asked] == [True, False]


async def test_without_a_directory_nothing_begins() -> None:
    mine = tenure(Pool(), Directories(None), is_named=True)

    assert not await mine.begin()
    mine.end(keep_s=0.0, has_ended_well=True)


async def test_the_gateway_before_lets_go_when_another_one_has_the_request() -> None:
    old, new = Session("old"), Session("new")
    known = Claim(request_id="r", assignment=GRANT + 4, owner="old.1", front_door="other")
    mine = tenure(Pool(old, new), Directories(Grant(2 * GRANT, known)), is_named=True)
    await mine.begin()
    assert mine.former is old
    mine.count()
    mine.submitted(new)
    assert (old.freed, mine.claim.owner) == ([GRANT + 4], "new.1")

    mine.lost_at(new.member.id, 0)
    mine.count()
    mine.submitted(new)  # it is back: it goes on there
    assert new.freed == []


async def test_only_gateways_that_stay_away_have_died() -> None:
    pool = Pool()
    mine = tenure(pool, Directories())
    await mine.begin()
    for number in range(3):
        mine.lost_at(MemberId("gateway", number), 15)
    pool.dead = {MemberId("gateway", 0), MemberId("gateway", 1)}
    assert await mine.begin()
    assert mine.claim.deaths == 2

    pool.dead.add(MemberId("gateway", 2))
    with pytest.raises(ExpertmeshError, match="3 gateways died with request r"):
        await mine.begin()


@pytest.mark.parametrize(
    ("died_at", "tokens", "deaths"),
    [
        (None, (7, 7, 7), 4),  # it goes no further
        (None, (7, 14, 21), 4),  # nor far
        (None, (100, 107, 114), 4),  # nor far: where it was before is not known
        (None, (100, 108, 115), 2),
        (None, (8, 16, 24), 1),
        (None, (0, 0, 8), 1),
        (90, (97, 97, 97), 4),
        (90, (98, 98, 98), 3),
        (90, (80, 80, 80), 4),  # a client that came back may have brought fewer
        (0, (8, 8, 8), 3),
    ],
)
async def test_a_request_that_goes_on_is_not_blamed_for_what_died_before(
    died_at, tokens, deaths
) -> None:
    pool = Pool()
    known = Claim(
        request_id="r", assignment=GRANT, owner="", front_door="other", deaths=1, died_at=died_at
    )
    pool.options.max_deaths = 5
    mine = tenure(pool, Directories(Grant(2 * GRANT, known)), is_named=True)
    for number, num_tokens in enumerate(tokens):
        assert await mine.begin()
        mine.lost_at(MemberId("gateway", number), num_tokens)
        pool.dead.add(MemberId("gateway", number))

    assert mine.num_deaths == deaths


async def test_a_loss_in_each_of_several_calls_is_no_fault_of_a_request_that_goes_on() -> None:
    at, claim = 0, None
    for number in range(1, 5):  # each call ends without a word after one loss, as its front door
        pool, at = Pool(), at + 20
        directories = Directories(Grant((number + 1) * GRANT, claim))
        mine = tenure(pool, directories, is_named=True)
        assert await mine.begin()
        mine.reached(at - 5)
        mine.lost_at(MemberId("gateway", number), at)
        pool.dead.add(MemberId("gateway", number))
        assert await mine.begin()
        claim = mine.claim
    assert (claim.deaths, claim.died_at) == (1, at)


async def test_what_a_call_has_counted_itself_is_not_counted_twice() -> None:
    pool = Pool()
    directories = Directories(Grant(2 * GRANT), None)
    mine = tenure(pool, directories, is_named=True)
    await mine.begin()
    mine.lost_at(MemberId("gateway", 1), 3)
    pool.dead.add(MemberId("gateway", 1))
    told = mine.claim
    mine.doubted(told.assignment)
    directories.grants = [Grant(3 * GRANT, told)]
    await mine.begin()

    assert mine.num_deaths == 1


@pytest.mark.parametrize(("has_ended_well", "deaths"), [(True, 0), (False, 2)])
async def test_deaths_are_handed_on_unless_all_went_well(has_ended_well, deaths) -> None:
    known = Claim(request_id="r", assignment=GRANT, owner="", front_door="other", deaths=2)
    directories = Directories(Grant(2 * GRANT, known))
    mine = tenure(Pool(), directories, is_named=True)
    await mine.begin()
    mine.end(keep_s=3.0, has_ended_well=has_ended_well)

    (claim,) = directories.released
    assert (claim.deaths, claim.resume_window_s) == (deaths, 3.0)
    assert grant_of(claim.assignment) == 2 * GRANT


async def test_who_keeps_snapshots_is_told_once() -> None:
    directories = Directories()
    mine = tenure(Pool(), directories)
    await mine.begin()
    for _ in range(3):
        mine.kept_at("keeper.1")

    assert [claim.snapshot_holder for claim in directories.held] == ["", "keeper.1"]
    mine.superseded()
    mine.kept_at("other.1")
    assert len(directories.held) == 2
