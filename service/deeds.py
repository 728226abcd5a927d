"""A deed: one request that may change something, and what is written beside its change in the same commit.

Beside every change stand its entry in the audit log, the answer that a repeated request gets (``idempotency``), and the
events that webhooks tell of. A request takes effect with all of them, or not at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from service.audit import Entry
from service.records import Commit

ANONYMOUS = "anonymous"
DEFAULT_TENANT = "default"


class Beside(Protocol):
    """Something that is written in the commit of a deed's change."""

    def commit(self, deed: "Deed", action: str, subject: str, answer: bytes | None) -> Commit:
        """What is written; ``answer`` is the body that the request is answered with, when it has one."""
        ...


@dataclass(frozen=True)
class Deed:
    """Who asks, in which request, and what is to be written beside what comes of it.

    ``beside`` stands beside every answer, ``events`` beside changes alone. ``progress`` is told how many wells are done, of
    how many; it raises when nobody wants the rest any more.
    """

    tenant: str = DEFAULT_TENANT
    by: str = ANONYMOUS
    request_id: str = "-"
    beside: tuple[Beside, ...] = ()
    events: Beside | None = None
    progress: Callable[[int, int], None] = field(default=lambda _done, _total: None)
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    def alone(self) -> "Deed":
        """The same caller's deed, of which only the audit log tells."""
        return Deed(self.tenant, self.by, self.request_id, now=self.now)

    def done(self, action: str, subject: str, digests: Mapping[str, Any], answer: bytes | None = None) -> Commit:
        """What is written beside a change: the audit entry, and all that stands beside."""
        entry = Entry(self.now(), self.tenant, self.by, self.request_id, action, subject, digests)
        commit = Commit({}, derived=(entry.appended(),))
        if self.events is not None:
            commit = commit.and_also(self.events.commit(self, action, subject, answer))
        return self._with_beside(commit, action, subject, answer)

    def answered(self, action: str, subject: str, answer: bytes) -> Commit | None:
        """What is written beside an answer that changed nothing; None when that is nothing."""
        return self._with_beside(Commit({}), action, subject, answer) if self.beside else None

    def _with_beside(self, commit: Commit, action: str, subject: str, answer: bytes | None) -> Commit:
        for item in self.beside:
            commit = commit.and_also(item.commit(self, action, subject, answer))
        return commit
