"""A whole plate of 384 wells: what it takes for each well beside fewer, and what memory the service takes for it.

Its controls are more than fit into the memory that measuring may take, so that the setting has to hold.
Planes are of sixty sites, kept small by a camera of few grey levels, so that the plate lies in the page cache, which is
warm; each file ends with bytes of its own, for none may be another's duplicate. By reference, LZW, nine sites a well.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_images import plane, tiff_bytes
from benchmarks.bench_service import Plate, served, write_plate
from benchmarks.servers import Service

CONTROL_WELLS, DISTINCT = 14, 60
SIZES = (24, 96, 384)
MEASURE_BYTES = 1_500_000_000
GREY_STEP = 128
POLL_S = 0.2


def plate_bars(folder: Path, threads: int) -> list[Bar]:
    """Adapt a plate, and classify three numbers of its wells."""
    files = [tiff_bytes(plane(seed) // GREY_STEP * GREY_STEP, "lzw") for seed in range(DISTINCT * len(network.CHANNELS))]
    whole = write_plate(folder / "plate-whole", files, CONTROL_WELLS, max(SIZES) - CONTROL_WELLS)
    try:
        settings = {"MEASURE_BYTES": str(MEASURE_BYTES)}
        with (
            served(folder, network.bundle(folder), threads, settings) as (service, _),
            httpx.Client(timeout=7_200) as client,
        ):
            return _measured(service, client, whole)
    finally:
        shutil.rmtree(whole.folder)


def _measured(service: Service, client: httpx.Client, whole: Plate) -> list[Bar]:
    def post(batch: str, what: str, wells: tuple[str, ...]) -> float:
        begun = time.perf_counter()
        client.post(f"{service.url}/batches/{batch}/{what}", json=whole.references(wells)).raise_for_status()
        return time.perf_counter() - begun

    post("small", "controls", whole.controls[:4])
    post("small", "predict", whole.treated[:4])
    own = resident_bytes(service)
    with peak(service) as measuring:
        post("whole", "controls", whole.controls)
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    with peak(service) as classifying:
        for size in (24, 96, 24, 384, 24, 96, 24):
            wells = (*whole.treated, *whole.controls)[:size]
            seconds[size].append(post("whole", "predict", wells) / size)
    each = {size: float(np.median(taken)) for size, taken in seconds.items()}
    spread = {size: (min(taken) / each[24], max(taken) / each[24]) for size, taken in seconds.items()}
    return [
        Bar("memory_of_its_own", own / 1e9, "GB"),
        Bar("memory_measuring", (max(measuring) - own) / 1e9, "GB", at_most=MEASURE_BYTES / 1e9),
        Bar("memory_classifying_a_plate", (max(classifying) - own) / 1e9, "GB", at_most=1.5),
        *(Bar(f"seconds_a_well_{size}_over_24", each[size] / each[24], "", 0.95, 1.05, spread[size]) for size in SIZES[1:]),
        *(Bar(f"seconds_a_well_of_{size}", each[size], "s") for size in SIZES),
    ]


@contextmanager
def peak(service: Service) -> Iterator[list[float]]:
    """Collect the service's memory while something is done."""
    found, done = [float(resident_bytes(service))], threading.Event()

    def look() -> None:
        while not done.wait(POLL_S):
            found.append(float(resident_bytes(service)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def resident_bytes(service: Service) -> int:
    """What the service and its decoders hold in memory, what they share counted once."""
    return sum(_proportional_bytes(process) for process in service.processes())


def _proportional_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
