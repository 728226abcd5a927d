"""The whole service beside a server that a lab would write, and beside what no service can be faster than.

Both servers are sent the same wells, a multipart form each, by the same client, several at once. The floor is the time that
the plate's bytes take from this machine's disk, past its cache, and through its memory.
"""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_service import COMPRESSIONS, START_TIMEOUT_S, Plate, make_plate, served
from benchmarks.interleaved import interleaved
from benchmarks.servers import free_port
from model.bundle import Bundle
from service.engine import BundleEngine
from service.runtime import open_runtime

WELLS, AT_ONCE = 12, 4
BLOCK = 4 << 20


def peer_bars(folder: Path, threads: int, rounds: int) -> list[Bar]:
    """Measure both servers on plates of each compression."""
    bundle = network.bundle(folder)
    mean, variance, _ = BundleEngine(bundle, open_runtime("cpu", "fp32", threads)).measure(network.images(16))
    np.savez(folder / "statistics.npz", mean=mean, variance=variance)
    bars: list[Bar] = []
    with served(folder, bundle, threads) as (service, _), fastapi_only(folder, bundle, threads) as other:
        for name, compression in COMPRESSIONS.items():
            plate = make_plate(folder / f"plate-peer-{name}", compression, 4, WELLS)
            ours = f"{service.url}/batches/{name}"
            httpx.post(f"{ours}/controls", json=plate.references(plate.controls), timeout=3_600).raise_for_status()
            found = interleaved(
                {
                    "ours": lambda plate=plate, url=f"{ours}/predict": sent(url, plate),  # type: ignore[misc]
                    "fastapi_only": lambda plate=plate, url=f"{other}/predict": sent(url, plate),  # type: ignore[misc]
                },
                rounds,
            )
            size = sum(path.stat().st_size for well in plate.of(plate.treated).values() for path in well)
            floor = size / disk_bytes_per_s([path for well in plate.of(plate.treated).values() for path in well])
            bars += [
                found.ratio(f"service_over_fastapi_only_{name}", "fastapi_only", "ours"),
                found.seconds(f"service_seconds_{name}", "ours"),
                found.seconds(f"fastapi_only_seconds_{name}", "fastapi_only"),
                Bar(f"bytes_over_disk_seconds_{name}", floor, "s"),
                Bar(f"bytes_over_memory_seconds_{name}", size / memory_bytes_per_s(), "s"),
            ]
    return bars


def sent(url: str, plate: Plate) -> None:
    """Send a plate's treated wells, several at once."""

    def send(well: str) -> None:
        files = [("images", (path.name, path.read_bytes())) for paths in plate.of((well,)).values() for path in paths]
        httpx.post(url, files=files, timeout=3_600).raise_for_status()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(send, plate.treated))


@contextmanager
def fastapi_only(folder: Path, bundle: Bundle, threads: int) -> Iterator[str]:
    """A running server of the other kind; its URL."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.fastapi_only", str(bundle.path), str(folder / "statistics.npz"), str(port)]
    with subprocess.Popen([*command, "--threads", str(threads)]) as process:  # noqa: S603 (our own)
        try:
            _wait(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait(url: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        try:
            httpx.get(f"{url}/openapi.json").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the other server did not start")


def disk_bytes_per_s(paths: list[Path]) -> float:
    """How fast files come from the disk, past the cache."""
    begun, read = time.perf_counter(), 0
    buffer = mmap.mmap(-1, BLOCK)  # which lies as the disk wants it
    for path in paths:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            while count := os.readv(handle, [buffer]):
                read += count
        finally:
            os.close(handle)
    return read / (time.perf_counter() - begun)


def memory_bytes_per_s() -> float:
    """How fast bytes are copied from memory to memory, on one thread; the fastest of several times."""
    here, there = np.ones(64 << 20, np.uint8), np.empty(64 << 20, np.uint8)
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        np.copyto(there, here)
        taken.append(time.perf_counter() - begun)
    return here.nbytes / min(taken)
