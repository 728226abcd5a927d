"""What a tenant's images take on disk: counted in the very commit that adds or forgets them, and bounded there.

Answers, statistics and plate maps are records, and are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import QuotaExceededError
from service.records import Changes, Derived, Records

USAGE = "usage/"


@dataclass(frozen=True)
class Usage:
    """Counts a tenant's bytes, of which there may be ``max_bytes``."""

    records: Records
    tenant: str
    max_bytes: int | None = None

    def kept_bytes(self) -> int:
        """What the tenant's images take now."""
        (value,) = self.records.read([USAGE + self.tenant])
        return amount(value)

    def changed(self, more: int) -> tuple[Derived, ...]:
        """What a commit adds to count bytes that come, or go.

        Raises:
            QuotaExceededError: in the commit, when more come than there is room for.
        """
        return (added(USAGE + self.tenant, more, self._require_room),) if more else ()

    def _require_room(self, total: int, more: int) -> None:
        if self.max_bytes is not None and more > 0 and total > self.max_bytes:
            raise QuotaExceededError(
                f"this tenant's images take {total - more:,} of {self.max_bytes:,} bytes, and {more:,} more do not fit: "
                "delete batches that are done with, or ask the operator for room",
                kept_bytes=total - more,
                max_bytes=self.max_bytes,
            )


def amount(value: bytes | None) -> int:
    """Read a count."""
    return 0 if value is None else int(value)


def added(key: str, more: int, check: Callable[[int, int], None] = lambda _total, _more: None) -> Derived:
    """A count that grows by ``more`` in a commit, unless ``check`` raises."""

    def changes(value: bytes | None) -> Changes:
        total = amount(value) + more
        check(total, more)
        return {key: str(total).encode() if total else None}

    return Derived(key, changes)
