"""A body for tests of the runtime: answers, raises, waits."""

import os
import threading

NICENESS = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # while it is imported


class EchoBody:
    def __init__(self, word: str) -> None:
        self._word = word

    def open(self) -> tuple[str, int]:
        return self._word, os.getpid()

    def fail(self) -> None:
        raise ValueError("as asked")

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def echo(self, argument: object) -> object:
        return argument

    def niceness(self) -> tuple[int, int]:
        return NICENESS, os.getpriority(os.PRIO_PROCESS, os.getpid())


class UnbornBody:
    def __init__(self) -> None:
        raise ValueError("cannot be born")
