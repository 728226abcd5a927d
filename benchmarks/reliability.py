"""Kills, faults and load on a running service: ``build/reliability.json``.

Each part writes its own figures when it is done and is not run again while they are there; ``--again PART`` runs one anew.

Run: ``python -m benchmarks.reliability [--only PART] [--again PART]``.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import hostile, kills, redis_faults, soak
from benchmarks.bars import Bar, read_bars, table, write_bars

BUILD = Path("build/reliability")
KILLS = 100

PARTS: dict[str, Callable[[Path], list[Bar]]] = {
    "kills-embedded": lambda folder: kills.run(KILLS, folder, with_redis=False),
    "kills-redis": lambda folder: kills.run(KILLS, folder, with_redis=True),
    "redis-faults": redis_faults.run,
    "hostile": hostile.run,
    "soak": soak.run,
}


def main() -> None:
    """Run the parts that have no figures yet, and tell all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--again", choices=PARTS, action="append", default=[])
    arguments = parser.parse_args()
    for name in arguments.only or PARTS:
        path = BUILD / f"{name}.json"
        if not path.is_file() or name in arguments.again:
            folder = Path(tempfile.mkdtemp(prefix=f"anchorwell-{name}-"))
            write_bars(PARTS[name](folder), path)
            shutil.rmtree(folder)
    bars = [bar for name in PARTS for bar in read_bars(BUILD / f"{name}.json")]
    write_bars(bars, Path("build/reliability.json"))
    print(table(bars))


if __name__ == "__main__":
    main()
