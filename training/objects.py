"""Objects by their place: a local path, or an s3:// URL read anonymously or with credentials from the environment.

Whole objects only, each read by one call, which tries again while the storage is away. Knows nothing of what they hold.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from model.errors import FetchError

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


class Objects:
    """Reads objects; keeps a store, with its connections, per bucket. Safe in threads, not to be passed to processes."""

    def __init__(self, access: ObjectAccess = ObjectAccess()) -> None:
        self.access = access
        self._stores: dict[str, S3Store] = {}

    def read(self, place: str) -> bytes:
        """Return an object's bytes.

        Raises:
            FileNotFoundError: it is not there. FetchError: it cannot be read: no network, no permission.
        """
        if not is_remote(place):
            return _read_file(place)
        parts = urlsplit(place, allow_fragments=False)
        try:
            found = obstore.get(self._store(parts.netloc), parts.path.lstrip("/"))
            data = bytes(found.bytes())
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise FetchError(f"{place} may not be read: {_first_line(error)}; {self._hint()}") from None
        except BaseError as error:
            raise FetchError(f"{place} cannot be read: {_first_line(error)}; run again when the storage is there") from None
        if len(data) != found.meta["size"]:
            raise FetchError(f"{place} has {found.meta['size']:,} bytes, {len(data):,} came: run again")
        return data

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


def _read_file(place: str) -> bytes:
    try:
        return Path(place).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FetchError(f"{place} cannot be read: {error.strerror}") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
