"""How fast plates are fetched from disk: synthetic 1080 x 1080 uint16 planes, uncompressed, percentile-8bit, halved.

Says how many planes are prepared a second by so many worker processes, beside what decoding alone takes of that, how much
memory the whole takes and how much more it takes for four times as many plates, and how long a plate that is there holds up.
Planes are written once and read from the page cache, so that the disk's own speed is left out.

Run: ``python -m benchmarks.fetch_speed [--workers 2] [--sites 384]``; writes ``build/fetch-speed.json``.
"""

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile

from benchmarks.bars import Bar, table, write_bars
from model.images import ImageRecipe, decode_plane
from training.fetch import FetchOptions, fetch
from training.index import path_column

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")
RECIPE = ImageRecipe(channels=CHANNELS, size=256, shrink=2)
SIDE_PX = 1080
FILES = 40
FEW, MANY, FEW_SITES = 10, 40, 8
AT_LEAST_PLANES_PER_S, AT_MOST_MORE_MB, AT_MOST_PEAK_MB = 200.0, 64.0, 1_500.0


def planes(folder: Path) -> list[Path]:
    """Write planes as bright as those of a Cell Painting field: mostly dark, few bright cells."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.tif" for number in range(FILES)]
    for path in paths:
        plane = rng.gamma(2, 300, (SIDE_PX, SIDE_PX)).astype(np.uint16)
        tifffile.imwrite(path, plane, photometric="minisblack", metadata=None)
    return paths


def index_of(paths: list[Path], plates: int, sites: int) -> pd.DataFrame:
    """An index whose sites take the planes in turn."""
    rows = pd.DataFrame(
        {
            "Metadata_Source": "lab",
            "Metadata_Batch": "batch",
            "Metadata_Plate": np.repeat([f"P{number:04d}" for number in range(plates)], sites),
            "Metadata_Well": "A01",
            "Metadata_Site": np.tile(np.arange(sites), plates),
            "label": "negcon",
            "role": "control",
            "pixel_size_um": np.nan,
        }
    )
    for number, channel in enumerate(CHANNELS):
        rows[path_column(channel)] = [str(paths[(len(CHANNELS) * at + number) % FILES]) for at in range(len(rows))]
    return rows


def decoding(paths: list[Path]) -> float:
    """Processor seconds to read and decode one plane, and nothing else."""
    started = time.process_time()
    for path in paths:
        decode_plane(path.read_bytes())
    return (time.process_time() - started) / len(paths)


def processor_seconds() -> float:
    """Processor time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mb(index: pd.DataFrame, folder: Path) -> float:
    """Peak memory of a process of its own that fetches an index by itself."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_fetched, args=(index, folder, answers))
    process.start()
    peak = float(answers.get())
    process.join()
    return peak


def _fetched(index: pd.DataFrame, folder: Path, answers: "multiprocessing.Queue[float]") -> None:
    fetch(index, folder, RECIPE)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def measured(work: Path, workers: int, sites: int) -> list[Bar]:
    """Fetch and measure."""
    paths = planes(work)
    index = index_of(paths, 1, sites)
    count = sites * len(CHANNELS)
    bare = decoding(paths)
    started, used = time.monotonic(), processor_seconds()
    fetch(index, work / "plates", RECIPE, FetchOptions(workers=workers))
    seconds, used = time.monotonic() - started, processor_seconds() - used
    again = time.monotonic()
    fetch(index, work / "plates", RECIPE, FetchOptions(workers=workers))
    again = time.monotonic() - again
    shutil.rmtree(work / "plates")
    few = peak_mb(index_of(paths, FEW, FEW_SITES), work / "few")
    many = peak_mb(index_of(paths, MANY, FEW_SITES), work / "many")
    return [
        Bar("fetch_planes_per_s", count / seconds, "planes/s", at_least=AT_LEAST_PLANES_PER_S),
        Bar("fetch_planes_per_processor_s", count / used, "planes/s", at_least=AT_LEAST_PLANES_PER_S / 2),
        Bar("fetch_share_of_decoding", bare * count / used, ""),
        Bar(f"fetch_peak_memory_{FEW}_plates", few, "MB", at_most=AT_MOST_PEAK_MB),
        Bar(f"fetch_more_memory_for_{MANY}_plates", many - few, "MB", at_most=AT_MOST_MORE_MB),
        Bar("fetch_again_s", again, "s"),
    ]


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sites", type=int, default=384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bars = measured(Path(folder), arguments.workers, arguments.sites)
    write_bars(bars, Path("build/fetch-speed.json"))
    print(table(bars))


if __name__ == "__main__":
    main()
