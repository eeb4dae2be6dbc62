"""Reading published JSON files key by key: every value is checked, every refusal names its key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Section:
    """One object of a JSON file; `file` and `path` say which, for messages.

    A key that is null counts as absent. All methods raise CheckpointError for what does not fit.
    """

    values: Mapping[str, Any]
    file: str
    path: str = ""

    def refuse(self, key: str, value: object, supported: str) -> CheckpointError:
        """Make the error for one value: where it is, what it is, what is supported."""
        return CheckpointError(
            f"{self.file}: {self.path}{key} is {value!r}; supported: {supported}"
        )

    def get(self, key: str, default: object = None) -> Any:  # noqa: ANN401 - JSON
        """Return a value as it is."""
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> "Section":
        """Return an object in this one."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.refuse(key, value, "an object")
        return Section(value, self.file, f"{self.path}{key}.")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """Return an integer from `minimum`; required when there is no default."""
        value = self.get(key, default)
        if type(value) is not int or value < minimum:
            raise self.refuse(key, value, f"an integer from {minimum}")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        zero: bool = False,
        maximum: float = math.inf,
    ) -> float:
        """Return a finite number above 0, or from 0; required when there is no default."""
        value = self.get(key, default)
        if (
            type(value) not in {int, float}
            or not math.isfinite(value)
            or not 0 <= value <= maximum
            or (value == 0 and not zero)
        ):
            limit = "" if maximum == math.inf else f", at most {maximum:g}"
            raise self.refuse(key, value, f"a number {'from' if zero else 'above'} 0{limit}")
        return float(value)

    def choice(self, key: str, supported: tuple[object, ...]) -> Any:  # noqa: ANN401 - JSON
        """Return one of the supported values; None among them means that the key may be absent."""
        value = self.values.get(key)
        # By type too: in Python False equals 0 and True equals 1.
        if not any(value == s and type(value) is type(s) for s in supported):
            named = ", ".join(repr(s) for s in supported if s is not None)
            raise self.refuse(key, value, named or "not set")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return token ids that are published as one id, as a list of ids, or not at all."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self.refuse(key, value, "token ids from 0")
        return tuple(ids)


def read_json(path: Path) -> Section:
    """Read a file that holds a JSON object; raises CheckpointError naming it when it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return Section(value, str(path))
