"""A request's body, in memory or, as a multipart form, in one spool on disk.

Knows nothing of plates. The body is parsed and written off the event loop, block by block, while it arrives, under a
limit that holds with and without Content-Length; a request of thousands of files keeps one file descriptor.
"""

import asyncio
import fcntl
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from service.decoding import FileSlice, content_of
from service.errors import InvalidRequestError, MalformedUploadError, UploadTimeoutError, UploadTooLargeError

IMAGES = "images"
LAYOUT = "layout"
OPTIONS = (LAYOUT, "channels", "pixel_size_um")
"""The parts that a form has at most once; a layout may be a file."""
SPOOL_PREFIX = "anchorwell-spool-"
SLOWEST_BYTES_PER_S = 16 << 10
"""An upload that arrives at less than that would hold its slot for hours."""
_BLOCK_BYTES = 1 << 20
_NEW_S = 60.0


@dataclass(frozen=True)
class FormLimits:
    """What a form may hold, in bytes and files, and for how long nothing of it may arrive."""

    body_bytes: int
    files: int
    file_bytes: int
    layout_bytes: int = 16 << 20
    field_bytes: int = 1_000
    idle_timeout_s: float = 30.0
    spool: Path | None = None


@dataclass(frozen=True)
class ReceivedFile:
    """One file part, by its place in the spool; ``page`` of a file of several channels."""

    name: str
    spool: Path
    offset: int
    size: int
    sha256: str
    page: int | None = None

    @property
    def content(self) -> str:
        """What the file is, whatever it is named."""
        return content_of(self.sha256, self.page)

    def read(self) -> bytes:
        """Return the file's bytes, while the request lasts."""
        return self.slice.read()

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as bytes on this machine's disk."""
        yield self.slice

    @property
    def slice(self) -> FileSlice:
        """Where it lies."""
        return FileSlice(self.spool, self.offset, self.size, self.name, self.page)


@dataclass(frozen=True)
class Form:
    """A received form; files are read from the spool, by any thread, while the request lasts."""

    fields: dict[str, str]
    files: list[tuple[str, ReceivedFile]]


@asynccontextmanager
async def received_form(request: Request, limits: FormLimits) -> AsyncIterator[Form]:
    """Receive a request's multipart form.

    Raises:
        UploadTooLargeError, MalformedUploadError, InvalidRequestError: as they say.
    """
    _check_declared_length(request, limits.body_bytes)
    async with _spooled_off_the_loop(limits.spool) as spool:
        reader = _FormReader(_boundary(request), spool, limits)
        block, received = bytearray(), 0
        async for chunk in _chunks(request, limits.idle_timeout_s):
            received += len(chunk)
            if received > limits.body_bytes:
                raise _too_large(limits.body_bytes)
            block += chunk
            if len(block) >= _BLOCK_BYTES:
                await run_in_threadpool(reader.feed, bytes(block))
                block.clear()
        await run_in_threadpool(reader.feed, bytes(block))
        yield await run_in_threadpool(reader.finish)


async def received_body(request: Request, limit: int, idle_timeout_s: float) -> bytes:
    """Receive a whole body into memory.

    Raises:
        UploadTooLargeError, UploadTimeoutError: as they say.
    """
    return b"".join(await received_pieces(request, limit, idle_timeout_s))


async def received_pieces(request: Request, limit: int, idle_timeout_s: float) -> list[bytes]:
    """Receive a body as it arrives: to join a large one takes the loop's time; raises as ``received_body`` does."""
    _check_declared_length(request, limit)
    chunks, received = [], 0
    async for chunk in _chunks(request, idle_timeout_s):
        received += len(chunk)
        if received > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return chunks


@contextmanager
def spooled(directory: Path | None) -> Iterator[BinaryIO]:
    """Give a file that other processes can open by its name, and that goes with the request."""
    with _opened_spool(directory) as spool:
        yield spool


@asynccontextmanager
async def _spooled_off_the_loop(directory: Path | None) -> AsyncIterator[BinaryIO]:
    """Give a spool; a disk that takes its time to make or delete it holds nobody else up."""
    spool = await run_in_threadpool(_opened_spool, directory)
    try:
        yield spool
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(spool.close)


def _opened_spool(directory: Path | None) -> Any:
    """Open a spool, locked for as long as its process lives: so ``sweep_spool`` knows what is left over."""
    spool = tempfile.NamedTemporaryFile(dir=directory, prefix=SPOOL_PREFIX, buffering=0)  # noqa: SIM115 (closed by who asked)
    fcntl.flock(spool, fcntl.LOCK_EX)
    return spool


def sweep_spool(directory: Path) -> None:
    """Delete what requests of processes that are no more left behind."""
    for path in directory.glob(f"{SPOOL_PREFIX}*"):
        with suppress(OSError), path.open("rb") as file:  # another process swept it, or holds it
            if time.time() - path.stat().st_mtime > _NEW_S:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


async def _chunks(request: Request, idle_timeout_s: float) -> AsyncIterator[bytes]:
    """Give the body as it arrives, and count what was not declared.

    Raises:
        UploadTimeoutError: nothing does, or next to nothing. TooManyRequestsError: it is more than its key may send.
    """
    stream, now = request.stream(), asyncio.get_running_loop().time
    count: Callable[[int], None] | None = getattr(request.state, "count_undeclared", None)
    begun, received, uncounted = now(), 0, 0
    while True:
        try:
            async with asyncio.timeout_at(min(now(), begun + received / SLOWEST_BYTES_PER_S) + idle_timeout_s):
                chunk = await anext(stream)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise UploadTimeoutError(
                f"nothing of the upload arrived for {idle_timeout_s:g} s, or less than {SLOWEST_BYTES_PER_S:,} bytes a "
                "second: send it again"
            ) from None
        received += len(chunk)
        uncounted += len(chunk)
        if count is not None and uncounted >= _BLOCK_BYTES:
            await run_in_threadpool(count, uncounted)
            uncounted = 0
        yield chunk
    if count is not None and uncounted:
        await run_in_threadpool(count, uncounted)


def _check_declared_length(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"the request's body is larger than {limit:,} bytes: send less a request", max_upload_bytes=limit
    )


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedUploadError("expected a multipart/form-data body with a boundary; the content type is another")
    return options[b"boundary"]


@dataclass
class _Part:
    """The part that is being read."""

    name: str = ""
    file_name: str | None = None
    offset: int = 0
    size: int = 0
    text: bytearray = field(default_factory=bytearray)
    digest: Any = field(default_factory=hashlib.sha256)


class _FormReader:
    """Feeds blocks to the parser and keeps what its callbacks say."""

    def __init__(self, boundary: bytes, spool: BinaryIO, limits: FormLimits) -> None:
        self._spool = spool
        self._limits = limits
        self._part = _Part()
        self._header_name = b""
        self._header_value = b""
        self._written = 0
        self._complete = False
        self._fields: dict[str, str] = {}
        self._files: list[tuple[str, ReceivedFile]] = []
        self._options: set[str] = set()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._add_header_name,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._name_part,
                    "on_part_data": self._add,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise MalformedUploadError(f"the body cannot be read: {error}") from None

    def feed(self, block: bytes) -> None:
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise MalformedUploadError(f"the body is not a valid multipart form: {str(error)[:200]}") from None

    def finish(self) -> Form:
        if not self._complete:
            raise MalformedUploadError("the body ends before its last part does; send it again")
        self._spool.flush()
        return Form(fields=self._fields, files=self._files)

    def _begin(self) -> None:
        self._part = _Part(offset=self._written)

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
            name = options.get(b"filename")
            self._part.file_name = None if name is None else name.decode("utf-8", "replace")
        self._header_name = self._header_value = b""

    def _name_part(self) -> None:
        if not self._part.name:
            raise MalformedUploadError("a part of the form has no name")
        is_image = self._part.name == IMAGES and self._part.file_name is not None
        if not is_image:
            self._take_option(self._part)
        elif len(self._files) >= self._limits.files:
            raise UploadTooLargeError(f"the form has more than {self._limits.files:,} files; send fewer wells a request")

    def _take_option(self, part: _Part) -> None:
        may_be = part.name == LAYOUT if part.file_name is not None else part.name in OPTIONS
        if not may_be or part.name in self._options:
            raise InvalidRequestError(
                f"the part {part.name[:40]!r} is not known or is given twice; a form has the files {IMAGES!r} and at most "
                f"one each of {', '.join(map(repr, OPTIONS))}"
            )
        self._options.add(part.name)

    def _limit(self, part: _Part) -> int:
        if part.name == LAYOUT:
            return self._limits.layout_bytes
        return self._limits.file_bytes if part.file_name is not None else self._limits.field_bytes

    def _add(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.size += end - start
        is_file = part.file_name is not None
        if part.size > self._limit(part):
            name = f"{part.name[:40]!r} {(part.file_name or '')[:80]!r}"
            raise UploadTooLargeError(f"the part {name} is larger than {self._limit(part):,} bytes")
        if is_file:
            block = memoryview(data)[start:end]
            part.digest.update(block)
            self._spool.write(block)
            self._written += end - start
        else:
            part.text += data[start:end]

    def _end(self) -> None:
        part = self._part
        if part.file_name is not None:
            place = Path(self._spool.name), part.offset, part.size
            self._files.append((part.name, ReceivedFile(part.file_name, *place, part.digest.hexdigest())))
        else:
            self._fields[part.name] = utf8(bytes(part.text), part.name)

    def _finish(self) -> None:
        self._complete = True


def utf8(data: bytes, name: str) -> str:
    """Decode text.

    Raises:
        InvalidRequestError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the part {name[:40]!r} is not UTF-8: {error.reason} at {error.start}") from None
