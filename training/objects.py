"""Objects by their place: a local path, or an s3:// URL read anonymously or with credentials from the environment.

Whole objects only, each read by one call, which tries again while the storage is away. Knows nothing of what they hold.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from model.errors import FetchError

if TYPE_CHECKING:
    from obstore import ObjectMeta

S3 = "s3://"
_BACKOFF = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=15), "base": 2}


@dataclass(frozen=True)
class ObjectAccess:
    """How object storage is reached: what is not said here is taken from AWS_* of the environment.

    ``retry_for_s``: how long one object is tried for before the storage counts as away.
    """

    anonymous: bool = False
    endpoint: str | None = None
    region: str | None = None
    retry_for_s: float = 180.0


@dataclass(frozen=True)
class StampedObject:
    """An object's bytes, and the stamp that another version of it does not have."""

    data: bytes
    stamp: str


class Objects:
    """Reads objects; keeps a store, with its connections, per bucket. Safe in threads, not to be passed to processes."""

    def __init__(self, access: ObjectAccess = ObjectAccess()) -> None:
        self.access = access
        self._stores: dict[str, S3Store] = {}

    def read(self, place: str) -> bytes:
        """Return an object's bytes.

        Raises:
            FileNotFoundError: it is not there. IsADirectoryError: a folder lies there. FetchError: it cannot be read: no
                network, no permission.
        """
        return self.read_stamped(place).data

    def read_stamped(self, place: str) -> StampedObject:
        """Return an object's bytes and stamp; raises what ``read`` does."""
        with self._told(place):
            if not is_remote(place):
                return _read_file(place)
            found = obstore.get(*self._located(place))
            data = bytes(found.bytes())
        if len(data) != found.meta["size"]:
            raise FetchError(f"{place} has {found.meta['size']:,} bytes, {len(data):,} came: run again")
        return StampedObject(data, _remote_stamp(found.meta))

    def stamp(self, place: str) -> str:
        """Return an object's stamp without its bytes; raises what ``read`` does."""
        with self._told(place):
            return _remote_stamp(obstore.head(*self._located(place))) if is_remote(place) else _stamp(Path(place).stat())

    @contextmanager
    def _told(self, place: str) -> Iterator[None]:
        """Tell in one sentence why an object cannot be read."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise FetchError(f"{place} may not be read: {_first_line(error)}; {self._hint()}") from None
        except BaseError as error:
            raise FetchError(f"{place} cannot be read: {_first_line(error)}; run again when the storage is there") from None
        except ValueError as error:
            raise FetchError(f"{place} is no object's address: {_first_line(error)}") from None
        except OSError as error:
            raise FetchError(f"{place} cannot be read: {error.strerror}") from None

    def _located(self, place: str) -> tuple[S3Store, str]:
        """Return the bucket and the key of a URL, whose key may hold what other URLs set apart: ? and #."""
        bucket, _, key = place.removeprefix(S3).partition("/")
        return self._store(bucket), key

    def _hint(self) -> str:
        return "it asks for credentials" if self.access.anonymous else "public data is read with --anonymous"

    def _store(self, bucket: str) -> S3Store:
        if bucket not in self._stores:
            self._stores[bucket] = S3Store(bucket, **self._config())
        return self._stores[bucket]

    def _config(self) -> dict[str, Any]:
        access = self.access
        retry = {"max_retries": 20, "retry_timeout": timedelta(seconds=access.retry_for_s), "backoff": _BACKOFF}
        config: dict[str, Any] = {"retry_config": retry}
        if access.anonymous:
            config["skip_signature"] = True
        if access.region:
            config["region"] = access.region
        if access.endpoint:
            config["endpoint"] = access.endpoint
            config["client_options"] = {"allow_http": access.endpoint.startswith("http://")}
        return config


def is_remote(place: str) -> bool:
    """Tell whether a place is in object storage."""
    return place.startswith(S3)


def _read_file(place: str) -> StampedObject:
    with Path(place).open("rb", buffering=0) as file:
        stamp = _stamp(os.fstat(file.fileno()))
        return StampedObject(file.read(), stamp)


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _remote_stamp(meta: "ObjectMeta") -> str:
    return meta["e_tag"] or f"{meta['size']} {meta['last_modified'].timestamp()}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
