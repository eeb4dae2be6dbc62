"""A journal in a directory: one file a View, one empty file a term.

Creating a file exclusively is the compare-and-set, so the directory may lie on any shared file
system that honours O_EXCL. It must not lie on the Ray head's own disk alone.
"""

import os
import pickle
from dataclasses import MISSING, fields
from pathlib import Path

from cluster.control.ports import Record
from workers.errors import RefusedError
from workers.placement import Member

_KEPT_VIEWS = 16


class DirectoryJournal:
    """A `Journal` on a file system; Views are written beside their place and moved into it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._term = 0
        directory.mkdir(parents=True, exist_ok=True)

    def claim_term(self, above: int = 0) -> int:
        """Take the next term; whoever creates its file first has it."""
        while True:
            term = max(self._highest_term(), above) + 1
            try:
                os.close(os.open(self._directory / f"term-{term:012d}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue  # another controller was faster: try the term after its
            self._sync_directory()
            self._term = term
            return term

    def is_leading(self) -> bool:
        """Whether nobody has claimed a higher term."""
        return self._highest_term() <= self._term

    def append(self, record: Record) -> None:
        """Store a record durably; refuse when a higher term has been claimed."""
        self._check_leading()
        view = record.view
        path = self._directory / f"view-{view.term:012d}-{view.version:012d}"
        beside = path.with_suffix(".new")
        with beside.open("wb") as file:
            file.write(pickle.dumps(record))
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        self._sync_directory()
        self._check_leading()  # who has claimed a term meanwhile may have read before this was here
        for old in sorted(self._directory.glob("view-*[0-9]"))[:-_KEPT_VIEWS]:
            old.unlink(missing_ok=True)

    def latest(self) -> Record | None:
        """Return the newest record in the directory."""
        paths = sorted(self._directory.glob("view-*[0-9]"))
        if not paths:
            return None
        record = pickle.loads(paths[-1].read_bytes())  # noqa: S301 - our own directory
        assert isinstance(record, Record)
        _complete(record)
        for member in record.view.members:
            _complete(member)
        return record

    def _check_leading(self) -> None:
        if not self.is_leading():
            raise RefusedError(
                f"controller term {self._term} is superseded by term {self._highest_term()}: "
                "this controller must stop"
            )

    def _sync_directory(self) -> None:
        """Make names durable, which a file's own sync does not."""
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _highest_term(self) -> int:
        terms = [int(p.name.removeprefix("term-")) for p in self._directory.glob("term-*")]
        return max(terms, default=0)


def _complete(value: Record | Member) -> None:
    """Give a value that an older program stored the fields that it did not know: the last ones."""
    for field in fields(value):
        if not hasattr(value, field.name):
            made = field.default if field.default_factory is MISSING else field.default_factory()
            object.__setattr__(value, field.name, made)
