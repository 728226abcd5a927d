"""A whole plate of 384 wells: what it takes for each well beside fewer, and what memory the service takes for it.

What it costs is counted in core seconds, for how long it takes depends on what else the machine does; that is told beside.

Its controls are more than fit into the memory that measuring may take, so that the setting has to hold.
Planes are of sixty sites, kept small by a camera of few grey levels, so that the plate lies in the page cache, which is
warm; each file ends with bytes of its own, for none may be another's duplicate. By reference, LZW, nine sites a well.
"""

import os
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
from benchmarks.interleaved import Seconds
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
    def post(batch: str, what: str, wells: tuple[str, ...]) -> tuple[float, float]:
        """Ask; return core seconds and seconds for each well."""
        spent, begun = core_seconds(service), time.perf_counter()
        client.post(f"{service.url}/batches/{batch}/{what}", json=whole.references(wells)).raise_for_status()
        return (core_seconds(service) - spent) / len(wells), (time.perf_counter() - begun) / len(wells)

    post("small", "controls", whole.controls[:4])
    post("small", "predict", whole.treated[:4])
    own = resident_bytes(service)
    with peak(service) as measuring:
        post("whole", "controls", whole.controls)
    taken: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    with peak(service) as classifying:
        for size in (24, 96, 24, 384, 24, 96, 24):
            wells = (*whole.treated, *whole.controls)[:size]
            taken[size].append(post("whole", "predict", wells))
    cores, seconds = ({size: np.array([both[part] for both in taken[size]]) for size in SIZES} for part in (0, 1))
    return [
        Bar("memory_of_its_own", own / 1e9, "GB"),
        Bar("memory_measuring", (max(measuring) - own) / 1e9, "GB", at_most=MEASURE_BYTES / 1e9),
        Bar("memory_classifying_a_plate", (max(classifying) - own) / 1e9, "GB", at_most=1.5),
        *(_beside(f"core_seconds_a_well_{size}_over_24", cores[size], cores[24], (0.95, 1.05)) for size in SIZES[1:]),
        *(_beside(f"seconds_a_well_{size}_over_24", seconds[size], seconds[24], (None, None)) for size in SIZES[1:]),
        *(Bar(f"core_seconds_a_well_of_{size}", float(np.median(cores[size])), "s") for size in SIZES),
        *(Bar(f"seconds_a_well_of_{size}", float(np.median(seconds[size])), "s") for size in SIZES),
    ]


def _beside(name: str, of: Seconds, fewest: Seconds, bounds: tuple[float | None, float | None]) -> Bar:
    each = float(np.median(fewest))
    return Bar(name, float(np.median(of)) / each, "", *bounds, (float(of.min()) / each, float(of.max()) / each))


def core_seconds(service: Service) -> float:
    """What the service and its decoders computed so far."""
    return sum(_core_seconds(process) for process in service.processes())


def _core_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


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
