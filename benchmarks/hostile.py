"""Hostile files, valid ones between them: every valid one is answered unchanged, and a hostile one costs its request alone.

The files are mutations of TIFFs of every kind that is read, and of real ones where ``../shared/data`` is: changed bytes,
changed tags, cut ends, forged headers, bombs, archives, pages in circles, and OME-XML that names another file. That other
file is a pipe that nobody writes to: who opens it hangs, and is counted.
"""

import io
import os
import random
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import tifffile

from benchmarks.bars import Bar
from benchmarks.servers import PIXELS, Service, channels, form

HOSTILE = 10_000
VALID_EVERY = 10
THREADS = 4
CONTROLS = ["A01", "A02", "B01", "B02", "C01", "C02", "D01", "D02"]
PAST_THE_HEADER = {
    "answered",
    "blank-image",
    "saturated-image",
    "non-finite-image",
    "image-too-small",
    "mixed-sizes",
    "decoding",
}

Mutation = Callable[[bytes, random.Random], bytes]


def seeds() -> list[bytes]:
    """TIFFs that are read as they are."""
    rng = np.random.default_rng(1)
    plane = rng.integers(100, 4_000, (PIXELS, PIXELS), dtype=np.uint16)
    made = []
    for compression in (None, "zlib", "zstd", "lzw"):
        for options in ({}, {"tile": (64, 64)}, {"rowsperstrip": 32}, {"predictor": compression is not None}):
            for kind in ({}, {"bigtiff": True}, {"byteorder": ">"}):
                buffer = io.BytesIO()
                tifffile.imwrite(buffer, plane, photometric="minisblack", compression=compression, **options, **kind)
                made.append(buffer.getvalue())
    real = Path("../shared/data")
    found = sorted(real.rglob("*.tif")) if real.is_dir() else []
    return made + [path.read_bytes() for path in found[:: max(1, len(found) // 20)] if path.stat().st_size < 4 << 20]


# --- mutations -------------------------------------------------------------------------------------------------------


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes of the pixels."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 30)):
        changed[rng.randrange(min(300, len(changed) - 1), len(changed))] = rng.randrange(256)
    return bytes(changed)


def changed_head(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes of the header."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(2, min(300, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def changed_tag(data: bytes, rng: random.Random) -> bytes:
    """Change one tag's kind, count or value, where the directory is that of a small classic TIFF."""
    if data[:4] != b"II*\x00":
        return changed_head(data, rng)
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", changed, 4)
    (count,) = struct.unpack_from("<H", changed, start)
    at = start + 2 + 12 * rng.randrange(count)
    field, form_ = rng.choice([(2, "<H"), (4, "<I"), (8, "<I")])
    value = rng.choice([0, 1, 2, 3, 7, 16, 255, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1])
    struct.pack_into(form_, changed, at + field, value & (0xFFFF if form_ == "<H" else 0xFFFFFFFF))
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data))]


def forged(data: bytes, rng: random.Random) -> bytes:
    """Put a header before what is none."""
    return data[:8] + rng.randbytes(rng.randrange(4_000))


def bomb(_: bytes, rng: random.Random) -> bytes:
    """Let a few bytes stand for very many."""
    side = rng.choice([4_000, 7_900, 20_000, 100_000])
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((64, 64), np.uint16), photometric="minisblack", compression="zlib")
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages.first.tags
        places = [tags[name].valueoffset for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
        strip = tags["StripOffsets"].value[0]
    for place in places:
        data[place : place + 4] = struct.pack("<I", side)
    return bytes(data[:strip]) + zlib.compress(bytes(min(side * side * 2, 4 << 20)), 9)


def archive(data: bytes, rng: random.Random) -> bytes:
    """Be an archive, or have one inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.tif", data * rng.randint(1, 20))
    return data + buffer.getvalue() if rng.random() < 0.5 else data[:200] + buffer.getvalue()  # noqa: PLR2004 (a coin)


def circle(data: bytes, _: random.Random) -> bytes:
    """Let the page follow itself."""
    if data[:4] != b"II*\x00":
        return data[:50]
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", changed, 4)
    (count,) = struct.unpack_from("<H", changed, start)
    struct.pack_into("<I", changed, start + 2 + 12 * count, start)
    return bytes(changed)


MUTATIONS: list[tuple[Mutation, float]] = [
    (changed_bytes, 4), (changed_head, 2), (changed_tag, 4), (cut, 1), (forged, 0.5), (bomb, 1), (archive, 1), (circle, 0.5),
]  # fmt: skip


def ome_naming(pipe: Path, rng: random.Random) -> bytes:
    """OME-XML that says that planes lie in the pipe."""
    name = rng.choice([str(pipe), f"../{pipe.name}", f"file://{pipe}", pipe.name])
    uuid = f'<UUID FileName="{name}">urn:uuid:2</UUID>'
    entity = f'<!DOCTYPE o [<!ENTITY x SYSTEM "file://{pipe}">]>' if rng.random() < 0.3 else ""  # noqa: PLR2004 (some)
    told = "&x;" if entity else ""
    names = "".join(f'<Channel Name="{channel}{told}"/>' for channel in channels())
    xml = f'{entity}<OME UUID="urn:uuid:1"><Image><Pixels>{names}<TiffData IFD="0">{uuid}</TiffData></Pixels></Image></OME>'
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for number in range(rng.choice([1, 5])):
            said = xml if number == 0 else None
            file.write(
                np.ones((64, 64), np.uint16), photometric="minisblack", metadata=None, contiguous=False, description=said
            )
    return buffer.getvalue()


# --- the attack ------------------------------------------------------------------------------------------------------


class Attack:
    """Sends hostile files from several threads, and valid ones between them."""

    def __init__(self, service: Service, pipe: Path, hostile: int) -> None:
        self.service, self.pipe = service, pipe
        self.seeds, self.names = seeds(), channels()
        self.left = hostile
        self.lock = threading.Lock()
        self.told: Counter[str] = Counter()
        self.faults: list[str] = []
        self.valid = self.peak_bytes = 0
        with httpx.Client(base_url=service.url, timeout=120) as http:
            http.post("/batches/P1/controls", files=form("P1", CONTROLS, self.names)).raise_for_status()
            self.expected = self.answer(http)

    def answer(self, http: httpx.Client) -> dict[str, float]:
        """The answer of the valid well."""
        answer = http.post("/batches/P1/predict", files=form("P1", ["E05"], self.names))
        answer.raise_for_status()
        probabilities: dict[str, float] = answer.json()["wells"][0]["probabilities"]
        return probabilities

    def run(self) -> None:
        """Send everything."""
        threads = [threading.Thread(target=self.send, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def send(self, seed: int) -> None:
        """Send until none is left."""
        rng = random.Random(seed)  # noqa: S311 (an attack to be repeated, no secret)
        with httpx.Client(base_url=self.service.url, timeout=120) as http:
            while True:
                with self.lock:
                    if self.left == 0:
                        return
                    self.left -= 1
                    number = self.left
                self.one(http, rng)
                if number % VALID_EVERY == 0:
                    self.check_valid(http)
                if number % 200 == 0:
                    memory = family_bytes(self.service)
                    with self.lock:
                        self.peak_bytes = max(self.peak_bytes, memory)
                    print(f"{number} left, {memory >> 20} MiB, {len(self.faults)} faults", flush=True)

    def one(self, http: httpx.Client, rng: random.Random) -> None:
        """Send one hostile file among valid ones of the same site."""
        if rng.random() < 0.05:  # noqa: PLR2004 (some)
            files = [("images", ("G07_1.ome.tif", ome_naming(self.pipe, rng), "image/tiff"))]
        else:
            mutations, weights = zip(*MUTATIONS, strict=True)
            data = rng.choices(mutations, weights)[0](rng.choice(self.seeds), rng)
            files = form("P1", ["G07"], self.names)
            files[0] = ("images", (files[0][1][0], data, "image/tiff"))
        try:
            answer = http.post("/batches/P1/predict", files=files)
        except httpx.HTTPError as error:
            self.fault(f"no answer: {error!r}")
            return
        kind = self.kind(answer)
        with self.lock:
            self.told[kind] += 1
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or "longer than" in answer.text:
            self.fault(answer.text[:300])

    def kind(self, answer: httpx.Response) -> str:
        """What became of a hostile file."""
        if answer.is_success:
            return "answered"
        slug = answer.json()["type"].rpartition("/")[2]
        return "decoding" if slug == "truncated-image" and "cannot be decoded" in answer.text else str(slug)

    def check_valid(self, http: httpx.Client) -> None:
        """Ask for the valid well."""
        try:
            same = self.answer(http) == self.expected
        except httpx.HTTPError as error:
            self.fault(f"a valid file was refused: {error!r}")
            return
        with self.lock:
            self.valid += same
        if not same:
            self.fault("a valid file got another answer")

    def fault(self, text: str) -> None:
        """Count what must not be."""
        with self.lock:
            self.faults.append(text)
        print(f"  fault: {text}", flush=True)


def family_bytes(service: Service) -> int:
    """Resident memory of the service and all its workers."""
    assert service.process is not None
    group = os.getpgid(service.process.pid)
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                total += int((folder / "statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ProcessLookupError):
            continue
    return total


def run(folder: Path, hostile: int = HOSTILE) -> list[Bar]:
    """Attack a service."""
    service = Service(folder / "lab")
    service.start()
    pipe = folder / "canary.tif"
    os.mkfifo(pipe)
    attack = Attack(service, pipe, hostile)
    before = family_bytes(service)
    attack.run()
    after = family_bytes(service)
    alive = httpx.get(f"{service.url}/health/ready").is_success
    service.stop()
    sent = sum(attack.told.values())
    deep = sum(count for kind, count in attack.told.items() if kind in PAST_THE_HEADER)
    return [
        Bar("hostile: files sent", sent, "files", at_least=hostile),
        Bar("hostile: share that got as far as the decoder", deep / sent, "", at_least=0.30),
        Bar("hostile: valid files between them, answered unchanged", attack.valid, "files", at_least=hostile / VALID_EVERY),
        Bar("hostile: 5xx, no answer, hangs, other answers to valid files", len(attack.faults), "faults", at_most=0),
        Bar("hostile: service dead at the end", float(not alive), "services", at_most=0),
        Bar("hostile: memory before, service and workers", before / 2**20, "MiB"),
        Bar("hostile: memory at most", attack.peak_bytes / 2**20, "MiB", at_most=4_096),
        Bar("hostile: memory after", after / 2**20, "MiB"),
        *(Bar(f"hostile: {kind}", count, "files") for kind, count in sorted(attack.told.items())),
    ]
