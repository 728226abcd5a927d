"""What lets a request in: the golden replay, a free slot, room for its bytes, what its key may send, and whence it comes."""

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import FixedWindowRateLimiter

from service.access import Caller
from service.errors import BusyError, ForeignSiteError, NotReadyError, StoreUnavailableError, TooManyRequestsError

T = TypeVar("T")
_CHECKS = 4
_CHECK_TIMEOUT_S = 5.0


class Readiness:
    """Whether the engine has shown that it computes what the bundle was exported with."""

    def __init__(self) -> None:
        self._decided = anyio.Event()
        self._checks = anyio.CapacityLimiter(_CHECKS)
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

    async def checked(self, check: Callable[[], None]) -> None:
        """Run a check of the store, on threads of its own: others may all be waiting for a disk.

        Raises:
            StoreUnavailableError: it does not come back.
        """
        try:
            with anyio.fail_after(_CHECK_TIMEOUT_S):
                await anyio.to_thread.run_sync(check, limiter=self._checks, abandon_on_cancel=True)
        except TimeoutError:
            raise StoreUnavailableError(f"the store did not answer for {_CHECK_TIMEOUT_S:g} s") from None

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
        self._held: Counter[str] = Counter()

    def require_room(self) -> None:
        """Return while not all are taken.

        Raises:
            BusyError: they are.
        """
        taken = self._held.total()
        if taken >= self._size:
            raise self._busy(taken)

    def _busy(self, taken: int) -> BusyError:
        return BusyError(f"{taken:,} {self._what} are being worked on; {self._size:,} are taken at once")

    @contextmanager
    def taken(self, tenant: str, count: int = 1) -> Iterator[None]:
        """Hold a slot, or several; more than there are is held alone. Who holds some leaves as many for another tenant.

        Raises:
            BusyError: there is none.
        """
        taken = self._held.total()
        wanted = 2 * count if self._held[tenant] else count
        if taken and taken + wanted > self._size:
            raise self._busy(taken)
        self._held[tenant] += count
        try:
            yield
        finally:
            self._held[tenant] -= count


class Turns:
    """Lets so many requests work at once; the others wait for their turn.

    More than there are cores would take longer together, and hold up the loop that answers whether the service lives.
    """

    def __init__(self, at_once: int, timeout_s: float) -> None:
        self._limiter = anyio.CapacityLimiter(at_once)
        self._threads = anyio.CapacityLimiter(at_once)
        self._timeout_s = timeout_s

    async def taken(self, work: Callable[[], T]) -> T:
        """Run work on a thread when it is its turn.

        Raises:
            BusyError: it is not, for too long.
        """
        turn = object()
        try:
            with anyio.fail_after(self._timeout_s):
                await self._limiter.acquire_on_behalf_of(turn)
        except TimeoutError:
            raise BusyError(f"the requests before took longer than {self._timeout_s:g} s") from None
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._limiter.release_on_behalf_of(turn)


@dataclass(frozen=True)
class Neighbours:
    """Where requests without a key may come from: this machine's programs, not pages of other sites in its browser.

    A page reaches the service under its own site's name (its DNS led here), or says what site it is of. An address is no
    name, so that nobody else's can lead to it.
    """

    names: Sequence[str] = ()

    def require(self, host: str, origin: str | None) -> None:
        """Check who is called, and from what page.

        Raises:
            ForeignSiteError: by a name that the operator did not give, or from another site's page.
        """
        name = _name_of(host)
        if host and not (name in ("localhost", *self.names) or _is_address(name)):
            raise ForeignSiteError(
                f"requests without an API key are not taken under the name {name[:80]!r}: use the address or localhost, "
                "give the name in ANCHORWELL_ALLOWED_HOSTS, or make a key"
            )
        if origin is not None and origin.partition("://")[2] != host:
            raise ForeignSiteError(f"requests without an API key are not taken from pages of {origin[:80]!r}")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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

    def count_request(self, caller: Caller) -> None:
        """Count a request; while Redis is away none is.

        Raises:
            TooManyRequestsError: it is one too many; says when to come back.
        """
        if caller.requests_per_minute is not None:
            limit = RateLimitItemPerMinute(caller.requests_per_minute, namespace="requests")
            self._hit(limit, caller, 1, "requests a minute")

    def count_bytes(self, caller: Caller, count: int) -> None:
        """Count bytes that are sent; those of a request that is refused for them are not.

        Raises:
            TooManyRequestsError: they are more than is left of the day; says when to come back.
        """
        if caller.bytes_per_day is not None and count:
            self._hit(RateLimitItemPerDay(caller.bytes_per_day, namespace="bytes"), caller, count, "bytes a day")

    def _hit(self, limit: RateLimitItemPerMinute | RateLimitItemPerDay, caller: Caller, cost: int, what: str) -> None:
        try:
            if self._limiter.test(limit, caller.by, cost=cost) and self._limiter.hit(limit, caller.by, cost=cost):
                return
            reset = self._limiter.get_window_stats(limit, caller.by).reset_time
        except StorageError:
            return
        wait_s = max(1, round(reset - time.time()))
        raise TooManyRequestsError(
            f"this key may send {limit.amount:,} {what}: come back in {wait_s} s", retry_after_s=wait_s
        )
