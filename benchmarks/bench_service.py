"""The whole service on one machine, by reference and over loopback, beside the same steps in one bare process.

And beside what a lab would write in PyTorch alone (``benchmarks/plain_pytorch.py``). Plates are of links to few images: each
file ends with bytes of its own, so that none is another's duplicate; what is in the pixels costs no time.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import torch

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_engine import CLOSELY
from benchmarks.bench_images import plane_bytes
from benchmarks.interleaved import Rounds, interleaved
from benchmarks.network import Float
from benchmarks.servers import Service
from model.bundle import Bundle
from model.images import ImageLimits, finish_site
from model.layout import SiteKey
from model.memory import keep_freed_memory
from model.predictions import site_probabilities
from model.statistics import BatchNormStatistics
from service.client import AnchorwellClient
from service.decoding import FileSlice, SiteDecoder
from service.deeds import DEFAULT_TENANT
from service.engine import BundleEngine
from service.errors import StartError
from service.runtime import open_runtime

SITES, CONTROL_WELLS, TREATED_WELLS, DISTINCT = 9, 4, 20, 12
COMPRESSIONS = {"lzw": "lzw", "uncompressed": None}
START_TIMEOUT_S = 120
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
    files = [plane_bytes(seed, compression) for seed in range(DISTINCT * len(network.CHANNELS))]
    return write_plate(folder, files, controls, treated)


def write_plate(folder: Path, files: Sequence[bytes], controls: int, treated: int) -> Plate:
    """Write given files as a plate's, in turn; each is told from the others by what stands behind its pixels."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wells = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)][: controls + treated]
    numbers, sites = count(), {}
    for well, site in product(wells, range(1, SITES + 1)):
        paths = [folder / f"{well}_{site}_{channel}.tif" for channel in network.CHANNELS]
        for path, number in zip(paths, numbers, strict=False):
            path.write_bytes(files[number % len(files)] + number.to_bytes(8, "big"))
        sites[well, site] = tuple(paths)
    return Plate(folder, sites, tuple(wells[:controls]))


# --- the service and its peers ---------------------------------------------------------------------------------------


@contextmanager
def served(
    folder: Path, bundle: Bundle, threads: int, changed: Mapping[str, str] | None = None
) -> Iterator[tuple[Service, float]]:
    """A running service that may read below the folder, some settings changed; how long it took to be ready."""
    data = folder / "-".join(["data", *(changed or {}).values()])
    shutil.rmtree(data, ignore_errors=True)
    settings = {"BUNDLE": str(bundle.path), "THREADS": str(threads), "KEEP_CONTROL_IMAGES": "false", **(changed or {})}
    settings["ROOTS"] = json.dumps({DEFAULT_TENANT: [f"{folder.resolve().as_uri()}/"]})
    service = Service(data, environment={f"ANCHORWELL_{name}": value for name, value in settings.items()})
    begun = time.perf_counter()
    service.start()
    ready = time.perf_counter() - begun
    try:
        yield service, ready
    finally:
        service.stop()


@dataclass(frozen=True, eq=False)
class Bare:
    """Read, decode, prepare, classify and store in one process: a thread takes a site through, on the service's engine."""

    bundle: Bundle
    statistics: BatchNormStatistics
    threads: int
    out: Path

    @classmethod
    def on_statistics(cls, folder: Path, bundle: Bundle, threads: int) -> Self:
        """Make one, on statistics of some images."""
        mean, variance, _ = BundleEngine(bundle, open_runtime("cpu", "fp32", threads)).measure(network.images(16))
        return cls(bundle, BatchNormStatistics(mean, variance, sites=16, wells=16), threads, folder / "bare.npy")

    @cached_property
    def _engine(self) -> BundleEngine:
        return BundleEngine(self.bundle, open_runtime("cpu", "fp32", self.threads))

    def __call__(self, plate: Plate, wells: tuple[str, ...] | None = None) -> None:
        """Classify a plate's treated wells, or some wells, and write their logits."""
        decode = SiteDecoder(self.bundle.manifest.recipe, ImageLimits())

        def classified(item: tuple[tuple[str, int], tuple[Path, ...]]) -> Float:
            (well, site), paths = item
            files = {
                channel: FileSlice(path, 0, path.stat().st_size, path.name)
                for channel, path in zip(network.CHANNELS, paths, strict=True)
            }
            image = finish_site(decode(SiteKey(well, site), files, None).image, self.bundle.manifest.recipe, None)
            logits: Float = self._engine.classify(image[np.newaxis], self.statistics).logits[0, 0]
            return logits

        with ThreadPoolExecutor(self.threads + self._engine.sites_at_once) as pool:
            np.save(self.out, np.stack(list(pool.map(classified, plate.of(wells or plate.treated).items()))))


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
    """Measure the service on a small plate of each compression."""
    keep_freed_memory()  # as the service's decoders do
    bundle = network.bundle(folder)
    bars: list[Bar] = []
    with ExitStack() as stack:
        services = {"fp32": stack.enter_context(served(folder, bundle, threads))[0]}
        if bfloat16_is_there():
            services["bf16"] = stack.enter_context(served(folder, bundle, threads, {"PRECISION": "bf16"}))[0]
        bare = Bare.on_statistics(folder, bundle, threads)
        for name, compression in COMPRESSIONS.items():
            plate = make_plate(folder / f"plate-{name}", compression, CONTROL_WELLS, TREATED_WELLS)
            bars += _plate_bars(name, folder, services, plate, bare, rounds)
            shutil.rmtree(plate.folder)
    return bars


def bfloat16_is_there() -> bool:
    """Whether the processor has it."""
    try:
        open_runtime("cpu", "bf16", 1)
    except StartError:
        return False
    return True


def _plate_bars(
    name: str, folder: Path, services: Mapping[str, Service], plate: Plate, bare: Bare, rounds: int
) -> list[Bar]:
    batches, service = count(), services["fp32"]
    with httpx.Client(timeout=3_600) as client:

        def post(where: Service, batch: str, what: str, wells: tuple[str, ...]) -> dict[str, Any]:
            sent = client.post(f"{where.url}/batches/{batch}/{what}", json=plate.references(wells)).raise_for_status()
            return dict(sent.json())

        def whole(where: Service) -> dict[str, Any]:
            batch = f"{name}{next(batches)}"
            post(where, batch, "controls", plate.controls)
            return post(where, batch, "predict", plate.treated)

        files = [path for paths in plate.of(plate.treated).values() for path in paths]

        def sent(batch: str, *, predict: bool) -> float:
            with AnchorwellClient(service.url) as sender:
                begun = time.perf_counter()
                (sender.predict_while_sending if predict else sender.stage)(batch, files)
                passed = time.perf_counter() - begun
                sender.delete(batch)
            return passed

        kept, new = f"{name}-kept", [f"{name}-new{number}" for number in range(rounds + 1)]
        for batch in (kept, *new):
            post(service, batch, "controls", plate.controls)
        found = interleaved(
            {
                "bare": lambda: bare(plate),
                "by_reference": lambda: post(service, kept, "predict", plate.treated),
                "raw_put": lambda: sent(new.pop(), predict=True),
                "upload": lambda: sent(f"{name}-up{next(batches)}", predict=False),
                **{f"whole_{precision}": (lambda where=where: whole(where)) for precision, where in services.items()},  # type: ignore[misc]
                "torch": lambda: torch_alone(folder, plate, bare.threads),
            },
            rounds,
        )
        alone = interleaved(
            {"bare": lambda: bare(plate), "by_reference": lambda: post(service, kept, "predict", plate.treated)},
            CLOSELY * rounds,
        )
        told = post(service, kept, "predict", plate.treated)
        _require_alike(told, np.load(folder / "plain.npz")["logits"])
        print(f"{name}: stages {told['seconds']}")
    slower = Rounds({**found.taken, "slower": np.maximum(found.taken["bare"], found.taken["upload"])})
    bound = 2.5 if name == "lzw" else 3.5
    return [
        alone.ratio(f"by_reference_over_bare_{name}", "bare", "by_reference", at_least=0.95),
        slower.ratio(f"raw_put_over_slower_{name}", "slower", "raw_put", at_least=0.85),
        *(
            found.ratio(f"{precision}_over_plain_pytorch_{name}", "torch", f"whole_{precision}", at_least=bound)
            for precision in services
        ),
        found.rate(f"by_reference_sites_per_s_{name}", "by_reference", len(plate.of(plate.treated)), "/s"),
        *(found.seconds(f"{way}_{name}", way) for way in found.taken),
    ]


def _require_alike(told: dict[str, Any], logits: Float) -> None:
    """End where the service and torch alone answer otherwise: one of them did not do the work."""
    expected = site_probabilities(logits[:, None]).reshape(-1, SITES, network.CLASSES).mean(axis=1)
    found = np.array([list(well["probabilities"].values()) for well in told["wells"]])
    difference = float(np.abs(found - expected).max())
    if not difference < SAME_PROBABILITIES:
        raise SystemExit(f"the service and torch alone answer otherwise, by {difference:.1e}")
