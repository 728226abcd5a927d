"""How many sites the plate simulator writes per second on one core; needs numpy, scipy and tifffile only.

Run from the repository root: `python -m benchmarks.simulate_speed [--plates 2] [--workers 1]`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.bars import Bar, table, write_bars
from training.simulate import SimulationPlan, simulate

AT_LEAST_SITES_PER_S = 10.0  # the bar: a training set of 18 plates within some minutes on a small machine


def main() -> None:
    """Print sites per second and core, and write build/simulate_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plates", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    plan = SimulationPlan(labs=1, batches=1, plates=arguments.plates)
    with tempfile.TemporaryDirectory() as folder:
        report = simulate(plan, folder, workers=arguments.workers)
    rate = report.sites / report.seconds / arguments.workers
    bars = [Bar("simulate_sites_per_s_per_core", rate, "sites/s", at_least=AT_LEAST_SITES_PER_S)]
    write_bars(bars, Path("build/simulate_speed.json"))
    print(f"{report.sites} SIMULATED sites of 5 x {plan.size_px} x {plan.size_px} in {report.seconds:.1f} s")
    print(table(bars))


if __name__ == "__main__":
    main()
