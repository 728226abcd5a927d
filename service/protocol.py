"""uvicorn's HTTP protocol, with a bound on what stands before a request's body."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers go on and on; the parser alone would keep them all."""

    _in_headers = True
    _header_bytes = 0

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

    def on_message_complete(self) -> None:
        self._in_headers, self._header_bytes = True, 0  # what follows in the same data is counted with what comes next
        super().on_message_complete()
