"""What lets a request in: the golden replay must have agreed, and a slot must be free."""

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
