"""Records: bytes under keys, in order; a commit changes several of them at once, or none.

Everything that the service remembers, but for images, is a record. Knows nothing of batches, keys or jobs, and no database;
what ``commit`` returned from is on disk. The in-memory twin passes the same tests and forgets everything.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Changes = Mapping[str, bytes | None]
"""Records to write; None deletes."""


class ConflictError(Exception):
    """A record is not what a commit expected it to be; nothing was changed."""


@dataclass(frozen=True)
class Derived:
    """Changes that are computed, inside the commit, from what one record is then: a counter, or the end of a chain."""

    key: str
    changes: Callable[[bytes | None], Changes]


@dataclass(frozen=True)
class Commit:
    """What is changed together, on condition that the ``expected`` records are what they were when they were read.

    ``cleared`` are prefixes of which every record goes before ``changes`` are written. ``scope`` names what the commit is
    about (a batch); a commit that clears and writes nothing ends its scope, whose journal can be dropped.
    """

    changes: Changes
    expected: Changes = field(default_factory=dict)
    cleared: Sequence[str] = ()
    derived: Sequence[Derived] = ()
    scope: str = "lab"

    def and_also(self, other: "Commit") -> "Commit":
        """Return both as one commit, about what this one is about."""
        return Commit(
            changes={**self.changes, **other.changes},
            expected={**self.expected, **other.expected},
            cleared=(*self.cleared, *other.cleared),
            derived=(*self.derived, *other.derived),
            scope=self.scope,
        )

    def with_derived(self, read: Callable[[str], bytes | None]) -> dict[str, bytes | None]:
        """Return all changes, the derived ones computed from what ``read`` gives, or from what was derived before."""
        changes = dict(self.changes)
        for item in self.derived:
            changes |= item.changes(changes[item.key] if item.key in changes else read(item.key))
        return changes


class Records(Protocol):
    """Keys are text without control characters; they are ordered by their UTF-8 bytes."""

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """One consistent reading of several records."""
        ...

    def scan(self, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        """The first records whose keys start with ``prefix`` and follow ``after``, in order."""
        ...

    def commit(self, commit: Commit) -> None:
        """Change records, all or none, for good: with everything that was committed before.

        Raises:
            ConflictError: an expected record is another. StoreUnavailableError: it is not known to be safe, though it may
            have taken effect; ``secure`` tells.
        """
        ...

    def secure(self) -> None:
        """Return when everything that was committed is safe, though not every commit returned.

        Raises:
            StoreUnavailableError: it is not.
        """
        ...

    def compact(self) -> None:
        """Keep what was committed in less room, when there is reason to; once an hour, however often it is called.

        Raises:
            StoreUnavailableError, StoreLostError: it cannot be done now.
        """
        ...

    def check(self) -> None:
        """Return when records can be read.

        Raises:
            StoreUnavailableError, StoreLostError: they cannot.
        """
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def scan_all(records: Records, prefix: str, page: int = 1000) -> Iterator[tuple[str, bytes]]:
    """Every record whose key starts with ``prefix``, in order; those that come or go meanwhile may be missed."""
    after = ""
    while found := records.scan(prefix, after, page):
        yield from found
        after = found[-1][0]


class MemoryRecords:
    """``Records`` of one process, for tests."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            return [self._values.get(key) for key in keys]

    def scan(self, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        with self._lock:
            keys = sorted((key for key in self._values if key.startswith(prefix)), key=str.encode)
            start = bisect_left([key.encode() for key in keys], after.encode() + b"\0") if after else 0
            return [(key, self._values[key]) for key in keys[start : start + limit]]

    def commit(self, commit: Commit) -> None:
        with self._lock:
            if any(self._values.get(key) != value for key, value in commit.expected.items()):
                raise ConflictError
            changes = commit.with_derived(self._values.get)
            for prefix in commit.cleared:
                self._values = {key: value for key, value in self._values.items() if not key.startswith(prefix)}
            for key, value in changes.items():
                if value is None:
                    self._values.pop(key, None)
                else:
                    self._values[key] = value

    def secure(self) -> None:
        pass

    def compact(self) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
