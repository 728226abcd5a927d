"""From files to the network's input: what preparing a site costs beside decoding it, and nothing else.

Planes are 1080 x 1080, uint16: cells on a dim ground, with the noise of a camera; LZW as microscopes write them, or plain.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks import network
from benchmarks.bars import Bar
from benchmarks.interleaved import Way, interleaved
from model.images import ImageLimits
from model.layout import SiteKey
from model.memory import keep_freed_memory
from service.decoding import FileSlice, SiteDecoder

SIDE_PX = 1080
COMPRESSIONS = {"lzw": "lzw", "uncompressed": None}
SITES = 4


def plane(seed: int) -> NDArray[np.uint16]:
    """One plane of cells, (1080, 1080) uint16."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    places = rng.integers(0, SIDE_PX, (2, 150))
    cells[places[0], places[1]] = rng.gamma(4, 1, 150)
    light = ndimage.gaussian_filter(cells, 9) * 4_000_000 / 25 + 300
    pixels: NDArray[np.uint16] = np.clip(rng.poisson(light / 8) * 8 + rng.normal(0, 6, light.shape), 0, 65_535).astype(
        np.uint16
    )
    return pixels


def plane_bytes(seed: int, compression: str | None) -> bytes:
    """That plane as a TIFF."""
    return tiff_bytes(plane(seed), compression)


def tiff_bytes(pixels: NDArray[np.uint16], compression: str | None) -> bytes:
    """A plane as a TIFF."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", metadata=None, compression=compression)
    return buffer.getvalue()


def image_bars(rounds: int) -> list[Bar]:
    """Preparing a site over decoding its planes, by one process on one thread that keeps its memory, as decoders do."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        bars = []
        for name, compression in COMPRESSIONS.items():
            paths = [Path(folder) / f"{name}_{number}.tif" for number in range(SITES * len(network.CHANNELS))]
            for number, path in enumerate(paths):
                path.write_bytes(plane_bytes(number, compression))
            bars += _bars(name, paths, rounds)
    return bars


def _bars(name: str, paths: list[Path], rounds: int) -> list[Bar]:
    decode = SiteDecoder(network.RECIPE, ImageLimits())
    count = len(network.CHANNELS)
    sites = [
        {
            channel: FileSlice(path, 0, path.stat().st_size, path.name)
            for channel, path in zip(network.CHANNELS, paths[at : at + count], strict=True)
        }
        for at in range(0, len(paths), count)
    ]
    ways: dict[str, Way] = {
        "prepare": lambda: [decode(SiteKey("A01", number), files, None) for number, files in enumerate(sites, start=1)],
        "decode": lambda: [tifffile.imread(path, maxworkers=1) for path in paths],
    }
    found = interleaved(ways, rounds)
    bound = {"at_most": 1.15} if name == "lzw" else {}
    return [
        found.ratio(f"prepare_over_decode_{name}", "prepare", "decode", **bound),
        found.rate(f"prepare_sites_per_s_{name}", "prepare", len(sites), "/s"),
    ]
