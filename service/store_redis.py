"""Batches in Redis. The only module that knows it.

Every key of a batch starts with ``anchorwell:v1:{tenant}:batch:{batch_id}:``; a commit watches the batch's head and
writes all its keys in one MULTI. Redis must sync every write to disk before it answers, or an acknowledged upload could
be lost; a server that says otherwise is refused at start.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from model.layout import SiteKey
from model.statistics import canonical_json
from service.errors import StartError, StoreUnavailableError
from service.store import (
    TENANT,
    Adaptation,
    BatchRecord,
    Change,
    ControlSite,
    RevisionConflictError,
    image_bytes,
    image_from_bytes,
    next_revision,
)

SCHEMA_VERSION = 1
_DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
_PARTS = ("head", "controls", "images", "treated", "adaptations")

log = logging.getLogger("anchorwell")


class RedisStore:
    """A ``Store`` in a Redis server, shared by several machines."""

    def __init__(self, url: str, tenant: str = TENANT) -> None:
        self._tenant_key = f"anchorwell:v1:{tenant}:"
        try:
            self._redis: Any = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=60)
            _check_durability(self._redis)
            _check_schema(self._redis)
        except (redis.RedisError, ValueError) as error:
            raise StartError(f"the Redis store cannot be used: {error}") from None

    def batch_ids(self) -> list[str]:
        with _told():
            return sorted(name.decode() for name in self._redis.smembers(self._tenant_key + "batches"))

    def batch(self, batch_id: str) -> BatchRecord | None:
        with _told(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(self._key(batch_id, "head"))
            pipe.hgetall(self._key(batch_id, "controls"))
            pipe.smembers(self._key(batch_id, "treated"))
            pipe.hkeys(self._key(batch_id, "adaptations"))
            head, controls, treated, adaptations = pipe.execute()
        if not head:
            return None
        sites = sorted((_control(name, value) for name, value in controls.items()), key=lambda site: site.key)
        size, plate = head.get(b"pixel_size_um"), head.get(b"plate")
        return BatchRecord(
            batch_id=batch_id,
            revision=head[b"revision"].decode(),
            pixel_size_um=None if size is None else float(size),
            plate=None if plate is None else plate.decode(),
            controls={site.key: site for site in sites},
            treated=frozenset(well.decode() for well in treated),
            adaptations=frozenset(_pair(name.decode()) for name in adaptations),
            changed_at=datetime.fromisoformat(head[b"changed_at"].decode()),
        )

    def image(self, batch_id: str, site: SiteKey) -> NDArray[np.float32] | None:
        with _told():
            data = self._redis.hget(self._key(batch_id, "images"), _site_name(site))
        return None if data is None else image_from_bytes(data)

    def adaptation(self, batch_id: str, bundle_digest: str, statistics_id: str) -> Adaptation | None:
        with _told():
            data = self._redis.hget(self._key(batch_id, "adaptations"), f"{bundle_digest}/{statistics_id}")
        return None if data is None else Adaptation.from_bytes(data)

    def commit(self, batch_id: str, expected_revision: str | None, change: Change) -> None:
        head = self._key(batch_id, "head")
        with _told(), self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(head)
            found = pipe.hget(head, "revision")
            if (None if found is None else found.decode()) != expected_revision:
                raise RevisionConflictError
            pipe.multi()
            self._write(pipe, batch_id, next_revision(expected_revision), change)
            try:
                pipe.execute()
            except redis.WatchError:
                raise RevisionConflictError from None

    def _write(self, pipe: Any, batch_id: str, revision: str, change: Change) -> None:
        values = {"revision": revision, "changed_at": change.changed_at.isoformat()}
        if change.pixel_size_um is not None:
            values["pixel_size_um"] = repr(change.pixel_size_um)
        if change.plate is not None:
            values["plate"] = change.plate
        pipe.sadd(self._tenant_key + "batches", batch_id)
        pipe.hset(self._key(batch_id, "head"), mapping=values)
        for site, image in change.controls:
            kept = {"planes": dict(site.planes), "recipe_digest": site.recipe_digest}
            pipe.hset(self._key(batch_id, "controls"), _site_name(site.key), canonical_json(kept))
            pipe.hset(self._key(batch_id, "images"), _site_name(site.key), image_bytes(image))
        if change.treated:
            pipe.sadd(self._key(batch_id, "treated"), *sorted(change.treated))
        if change.adaptation is not None:
            name = f"{change.adaptation.bundle_digest}/{change.adaptation.statistics_id}"
            pipe.hset(self._key(batch_id, "adaptations"), name, change.adaptation.to_bytes())

    def delete(self, batch_id: str) -> bool:
        with _told(), self._redis.pipeline(transaction=True) as pipe:
            pipe.srem(self._tenant_key + "batches", batch_id)
            pipe.delete(*(self._key(batch_id, part) for part in _PARTS))
            removed, _ = pipe.execute()
        return bool(removed)

    def check(self) -> None:
        with _told():
            self._redis.ping()

    def close(self) -> None:
        self._redis.close()

    def _key(self, batch_id: str, part: str) -> str:
        return f"{self._tenant_key}batch:{batch_id}:{part}"


def _check_durability(server: Any) -> None:
    try:
        found = {name: server.config_get(name).get(name) for name in _DURABLE}
    except redis.ResponseError as error:  # a managed server may forbid CONFIG
        log.warning("Redis does not tell whether it syncs every write to disk (%s): make sure that it does", error)
        return
    wrong = [f"{name} {wanted} (it is {found[name]})" for name, wanted in _DURABLE.items() if found[name] != wanted]
    if wrong:
        raise StartError(f"this Redis could lose what was acknowledged; it needs {', '.join(wrong)}")


def _check_schema(server: Any) -> None:
    key = "anchorwell:schema"
    server.setnx(key, SCHEMA_VERSION)
    found = int(server.get(key))
    if found != SCHEMA_VERSION:
        raise StartError(f"the Redis store has schema {found}; this release reads {SCHEMA_VERSION}: update it")


@contextmanager
def _told() -> Iterator[None]:
    """Tell Redis's errors as the store's own."""
    try:
        yield
    except redis.RedisError as error:
        raise StoreUnavailableError(f"Redis failed: {error}; nothing is known to have changed") from error


def _site_name(site: SiteKey) -> str:
    return f"{site.well}/{site.site}"


def _control(name: bytes, value: bytes) -> ControlSite:
    well, _, site = name.decode().partition("/")
    return ControlSite(key=SiteKey(well, int(site)), **json.loads(value))


def _pair(name: str) -> tuple[str, str]:
    bundle, _, statistics = name.partition("/")
    return bundle, statistics
