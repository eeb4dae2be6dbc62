"""Files that change under a running process, as those of a mounted Secret do."""

from pathlib import Path


class WatchedFiles:
    """Some small files that are read as one.

    What they contain is compared, not when they were written: a mounted Secret changes by a
    symbolic link that points elsewhere.
    """

    def __init__(self, *paths: str) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self._contents: tuple[bytes, ...] = ()

    def changed(self) -> tuple[bytes, ...] | None:
        """Return the contents, or None when they are those of the last call; raises OSError."""
        contents = tuple(path.read_bytes() for path in self.paths)
        if contents == self._contents:
            return None
        self._contents = contents
        return contents
