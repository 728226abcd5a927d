"""The audit log: every write as one entry, chained by hash, so that a change or a gap anywhere shows.

An entry is written in the very commit that it tells of. Its record is canonical JSON with the sha256 of the one before;
the chain's end is kept beside it. Who can write to the store could make a chain anew: note the end's hash elsewhere.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from model.statistics import canonical_json
from service.records import Changes, Derived, Records, scan_all

_ENTRIES = "audit/entry/"
_END = "audit/end"
_FIRST = "0" * 64


@dataclass(frozen=True)
class Entry:
    """Who did what to what, when; ``digests`` name the images or values that were written."""

    at: datetime
    tenant: str
    by: str
    request_id: str
    action: str
    subject: str
    digests: Mapping[str, Any]

    def appended(self) -> Derived:
        """What a commit adds to write this entry at the chain's end."""
        return Derived(_END, self._changes)

    def _changes(self, end: bytes | None) -> Changes:
        number, previous = _end(end)
        content = canonical_json(
            {
                "number": number + 1,
                "previous": previous,
                "at": self.at.isoformat(),
                "tenant": self.tenant,
                "by": self.by,
                "request_id": self.request_id,
                "action": self.action,
                "subject": self.subject,
                "digests": dict(self.digests),
            }
        )
        after = canonical_json({"number": number + 1, "hash": sha256(content).hexdigest()})
        return {_name(number + 1): content, _END: after}


@dataclass(frozen=True)
class Verdict:
    """What a look at the whole chain found: its length, the hash at its end, and the first fault, if there is one."""

    entries: int
    end: str
    fault: str | None


def entries(records: Records) -> Iterator[dict[str, Any]]:
    """Every entry, oldest first."""
    return (json.loads(content) for _, content in scan_all(records, _ENTRIES))


def verify(records: Records, expected_hash: str | None = None) -> Verdict:
    """Check every link of the chain; a hash that it once ended with must still be in it."""
    (kept_end,) = records.read([_END])
    count, expected = _end(kept_end)
    number, previous = 0, _FIRST
    seen = expected_hash is None
    for key, content in scan_all(records, _ENTRIES):
        number += 1
        entry = json.loads(content)
        if key != _name(number) or entry.get("number") != number:
            return Verdict(number - 1, previous, f"entry {number} is missing: the next one there is {key}")
        if entry.get("previous") != previous:
            return Verdict(number - 1, previous, f"entry {number} does not follow the one before it, which was changed")
        previous = sha256(content).hexdigest()
        seen = seen or previous == expected_hash
        if number == count:
            break  # what is written meanwhile is checked next time
    if (number, previous) != (count, expected):
        return Verdict(number, previous, f"the chain should end with entry {count}, hash {expected[:12]}…")
    if not seen:
        return Verdict(
            number, previous, f"no entry has the hash {(expected_hash or '')[:12]}… that the chain once ended with"
        )
    return Verdict(number, previous, None)


def _end(end: bytes | None) -> tuple[int, str]:
    if end is None:
        return 0, _FIRST
    value = json.loads(end)
    return int(value["number"]), str(value["hash"])


def _name(number: int) -> str:
    return f"{_ENTRIES}{number:012d}"
