"""The journal: every commit as one object beside the images, so that records can be rebuilt from the object storage alone.

An object is named ``journal/{scope}/{sequence}`` and never changes: whoever writes it again writes the same. A commit that
clears a scope's records lets the objects before it go, so that what is deleted is gone here, too.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.statistics import canonical_json
from service.blobs import Blobs
from service.records import Changes, Commit

AUDIT = "audit/"
"""Records of the audit log lie in a scope of their own: they outlive what they tell of."""
VOLATILE = ("idempotency/", "lease/")
"""Records that are worth nothing after Redis is lost."""
_ROOT = "journal"


@dataclass(frozen=True)
class JournalEntry:
    """What one commit changed, derived changes included."""

    scope: str
    changes: Changes
    cleared: Sequence[str] = ()

    @classmethod
    def of(cls, commit: Commit, changes: Changes) -> "JournalEntry":
        """Keep what is worth keeping of a commit."""
        kept = {key: value for key, value in changes.items() if not key.startswith(VOLATILE)}
        return cls(commit.scope, kept, tuple(commit.cleared))

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON, values in base64."""
        values = {key: None if value is None else b64encode(value).decode() for key, value in self.changes.items()}
        return canonical_json({"version": 1, "scope": self.scope, "cleared": list(self.cleared), "changes": values})

    @classmethod
    def from_bytes(cls, data: bytes) -> "JournalEntry":
        """Read what ``to_bytes`` wrote."""
        value: Mapping[str, Any] = json.loads(data)
        if value["version"] != 1:
            raise ValueError(f"a journal entry of version {value['version']}; this release reads 1")
        changes = {key: None if text is None else b64decode(text) for key, text in value["changes"].items()}
        return cls(value["scope"], changes, tuple(value["cleared"]))

    def by_scope(self) -> "list[JournalEntry]":
        """Separate what outlives the scope from the rest."""
        audit = {key: value for key, value in self.changes.items() if key.startswith(AUDIT)}
        rest = {key: value for key, value in self.changes.items() if key not in audit}
        parts = [JournalEntry(self.scope, rest, self.cleared)] if rest or self.cleared else []
        return [*parts, *([JournalEntry(AUDIT.strip("/"), audit)] if audit else [])]


@dataclass(frozen=True)
class Journal:
    """Journal entries in object storage."""

    blobs: Blobs

    def keep(self, sequence: int, entry: JournalEntry) -> None:
        """Bring an entry to safety; the same again changes nothing.

        Raises:
            StoreUnavailableError: the object storage does not take it.
        """
        for part in entry.by_scope():
            self.blobs.put(f"{_ROOT}/{part.scope}/{sequence:016d}", part.to_bytes())
        if entry.cleared:
            self.blobs.delete(name for name in self.blobs.names(f"{_ROOT}/{entry.scope}/") if _sequence(name) < sequence)

    def entries(self) -> list[tuple[int, JournalEntry]]:
        """Every entry, in the order of the commits."""
        names = sorted(self.blobs.names(f"{_ROOT}/"), key=_sequence)
        return [(_sequence(name), JournalEntry.from_bytes(self.blobs.get(name))) for name in names]


def _sequence(name: str) -> int:
    return int(name.rpartition("/")[2])
