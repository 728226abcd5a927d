"""A screen on a Ray cluster of two nodes on this machine, one of which is killed midway, beside the same in one process.

Simulated plates of a handful of images, under many names, for what is measured is what becomes of plates. Writes
``build/ray.json``. Needs the extra ``ray``.

Run: ``python -m benchmarks.ray_cluster [--plates 40]``.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from pyarrow import parquet
from ray.cluster_utils import Cluster

from benchmarks.bars import Bar, conclude
from service.screen import ANSWERS, folder_of
from training.index import index_tree, write_index
from training.simulate import CHANNELS, SimulationPlan, simulate

BUNDLE = Path("examples/bundles/cs-arm-bn")
SIMULATED = 4
PLAN = SimulationPlan(labs=1, batches=1, plates=SIMULATED, seed=4, sites=1, wells_per_class=1, inactive_wells=0, size_px=256)
TIMEOUT_S = 900


def make_index(folder: Path, plates: int) -> list[str]:
    """Write an index of so many plates; their names."""
    simulate(PLAN, folder / "plates")
    found = index_tree(folder / "plates", CHANNELS)
    groups = [rows for _, rows in found.groupby("Metadata_Plate", sort=True)]
    copies = [groups[number % SIMULATED].assign(Metadata_Plate=f"plate{number:03d}") for number in range(plates)]
    write_index(pd.concat(copies), folder / "index.parquet")
    return [f"plate{number:03d}" for number in range(plates)]


def screen(folder: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    """Begin a screen."""
    command = [str(Path(sys.executable).with_name("anchorwell")), "screen", str(folder / "index.parquet")]
    return subprocess.Popen(  # noqa: S603 (our own)
        [*command, "--bundle", str(BUNDLE), "--out", str(out), *options], stdout=subprocess.DEVNULL,
        stderr=(out.parent / f"{out.name}.log").open("w"), text=True
    )  # fmt: skip


def answered(out: Path) -> int:
    """How many plates are answered so far."""
    return sum(1 for _ in out.glob(f"plate=*/{ANSWERS}"))


def largest_difference(one: Path, other: Path, plates: list[str]) -> float:
    """Of any number of any answer; infinite where a text differs, or a row is not there."""
    most = 0.0
    for plate in plates:
        ours, others = (_answers(out, plate) for out in (one, other))
        if not ours.select_dtypes(exclude="number").equals(others.select_dtypes(exclude="number")):
            return float("inf")
        numbers = [table.select_dtypes("number").to_numpy(np.float64) for table in (ours, others)]
        most = max(most, float(np.nanmax(np.abs(numbers[0] - numbers[1]))))
    return most


def _answers(out: Path, plate: str) -> pd.DataFrame:
    found: pd.DataFrame = parquet.read_table(out / folder_of(plate) / ANSWERS).to_pandas()
    return found.drop(columns="answered_at")


def bars(folder: Path, plates: int, decoders: int) -> list[Bar]:
    """Screen the plates in one process; then on two nodes, one of which is killed when a third is answered."""
    names = make_index(folder, plates)
    begun = time.monotonic()
    if screen(folder, folder / "one").wait(TIMEOUT_S):
        raise SystemExit("the screen in one process failed")
    alone = time.monotonic() - begun
    cores = 1 if not decoders else 2
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores})
    node = cluster.add_node(num_cpus=cores)
    cluster.wait_for_nodes()
    try:
        begun = time.monotonic()
        options = ("--ray", cluster.address, "--ray-actors", "2", "--ray-cores", "1", "--ray-decoders", str(decoders))
        with screen(folder, folder / "two", *options) as process:
            while answered(folder / "two") < plates // 3 and process.poll() is None:
                time.sleep(0.1)
            killed_at = answered(folder / "two")
            cluster.remove_node(node, allow_graceful=False)
            code = process.wait(TIMEOUT_S)
        together = time.monotonic() - begun
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    told = json.loads((folder / "two" / "screen.json").read_text())
    found = re.search(r"(\d+) sites were decoded by other cores", (folder / "two.log").read_text())
    difference = largest_difference(folder / "one", folder / "two", names)
    return [
        Bar("plates", plates, ""),
        Bar("plates_answered_when_a_node_was_killed", killed_at, "", at_most=plates - 1),
        Bar("exit_code", code, "", at_most=0),
        Bar("plates_answered", told["answered"] + told["kept"], "", at_least=plates),
        Bar(
            "largest_difference_from_one_process",
            difference,
            "",
            at_most=1e-5,
        ),
        Bar("sites_decoded_by_other_cores", int(found[1]) if found else 0, "", at_least=plates if decoders else None),
        Bar("seconds_in_one_process", alone, "s"),
        Bar("seconds_on_ray", together, "s"),
    ]


def main() -> None:
    """Screen, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plates", type=int, default=40)
    parser.add_argument("--decoders", type=int, default=2, help="sites decoded by other cores for each actor")
    parser.add_argument("--out", type=Path, default=Path("build/ray.json"))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        conclude(bars(Path(folder), arguments.plates, arguments.decoders), arguments.out)


if __name__ == "__main__":
    main()
