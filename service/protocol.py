"""uvicorn's HTTP protocol, with a bound on what stands before a request's body, and large bodies in large pieces."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
PIECE_BYTES = 512 << 10
PIECE_S = 0.05
"""A body is handed on when so much of it has arrived, or for so long nothing was: to wake who reads it is dear."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers go on and on; the parser alone would keep them all."""

    _in_headers = True
    _header_bytes = 0
    _handing_on: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if not self._in_headers:
            self._header_bytes = 0
        elif self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"More than {MAX_HEADER_BYTES} bytes of headers.")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete or len(cycle.body) + len(body) >= PIECE_BYTES:
            self._hand_on()
            super().on_body(body)
            return
        cycle.body += body
        if self._handing_on is None:
            self._handing_on = self.loop.call_later(PIECE_S, self._hand_on)

    def _hand_on(self) -> None:
        """Let who waits for the body look at what is there."""
        if self._handing_on is not None:
            self._handing_on.cancel()
            self._handing_on = None
        if self.cycle is not None:  # as for a request that wants another protocol
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._in_headers, self._header_bytes = True, 0  # what follows in the same data is counted with what comes next
        super().on_message_complete()
        self._hand_on()
