"""The directory of request ids: who is granted a request, who loses it, and what is remembered."""

from dataclasses import replace

import pytest

from cluster.ownership.directory import GRANT, Claim, Directory, directories_of, grant_of
from workers.placement import MemberId

GATEWAYS = [MemberId(f"gateway-{i}", 1) for i in range(5)]
A = Claim(request_id="r", assignment=0, owner="", front_door="a")
B = replace(A, front_door="b")


def granted(directory: Directory, claim: Claim = A, **asked) -> Claim:
    """Return the claim after it was asked for and renewed with its owner."""
    grant = directory.ask(claim, **({"above": 0, "held": 0, "takes_over": False} | asked))
    assert grant.assignment
    mine = replace(claim, assignment=grant.assignment + 1, owner="gateway-0.1")
    assert directory.renew(mine) is None
    return mine


def refused(directory: Directory, claim: Claim = B, **asked) -> bool:
    grant = directory.ask(claim, **({"above": 0, "held": 0, "takes_over": False} | asked))
    return not grant.assignment


def test_a_gateway_that_goes_changes_the_directory_of_its_own_ids_only() -> None:
    ids = [f"id-{i}" for i in range(200)]
    gone = GATEWAYS[2]
    before = {i: directories_of(i, GATEWAYS) for i in ids}
    after = {i: directories_of(i, [g for g in GATEWAYS if g != gone]) for i in ids}

    assert all(after[i] == [g for g in before[i] if g != gone] for i in ids)
    assert all(20 < sum(order[0] == g for order in before.values()) < 70 for g in GATEWAYS)


def test_every_grant_is_above_all_that_the_call_before_may_count_to() -> None:
    directory = Directory()
    first = granted(directory)
    busy = replace(first, assignment=first.assignment + 500)
    assert directory.renew(busy) is None

    grant = directory.ask(B, above=0, held=0, takes_over=True)

    assert grant.assignment == grant_of(busy.assignment) + GRANT
    assert grant.previous == busy


def test_a_number_is_above_what_the_asking_call_has_heard_of() -> None:
    assert Directory().ask(A, above=7 * GRANT + 3, held=0, takes_over=False).assignment == 8 * GRANT


def test_a_request_of_a_living_call_is_refused_unless_it_is_taken_over() -> None:
    directory = Directory()
    granted(directory)

    assert refused(directory)
    assert refused(directory, A)
    assert not refused(directory, takes_over=True)


def test_a_call_that_has_it_may_ask_again() -> None:
    directory = Directory()
    mine = granted(directory)

    assert not refused(directory, A, held=mine.assignment)
    assert refused(directory, A, held=mine.assignment)  # that number is not the newest any more


def test_who_lost_a_request_is_told_when_it_renews() -> None:
    directory = Directory()
    old = granted(directory)
    new = granted(directory, B, takes_over=True)

    assert directory.renew(old) == old
    assert directory.find("r") == new


def test_of_two_claims_of_two_directories_the_same_one_loses_everywhere() -> None:
    one = granted(Directory(), A)
    two = granted(Directory(), B)
    assert one.assignment == two.assignment
    for claims in ([one, two], [two, one]):
        directory = Directory()
        lost = [loser for claim in claims if (loser := directory.renew(claim))]
        assert lost == [one]


@pytest.mark.parametrize("window_s", [0.0, 5.0])
def test_a_request_whose_front_door_is_gone_is_known_for_its_window(window_s: float) -> None:
    directory = Directory()
    mine = granted(directory, replace(A, resume_window_s=window_s))
    directory.front_door_gone("a", 10.0)

    directory.tick(14.9)
    assert (directory.find("r") == mine) == (window_s > 0)
    assert not refused(directory)


def test_a_number_that_was_just_given_up_is_not_given_to_the_next_call() -> None:
    directory = Directory()
    mine = granted(directory)
    directory.release(mine, 10.0)
    assert directory.find("r") is None
    assert granted(directory).assignment > grant_of(mine.assignment) + GRANT

    directory.front_door_gone("a", 11.0)
    directory.tick(30.0)
    assert granted(directory).assignment == mine.assignment


def test_nor_is_the_number_of_a_call_whose_window_is_over() -> None:
    directory = Directory()
    mine = granted(directory, replace(A, resume_window_s=1.0))
    directory.release(mine, 10.0)
    directory.tick(11.0)
    assert directory.find("r") is None
    assert granted(directory).assignment > grant_of(mine.assignment) + GRANT


def test_what_was_kept_for_its_window_is_forgotten() -> None:
    directory = Directory()
    mine = granted(directory, replace(A, resume_window_s=5.0))
    directory.release(mine, 10.0)
    assert directory.find("r") == mine
    directory.tick(15.0)
    assert len(directory) == 0


def test_an_older_call_cannot_give_up_the_claim_of_a_newer_one() -> None:
    directory = Directory()
    old = granted(directory)
    new = granted(directory, B, takes_over=True)
    directory.release(old, 0.0)

    assert directory.find("r") == new
    assert directory.is_held("r")


def test_deaths_outlive_the_call_that_saw_them() -> None:
    directory = Directory()
    mine = replace(granted(directory), deaths=2)
    directory.renew(mine)
    directory.release(mine, 0.0)
    directory.tick(60.0)

    grant = directory.ask(B, above=0, held=0, takes_over=False)
    assert grant.previous is not None
    assert grant.previous.deaths == 2
    assert directory.find("r").deaths == 2
    directory.release(replace(B, assignment=grant.assignment), 60.0)  # it ended well
    assert len(directory) == 0
