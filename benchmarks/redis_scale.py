"""What Redis holds and does for a plate, and so for many plates a day: ``build/redis-scale.json`` and a table.

Commands count those within scripts, too; bytes are those of all keys, as Redis tells them.

Measured on plates of a few wells with nine sites of the published ResNet-50 (``benchmarks.network``), images by reference; a
plate of 384 wells, and a day of them, is arithmetic upon that. Nothing else may ask this Redis.

Run: ``python -m benchmarks.redis_scale [--plates-a-day 10000]``.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import redis as redis_client

from benchmarks import network
from benchmarks.bars import Bar, table, write_bars
from benchmarks.bench_service import SITES, Plate, make_plate
from benchmarks.servers import Redis, Service
from service.deeds import DEFAULT_TENANT
from service.digests import content_digest

CONTROLS, TREATED = 8, 16
PLATE = {"controls": 64, "treated": 320}
SECONDS_A_DAY = 86_400
OWN = ("info", "scan", "memory|usage")
"""Commands of the measurement itself."""


@dataclass(frozen=True)
class Taken:
    """What something took of Redis: commands, seconds of a core, and bytes that stay."""

    commands: float
    core_s: float
    bytes_kept: float

    def __sub__(self, other: "Taken") -> "Taken":
        return self + other * -1

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.commands + other.commands, self.core_s + other.core_s, self.bytes_kept + other.bytes_kept)

    def __mul__(self, factor: float) -> "Taken":
        return Taken(self.commands * factor, self.core_s * factor, self.bytes_kept * factor)


class Meter:
    """Reads what Redis was asked for and holds."""

    def __init__(self, server: redis_client.Redis) -> None:
        self._server = server

    def taken_by(self, work: Callable[[], object]) -> Taken:
        """What some work took."""
        held, before = self._held(), self._done()
        work()
        after = self._done()
        return Taken(after.commands - before.commands, after.core_s - before.core_s, self._held() - held)

    def _done(self) -> Taken:
        asked: dict[str, Any] = self._server.info("commandstats")
        commands = sum(found["calls"] for name, found in asked.items() if name.removeprefix("cmdstat_") not in OWN)
        spent: dict[str, Any] = self._server.info("cpu")
        return Taken(commands, spent["used_cpu_user"] + spent["used_cpu_sys"], 0)

    def _held(self) -> int:
        return sum(int(str(self._server.memory_usage(key, samples=0) or 0)) for key in self._server.scan_iter(count=1_000))


def measured(folder: Path) -> dict[str, Taken]:
    """What each part of a plate's work takes."""
    plate = make_plate(folder / "plate", None, CONTROLS, TREATED)
    redis = Redis(folder / "redis")
    redis.start()
    roots = json.dumps({DEFAULT_TENANT: [f"{folder.resolve().as_uri()}/"]})
    bundle = network.bundle(Path("build/bench"))
    service = Service(folder / "lab", redis.url, {"ANCHORWELL_BUNDLE": str(bundle.path), "ANCHORWELL_ROOTS": roots})
    service.start()
    try:
        with redis_client.Redis(port=redis.port) as server, httpx.Client(base_url=service.url, timeout=600) as client:
            return _parts(Meter(server), client, plate)
    finally:
        service.stop()
        redis.kill()


def _parts(meter: Meter, client: httpx.Client, plate: Plate) -> dict[str, Taken]:
    def post(batch: str, what: str, wells: tuple[str, ...]) -> Callable[[], object]:
        return lambda: client.post(f"/batches/{batch}/{what}", json=plate.references(wells)).raise_for_status()

    def put() -> None:
        for (well, site), paths in plate.of(plate.treated[:1]).items():
            for channel, path in zip(network.CHANNELS, paths, strict=True):
                data = path.read_bytes()
                sent = client.put(
                    f"/batches/few/images/{well}/{site}/{channel}",
                    content=data,
                    headers={"Content-Digest": content_digest(data)},
                )
                sent.raise_for_status()

    post("warm", "controls", plate.controls)()
    post("warm", "predict", plate.treated[:1])()
    few, many = len(plate.controls) // 2, len(plate.controls)
    controls = {count: meter.taken_by(post(name, "controls", plate.controls[:count])) for name, count in
                (("few", few), ("many", many))}  # fmt: skip
    treated = {count: meter.taken_by(post("few", "predict", plate.treated[:count])) for count in (1, 9)}
    one_plane = meter.taken_by(put) * (1 / (SITES * len(network.CHANNELS)))
    a_control = (controls[many] - controls[few]) * (1 / (many - few))
    a_well = (treated[9] - treated[1]) * (1 / 8)
    return {
        "adapting, whatever the plate": controls[few] + a_control * -few,
        "a control well": a_control,
        "classifying, a request": treated[1] + a_well * -1,
        "a treated well": a_well,
        "a plane sent ahead": one_plane,
    }


def of_a_plate(parts: dict[str, Taken], *, sent_ahead: bool) -> Taken:
    """A plate of 384 wells, adapted and classified in one request each."""
    whole = (
        parts["adapting, whatever the plate"]
        + parts["a control well"] * PLATE["controls"]
        + parts["classifying, a request"]
        + parts["a treated well"] * PLATE["treated"]
    )
    planes = sum(PLATE.values()) * SITES * len(network.CHANNELS)
    return whole + parts["a plane sent ahead"] * planes if sent_ahead else whole


def main() -> None:
    """Measure, and tell what a day takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plates-a-day", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("build/redis-scale.json"))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        parts = measured(Path(folder))
    bars = []
    for name, taken in parts.items():
        bars += [
            Bar(f"commands: {name}", taken.commands, ""),
            Bar(f"core time: {name}", 1e3 * taken.core_s, "ms"),
            Bar(f"kept: {name}", taken.bytes_kept / 1e3, "kB"),
        ]
    day = arguments.plates_a_day
    for name, sent_ahead in (("by reference", False), ("sent ahead", True)):
        plate = of_a_plate(parts, sent_ahead=sent_ahead)
        bars += [
            Bar(f"commands a plate, {name}", plate.commands, ""),
            Bar(f"commands a second at {day:,} plates a day, {name}", plate.commands * day / SECONDS_A_DAY, "/s"),
            Bar(f"share of a core at {day:,} plates a day, {name}", plate.core_s * day / SECONDS_A_DAY, ""),
            Bar(f"kept a plate, {name}", plate.bytes_kept / 1e6, "MB"),
            Bar(f"kept of a day of {day:,} plates, {name}", plate.bytes_kept * day / 1e9, "GB"),
        ]
    write_bars(bars, arguments.out)
    print(table(bars))


if __name__ == "__main__":
    main()
