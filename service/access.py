"""Who may ask: API keys, each of a tenant, with scopes, an expiry and limits. Secrets are kept as their sha256 alone.

A tenant never learns of another's: what is not a tenant's own does not exist to it. Knows nothing of HTTP.
"""

import hmac
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from secrets import token_hex, token_urlsafe
from typing import Any

from cachetools import LRUCache

from model.statistics import canonical_json
from service.audit import Entry
from service.deeds import ANONYMOUS, DEFAULT_TENANT
from service.errors import (
    ForbiddenError,
    InvalidRequestError,
    KeyNotFoundError,
    StoreLostError,
    StoreUnavailableError,
    UnauthorizedError,
)
from service.records import Commit, ConflictError, Records, scan_all

TOKEN_PREFIX = "aw"  # noqa: S105 (marks a token, and is none)
_KEYS = "key/"
_FRESH_FOR = timedelta(seconds=5)
_KNOWN_KEYS = 4096


class Scope(StrEnum):
    """What a key may do."""

    READ = "read"
    """Look at the tenant's batches, images, answers and jobs."""
    WRITE = "write"
    """Send images and plate maps, ask for answers, delete batches."""
    ADMIN = "admin"
    """Manage the tenant's webhooks."""
    METRICS = "metrics"
    """Read the metrics of the whole service."""


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept: never the secret itself."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    secret_sha256: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = None
    bytes_per_day: int | None = None
    note: str = ""

    def is_valid(self, now: datetime) -> bool:
        """Tell whether it opens anything."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def to_bytes(self) -> bytes:
        """Serialise as canonical JSON."""
        times = {name: _told(getattr(self, name)) for name in ("created_at", "expires_at", "revoked_at")}
        return canonical_json({**vars(self), **times, "scopes": sorted(self.scopes)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "ApiKey":
        """Read what ``to_bytes`` wrote."""
        value: dict[str, Any] = json.loads(data)
        times = {name: _time(value[name]) for name in ("created_at", "expires_at", "revoked_at")}
        return cls(**{**value, **times, "scopes": frozenset(Scope(name) for name in value["scopes"])})


@dataclass(frozen=True)
class Caller:
    """Who asks, what they may do, and how much."""

    tenant: str
    by: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    bytes_per_day: int | None = None

    def require(self, scope: Scope) -> None:
        """Check a scope, whatever is asked of whatever exists.

        Raises:
            ForbiddenError: the key lacks it.
        """
        if scope not in self.scopes:
            raise ForbiddenError(f"this key has no scope {scope.value!r}; it has {', '.join(sorted(self.scopes))}")


EVERYONE = Caller(DEFAULT_TENANT, ANONYMOUS, frozenset(Scope))


@dataclass(frozen=True)
class Keys:
    """The keys of a lab, on its records."""

    records: Records
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    def create(
        self,
        tenant: str,
        scopes: Iterable[Scope],
        *,
        days: float | None = None,
        requests_per_minute: int | None = None,
        bytes_per_day: int | None = None,
        note: str = "",
        by: str = "operator",
    ) -> tuple[ApiKey, str]:
        """Keep a new key; the token that is returned is not kept and cannot be told again.

        Raises:
            InvalidRequestError: no scope, or a tenant's name that could not stand in a path.
        """
        if not valid_tenant(tenant):
            raise InvalidRequestError(f"{tenant[:40]!r} is not a tenant: 1 to 64 letters, digits, '_' or '-'")
        granted = frozenset(scopes)
        if not granted:
            raise InvalidRequestError(f"a key needs a scope: {', '.join(Scope)}")
        secret, now = token_urlsafe(32), self.now()
        key = ApiKey(
            key_id=token_hex(6),
            tenant=tenant,
            scopes=granted,
            secret_sha256=_digest(secret),
            created_at=now,
            expires_at=None if days is None else now + timedelta(days=days),
            requests_per_minute=requests_per_minute,
            bytes_per_day=bytes_per_day,
            note=note,
        )
        self._keep(key, None, "key.created", by)
        return key, f"{TOKEN_PREFIX}_{key.key_id}_{secret}"

    def all(self) -> list[ApiKey]:
        """Every key, the revoked ones included."""
        return [ApiKey.from_bytes(data) for _, data in scan_all(self.records, _KEYS)]

    def revoke(self, key_id: str, by: str = "operator") -> ApiKey:
        """Let a key open nothing more.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        (data,) = self.records.read([_KEYS + key_id])
        if data is None:
            raise KeyNotFoundError(f"there is no key {key_id[:40]!r}")
        key = ApiKey.from_bytes(data)
        revoked = ApiKey(**{**vars(key), "revoked_at": key.revoked_at or self.now()})
        self._keep(revoked, data, "key.revoked", by)
        return revoked

    def _keep(self, key: ApiKey, was: bytes | None, action: str, by: str) -> None:
        name = _KEYS + key.key_id
        entry = Entry(self.now(), key.tenant, by, "-", action, key.key_id, {"scopes": sorted(key.scopes)})
        try:
            self.records.commit(
                Commit({name: key.to_bytes()}, {name: was}, derived=(entry.appended(),), scope=f"keys/{key.key_id}")
            )
        except ConflictError:
            raise StoreUnavailableError("the key was changed at the same moment: look at it again") from None


class Access:
    """Tells who asks, by the token of a request; keys that were looked up are known for a few seconds."""

    def __init__(
        self, records: Records, *, allow_anonymous: bool, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._records = records
        self._allow_anonymous = allow_anonymous
        self._now = now
        self._known: LRUCache[str, tuple[datetime, ApiKey | None]] = LRUCache(_KNOWN_KEYS)
        self._keys_known: bool | None = None
        self._lock = threading.Lock()

    def caller(self, authorization: str | None) -> Caller:
        """Return who asks.

        Raises:
            UnauthorizedError: no key where one is needed, or none that opens anything.
        """
        if authorization is None:
            if self._allow_anonymous or not self._any_key():
                return EVERYONE
            raise UnauthorizedError("send Authorization: Bearer aw_… (on the command line, set ANCHORWELL_API_KEY)")
        kind, _, token = authorization.partition(" ")
        prefix, _, rest = token.strip().partition("_")
        key_id, _, secret = rest.partition("_")
        key = self._key(key_id) if kind.lower() == "bearer" and prefix == TOKEN_PREFIX else None
        same = hmac.compare_digest(_digest(secret), key.secret_sha256 if key is not None else _digest("none"))
        if key is None or not same or not key.is_valid(self._now()):
            raise UnauthorizedError("this API key is not known, was revoked, or has expired")
        return Caller(key.tenant, key.key_id, key.scopes, key.requests_per_minute, key.bytes_per_day)

    def _key(self, key_id: str) -> ApiKey | None:
        """Look a key up; while the store is away, one that was known goes on to be."""
        with self._lock:
            known = self._known.get(key_id)
        if known is not None and self._now() - known[0] < _FRESH_FOR:
            return known[1]
        try:
            (data,) = self._records.read([_KEYS + key_id])
        except StoreLostError:
            raise
        except StoreUnavailableError:
            if known is None:
                raise
            return known[1]
        key = None if data is None else ApiKey.from_bytes(data)
        with self._lock:
            self._known[key_id] = (self._now(), key)
        return key

    def _any_key(self) -> bool:
        """Whether there is a key at all; while the store is away, as far as was known."""
        try:
            self._keys_known = bool(self._records.scan(_KEYS, limit=1))
        except StoreLostError:
            raise
        except StoreUnavailableError:
            if self._keys_known is None:
                raise
        return bool(self._keys_known)


def valid_tenant(name: str) -> bool:
    """Tell whether a name can stand in a path and a key."""
    return 0 < len(name) <= 64 and name.isascii() and name.replace("_", "a").replace("-", "a").isalnum()  # noqa: PLR2004


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _told(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
