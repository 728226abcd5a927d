"""What whole screens take, from the measured speed of one two-core machine: hours, machines, bandwidth, money.

Arithmetic on ``build/bench.json`` (``python -m benchmarks.bench``): time a well is that of a small plate, adapted and
classified, a sixth of whose wells are controls. Prices, and how many sites a GPU classifies, are assumptions: give your own.
The second table is of 58 million planes, 127 TB: what each stage of a machine could do, and which one limits it.

Run: ``python -m benchmarks.screen_cost [--core-hour 0.04] [--days 1] [--gpu-sites-per-s 2000]``
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
PARTS = "engine,images,service"
NEEDED = {"prepare_sites_per_s_lzw", "ours_images_per_s", *(f"whole_fp32_{compression}" for compression in PLANE_BYTES)}
SCREEN_PLANES, SCREEN_BYTES = 58e6, 127e12


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


@dataclass(frozen=True)
class Machine:
    """Cores, GPUs, and gigabits a second that it reads with."""

    cores: int
    gpus: int
    gigabits: float

    def __str__(self) -> str:
        return f"{self.cores} cores" + (f", {self.gpus} GPU" if self.gpus else "") + f", {self.gigabits:g} Gbit/s"


MACHINES = (Machine(16, 0, 10), Machine(64, 0, 10), Machine(64, 0, 25), Machine(64, 1, 25), Machine(64, 4, 100))


def stages(machine: Machine, value: dict[str, float], gpu_sites_per_s: float) -> dict[str, float]:
    """Sites a second that each stage of a machine could do if it were alone; cores share decoding and classifying."""
    prepare, classify = value["prepare_sites_per_s_lzw"], value["ours_images_per_s"] / CORES
    read = machine.gigabits * 1e9 / 8 / (SCREEN_BYTES / SCREEN_PLANES * CHANNELS)
    if not machine.gpus:
        return {"reading": read, "decoding and classifying": machine.cores / (1 / prepare + 1 / classify)}
    return {"reading": read, "decoding": machine.cores * prepare, "classifying": machine.gpus * gpu_sites_per_s}


def screen_table(value: dict[str, float], gpu_sites_per_s: float, days: float) -> str:
    """Tell what a screen of 58 million planes takes on machines of some kinds."""
    sites = SCREEN_PLANES / CHANNELS
    lines = [
        f"| machine | sites/s by stage | limited by | hours on one | machines for {days:g} day(s) | GB/s that they read |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for machine in MACHINES:
        found = stages(machine, value, gpu_sites_per_s)
        limit = min(found, key=lambda name: found[name])
        hours = sites / found[limit] / 3600
        machines = math.ceil(hours / (HOURS_A_DAY * days))
        read = SCREEN_BYTES / (hours / machines * 3600) / 1e9
        told = ", ".join(f"{name} {rate:,.0f}" for name, rate in found.items())
        lines.append(f"| {machine} | {told} | {limit} | {hours:,.1f} | {machines} | {read:,.1f} |")
    return "\n".join(lines)


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
    """Print what a million wells cost, and what a large screen takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core-hour", type=float, default=0.04)
    parser.add_argument("--days", type=float, default=1.0)
    parser.add_argument("--gpu-sites-per-s", type=float, default=2_000.0, help="an assumption: none was measured")
    parser.add_argument("--bars", type=Path, default=Path("build/bench.json"))
    arguments = parser.parse_args()
    bars = json.loads(arguments.bars.read_text())
    missing = NEEDED - {str(bar["name"]) for bar in bars}
    if missing:
        raise SystemExit(f"{arguments.bars} has no {', '.join(sorted(missing))}: run benchmarks.bench --parts {PARTS}")
    print(table(costs(bars, arguments.core_hour, arguments.days), arguments.days))
    print()
    value = {str(bar["name"]): float(bar["value"]) for bar in bars}
    print(screen_table(value, arguments.gpu_sites_per_s, arguments.days))


if __name__ == "__main__":
    main()
