"""The journal of Views: terms are unique, the newest View is found, the superseded are refused."""

import pickle
from dataclasses import fields, make_dataclass

import pytest

from cluster.control import ports
from cluster.control.journal import DirectoryJournal
from cluster.control.ports import Record
from workers import placement
from workers.errors import RefusedError
from workers.placement import MemberId, MemberState, Placement, Role, View


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


def test_who_is_superseded_while_it_writes_is_told_so(tmp_path, monkeypatch) -> None:
    old = DirectoryJournal(tmp_path)
    term = old.claim_term()
    sync = old._sync_directory

    def claimed_meanwhile() -> None:
        sync()
        DirectoryJournal(tmp_path).claim_term()

    monkeypatch.setattr(old, "_sync_directory", claimed_meanwhile)
    with pytest.raises(RefusedError, match="superseded by term 2"):
        old.append(record(term, 1))


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


def test_what_an_older_program_wrote_is_read_with_what_it_did_not_know(
    tmp_path, monkeypatch
) -> None:
    """Classes of the same names with fewer fields stand for the older program's."""

    def older(kind: type, *names: str) -> type:
        known = [(f.name, f.type) for f in fields(kind) if f.name in names]
        made = make_dataclass(kind.__name__, known, frozen=True, slots=True)
        made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
        return made

    old_member = older(placement.Member, "id", "role", "state", "node")
    old_record = older(ports.Record, "view", "wanted", "leaving")
    with monkeypatch.context() as then:
        then.setattr(placement, "Member", old_member)
        then.setattr(ports, "Record", old_record)
        member = old_member(MemberId("gateway-0", 1), Role.GATEWAY, MemberState.ACTIVE, "node")
        view = View(1, 1, (member,), Placement("w", 1, 1))
        raw = pickle.dumps(old_record(view, {Role.GATEWAY: 1}, frozenset()))
    (tmp_path / f"view-{1:012d}-{1:012d}").write_bytes(raw)

    found = DirectoryJournal(tmp_path).latest()

    assert found is not None
    (read,) = found.view.members
    assert (read.id, read.node, read.settings, read.stores) == (member.id, "node", "", ())
    assert (found.wanted, found.configured, found.rolling) == ({Role.GATEWAY: 1}, {}, False)
