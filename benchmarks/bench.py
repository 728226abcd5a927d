"""Speed: ratios measured in one run on this machine, every way in turn with its peers; build/bench.json and a table.

Run where nothing else does: ``python -m benchmarks.bench [--parts engine,images,service,latency,peers,plates]
[--rounds 9]``; on a GPU ``--parts engine --device cuda``, which needs no network. What is not run keeps its figures.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.bars import conclude, read_bars
from benchmarks.bench_engine import CLOSELY, Machine, engine_bars
from benchmarks.bench_images import image_bars
from benchmarks.bench_latency import latency_bars
from benchmarks.bench_peers import peer_bars
from benchmarks.bench_plates import plate_bars
from benchmarks.bench_service import service_bars

FOLDER = Path("build/bench")


def main() -> None:
    """Measure the parts that are asked for, write and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="engine,images,service,latency,peers,plates")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    parts = {
        "engine": lambda: engine_bars(FOLDER, Machine(arguments.device, arguments.threads), arguments.rounds),
        "images": lambda: image_bars(CLOSELY * arguments.rounds),
        "latency": lambda: latency_bars(FOLDER, arguments.threads),
        "peers": lambda: peer_bars(FOLDER, arguments.threads, max(2, arguments.rounds // 3)),
        "plates": lambda: plate_bars(FOLDER, arguments.threads),
        "service": lambda: service_bars(FOLDER, arguments.threads, max(2, arguments.rounds // 3)),
    }
    for name in arguments.parts.split(","):
        _figures(name).write_text(json.dumps([asdict(bar) for bar in parts[name]()], indent=1) + "\n")
    conclude([bar for name in parts for bar in read_bars(_figures(name))], Path("build/bench.json"))


def _figures(part: str) -> Path:
    return FOLDER / f"{part}.json"


if __name__ == "__main__":
    main()
