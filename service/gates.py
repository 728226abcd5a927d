"""What lets a request in: the golden replay, a free slot, room for its bytes, and what its key may send."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import FixedWindowRateLimiter

from service.access import Caller
from service.errors import BusyError, NotReadyError, TooManyRequestsError


class Readiness:
    """Whether the engine has shown that it computes what the bundle was exported with."""

    def __init__(self) -> None:
        self._decided = anyio.Event()
        self._reason: str | None = "the bundle's golden images are being replayed"

    @property
    def reason(self) -> str | None:
        """Why requests are refused; None when they are taken."""
        return self._reason

    def succeed(self) -> None:
        """Let requests in."""
        self._reason = None
        self._decided.set()

    def fail(self, reason: str) -> None:
        """Refuse requests for good."""
        self._reason = reason
        self._decided.set()

    async def decided(self) -> bool:
        """Wait for the verdict; whether it is good."""
        await self._decided.wait()
        return self._reason is None

    def require(self) -> None:
        """Return when requests are taken.

        Raises:
            NotReadyError: they are not; says why.
        """
        if self._reason is not None:
            raise NotReadyError(f"the service is not ready: {self._reason}", ready=False)


class Slots:
    """Bounds what is worked on at once, uploads or bytes; used from the event loop alone."""

    def __init__(self, size: int, what: str = "uploads") -> None:
        self._size = size
        self._what = what
        self._taken = 0

    @contextmanager
    def taken(self, count: int = 1) -> Iterator[None]:
        """Hold a slot, or several; more than there are is held alone.

        Raises:
            BusyError: there is none.
        """
        if self._taken and self._taken + count > self._size:
            raise BusyError(f"{self._taken:,} {self._what} are being worked on; {self._size:,} are taken at once")
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count


def _counts(redis: str | None) -> Any:
    """Where counts are kept; a Redis that does not answer is not waited for."""
    if redis is None:
        return MemoryStorage(wrap_exceptions=True)
    from service.records_redis import connect  # noqa: PLC0415 (an embedded service needs no Redis)

    return RedisStorage("redis://", connection_pool=connect(redis, timeout_s=1).connection_pool, wrap_exceptions=True)


class Rates:
    """Bounds what each key sends: requests a minute and bytes a day. Counts are shared through Redis when there is one."""

    def __init__(self, redis: str | None = None) -> None:
        self._limiter = FixedWindowRateLimiter(_counts(redis))

    def count(self, caller: Caller, sent_bytes: int) -> None:
        """Count a request; while Redis is away none is.

        Raises:
            TooManyRequestsError: it is one too many, or too large for what is left of the day; says when to come back.
        """
        if caller.requests_per_minute is not None:
            self._hit(
                RateLimitItemPerMinute(caller.requests_per_minute, namespace="requests"), caller, 1, "requests a minute"
            )
        if caller.bytes_per_day is not None and sent_bytes:
            self._hit(RateLimitItemPerDay(caller.bytes_per_day, namespace="bytes"), caller, sent_bytes, "bytes a day")

    def _hit(self, limit: RateLimitItemPerMinute | RateLimitItemPerDay, caller: Caller, cost: int, what: str) -> None:
        try:
            if self._limiter.hit(limit, caller.by, cost=cost):
                return
            reset = self._limiter.get_window_stats(limit, caller.by).reset_time
        except StorageError:
            return
        wait_s = max(1, round(reset - time.time()))
        raise TooManyRequestsError(
            f"this key may send {limit.amount:,} {what}: come back in {wait_s} s", retry_after_s=wait_s
        )
