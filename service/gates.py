"""What lets a request in, and its pixels into memory: the golden replay, a free slot, and room to decode."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from service.errors import BusyError, NotReadyError


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
    """Bounds the uploads worked on at once; used from the event loop alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            BusyError: there is none.
        """
        if self._taken >= self._size:
            raise BusyError(f"{self._size} uploads are being worked on, which is all that is taken at once")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class PixelBudget:
    """Bounds the pixels decoded at once, over all requests; used from any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for room for a plane and hold it; a plane larger than the whole budget waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + pixels <= self._size)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()
