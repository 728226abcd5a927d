"""Redis killed and started, stopped for half a minute, and flushed, under a service that is asked all the while."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import redis as redis_client

from benchmarks.bars import Bar
from benchmarks.servers import Redis, Service, channels, form

CONTROLS = ["A01", "A02", "B01", "B02", "C01", "C02", "D01", "D02"]
WELLS = ["E05", "F05"]
PAUSE_S = 30.0


class Asker:
    """Asks the same of one plate, and counts what comes back."""

    def __init__(self, service: Service) -> None:
        self.http = httpx.Client(base_url=service.url, timeout=60)
        self.names = channels()
        self.http.post("/batches/P1/controls", files=form("P1", CONTROLS, self.names)).raise_for_status()
        self.first = self.wells(self.predict().json())
        self.summary = self.http.get("/batches").json()
        self.wrong = 0
        self.unexpected = 0

    def predict(self, **headers: str) -> httpx.Response:
        """Ask for the plate's answers."""
        return self.http.post("/batches/P1/predict", files=form("P1", WELLS, self.names), headers=headers)

    def wells(self, body: dict[str, Any]) -> list[Any]:
        """The answers alone."""
        return [(well["well"], well["probabilities"]) for well in body["wells"]]

    def check(self, answer: httpx.Response, *, kept: bool | None = None) -> bool:
        """Count an answer that is another one, or a refusal that is none of those promised; whether it was an answer."""
        if answer.is_success:
            self.wrong += self.wells(answer.json()) != self.first
            self.unexpected += kept is not None and answer.json()["kept"] is not kept
            return True
        promised = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and "retry-after" in answer.headers
        self.unexpected += not promised
        return False


def run(folder: Path) -> list[Bar]:
    """Do to Redis what happens to servers."""
    redis = Redis(folder / "redis")
    redis.start()
    service = Service(folder / "lab", redis.url)
    service.start()
    asker = Asker(service)
    bars = [*_restarted(redis, asker), *_paused(redis, asker), *_flushed(redis, service, asker)]
    service.stop()
    redis.kill()
    return bars


def _restarted(redis: Redis, asker: Asker) -> list[Bar]:
    back_s = []
    for _ in range(5):
        redis.kill()
        asker.check(asker.predict(), kept=False)
        redis.start()
        start = time.monotonic()
        while not (asker.check(answer := asker.predict()) and answer.json()["kept"]):
            time.sleep(0.05)
        back_s.append(time.monotonic() - start)
    gone = int(
        asker.http.get("/batches").json()["batches"][0]["statistics_id"] != asker.summary["batches"][0]["statistics_id"]
    )
    return [
        Bar("Redis killed and started: wrong answers, or statistics gone", asker.wrong + gone, "answers", at_most=0),
        Bar("Redis killed and started: until answers are kept again", max(back_s), "s", at_most=10),
    ]


def _paused(redis: Redis, asker: Asker) -> list[Bar]:
    wrong, unexpected = asker.wrong, asker.unexpected
    redis.pause()
    end, answered, slowest = time.monotonic() + PAUSE_S, 0, 0.0
    uploads = keyed = 0
    while time.monotonic() < end:
        start = time.monotonic()
        answered += asker.check(asker.predict(), kept=False)
        slowest = max(slowest, time.monotonic() - start)
        keyed += asker.check(asker.predict(**{"Idempotency-Key": "while Redis is away"}))
        more = asker.http.post("/batches/P1/controls", files=form("P1", ["A23"], asker.names))
        uploads += more.status_code != httpx.codes.SERVICE_UNAVAILABLE or "retry-after" not in more.headers
    refused = asker.unexpected - unexpected
    redis.resume()
    start = time.monotonic()
    while not (asker.check(answer := asker.predict()) and answer.json()["kept"]):
        time.sleep(0.05)
    return [
        Bar("Redis stopped for 30 s: answers for a plate that is known, kept: false", answered, "answers", at_least=5),
        Bar("Redis stopped for 30 s: slowest of them", slowest, "s", at_most=15),
        Bar("Redis stopped for 30 s: wrong answers", asker.wrong - wrong, "answers", at_most=0),
        Bar("Redis stopped for 30 s: uploads or keyed requests taken", uploads + keyed, "requests", at_most=0),
        Bar("Redis stopped for 30 s: refusals other than 503 with Retry-After", refused, "answers", at_most=0),
        Bar("Redis stopped for 30 s: until answers are kept again", time.monotonic() - start, "s", at_most=10),
    ]


def _flushed(redis: Redis, service: Service, asker: Asker) -> list[Bar]:
    before = asker.http.get("/batches/P1/predictions").json()
    with redis_client.Redis.from_url(redis.url) as server:
        server.flushall()
    asked = [asker.http.get("/batches"), asker.predict(), asker.http.get("/batches/P1"), asker.http.get("/health/ready")]
    empty = sum(not answer.json().get("type", "").endswith("store-lost") for answer in asked)
    start = time.monotonic()
    command = [str(Path(sys.executable).with_name("anchorwell")), "restore", "--data", str(service.data)]
    subprocess.run(command, env={**os.environ, "ANCHORWELL_REDIS": redis.url}, check=True)  # noqa: S603 (our own program)
    seconds = time.monotonic() - start
    wrong = asker.wrong
    asker.check(asker.predict(), kept=True)
    same = asker.http.get("/batches/P1/predictions").json()["wells"]
    told = [(well["well"], well["probabilities"], well["statistics_id"]) for well in same]
    expected = [(well["well"], well["probabilities"], well["statistics_id"]) for well in before["wells"]]
    lost = asker.wrong - wrong + (told != expected)
    return [
        Bar("Redis flushed: answers other than 503 store-lost", empty, "answers", at_most=0),
        Bar("Redis flushed: anchorwell restore", seconds, "s"),
        Bar("Redis flushed and restored: answers wrong or gone", lost, "answers", at_most=0),
    ]
