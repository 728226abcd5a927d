"""The whole service on one machine, by reference and over loopback, beside the same steps in one bare process.

And beside what a lab would write in PyTorch alone (``benchmarks/plain_pytorch.py``). Plates are of links to few images: each
file ends with bytes of its own, so that none is another's duplicate; what is in the pixels costs no time.
"""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import torch

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_images import plane_bytes
from benchmarks.interleaved import Rounds, interleaved
from benchmarks.network import Float
from benchmarks.servers import Service
from model.bundle import INPUT_IMAGES, OUTPUT_LOGITS, Bundle
from model.images import ImageLimits, finish_site
from model.layout import SiteKey
from model.predictions import site_probabilities
from model.statistics import BatchNormStatistics
from service.client import AnchorwellClient
from service.decoding import FileSlice, SiteDecoder
from service.deeds import DEFAULT_TENANT
from service.engine import OnnxEngine

SITES, CONTROL_WELLS, TREATED_WELLS, DISTINCT = 9, 8, 24, 12
CPU = "CPUExecutionProvider"
COMPRESSIONS = {"lzw": "lzw", "uncompressed": None}
PINGS, ONE_WELLS, CLIENTS = 2_000, 60, 8
SAME_PROBABILITIES = 1e-2


@dataclass(frozen=True)
class Plate:
    """Files of a plate's wells: ``sites`` maps (well, site) to the paths of its channels."""

    folder: Path
    sites: dict[tuple[str, int], tuple[Path, ...]]
    controls: tuple[str, ...]

    def of(self, wells: tuple[str, ...]) -> dict[tuple[str, int], tuple[Path, ...]]:
        """Sites of some wells."""
        return {key: paths for key, paths in self.sites.items() if key[0] in wells}

    @property
    def treated(self) -> tuple[str, ...]:
        """Wells that are no controls."""
        return tuple(sorted({well for well, _ in self.sites} - set(self.controls)))

    def references(self, wells: tuple[str, ...]) -> dict[str, object]:
        """What a post says of some wells."""
        images = [
            {"uri": path.resolve().as_uri(), "well": well, "site": site, "channel": channel}
            for (well, site), paths in self.of(wells).items()
            for channel, path in zip(network.CHANNELS, paths, strict=True)
        ]
        return {"images": images}


def make_plate(folder: Path, compression: str | None, controls: int, treated: int) -> Plate:
    """Write a plate's files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    images = [plane_bytes(seed, compression) for seed in range(DISTINCT * len(network.CHANNELS))]
    wells = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)][: controls + treated]
    sites: dict[tuple[str, int], tuple[Path, ...]] = {}
    number = 0
    for well in wells:
        for site in range(1, SITES + 1):
            paths = []
            for channel in network.CHANNELS:
                path = folder / f"{well}_{site}_{channel}.tif"
                path.write_bytes(images[number % len(images)] + number.to_bytes(8, "big"))
                paths.append(path)
                number += 1
            sites[well, site] = tuple(paths)
    return Plate(folder, sites, tuple(wells[:controls]))


# --- the service and its peers ---------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, bundle: Bundle, roots: Path, threads: int) -> Iterator[tuple[Service, float]]:
    """A running service that may read below ``roots``; how long it took to be ready."""
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    settings = {"BUNDLE": str(bundle.path), "THREADS": str(threads), "KEEP_CONTROL_IMAGES": "false"}
    settings["ROOTS"] = json.dumps({DEFAULT_TENANT: [f"{roots.resolve().as_uri()}/"]})
    service = Service(data, environment={f"ANCHORWELL_{name}": value for name, value in settings.items()})
    begun = time.perf_counter()
    service.start()
    ready = time.perf_counter() - begun
    try:
        yield service, ready
    finally:
        service.stop()


@dataclass(eq=False)
class Bare:
    """Read, decode, prepare, classify and store in one process: two threads decode, onnxruntime has statistics folded in."""

    bundle: Bundle
    statistics: BatchNormStatistics
    threads: int
    out: Path
    session: Any = field(init=False)

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = network.folded_session(self.bundle, self.statistics, options, [CPU])

    def __call__(self, plate: Plate) -> None:
        """Classify a plate's treated wells, and write their logits."""
        decode = SiteDecoder(self.bundle.manifest.recipe, ImageLimits())

        def prepared(item: tuple[tuple[str, int], tuple[Path, ...]]) -> Float:
            (well, site), paths = item
            files = {
                channel: FileSlice(path, 0, path.stat().st_size, path.name)
                for channel, path in zip(network.CHANNELS, paths, strict=True)
            }
            return finish_site(decode(SiteKey(well, site), files, None).image, self.bundle.manifest.recipe, None)

        logits = []
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: list[Float] = []
            for image in pool.map(prepared, plate.of(plate.treated).items()):
                waiting.append(image)
                if len(waiting) == SITES:
                    logits.append(self.session.run([OUTPUT_LOGITS], {INPUT_IMAGES: np.stack(waiting)})[0])
                    waiting = []
        np.save(self.out, np.concatenate(logits))


def torch_alone(folder: Path, plate: Plate, threads: int) -> float:
    """Run the frozen script on a plate; its seconds, once torch and the weights are loaded."""
    weights, described = folder / "weights.pt", folder / "sites.json"
    if not weights.is_file():
        torch.save(network.network().state_dict(), weights)
    paths = {
        name: [list(map(str, paths)) for paths in plate.of(wells).values()]
        for name, wells in (("controls", plate.controls), ("treated", plate.treated))
    }
    described.write_text(json.dumps({**paths, "mean": network.MEAN, "std": network.STD, "classes": network.CLASSES}))
    command = [sys.executable, "-m", "benchmarks.plain_pytorch", str(described), str(weights), str(folder / "plain.npz")]
    subprocess.run([*command, "--threads", str(threads), "--workers", str(threads)], check=True)  # noqa: S603 (our own)
    found = np.load(folder / "plain.npz")
    return float(found["adapt_s"] + found["classify_s"])


# --- figures ---------------------------------------------------------------------------------------------------------


def service_bars(folder: Path, threads: int, rounds: int) -> list[Bar]:
    """Start the service once a compression and measure it there."""
    bundle = network.bundle(folder)
    bars: list[Bar] = []
    for name, compression in COMPRESSIONS.items():
        plate = make_plate(folder / f"plate-{name}", compression, CONTROL_WELLS, TREATED_WELLS)
        with served(folder, bundle, folder, threads) as (service, ready):
            bars += [Bar("ready_after_start", ready, "s", at_most=3.0)] if name == "lzw" else []
            bars += _plate_bars(name, folder, service, plate, bundle, threads, rounds)
            bars += _latency_bars(service, plate) if name == "uncompressed" else []
        shutil.rmtree(plate.folder)
    return bars


def _plate_bars(
    name: str, folder: Path, service: Service, plate: Plate, bundle: Bundle, threads: int, rounds: int
) -> list[Bar]:
    batches = iter(range(1_000_000))
    engine = OnnxEngine(bundle, "cpu", threads)
    mean, variance = engine.measure(network.images(16))
    bare = Bare(bundle, BatchNormStatistics(mean, variance, sites=16, wells=16), threads, folder / "bare.npy")
    del engine
    with httpx.Client(base_url=service.url, timeout=3_600) as client:

        def post(batch: str, what: str, body: object) -> None:
            client.post(f"/batches/{batch}/{what}", json=body).raise_for_status()

        def adapted() -> str:
            batch = f"{name}{next(batches)}"
            post(batch, "controls", plate.references(plate.controls))
            return batch

        kept, new = adapted(), [adapted() for _ in range(rounds + 1)]

        def sent(batch: str, *, predict: bool) -> float:
            with AnchorwellClient(service.url) as sender:
                begun = time.perf_counter()
                sender.stage(batch, [path for paths in plate.of(plate.treated).values() for path in paths])
                if predict:
                    sender.predict_staged(batch)
                passed = time.perf_counter() - begun
                sender.delete(batch)
            return passed

        found = interleaved(
            {
                "bare": lambda: bare(plate),
                "by_reference": lambda: post(kept, "predict", plate.references(plate.treated)),
                "raw_put": lambda: sent(new.pop(), predict=True),
                "upload": lambda: sent(f"up{name}{next(batches)}", predict=False),
                "whole": lambda: post(adapted(), "predict", plate.references(plate.treated)),
                "torch": lambda: torch_alone(folder, plate, threads),
            },
            rounds,
        )
        told = client.post(f"/batches/{kept}/predict", json=plate.references(plate.treated)).raise_for_status().json()
        _require_alike(told, np.load(folder / "plain.npz")["logits"])
    slower = Rounds({**found.taken, "slower": np.maximum(found.taken["bare"], found.taken["upload"])})
    return [
        found.ratio(f"by_reference_over_bare_{name}", "bare", "by_reference", at_least=0.95),
        slower.ratio(f"raw_put_over_slower_{name}", "slower", "raw_put", at_least=0.85),
        found.ratio(f"over_plain_pytorch_{name}", "torch", "whole", at_least=2.5 if name == "lzw" else 3.5),
        found.rate(f"by_reference_sites_per_s_{name}", "by_reference", len(plate.of(plate.treated)), "/s"),
    ]


def _require_alike(told: dict[str, Any], logits: Float) -> None:
    """End where the service and torch alone answer otherwise: one of them did not do the work."""
    expected = site_probabilities(logits[:, None]).reshape(-1, SITES, network.CLASSES).mean(axis=1)
    found = np.array([list(well["probabilities"].values()) for well in told["wells"]])
    difference = float(np.abs(found - expected).max())
    if not difference < SAME_PROBABILITIES:
        raise SystemExit(f"the service and torch alone answer otherwise, by {difference:.1e}")


def _latency_bars(service: Service, plate: Plate) -> list[Bar]:
    """One well at a time on an idle service, and whether it says that it lives while it is uploaded to."""
    seconds, computing = [], []
    with httpx.Client(base_url=service.url, timeout=600) as client:
        client.post("/batches/one/controls", json=plate.references(plate.controls)).raise_for_status()
        for number in range(ONE_WELLS):
            body = plate.references((plate.treated[number % len(plate.treated)],))
            begun = time.perf_counter()
            told = client.post("/batches/one/predict", json=body).raise_for_status().json()["seconds"]
            seconds.append(time.perf_counter() - begun)
            computing.append(told["classify"])
    over = np.quantile(np.array(seconds) - np.array(computing), 0.99)
    return [
        Bar("one_well_p99_over_compute", float(np.quantile(seconds, 0.99) / statistics.median(computing)), "", at_most=1.15),
        Bar("one_well_p99_beside_compute", 1_000 * float(over), "ms", at_most=15.0),
        Bar("live_p99_while_8_upload", 1_000 * _live_p99(service, plate), "ms", at_most=10.0),
    ]


def _live_p99(service: Service, plate: Plate) -> float:
    done = threading.Event()

    def send(number: int) -> None:
        files = [path for paths in plate.of(plate.treated[number::CLIENTS]).values() for path in paths]
        with AnchorwellClient(service.url) as sender:
            while not done.is_set():
                sender.stage(f"live{number}", files)
                sender.delete(f"live{number}")

    pings = []
    with ThreadPoolExecutor(CLIENTS) as pool, httpx.Client(base_url=service.url, timeout=60) as client:
        sending = [pool.submit(send, number) for number in range(CLIENTS)]
        time.sleep(1)
        for _ in range(PINGS):
            begun = time.perf_counter()
            client.get("/health/live").raise_for_status()
            pings.append(time.perf_counter() - begun)
            time.sleep(0.005)
        done.set()
        for one in sending:
            one.result()
    return float(np.quantile(pings, 0.99))
