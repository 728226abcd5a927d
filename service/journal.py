"""The journal: every commit as objects beside the images, so that records can be rebuilt from the object storage alone.

A commit is one object in each scope that it touches, ``journal/{scope}/{sequence}``, or ``…-end`` where it ends the scope.
It never changes: whoever writes it again writes the same. When everything before it is in the journal as well, an end
becomes ``…-gone-{time}``, before which nothing of its scope counts; it goes itself when nobody can still be writing what was
before. Many entries of a scope are merged into one ``…-snapshot``: no entry up to its sequence counts any more. So an entry
that a slow process writes late changes nothing.

Entries arrive in any order. Each tells up to which sequence nothing was missing when it was committed, so that a gap at the
journal's end is seen: what lies behind it was never acknowledged.
"""

import json
import time
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

from model.statistics import canonical_json
from service.blobs import Blobs, in_parallel
from service.errors import BlobMissingError
from service.records import Changes, Commit

AUDIT = "audit"
"""The scope of the audit log: its records outlive what they tell of, and none ever changes."""
ROWS = ("job/", "job-asked/", "job-answer/", "delivery/", "webhook/", "key/")
"""Records that live and go by themselves: each is a scope of its own, whatever else its commits are about."""
VOLATILE = ("idempotency/", "lease/", "usage/")
"""Records that are worth nothing after Redis is lost, or are counted anew."""
MERGED_FROM = 256
"""How many entries of a scope are left as they are."""
_MERGED_AT_ONCE = 4096
_GONE_FOR = timedelta(days=7)
_ROOT = "journal"
_VERSION = 2
_SET_ASIDE = "unacknowledged"
_AUDIT_ROOT = f"{AUDIT}/"

Kind = Literal["entry", "end", "snapshot", "gone"]
_KINDS: Mapping[str, Kind] = {"": "entry", "end": "end", "snapshot": "snapshot", "gone": "gone"}


@dataclass(frozen=True)
class JournalEntry:
    """What one commit changed, or several in a row, derived changes included.

    ``at`` is when, in seconds since 1970; every commit up to the sequence ``settled`` was in the journal then. ``parts`` is
    how many objects the commit is in the journal. The commit before it had the sequence ``after``; without, one less.
    """

    scope: str
    changes: Changes
    cleared: Sequence[str] = ()
    at: int = 0
    settled: int = 0
    parts: int = 1
    after: int | None = None

    @classmethod
    def of(cls, commit: Commit, changes: Changes, at: int) -> "JournalEntry":
        """Keep what is worth keeping of a commit."""
        kept = {key: value for key, value in changes.items() if not key.startswith(VOLATILE)}
        return cls(commit.scope, kept, tuple(commit.cleared), at)

    @classmethod
    def merged(cls, entries: "Sequence[JournalEntry]") -> "JournalEntry":
        """Return one entry that changes what entries of one scope change, one after the other."""
        changes: dict[str, bytes | None] = {}
        cleared: dict[str, None] = {}
        for entry in entries:
            gone = tuple(entry.cleared)
            cleared |= dict.fromkeys(gone)
            changes = {key: value for key, value in changes.items() if not key.startswith(gone)} if gone else changes
            changes |= entry.changes
        return replace(entries[-1], changes=changes, cleared=tuple(cleared))

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return not self.changes and not self.cleared

    @property
    def ends_scope(self) -> bool:
        """Whether the scope's records are gone after it."""
        emptied = bool(self.cleared) or self.scope.startswith(ROWS)
        return emptied and all(value is None for value in self.changes.values())

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON, values in base64."""
        values = {key: None if value is None else b64encode(value).decode() for key, value in self.changes.items()}
        whole = {"at": self.at, "settled": self.settled, "parts": self.parts, "after": self.after}
        fields = {"scope": self.scope, "cleared": list(self.cleared), "changes": values}
        return canonical_json({"version": _VERSION, **fields, **whole})

    @classmethod
    def from_bytes(cls, data: bytes) -> "JournalEntry":
        """Read what ``to_bytes`` wrote."""
        value: Mapping[str, Any] = json.loads(data)
        if value["version"] != _VERSION:
            raise ValueError(f"a journal entry of version {value['version']}; this release reads {_VERSION}")
        changes = {key: None if text is None else b64decode(text) for key, text in value["changes"].items()}
        whole = {name: value[name] for name in ("at", "settled", "parts")}
        return cls(value["scope"], changes, tuple(value["cleared"]), after=value.get("after"), **whole)

    def by_scope(self) -> "list[JournalEntry]":
        """Separate what outlives the scope from the rest; the audit log, which tells of all of it, comes last."""
        found: dict[str, dict[str, bytes | None]] = {self.scope: {}} if self.cleared else {}
        for key, value in sorted(self.changes.items(), key=lambda item: item[0].startswith(_AUDIT_ROOT)):
            found.setdefault(self._scope_of(key), {})[key] = value
        part = replace(self, cleared=(), parts=len(found))
        return [
            replace(part, scope=scope, changes=changes, cleared=self.cleared if scope == self.scope else ())
            for scope, changes in found.items()
        ]

    def _scope_of(self, key: str) -> str:
        if key.startswith(_AUDIT_ROOT):
            return AUDIT
        return key if key.startswith(ROWS) else self.scope


@dataclass(frozen=True)
class _Name:
    """An object of the journal, as its name tells it."""

    scope: str
    sequence: int
    kind: Kind = "entry"
    at: int = 0

    @classmethod
    def of(cls, name: str) -> "_Name":
        scope, _, last = name.removeprefix(f"{_ROOT}/").rpartition("/")
        sequence, _, rest = last.partition("-")
        kind, _, at = rest.partition("-")
        return cls(scope, int(sequence), _KINDS[kind], int(at or 0))

    def __str__(self) -> str:
        suffix = {"entry": "", "end": "-end", "snapshot": "-snapshot", "gone": f"-gone-{self.at}"}[self.kind]
        return f"{_ROOT}/{self.scope}/{self.sequence:016d}{suffix}"

    @property
    def is_mark(self) -> bool:
        """Whether nothing up to its sequence is missing from the journal, but for what it stands for."""
        return self.kind in ("snapshot", "gone")


@dataclass(frozen=True)
class Journal:
    """Journal entries in object storage; ``now`` gives seconds since 1970."""

    blobs: Blobs
    now: Callable[[], float] = field(default=time.time)

    def entry(self, commit: Commit, changes: Changes) -> JournalEntry | None:
        """What is to be kept of a commit; None when that is nothing."""
        entry = JournalEntry.of(commit, changes, int(self.now()))
        return None if entry.is_empty else entry

    def keep(self, sequence: int, entry: JournalEntry) -> None:
        """Bring an entry to safety; the same again changes nothing.

        Raises:
            StoreUnavailableError: the object storage does not take it.
        """
        for part in entry.by_scope():
            self.blobs.put(str(_Name(part.scope, sequence, "end" if part.ends_scope else "entry")), part.to_bytes())

    def conclude(self, sequence: int, entry: JournalEntry) -> None:
        """Let go of the scopes that an entry ended; to be called when no entry before it is missing."""
        for part in entry.by_scope():
            if part.ends_scope:
                self._end(_Name(part.scope, sequence, "end"), part, self._names(f"{part.scope}/"))

    def set_aside(self) -> int:
        """Move what lies behind a gap at the journal's end out of it; how much that is. Not while anything is committed."""
        every = [name for names in self._by_scope().values() for name in names]
        found = defaultdict(list)
        for name in every:
            found[name.sequence].append(name)
        whole = self._whole(every)
        for sequence in sorted(sequence for sequence in found if sequence > whole):
            entry = self._read(found[sequence][0])
            before = sequence - 1 if entry.after is None else entry.after
            if before > whole or entry.parts != len(found[sequence]):
                break
            whole = sequence
        behind = [name for name in every if name.sequence > whole]
        for name in behind:
            self.blobs.put(f"{_SET_ASIDE}/{name}", self.blobs.get(str(name)))
        self._delete(behind)
        return len(behind)

    def _whole(self, every: Sequence[_Name]) -> int:
        """A sequence up to which no entry is missing, as far as the marks and the last entry tell."""
        marks = [name.sequence for name in every if name.is_mark]
        last = max(every, key=lambda name: name.sequence, default=None)
        return max([*marks, 0 if last is None else self._read(last).settled])

    def entries(self) -> Iterator[tuple[int, JournalEntry]]:
        """Every entry that counts, in the order of the commits.

        Raises:
            BlobMissingError: entries are being merged at this moment.
        """
        counting = [name for names in self._by_scope().values() for name in _counting(names)]
        for name in sorted(counting, key=lambda name: (name.sequence, name.scope)):
            yield name.sequence, self._read(name)

    # --- merging -----------------------------------------------------------------------------------------------------

    def compact(self, complete: int) -> None:
        """Merge what a scope has many entries of, and forget what does not count; any number of processes may do it.

        Args:
            complete: a sequence up to which no entry is missing from the journal.
        """
        scopes = self._by_scope()
        last_mark = max((name.sequence for names in scopes.values() for name in names if name.is_mark), default=0)
        for names in scopes.values():
            with suppress(BlobMissingError):  # another process merges the same entries
                self._compact(names, complete, last_mark)

    def _compact(self, names: Sequence[_Name], complete: int, last_mark: int) -> None:
        counting = _counting(names)
        ripe = [name for name in counting if name.sequence <= complete]
        ends = [name for name in ripe if name.kind == "end"]
        if ends:
            self._end(ends[-1], self._read(ends[-1]), names)
            return
        self._delete({name for name in names if name.sequence <= complete} - set(counting))
        if [name.kind for name in counting] == ["gone"]:
            old = counting[0].at < self.now() - _GONE_FOR.total_seconds()
            self._delete(counting if old and counting[0].sequence < last_mark else ())
        elif sum(not name.is_mark for name in ripe) >= MERGED_FROM:
            self._merge_all(ripe)

    def _merge_all(self, names: Sequence[_Name]) -> None:
        """Merge a whole scope; of the audit log, only what has not been merged yet."""
        if names[0].scope != AUDIT:
            self._merge(names)
            return
        unmerged = [name for name in names if not name.is_mark]
        for start in range(0, len(unmerged), _MERGED_AT_ONCE):
            self._merge(unmerged[start : start + _MERGED_AT_ONCE])

    def _merge(self, names: Sequence[_Name]) -> None:
        """Put one snapshot in the place of objects in a row; a process that dies between leaves some that do not count."""
        last = names[-1]
        merged = JournalEntry.merged(in_parallel(self._read, names))
        self.blobs.put(str(_Name(last.scope, last.sequence, "snapshot")), merged.to_bytes())
        self._delete(names)

    def _end(self, end: _Name, entry: JournalEntry, names: Sequence[_Name]) -> None:
        """Put the mark of a scope's end, then let go of what it ends."""
        self.blobs.put(str(replace(end, kind="gone", at=entry.at)), entry.to_bytes())
        self._delete(name for name in names if name.sequence < end.sequence or name == end)

    # --- objects -----------------------------------------------------------------------------------------------------

    def _read(self, name: _Name) -> JournalEntry:
        return JournalEntry.from_bytes(self.blobs.get(str(name)))

    def _delete(self, names: Iterable[_Name]) -> None:
        self.blobs.delete(str(name) for name in names)

    def _names(self, prefix: str = "") -> list[_Name]:
        return [_Name.of(name) for name in self.blobs.names(f"{_ROOT}/{prefix}")]

    def _by_scope(self) -> dict[str, list[_Name]]:
        found = defaultdict(list)
        for name in self._names():
            found[name.scope].append(name)
        return found


def _counting(names: Iterable[_Name]) -> list[_Name]:
    """The objects of one scope that count, in order: what it ended with, all snapshots since, all entries since those."""
    ordered = sorted(names, key=lambda name: (name.sequence, name.kind == "snapshot"))
    gone = max((name.sequence for name in ordered if name.kind == "gone"), default=0)
    covered = max((name.sequence for name in ordered if name.is_mark), default=0)
    return [name for name in ordered if name.sequence >= gone and (name.is_mark or name.sequence > covered)]
