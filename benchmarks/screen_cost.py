"""What a million wells cost, from the measured speed of one two-core machine: hours, machines, bandwidth, money.

Arithmetic on ``build/bench.json`` (``python -m benchmarks.bench``): time a well is that of a small plate, adapted and
classified, a sixth of whose wells are controls. Prices are assumptions: give your own.

Run: ``python -m benchmarks.screen_cost [--core-hour 0.04] [--days 1]``
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_service import CONTROL_WELLS, SITES, TREATED_WELLS

WELLS, CHANNELS, CORES = 1_000_000, 5, 2
PLANE_BYTES = {"lzw": 1.87e6, "uncompressed": 2.33e6}
HOURS_A_DAY = 24


@dataclass(frozen=True)
class Cost:
    """What a million wells take."""

    way: str
    seconds_a_well: float
    core_hours: float
    machines: int
    megabytes_a_second: float
    money: float


def costs(bars: list[dict[str, object]], core_hour: float, days: float) -> list[Cost]:
    """Cost by precision and compression, of those that were measured."""
    value = {str(bar["name"]): float(str(bar["value"])) for bar in bars}
    found = []
    for compression, plane_bytes in PLANE_BYTES.items():
        for precision in ("fp32", "bf16"):
            seconds = value.get(f"whole_{precision}_{compression}")
            if seconds is None:
                continue
            each = seconds / (CONTROL_WELLS + TREATED_WELLS)
            hours = WELLS * each / 3600
            machines = math.ceil(hours / (HOURS_A_DAY * days))
            bandwidth = machines * SITES * CHANNELS * plane_bytes / each / 1e6
            found.append(
                Cost(f"{precision}, {compression}", each, CORES * hours, machines, bandwidth, CORES * hours * core_hour)
            )
    return found


def table(rows: list[Cost], days: float) -> str:
    """Format the costs."""
    head = f"| two cores | s a well | core hours | machines for {days:g} day(s) | MB/s that they read | money |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row.way} | {row.seconds_a_well:.2f} | {row.core_hours:,.0f} | {row.machines} | {row.megabytes_a_second:,.0f} | "
        f"{row.money:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Print what a million wells cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core-hour", type=float, default=0.04)
    parser.add_argument("--days", type=float, default=1.0)
    parser.add_argument("--bars", type=Path, default=Path("build/bench.json"))
    arguments = parser.parse_args()
    print(table(costs(json.loads(arguments.bars.read_text()), arguments.core_hour, arguments.days), arguments.days))


if __name__ == "__main__":
    main()
