"""Requests that may be repeated: the same Idempotency-Key and content gets the first answer, and takes effect once.

A request holds its key by a lease while it runs; its answer is kept in the very commit of its change. One that died without
an answer lets go when its lease runs out.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from secrets import token_hex
from typing import Any

from starlette.concurrency import run_in_threadpool

from model.statistics import canonical_json, json_sha256
from service.deeds import Deed
from service.errors import (
    AnsweredBefore,
    IdempotencyConflictError,
    InvalidRequestError,
    StillRunningError,
    StoreUnavailableError,
)
from service.records import Commit, ConflictError, Records

PREFIX = "idempotency/"
KEPT_FOR = timedelta(days=7)
_LEASE = timedelta(seconds=10)
_MAX_KEY = 255


@dataclass(frozen=True)
class Held:
    """A key that a running request holds; stands beside its change."""

    name: str
    running: bytes
    content: str
    status: int

    @property
    def lease(self) -> str:
        """The record that says how long the request is known to run."""
        return lease_of(self.name)

    def commit(self, deed: Deed, action: str, subject: str, answer: bytes | None) -> Commit:  # noqa: ARG002
        """Keep the answer in the place of the lease; the commit conflicts when another request took the key."""
        done = {
            "state": "done",
            "content": self.content,
            "status": self.status,
            "body": (answer or b"").decode(),
            "until": (deed.now() + KEPT_FOR).isoformat(),
        }
        return Commit({self.name: canonical_json(done), self.lease: None}, expected={self.name: self.running})


@dataclass(frozen=True)
class Idempotency:
    """The keys of requests that run or were answered."""

    records: Records
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    @asynccontextmanager
    async def held(self, tenant: str, key: str, content: Any, status: int) -> AsyncIterator[Held]:
        """Hold a key while a request runs; a request that fails lets go of it.

        Raises:
            AnsweredBefore: the same request has been answered. IdempotencyConflictError: the key is another request's.
            StillRunningError: the same request is still running.
        """
        held = await run_in_threadpool(self._take, tenant, key, json_sha256(content), status)
        renewal = asyncio.create_task(self._renew(held))
        try:
            yield held
        finally:
            renewal.cancel()
            await run_in_threadpool(self._let_go, held)

    async def _renew(self, held: Held) -> None:
        """Push the end of the lease on, for as long as the request runs."""
        while True:
            await asyncio.sleep(_LEASE.total_seconds() / 3)
            await run_in_threadpool(self._push_on, held)

    def _push_on(self, held: Held) -> None:
        with suppress(ConflictError, StoreUnavailableError):
            self.records.commit(Commit({held.lease: self._until()}, expected={held.name: held.running}, scope=held.name))

    def _take(self, tenant: str, key: str, content: str, status: int) -> Held:
        if not 0 < len(key) <= _MAX_KEY or not key.isascii() or not key.isprintable():
            raise InvalidRequestError(f"an Idempotency-Key is 1 to {_MAX_KEY} printable ASCII characters")
        name = f"{PREFIX}{tenant}/{sha256(key.encode()).hexdigest()}"
        found, lease = self.records.read([name, lease_of(name)])
        if found is not None:
            self._refuse(json.loads(found), lease, content)
        held = Held(name, canonical_json({"state": "running", "content": content, "by": token_hex(8)}), content, status)
        changes = {name: held.running, held.lease: self._until()}
        try:
            self.records.commit(Commit(changes, expected={name: found, held.lease: lease}, scope=name))
        except ConflictError:
            raise _still_running() from None
        return held

    def _refuse(self, found: dict[str, Any], lease: bytes | None, content: str) -> None:
        """Return when the key is free: its request died, or was answered too long ago.

        Raises:
            AnsweredBefore, IdempotencyConflictError, StillRunningError: it is not.
            StoreUnavailableError: the first answer is not safe yet.
        """
        until = found["until"] if lease is None else lease.decode()
        if datetime.fromisoformat(until) < self.now():
            return
        if found["content"] != content:
            raise IdempotencyConflictError(
                "this Idempotency-Key was used for another request: give every request a key of its own"
            )
        if found["state"] == "running":
            raise _still_running()
        self.records.secure()  # the first answer may never have been sent, because its change was not safe yet
        raise AnsweredBefore(found["status"], found["body"].encode())

    def _until(self) -> bytes:
        return (self.now() + _LEASE).isoformat().encode()

    def _let_go(self, held: Held) -> None:
        """Free the key of a request that was not answered; one that was keeps its answer."""
        with suppress(ConflictError, StoreUnavailableError):  # then the lease runs out
            gone = {held.name: None, held.lease: None}
            self.records.commit(Commit(gone, expected={held.name: held.running}, scope=held.name))


def lease_of(name: str) -> str:
    """The record of a key's lease."""
    return f"lease/{name}"


def _still_running() -> StillRunningError:
    return StillRunningError("the same request is still running: ask again for its answer")
