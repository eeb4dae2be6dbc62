"""The journal of Views: terms are unique, the newest View is found, the superseded are refused."""

import pytest

from cluster.control.journal import DirectoryJournal
from cluster.control.ports import Record
from workers.errors import RefusedError
from workers.placement import Placement, Role, View


def record(term: int, version: int) -> Record:
    return Record(View(term, version, (), Placement("w", 1, 1)), {Role.GATEWAY: version})


def test_each_claim_is_a_higher_term(tmp_path) -> None:
    journals = [DirectoryJournal(tmp_path) for _ in range(3)]

    assert [j.claim_term() for j in journals] == [1, 2, 3]


def test_the_newest_view_is_found_by_the_next_controller(tmp_path) -> None:
    journal = DirectoryJournal(tmp_path)
    term = journal.claim_term()
    for version in (1, 2, 10):
        journal.append(record(term, version))

    assert DirectoryJournal(tmp_path).latest() == record(term, 10)


def test_an_empty_journal_has_no_view(tmp_path) -> None:
    assert DirectoryJournal(tmp_path).latest() is None


def test_a_superseded_controller_cannot_append(tmp_path) -> None:
    old = DirectoryJournal(tmp_path)
    term = old.claim_term()
    DirectoryJournal(tmp_path).claim_term()

    with pytest.raises(RefusedError, match="superseded by term 2"):
        old.append(record(term, 1))


def test_old_views_are_removed(tmp_path) -> None:
    journal = DirectoryJournal(tmp_path)
    term = journal.claim_term()
    for version in range(1, 40):
        journal.append(record(term, version))

    assert len(list(tmp_path.glob("view-*"))) == 16
    assert journal.latest() == record(term, 39)
