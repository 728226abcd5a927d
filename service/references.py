"""Images that stay where they are: read by reference, only below the roots that the operator gave a tenant.

``file://`` paths are walked from the root one name at a time without following a link; ``s3://`` keys are taken as they are.
Every address is checked, each one inside a LoadData table too, when the request is read and again when its file is.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import httpx
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from service.decoding import FileSlice
from service.errors import ReferenceNotAllowedError, ReferenceUnreadableError, StartError, UploadTooLargeError
from service.multipart import spooled

_CHUNK_BYTES = 1 << 20
_MAX_URI = 2_000
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f]")
_TIMEOUT_S = 60.0
_SIGNED_FOR = timedelta(minutes=5)


@dataclass(frozen=True)
class Place:
    """Where a reference points: below which root, and by which names."""

    root: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class References:
    """Reads what tenants may refer to: ``roots`` by tenant, each ``file:///directory/`` or ``s3://bucket/prefix/``."""

    roots: Mapping[str, Sequence[str]]
    spool: Path
    max_file_bytes: int

    def __post_init__(self) -> None:
        """Check the roots.

        Raises:
            StartError: one is no place.
        """
        for tenant, roots in self.roots.items():
            for root in roots:
                try:
                    _parts(root)
                except ReferenceNotAllowedError as error:
                    raise StartError(f"roots of tenant {tenant}: {error.detail}") from None

    def place(self, tenant: str, uri: str) -> Place:
        """Return where a URI points.

        Raises:
            ReferenceNotAllowedError: it is below none of the tenant's roots.
        """
        kind, where, names = _parts(uri)
        for root in self.roots.get(tenant, ()):
            root_kind, root_where, root_names = _parts_of_root(root)
            below = names[: len(root_names)] == root_names and len(names) > len(root_names)
            if (kind, where) == (root_kind, root_where) and below:
                return Place(root, names[len(root_names) :])
        raise ReferenceNotAllowedError(
            f"{uri[:200]!r} is not below a place that the operator gave this tenant to read from", uri=uri[:200]
        )

    def read(self, tenant: str, uri: str, limit: int) -> bytes:
        """Return a file's bytes.

        Raises:
            ReferenceNotAllowedError, ReferenceUnreadableError, UploadTooLargeError: as they say.
        """
        file = BytesIO()
        self._copy(self.place(tenant, uri), uri, file, limit)
        return file.getvalue()

    @contextmanager
    def on_disk(self, tenant: str, uri: str) -> Iterator[FileSlice]:
        """Give a file that was checked: one of this machine as it lies, held open; an object as a copy."""
        place, name = self.place(tenant, uri), uri.rpartition("/")[2]
        if _parts_of_root(place.root)[0] == "file":
            with self._opened(place, uri) as handle:
                yield FileSlice(Path(f"/proc/{os.getpid()}/fd/{handle}"), 0, os.fstat(handle).st_size, name)
            return
        with spooled(self.spool) as file:
            size = self._copy(place, uri, file, self.max_file_bytes)
            yield FileSlice(Path(file.name), 0, size, name)

    @contextmanager
    def _opened(self, place: Place, uri: str) -> Iterator[int]:
        with _told(uri):
            handle = _open_file(place)
        try:
            if os.fstat(handle).st_size > self.max_file_bytes:
                raise _too_large(self.max_file_bytes)
            yield handle
        finally:
            os.close(handle)

    def _copy(self, place: Place, uri: str, target: Any, limit: int) -> int:
        copy = _copy_file if _parts_of_root(place.root)[0] == "file" else self._copy_object
        with _told(uri):
            return copy(place, target, limit)

    def _copy_object(self, place: Place, target: Any, limit: int) -> int:
        """Copy an object; obstore signs, httpx fetches, for only that can be told to follow no redirect."""
        parts = urlsplit(place.root)
        url = signed_url(parts.netloc, "/".join((*_names(parts.path), *place.names)))
        size = 0
        with httpx.stream("GET", url, follow_redirects=False, timeout=_TIMEOUT_S) as found:
            if found.status_code != httpx.codes.OK:
                raise OSError(f"the object storage answers {found.status_code}")
            for chunk in found.iter_bytes(_CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                target.write(chunk)
        return size


def signed_url(bucket: str, key: str) -> str:
    """Return a URL that reads one object for a few minutes; unsigned where AWS_SKIP_SIGNATURE says that all may read."""
    store = S3Store(bucket)
    if not store.config.get("skip_signature"):
        return obstore.sign(store, "GET", key, _SIGNED_FOR)
    anyone = S3Store(bucket, access_key_id="none", secret_access_key="none", skip_signature=False)  # noqa: S106 (names nobody)
    return obstore.sign(anyone, "GET", key, _SIGNED_FOR).partition("?")[0]


@dataclass(frozen=True)
class ReferencedFile:
    """A plane's file, by its address."""

    references: References
    tenant: str
    uri: str

    @property
    def name(self) -> str:
        """Its address."""
        return self.uri

    @property
    def content(self) -> str:
        """Its address: what lies there is known when it is read."""
        return self.uri

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as bytes on this machine's disk."""
        with self.references.on_disk(self.tenant, self.uri) as copy:
            yield copy


@dataclass(frozen=True)
class ObjectSlice(FileSlice):
    """An object that is fetched by whoever reads it, on another machine perhaps."""

    references: References = References({}, Path(), 0)
    tenant: str = ""

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            ReferenceNotAllowedError, ReferenceUnreadableError, UploadTooLargeError: as they say.
        """
        return self.references.read(self.tenant, self.name, self.references.max_file_bytes)


@dataclass(frozen=True)
class FetchedFile(ReferencedFile):
    """A plane's file in object storage, by its address, fetched where it is decoded."""

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give what fetches it."""
        yield ObjectSlice(Path(), 0, 0, self.uri, references=self.references, tenant=self.tenant)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Tell why a file cannot be read."""
    try:
        yield
    except (OSError, BaseError, httpx.HTTPError) as error:
        raise ReferenceUnreadableError(f"{uri[:200]!r} cannot be read: {_reason(error)}", uri=uri[:200]) from None


def _parts(uri: str) -> tuple[str, str, tuple[str, ...]]:
    """Split an address into its kind, its host or bucket, and names; a plain absolute path is a file's."""
    if len(uri) > _MAX_URI or _CONTROL_CHARACTER.search(uri):
        raise ReferenceNotAllowedError("an address is at most 2,000 characters, none of them a control character")
    if uri.startswith("/") and not uri.startswith("//"):
        return "file", "", _names(uri)
    kind, separator, rest = uri.partition("://")
    where, _, path = rest.partition("/")
    if not separator or kind not in ("file", "s3") or (kind == "file") == bool(where):
        raise ReferenceNotAllowedError(f"{uri[:200]!r} is no address that is read: file:///path or s3://bucket/key")
    return kind, where, _names(_unquoted(path) if kind == "file" else path)


_parts_of_root = lru_cache(_parts)
"""Of few, which each of a plate's thousands of addresses is held against."""


def _unquoted(path: str) -> str:
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ReferenceNotAllowedError(f"the address {path[:200]!r} has a name that is not UTF-8") from None


def _names(path: str) -> tuple[str, ...]:
    """Split a path into names; none of them leads up."""
    names = tuple(name for name in path.split("/") if name)
    if any(name in (".", "..") or "\0" in name or "\\" in name for name in names):
        raise ReferenceNotAllowedError(f"the address {path[:200]!r} has a name that leads elsewhere")
    return names


def _copy_file(place: Place, target: BinaryIO, limit: int) -> int:
    handle = _open_file(place)
    try:
        return _copied(handle, target, limit)
    finally:
        os.close(handle)


def _open_file(place: Place) -> int:
    """Open a regular file that is reached from its root by names alone, never by a link."""
    root = "/" + "/".join(_parts_of_root(place.root)[2])
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in place.names[:-1]:
            handle = _entered(handle, name, os.O_DIRECTORY)
        handle = _entered(handle, place.names[-1], os.O_NONBLOCK)
        _require_regular(handle)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _require_regular(handle: int) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError("it is no regular file")


def _entered(handle: int, name: str, flags: int) -> int:
    """Open a name in a directory, and let go of the directory."""
    inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=handle)
    os.close(handle)
    return inner


def _copied(handle: int, target: BinaryIO, limit: int) -> int:
    size = 0
    while block := os.read(handle, _CHUNK_BYTES):
        size += len(block)
        if size > limit:
            raise _too_large(limit)
        target.write(block)
    return size


def _too_large(limit: int) -> UploadTooLargeError:
    return UploadTooLargeError(f"a file that is referred to is larger than {limit:,} bytes", max_file_bytes=limit)


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without its path on this machine."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)[:200]
