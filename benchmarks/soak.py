"""64 clients for ten minutes on two cores: nothing refused but with a time to come back, memory flat, and the loop free.

The clients would be other machines: here they give way to the service, whose two cores they use. Who asks whether it lives
goes first, so that it is the service's time that is measured. Beside it stands a bare uvicorn that is asked in the same way
while two processes use both cores: what a machine this busy allows at all.
"""

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import numpy as np
import uvicorn

from benchmarks.bars import Bar
from benchmarks.hostile import family_bytes
from benchmarks.servers import Service, channels, form, free_port, put_plane

CLIENTS = 64
SECONDS = 600.0
WARM_UP_S = 120.0
PROBE_S = 0.05
CONTROLS = ["A01", "A02", "B01", "B02", "C01", "C02", "D01", "D02"]


class Probe:
    """Asks from a process of its own whether a server lives, twenty times a second, and notes how long that takes."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.results, told = context.Pipe(duplex=False)
        self.over = context.Event()
        self.process = context.Process(target=_probe, args=(url, self.over, told), daemon=True)
        self.process.start()

    def p99_ms(self) -> float:
        """End; what 99 of 100 stayed within."""
        self.over.set()
        seconds = self.results.recv()
        self.process.join()
        return float(np.percentile(seconds, 99)) * 1e3


def _probe(url: str, over: Event, told: Connection) -> None:
    with suppress(PermissionError):
        os.nice(-10)
    seconds: list[float] = []
    with httpx.Client(timeout=30) as http:
        while not over.wait(PROBE_S):
            start = time.perf_counter()
            http.get(url).raise_for_status()
            seconds.append(time.perf_counter() - start)
    told.send(seconds)


class Client(threading.Thread):
    """Sends planes ahead and asks for answers, on and on, as a well-behaved client does."""

    def __init__(self, url: str, number: int, end: float, told: Counter[str]) -> None:
        super().__init__(daemon=True)
        self.url, self.batch, self.end, self.told = url, f"S{number}", end, told
        self.names = channels()
        self.files = form(self.batch, ["E05"], self.names)

    def run(self) -> None:
        """Work until the end."""
        with httpx.Client(base_url=self.url, timeout=120) as http:
            self.until_done(
                lambda: http.post(f"/batches/{self.batch}/controls", files=form(self.batch, CONTROLS, self.names))
            )
            while time.monotonic() < self.end:
                self.until_done(lambda: http.post(f"/batches/{self.batch}/predict", files=self.files))
                self.until_done(lambda: put_plane(http, self.batch, "F05", self.names[0]))

    def until_done(self, send: Callable[[], httpx.Response]) -> None:
        """Send again after the time asked for, until it is done."""
        while time.monotonic() < self.end:
            try:
                answer = send()
            except httpx.HTTPError as error:
                self.told[f"error {type(error).__name__}"] += 1
                return
            if answer.is_success:
                self.told["done"] += 1
                return
            waits = answer.status_code in (429, 503) and "retry-after" in answer.headers
            self.told["come back" if waits else f"error {answer.status_code}"] += 1
            if not waits:
                return
            time.sleep(float(answer.headers["retry-after"]))


def run(folder: Path, seconds: float = SECONDS, warm_up_s: float = WARM_UP_S) -> list[Bar]:
    """Load a service, and then a bare server on a machine as busy."""
    service = Service(folder / "lab")
    service.start()
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    clients = context.Process(target=_clients, args=(service.url, seconds, sender), daemon=True)
    clients.start()
    probe = Probe(f"{service.url}/health/live")
    end = time.monotonic() + seconds
    memory: list[tuple[float, int]] = []
    while (left := end - time.monotonic()) > 0:
        memory.append((seconds - left, family_bytes(service)))
        time.sleep(min(5.0, left))
    live_ms = probe.p99_ms()
    told = results.recv()
    clients.join()
    service.stop()
    warm = [size for at, size in memory if warm_up_s <= at < warm_up_s + seconds / 5]
    last = [size for at, size in memory if at >= seconds * 0.8]
    growth = float(np.median(last) / np.median(warm) - 1)
    errors = sum(count for name, count in told.items() if name.startswith("error"))
    print(dict(told), flush=True)
    return [
        Bar("soak: clients", CLIENTS, "clients", at_least=64),
        Bar("soak: time", seconds, "s", at_least=600),
        Bar("soak: requests done", told["done"], "requests"),
        Bar("soak: told to come back", told["come back"], "requests"),
        Bar("soak: any other refusal or error", errors, "requests", at_most=0),
        Bar("soak: growth of memory after warm-up", growth, "", at_most=0.05),
        Bar("soak: memory at the end, service and workers", float(np.median(last)) / 2**20, "MiB"),
        Bar("soak: /health/live, 99 of 100 within", live_ms, "ms", at_most=20),
        Bar("soak: a bare uvicorn beside two busy cores, 99 of 100 within", _bare_p99_ms(min(60.0, seconds)), "ms"),
    ]


def _clients(url: str, seconds: float, results: Connection) -> None:
    os.nice(10)
    told: Counter[str] = Counter()
    end = time.monotonic() + seconds
    clients = [Client(url, number, end, told) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    results.send(told)


def _bare_p99_ms(seconds: float) -> float:
    port = free_port()
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_busy, daemon=True) for _ in range(2)]
    server = context.Process(target=_bare, args=(port,), daemon=True)
    server.start()
    time.sleep(3)
    for other in others:
        other.start()
    probe = Probe(f"http://127.0.0.1:{port}/")
    time.sleep(seconds)
    bare_ms = probe.p99_ms()
    for process in (*others, server):
        process.kill()
    return bare_ms


def _busy() -> None:
    """Use a core, as gently as the service's own work does."""
    os.nice(5)
    while True:
        np.dot(np.ones((300, 300)), np.ones((300, 300)))


async def _answer(_scope: object, _receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def _bare(port: int) -> None:
    uvicorn.run(_answer, port=port, log_config=None, lifespan="off")
