"""Blobs: bytes under names that are written once and kept for good: kept images, staged planes, the journal.

In files of a data directory, or in object storage (S3 and what speaks like it). Knows nothing of plates. What ``put``
returned from is on disk: a file is written beside its place, synced, renamed, and its directory synced.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex
from tempfile import NamedTemporaryFile
from threading import Event
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, NotFoundError
from obstore.store import MemoryStore, ObjectStore, from_url

from service.errors import BlobMissingError, StartError, StoreUnavailableError
from service.priority import give_way

PARTIAL = "partial"
"""Where files lie while they are written; what is old there was never acknowledged."""
_PARALLEL = 16
_ATTEMPTS = 100
_PATIENCE = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=16)}
_RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=10)}
"""A call begins for the last time after 10 s, and ends within 16 s of it: object storage that hangs is told as such."""
_CLIENT_SETTINGS = (
    *_PATIENCE,
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "user_agent",
)
_OF_ENVIRONMENT = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "azure": "AZURE_", "abfs": "AZURE_"}

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger("anchorwell")


class Blobs(Protocol):
    """Names are relative paths of plain segments."""

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes for good; under a name that is there already, they take its place."""
        ...

    def put_all(self, blobs: Mapping[str, bytes]) -> None:
        """Keep several."""
        ...

    def get(self, name: str) -> bytes:
        """Return what is kept.

        Raises:
            BlobMissingError: nothing is.
        """
        ...

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Give a blob as a file of this machine, while the context lasts.

        Raises:
            BlobMissingError: nothing is kept there.
        """
        ...

    def names(self, prefix: str = "") -> list[str]:
        """Names that start with ``prefix``, up to a slash."""
        ...

    def older(self, prefix: str, than: datetime) -> list[str]:
        """Names that start with ``prefix``, up to a slash, of blobs that were put before a time."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Forget blobs; one that is not there is forgotten already."""
        ...


class FileBlobs:
    """Blobs as files below one directory of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced: set[Path] = set()
        with _told("the data directory"):
            self._make_directory(root)

    def put(self, name: str, data: bytes) -> None:
        with _told(name):
            _sync_directory(self._written(name, data).parent)

    def put_all(self, blobs: Mapping[str, bytes]) -> None:
        """Keep several; each directory is synced once, when all its files are there."""
        with _told("a blob"):
            written = in_parallel(lambda item: self._written(*item), blobs.items())
            for directory in sorted({path.parent for path in written}):
                _sync_directory(directory)

    def get(self, name: str) -> bytes:
        try:
            with _told(name):
                return (self._root / name).read_bytes()
        except FileNotFoundError:
            raise BlobMissingError(f"{name} is missing from the data directory") from None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self._root / name
        if not path.is_file():
            raise BlobMissingError(f"{name} is missing from the data directory")
        yield path

    def names(self, prefix: str = "") -> list[str]:
        with _told(prefix):
            return sorted(str(path.relative_to(self._root)) for path in self._files(prefix))

    def older(self, prefix: str, than: datetime) -> list[str]:
        found = []
        with _told(prefix):
            for path in self._files(prefix):
                with suppress(FileNotFoundError):  # it goes this moment
                    if path.stat().st_mtime < than.timestamp():
                        found.append(str(path.relative_to(self._root)))
        return sorted(found)

    def _files(self, prefix: str) -> Iterator[Path]:
        return (Path(folder) / file for folder, _, files in os.walk(self._root / prefix) for file in files)

    def delete(self, names: Iterable[str]) -> None:
        with _told("a blob"):
            for name in names:
                path = self._root / name
                path.unlink(missing_ok=True)
                if path.parent.name != PARTIAL:
                    with suppress(OSError):  # the directory is not empty
                        path.parent.rmdir()

    def _written(self, name: str, data: bytes) -> Path:
        """Write a file whole or not at all; it is found after a power cut once its directory is synced."""
        path, partial = self._root / name, self._root / PARTIAL / token_hex(8)
        self._make_directory(partial.parent)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._moved(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path

    def _moved(self, partial: Path, path: Path) -> None:
        for _ in range(_ATTEMPTS):
            try:
                self._make_directory(path.parent)
                partial.rename(path)
            except FileNotFoundError:  # another request deleted the directory's last file, and with it the directory
                self._synced -= {path.parent, *path.parent.parents}
                continue
            return
        raise OSError(f"{path.parent} keeps being deleted")

    def _make_directory(self, directory: Path) -> None:
        """Make a directory that outlives a power cut: what holds it is synced before anything is put into it."""
        if directory in self._synced and directory.is_dir():
            return
        if directory != self._root:
            self._make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)
        self._synced.add(directory)


class ObjectBlobs:
    """Blobs as objects below one URL, e.g. ``s3://bucket/prefix``."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, name: str, data: bytes) -> None:
        with _told(name):
            self._store.put(name, data)

    def put_all(self, blobs: Mapping[str, bytes]) -> None:
        in_parallel(lambda item: self.put(*item), blobs.items())

    def get(self, name: str) -> bytes:
        try:
            with _told(name):
                return bytes(self._store.get(name).bytes())
        except FileNotFoundError:
            raise BlobMissingError(f"{name} is missing from the object storage") from None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with NamedTemporaryFile() as file:
            file.write(self.get(name))
            file.flush()
            yield Path(file.name)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(str(item["path"]) for item in self._listed(prefix))

    def older(self, prefix: str, than: datetime) -> list[str]:
        return sorted(str(item["path"]) for item in self._listed(prefix) if item["last_modified"] < than)

    def _listed(self, prefix: str) -> list[Any]:
        with _told(prefix):
            return [item for page in self._store.list(prefix or None) for item in page]

    def delete(self, names: Iterable[str]) -> None:
        with _told("a blob"):
            for name in names:
                with suppress(NotFoundError, FileNotFoundError):
                    self._store.delete(name)


def memory_blobs() -> ObjectBlobs:
    """Blobs that are forgotten with the process, for tests."""
    return ObjectBlobs(MemoryStore())


def open_blobs(where: str) -> Blobs:
    """Open a directory, made where it is missing, or object storage by its URL.

    Raises:
        StartError: it cannot be used.
    """
    if "://" in where:
        return open_object_blobs(where)
    try:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        return FileBlobs(Path(where))
    except (OSError, StoreUnavailableError) as error:
        raise StartError(f"the directory {where} cannot be used: {error}") from None


def open_object_blobs(url: str, **options: Any) -> ObjectBlobs:
    """Open object storage; credentials come from the environment, as for any S3 client.

    Raises:
        StartError: the URL is not one.
    """
    try:
        return ObjectBlobs(from_url(url, **{**_bounds(url), **options}))
    except (BaseError, ValueError) as error:
        raise StartError(f"the object storage {url} cannot be used: {error}") from None


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Do work on several items at once, results in their order; once one failed, none is begun any more."""
    todo = list(items)
    if len(todo) <= 1:
        return [work(item) for item in todo]
    failed = Event()

    def begin(item: Item) -> Result:
        if failed.is_set():
            raise CancelledError  # never told: what failed stands before it
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(_PARALLEL, initializer=give_way) as pool:
        return list(pool.map(begin, todo))


def _bounds(url: str) -> dict[str, Any]:
    """How long a call over a network may take; options of the client that the environment sets go before."""
    start = _OF_ENVIRONMENT.get(urlsplit(url).scheme)
    if start is None:
        return {}
    names = {name: f"{start}{name.upper()}" for name in _CLIENT_SETTINGS}
    told = {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}
    return {"client_options": {**_PATIENCE, **told}, "retry_config": _RETRIES}


def _sync_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # it went, with all that was in it
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell errors of the disk and of the object storage as the store's own; paths and addresses are logged alone."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, BaseError) as error:
        log.warning("%s cannot be kept or read: %s", what, str(error).partition("\n")[0])
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise StoreUnavailableError(f"{what} cannot be kept or read ({reason}); nothing is known to have changed") from error
