"""The queue of background work: huey, carrying nothing but the names of rows. The only module that knows it.

huey acknowledges nothing: a message is gone when it is taken. So a row (a job, a delivery) is the truth, with a lease that
runs out; ``look_after`` runs every minute, and enqueues again whatever should run and does not.
"""

import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from huey import Huey, PriorityRedisHuey, SqliteHuey, crontab
from huey.consumer import Consumer
from huey.registry import Message
from huey.serializer import Serializer

log = logging.getLogger("anchorwell")
logging.getLogger("huey").setLevel(logging.WARNING)


class NamesOnly(Serializer):  # type: ignore[misc]  # huey has no types
    """Messages as JSON: nothing that is read back can be more than text and numbers."""

    def _serialize(self, data: Any) -> bytes:
        fields = data._asdict() if isinstance(data, Message) else {"value": data}
        eta = fields.get("eta")
        return json.dumps({**fields, "eta": eta.timestamp() if eta is not None else None}).encode()

    def _deserialize(self, data: bytes) -> Any:
        fields = json.loads(data)
        if "value" in fields:
            return fields["value"]
        eta = fields["eta"]
        fields["eta"] = None if eta is None else _local_time(eta)
        return Message(**{**fields, "args": tuple(fields["args"])})


def _local_time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds)  # noqa: DTZ006 (huey compares with naive local time)


def _connected(redis: str) -> Any:
    from service.records_redis import connect  # noqa: PLC0415 (an embedded service needs no Redis)

    return connect(redis)


class Queue:
    """Runs ``run(kind, name)`` in the background, on this machine's workers or others'."""

    def __init__(self, data: Path, redis: str | None) -> None:
        self._redis = None if redis is None else _connected(redis)
        options = {"name": "anchorwell", "serializer": NamesOnly(), "utc": False, "results": False}
        self._huey: Huey = (
            SqliteHuey(filename=str(data / "queue.db"), fsync=True, **options)
            if self._redis is None
            else PriorityRedisHuey(connection_pool=self._redis.connection_pool, **options)
        )
        self._consumer: Consumer | None = None
        self._run: Callable[[str, str], None] | None = None

        @self._huey.task(name="run")  # type: ignore[untyped-decorator]
        def run(kind: str, name: str) -> None:
            assert self._run is not None
            self._run(kind, name)

        self._task = run

    def put(self, kind: str, name: str, delay_s: float = 0.0) -> None:
        """Enqueue a row; one that is lost on the way is enqueued again by ``look_after``."""
        try:
            self._task.schedule((kind, name), delay=delay_s) if delay_s else self._task(kind, name)
        except Exception:
            log.exception("a row could not be enqueued: it is looked after within a minute")

    def start(self, workers: int, run: Callable[[str, str], None], look_after: Callable[[], None]) -> None:
        """Begin to run what is enqueued, on threads of this process."""
        self._run = run

        @self._huey.periodic_task(crontab(minute="*"), name="look_after")  # type: ignore[untyped-decorator]
        def periodic() -> None:
            look_after()

        self._consumer = _Embedded(self._huey, workers=workers, max_delay=1.0, backoff=1.3, shutdown_timeout=60)
        self._consumer.start()

    def stop(self) -> None:
        """Let running work end, for a minute; what does not is done again by another worker."""
        if self._consumer is not None:
            self._consumer.stop(graceful=True)
        self._huey.storage.close()
        if self._redis is not None:
            self._redis.close()


class _Embedded(Consumer):  # type: ignore[misc]  # huey has no types
    """A consumer inside a server, which has the signals."""

    def _set_signal_handlers(self) -> None:
        pass
