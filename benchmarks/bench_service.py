"""The whole service on one machine, by reference and over loopback, beside the same steps in one bare process.

And beside what a lab would write in PyTorch alone (``benchmarks/plain_pytorch.py``). Plates are of links to few images: each
file ends with bytes of its own, so that none is another's duplicate; what is in the pixels costs no time.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import torch

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.bench_images import plane_bytes
from benchmarks.interleaved import Rounds, interleaved
from benchmarks.network import Float
from benchmarks.servers import Service, free_port
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
PING_S = 0.01
PINGS, ONE_WELLS, CLIENTS, CLIENTS_GIVE_WAY, START_TIMEOUT_S = 2_000, 100, 8, 10, 120
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
    """Measure the service on a small plate of each compression, and one request at a time."""
    keep_freed_memory()  # as the service's decoders do
    bundle = network.bundle(folder)
    bars: list[Bar] = []
    with ExitStack() as stack:
        service, ready = stack.enter_context(served(folder, bundle, threads))
        bars.append(Bar("ready_after_start", ready, "s", at_most=3.0))
        services = {"fp32": service}
        if bfloat16_is_there():
            services["bf16"] = stack.enter_context(served(folder, bundle, threads, {"PRECISION": "bf16"}))[0]
        engine = BundleEngine(bundle, open_runtime("cpu", "fp32", threads))
        mean, variance, _ = engine.measure(network.images(16))
        bare = Bare(bundle, BatchNormStatistics(mean, variance, sites=16, wells=16), threads, folder / "bare.npy")
        del engine
        for name, compression in COMPRESSIONS.items():
            plate = make_plate(folder / f"plate-{name}", compression, CONTROL_WELLS, TREATED_WELLS)
            bars += _plate_bars(name, folder, services, plate, bare, rounds)
            bars += _latency_bars(service, plate, bare) if name == "uncompressed" else []
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
        told = post(service, kept, "predict", plate.treated)
        _require_alike(told, np.load(folder / "plain.npz")["logits"])
        print(f"{name}: stages {told['seconds']}")
    slower = Rounds({**found.taken, "slower": np.maximum(found.taken["bare"], found.taken["upload"])})
    bound = 2.5 if name == "lzw" else 3.5
    return [
        found.ratio(f"by_reference_over_bare_{name}", "bare", "by_reference", at_least=0.95),
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


def _latency_bars(service: Service, plate: Plate, bare: Bare) -> list[Bar]:
    """One well at a time on an idle service, beside the same in a bare process, and beside what its own images took there.

    And how long it takes to say that it lives while it is uploaded to.
    """
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
    live, idle = _live(service, plate)
    return [
        Bar("one_well_p50_over_compute", statistics.median(seconds) / computed, ""),
        Bar("one_well_p99_over_compute", slowest / computed, "", at_most=1.15),
        Bar("one_well_p99_over_compute_p99", slowest / float(np.quantile(computing, 0.99)), ""),
        Bar("one_well_p50_beside_compute", 1_000 * (statistics.median(seconds) - computed), "ms"),
        Bar("one_well_p99_beside_compute", 1_000 * (slowest - computed), "ms", at_most=15.0),
        Bar("one_well_over_its_own_compute_p99", float(np.quantile(over, 0.99)), "", at_most=1.15),
        Bar("one_well_beside_its_own_compute_p50", 1_000 * float(np.median(beside)), "ms"),
        Bar("one_well_beside_its_own_compute_p99", 1_000 * float(np.quantile(beside, 0.99)), "ms", at_most=15.0),
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
