"""One request at a time on one machine: one well of an idle service, its life while it is uploaded to, and its start."""

import asyncio
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import httpx
import numpy as np

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_service import CONTROL_WELLS, START_TIMEOUT_S, TREATED_WELLS, Bare, Plate, make_plate, served
from benchmarks.servers import Service, free_port
from model.bundle import Bundle
from model.memory import keep_freed_memory
from service.client import AnchorwellClient

PING_S = 0.01
PINGS, ONE_WELLS, CLIENTS, CLIENTS_GIVE_WAY, STARTS = 2_000, 100, 8, 10, 9


def latency_bars(folder: Path, threads: int) -> list[Bar]:
    """Start the service a few times, and measure it on an uncompressed plate."""
    keep_freed_memory()  # as the service's decoders do
    bundle = network.bundle(folder)
    bars = [_ready_bar(folder, bundle, threads)]
    plate = make_plate(folder / "plate-latency", None, CONTROL_WELLS, TREATED_WELLS)
    os.sync()  # or what is written here would wait for the plate
    with served(folder, bundle, threads) as (service, _):
        bars += _one_well_bars(service, plate, Bare.on_statistics(folder, bundle, threads))
        bars += _live_bars(service, plate)
    shutil.rmtree(plate.folder)
    return bars


def _ready_bar(folder: Path, bundle: Bundle, threads: int) -> Bar:
    seconds = []
    for _ in range(STARTS):
        with served(folder, bundle, threads) as (_, ready):
            seconds.append(ready)
    return Bar("ready_after_start", statistics.median(seconds), "s", at_most=3.0, interval=(min(seconds), max(seconds)))


def _one_well_bars(service: Service, plate: Plate, bare: Bare) -> list[Bar]:
    """One well at a time on an idle service, beside the same in a bare process, and beside its own images' time there."""
    seconds, computing, inside = [], [], []
    with Asker(service.port) as asker:
        asker.ask("POST", "/batches/one/controls", _json(plate.references(plate.controls)))
        asker.ask("POST", "/batches/one/predict", _json(plate.references(plate.treated[:1])))
        for number in range(ONE_WELLS):
            well = (plate.treated[number % len(plate.treated)],)
            named = _json(plate.references(well))
            begun = time.perf_counter()
            told = asker.ask("POST", "/batches/one/predict", named)
            answered = time.perf_counter()
            inside.append(json.loads(told)["seconds"]["images"])
            bare(plate, well)
            seconds.append(answered - begun)
            computing.append(time.perf_counter() - answered)
    slowest, computed = float(np.quantile(seconds, 0.99)), statistics.median(computing)
    over, beside = np.divide(seconds, inside), np.subtract(seconds, inside)
    return [
        Bar("one_well_p50_over_compute", statistics.median(seconds) / computed, ""),
        Bar("one_well_p99_over_compute", slowest / computed, "", at_most=1.15),
        Bar("one_well_p99_over_compute_p99", slowest / float(np.quantile(computing, 0.99)), ""),
        Bar("one_well_p50_beside_compute", 1_000 * (statistics.median(seconds) - computed), "ms"),
        Bar("one_well_p99_beside_compute", 1_000 * (slowest - computed), "ms", at_most=15.0),
        Bar("one_well_over_its_own_compute_p99", float(np.quantile(over, 0.99)), "", at_most=1.15),
        Bar("one_well_beside_its_own_compute_p50", 1_000 * float(np.median(beside)), "ms"),
        Bar("one_well_beside_its_own_compute_p99", 1_000 * float(np.quantile(beside, 0.99)), "ms", at_most=15.0),
    ]


def _live_bars(service: Service, plate: Plate) -> list[Bar]:
    live, idle = _live(service, plate)
    return [
        Bar("live_p99_while_8_upload", 1_000 * float(np.quantile(live, 0.99)), "ms", at_most=10.0),
        Bar("live_p50_while_8_upload", 1_000 * float(np.median(live)), "ms"),
        Bar("idle_server_p99_while_8_upload", 1_000 * float(np.quantile(idle, 0.99)), "ms"),
        Bar("idle_server_p50_while_8_upload", 1_000 * float(np.median(idle)), "ms"),
    ]


class Asker:
    """One connection on loopback, by the client that takes least itself: httpx takes two milliseconds a request."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the body of an answer; end where it is a refusal."""
        self._connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= httpx.codes.BAD_REQUEST:
            raise SystemExit(f"{method} {path} is answered {answer.status}: {content[:500]!r}")
        return content


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _live(service: Service, plate: Plate) -> tuple[list[float], list[float]]:
    """How long the service takes to say that it lives, and a server that does nothing else, which is asked in turn.

    The probe goes first, the clients, in processes, give way.
    """
    files = [list(plate.of(plate.treated[number::CLIENTS]).values()) for number in range(CLIENTS)]
    context, idle_port = get_context("spawn"), free_port()
    clients = [context.Process(target=_send_again, args=(service.url, number, files[number])) for number in range(CLIENTS)]
    idle = context.Process(target=_say_that_it_lives, args=(idle_port,))
    for process in (idle, *clients):
        process.start()
    try:
        with httpx.Client(base_url=service.url, timeout=60) as probe:
            _wait_for_uploads(probe)
        with Asker(service.port) as live, Asker(idle_port) as beside:
            pings = _pings(live, beside)
        if not all(client.is_alive() for client in clients):
            raise SystemExit("a client of those that upload ended")
    finally:
        for process in (idle, *clients):
            process.kill()
            process.join()
    return pings[0::2], pings[1::2]


def _pings(*askers: Asker) -> list[float]:
    """Ask each in turn whether it lives, one every ``PING_S``.

    A server's stall counts for all that it was due to answer meanwhile; that who asks is woken late is not the server's.
    """
    begun, answered, pings = time.perf_counter(), [0.0] * len(askers), []
    for number in range(PINGS * len(askers)):
        due, asked = begun + number * PING_S, number % len(askers)
        time.sleep(max(0.0, due - time.perf_counter()))
        since = due if answered[asked] > due else time.perf_counter()
        askers[asked].ask("GET", "/health/live")
        answered[asked] = time.perf_counter()
        pings.append(answered[asked] - since)
    return pings


def _say_that_it_lives(port: int) -> None:
    """Serve one answer to whatever is asked, and do nothing else."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async def serve() -> None:
        await (await asyncio.start_server(answer, "127.0.0.1", port)).serve_forever()

    asyncio.run(serve())


def _wait_for_uploads(probe: httpx.Client) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while any(probe.get(f"/batches/live{number}/images").status_code != httpx.codes.OK for number in range(CLIENTS)):
        if time.monotonic() > end:
            raise SystemExit("not all clients upload")
        time.sleep(0.2)


def _send_again(url: str, number: int, sites: Sequence[tuple[Path, ...]]) -> None:
    os.nice(CLIENTS_GIVE_WAY)
    with AnchorwellClient(url) as sender:
        while True:
            sender.stage(f"live{number}", [path for paths in sites for path in paths])
            sender.delete(f"live{number}")
