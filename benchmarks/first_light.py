"""First light: does CS-ARM-BN cure simulated batch effects? Leave one lab out, equal budgets, beside the baselines.

For every seed (of data and training) and every one of three simulated labs, each method is trained on the other two and
scored per well on plates of its training batches, on a new batch and on the left-out lab. A method passes the same number
of images through the network per step as every other. Writes ``build/first-light.json`` and ``build/first-light.md``;
finished parts lie in ``build/first-light/`` and are not made again.

Run: ``python -m benchmarks.first_light [--seeds 11 12] [--steps 300] [--workers 2]``.
"""

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.bars import Bar, table, write_bars
from examples.small import small_config
from training.evaluate import evaluate, evaluate_nulls
from training.index import index_tree, write_index
from training.release import load_run_plates
from training.report import bootstrap, markdown_table, summarise
from training.simulate import CHANNELS, SimulationPlan, simulate
from training.train import RUN, Run, load_network, train

OUT = Path("build/first-light")
METHODS = ("erm", "cs-arm-bn", "arm-bn", "instancenorm", "erm-zscore")
LABS = ("simulated_01", "simulated_02", "simulated_03")
MAIN, CONTEXT = "cs-arm-bn", "controls"


def data(seed: int, workers: int) -> Path:
    """Simulate and index one seed's plates; return the index."""
    root = OUT / f"data-{seed}"
    index = root / "index.parquet"
    if not index.is_file():
        plan = SimulationPlan(
            labs=3, batches=3, plates=3, seed=seed, sites=2, wells_per_class=6, inactive_wells=0, novel_wells=0
        )
        if not (root / "simulation.json").is_file():
            simulate(plan, root, workers=workers)
        write_index(index_tree(root, CHANNELS), index)
    return index


def one_run(index: Path, method: str, test_lab: str, seed: int, steps: int, threads: int) -> Path:
    """Train one method with one lab left out and score it; return the table's path."""
    folder = OUT / f"seed-{seed}" / test_lab / method
    scores = folder / "scores.csv"
    if scores.is_file():
        return scores
    torch.set_num_threads(threads)
    config = small_config(index, method, steps=steps, seed=seed, cache=OUT / "cache", test_lab=test_lab)
    started = time.monotonic()
    run = train(config, folder, resume=(folder / RUN).is_file(), quiet=True)
    seconds = time.monotonic() - started
    found = evaluate(load_network(run), run.method, run.recipe, run.split, load_run_plates(run))
    found.assign(seed=seed, test_lab=test_lab, train_seconds=seconds).to_csv(scores, index=False)
    return scores


def nulls(run: Run, seed: int, test_lab: str) -> pd.DataFrame:
    """Score the nulls on one split."""
    return evaluate_nulls(run.split, load_run_plates(run)).assign(seed=seed, test_lab=test_lab)


def collect(indexes: dict[int, Path], steps: int, workers: int) -> pd.DataFrame:
    """Make every table that is missing and read them all."""
    tasks = list(itertools.product(indexes, LABS, METHODS))
    threads = max(1, (torch.get_num_threads() + workers - 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(one_run, indexes[s], method, lab, s, steps, threads) for s, lab, method in tasks]
        for done, future in enumerate(as_completed(futures), start=1):
            print(f"{done}/{len(tasks)} {future.result().parent.relative_to(OUT)}", flush=True)
    tables = [pd.read_csv(future.result()) for future in futures]
    tables += [nulls(Run.load(OUT / f"seed-{s}" / lab / "erm"), s, lab) for s, lab in itertools.product(indexes, LABS)]
    return pd.concat(tables, ignore_index=True)


def well_accuracy(scores: pd.DataFrame, method: str, context: str, setting: str, metric: str = "well_accuracy") -> float:
    """Mean over plates of one method's accuracy."""
    rows = scores[(scores["method"] == method) & (scores["context"] == context) & (scores["setting"] == setting)]
    return float(rows[metric].mean())


def bars(scores: pd.DataFrame) -> list[Bar]:
    """Hold the scores against the bounds."""
    erm_in, erm_lab = (well_accuracy(scores, "erm", "source", setting) for setting in ("in_domain", "new_lab"))
    ours = well_accuracy(scores, MAIN, CONTEXT, "new_lab")
    ours_one = well_accuracy(scores, MAIN, CONTEXT, "new_lab", "one_class_well_accuracy")
    arm, arm_one = (
        well_accuracy(scores, "arm-bn", "treated", "new_lab", metric)
        for metric in ("well_accuracy", "one_class_well_accuracy")
    )
    instance = well_accuracy(scores, "instancenorm", "instance", "new_lab")
    zscore = well_accuracy(scores, "erm-zscore", "source", "new_lab")
    found = [
        Bar("erm_loss_in_domain_to_new_lab", 100 * (erm_in - erm_lab), "points", at_least=10),
        Bar("cs_arm_bn_share_of_loss_closed", (ours - erm_lab) / (erm_in - erm_lab), "", at_least=0.8),
        Bar("cs_arm_bn_one_class_drop", 100 * (ours - ours_one), "points", at_most=3),
        Bar("arm_bn_one_class_drop", 100 * (arm - arm_one), "points", at_least=3),
        Bar("cs_arm_bn_over_instancenorm", 100 * (ours - instance), "points", at_least=0),
        Bar("cs_arm_bn_over_zscore_erm", 100 * (ours - zscore), "points", at_least=0),
    ]
    for (method, context, setting), rows in scores.groupby(["method", "context", "setting"], sort=False):
        name = f"well_accuracy {method} {context} {setting}".replace("null: ", "null-").replace(" - ", " ")
        found.append(Bar(name.replace(" ", "_"), float(rows["well_accuracy"].mean()), ""))
    return found


def headline(found: list[Bar]) -> str:
    """Say first whether the method beat both baselines."""
    by_name = {bar.name: bar.value for bar in found}
    beaten = [n for n in ("instancenorm", "zscore_erm") if by_name[f"cs_arm_bn_over_{n}"] > 0]
    if len(beaten) == 2:  # noqa: PLR2004 (both)
        return "CS-ARM-BN with context `controls` beats InstanceNorm and z-score + ERM on a new simulated lab."
    lost = sorted({"instancenorm", "zscore_erm"} - set(beaten))
    return f"CS-ARM-BN with context `controls` does NOT beat {' and '.join(lost)} on a new simulated lab."


def intervals(scores: pd.DataFrame) -> str:
    """Spread over seeds and labs of the left-out lab's accuracy, method by method."""
    lines = ["| seed | left-out lab | erm | cs-arm-bn controls | gap closed |", "| --- | --- | ---: | ---: | ---: |"]
    for (seed, lab), part in scores.groupby(["seed", "test_lab"]):
        inside, outside = (well_accuracy(part, "erm", "source", setting) for setting in ("in_domain", "new_lab"))
        ours = well_accuracy(part, MAIN, CONTEXT, "new_lab")
        closed = (ours - outside) / (inside - outside) if inside > outside else np.nan
        lines.append(f"| {seed} | {lab} | {outside:.3f} | {ours:.3f} | {closed:.2f} |")
    ours_all = scores[(scores["method"] == MAIN) & (scores["context"] == CONTEXT) & (scores["setting"] == "new_lab")]
    low, high = bootstrap(ours_all["well_accuracy"].to_numpy(dtype=float))
    return "\n".join([*lines, "", f"CS-ARM-BN controls, new lab, 95 % over plates: {low:.3f} to {high:.3f}."])


def main() -> None:
    """Run what is missing, then write and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    indexes = {seed: data(seed, arguments.workers) for seed in arguments.seeds}
    scores = collect(indexes, arguments.steps, arguments.workers)
    scores.to_csv(OUT / "scores.csv", index=False)
    found = bars(scores)
    write_bars(found, Path("build/first-light.json"))
    report = "\n\n".join([headline(found), table(found[:6]), markdown_table(summarise_by_plate(scores)), intervals(scores)])
    Path("build/first-light.md").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\n\nthis call took {(time.monotonic() - started) / 60:.0f} min")


def summarise_by_plate(scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise with a plate of each seed and split counting as one."""
    keys = scores["plate"].astype(str) + "/" + scores["seed"].astype(str) + "/" + scores["test_lab"].astype(str)
    return summarise(scores.assign(plate=keys))


if __name__ == "__main__":
    main()
