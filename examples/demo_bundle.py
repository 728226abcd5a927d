"""Make the two committed bundles from simulation alone: CS-ARM-BN (context ``controls``) and its equally sized ERM twin.

Simulates four labs, trains both networks with equal budgets (one a process), and exports them to ``examples/bundles``.
Resumable: what lies finished in ``build/demo-bundle`` is not made again.

Run: ``python -m examples.demo_bundle``; about half an hour on two cores.
"""

import argparse
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from examples.small import RECIPE, fetched_plates, small_config
from model.bundle import Bundle
from training.release import evaluate_run, release
from training.report import markdown_table, summarise
from training.simulate import SimulationPlan
from training.train import RUN, train

OUT = Path("build/demo-bundle")
BUNDLES = Path(__file__).parent / "bundles"
METHODS = ("cs-arm-bn", "erm")
PLAN = SimulationPlan(labs=4, batches=3, plates=3, seed=2025, sites=2, wells_per_class=8, inactive_wells=0)
STEPS, SEED = 1200, 1
MINIMUM_CONTROL_WELLS = 4
MAX_BYTES = 12_000_000


def main() -> None:
    """Simulate, train, export, and print how both do on their own test plates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=BUNDLES)
    arguments = parser.parse_args()
    started = time.monotonic()
    plates = simulated_plates()
    with ProcessPoolExecutor(len(METHODS), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(trained, plates, method, arguments.steps) for method in METHODS]:
            future.result()
    for method in METHODS:
        print(f"{exported(method, arguments.out / method)}\n{scores(method)}\n")
    print(f"made in {(time.monotonic() - started) / 60:.0f} min")


def simulated_plates() -> Path:
    """Simulate the training plates and fetch them."""
    fetched_plates(PLAN, OUT / "plates", {OUT / "fetched": RECIPE})
    return OUT / "fetched"


def trained(plates: Path, method: str, steps: int) -> None:
    """Train one method, or go on with it."""
    torch.set_num_threads(1)
    folder = OUT / method
    train(small_config(plates, method, steps=steps, seed=SEED), folder, resume=(folder / RUN).is_file())


def exported(method: str, path: Path) -> str:
    """Export one run, replacing the bundle that lies there."""
    shutil.rmtree(path, ignore_errors=True)
    bundle, parity = release([OUT / method], path, name=f"demo-{method}", minimum_control_wells=MINIMUM_CONTROL_WELLS)
    size = sum(file.stat().st_size for file in path.iterdir())
    if 2 * size > MAX_BYTES:
        raise SystemExit(f"{path} has {size:,} bytes; two such bundles may have {MAX_BYTES:,}")
    return (
        f"{Bundle.load(path).manifest.name} {bundle.digest[:12]}, {size / 1e6:.1f} MB; ONNX against torch: statistics "
        f"{parity.statistics_sd:.1e} standard deviations, logits {parity.logits:.1e}, embeddings {parity.embeddings:.1e}"
    )


def scores(method: str) -> str:
    """Score one run on its in-domain plates and new batches."""
    table = evaluate_run(OUT / method)
    return markdown_table(summarise(table[~table["method"].str.startswith("null")]))


if __name__ == "__main__":
    main()
