"""MitoCheck nuclei: real crops of 67 plates without controls, so that only contexts `source` and `treated` apply.

Sixteen phenotypes of single HeLa nuclei, split by experiment date: no date, and so no plate, trains and is tested. Every
plate is tested in one fold. ERM, InstanceNorm and ARM-BN are trained with equal numbers of images and scored per crop; AdaBN
takes ERM's weights with the statistics of the plate's own crops; nothing is chosen on any plate. Writes
``build/mitocheck.json`` and ``build/mitocheck.md``; finished parts lie in ``build/mitocheck/`` and are not made again. Needs
../shared/data.

Run: ``python -m benchmarks.mitocheck [--folds 3] [--seeds 0 1] [--steps 300] [--workers 2]``.
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from benchmarks.bars import Bar, table, write_bars
from model.images import ImageRecipe
from model.layout import PLATE_FORMATS, well_name
from model.network import NetworkSpec, Normaliser, PerInstance, ResNet, Running
from training.dataset import PlateSites, moments
from training.episodes import Episodes, EpisodeShape
from training.intervals import Estimate, Resamples
from training.methods import classify, make_method, measured, training_loss
from training.nulls import fit_nulls
from training.results import NULL
from training.train import cosine

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "mitocheck_nuclei_crops"
OUT = Path("build/mitocheck")
RECIPE = ImageRecipe(channels=("DNA",), size=64, shrink=1)
"""The crops are 8-bit as published, and are taken as they are."""
NETWORKS = ("erm", "instancenorm", "arm-bn")
SHAPE = EpisodeShape(treated=24, controls_min=0, controls_max=0, plates=4)
LEARNING_RATE, WIDTH = 2e-3, 16
ONE_SIDED = 0.8
"""Share of a plate's commonest class from which its crops are called one-sided."""
WAYS = ("erm source", "adabn treated", "instancenorm instance", "arm-bn treated")
NO_CONTROLS = np.array([], str)
NULLS = ("null: majority", "null: position", "null: intensity", "oracle: plate's commonest class")

Plates = Mapping[str, PlateSites]


# --- plates and folds ------------------------------------------------------------------------------------------------


def read_plates(folder: Path) -> tuple[dict[str, PlateSites], tuple[str, ...]]:
    """Read all crops by plate, each a site of its well, and the classes in order; a lab is what all have in common."""
    labels = pd.read_csv(folder / "labels.csv", dtype=str)
    classes = tuple(sorted(set(labels["phenotype"])))
    return {str(name): _plate(folder, str(name), rows, classes) for name, rows in labels.groupby("plate")}, classes


def _plate(folder: Path, name: str, rows: pd.DataFrame, classes: Sequence[str]) -> PlateSites:
    crops = np.stack([np.asarray(Image.open(folder / file)) for file in rows["file"]])[:, None]
    columns = PLATE_FORMATS[384][1]
    wells = [well_name(*divmod(int(number) - 1, columns)) for number in rows["well_number"]]
    return PlateSites(
        plate=name, lab="MitoCheck", batch=str(rows["experiment_date"].iloc[0]), wells=np.array(wells),
        names=rows["phenotype"].to_numpy(dtype=str), labels=np.array([classes.index(label) for label in rows["phenotype"]]),
        controls=np.zeros(len(rows), np.bool_), images=crops,
        intensities=np.stack([crops.mean(axis=(2, 3)), crops.std(axis=(2, 3))], axis=2).astype(np.float32), recipe=RECIPE,
    )  # fmt: skip


def folds(plates: Plates, count: int) -> list[tuple[list[str], list[str]]]:
    """Plates that train and plates that are tested, by date and with classes spread as evenly as dates allow."""
    labels = np.concatenate([plate.labels for plate in plates.values()])
    names = np.concatenate([np.full(len(plate.labels), name) for name, plate in plates.items()])
    dates = np.concatenate([np.full(len(plate.labels), plate.batch) for plate in plates.values()])
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    return [
        (sorted(set(names[train])), sorted(set(names[test]))) for train, test in splitter.split(labels, labels, groups=dates)
    ]


# --- answers ---------------------------------------------------------------------------------------------------------


def trained(network: str, plates: Sequence[PlateSites], recipe: ImageRecipe, classes: int, seed: int, steps: int) -> ResNet:
    """Train a small ResNet-18 for a fixed number of steps: 4 plates and 96 crops each, whatever the method."""
    torch.manual_seed(seed)
    method = make_method(network)
    net = ResNet(NetworkSpec(channels=1, classes=classes, depth=18, width=WIDTH, antialiased=True))
    episodes = Episodes(plates, recipe, SHAPE, crop=recipe.size, seed=seed, first=0, steps=steps, with_controls=False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, steps))
    for step in range(steps):
        loss = training_loss(net, method, episodes[step])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return net.eval()


def answered(way: str, plate: PlateSites, probabilities: NDArray[np.floating], seed: int) -> pd.DataFrame:
    """One row a crop: what it is and what it is called."""
    place = {"lab": plate.lab, "batch": plate.batch, "plate": plate.plate}
    share = np.bincount(plate.labels).max() / len(plate.labels)
    return pd.DataFrame({"truth": plate.labels, "called": probabilities.argmax(axis=1)}).assign(
        way=way, seed=seed, one_sided=bool(share >= ONE_SIDED), **place
    )


def networks_part(network: str, fold: int, seed: int, count: int, steps: int, threads: int) -> Path:
    """Train one network on one fold and answer its test plates; return the table's path."""
    path = OUT / f"{network}-{count}.{fold}-{seed}-{steps}.parquet"
    if path.is_file():
        return path
    torch.set_num_threads(threads)
    plates, classes = read_plates(DATA)
    train, test = ([plates[name] for name in names] for names in folds(plates, count)[fold])
    mean, std = moments(train)
    recipe = replace(RECIPE, mean=mean, std=std)
    net = trained(network, train, recipe, len(classes), seed, steps)
    found = []
    for plate in test:
        crops = plate.served(np.arange(len(plate.labels)), recipe)
        norms = normalisers(network, net, crops)
        found += [answered(way, plate, classify(net, crops, norm)[0], seed) for way, norm in norms.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(found, ignore_index=True).to_parquet(path, index=False)
    return path


def normalisers(network: str, net: ResNet, crops: NDArray[np.float32]) -> dict[str, Normaliser]:
    """The ways in which a network answers all crops of one plate."""
    if network == "instancenorm":
        return {"instancenorm instance": PerInstance()}
    treated = measured(net, crops)
    return {"arm-bn treated": treated} if network == "arm-bn" else {
        "erm source": Running(update=False), "adabn treated": treated,
    }  # fmt: skip


def nulls(plates: Plates, split: Sequence[tuple[list[str], list[str]]]) -> pd.DataFrame:
    """Answer every test plate without morphology; the oracle alone is told what is commonest on the plate it answers."""
    found, classes = [], 1 + max(int(plate.labels.max()) for plate in plates.values())
    for train, test in split:
        fitted = fit_nulls([plates[name] for name in train])
        for plate in (plates[name] for name in test):
            for null in fitted:
                logits = null.logits(plate, np.arange(len(plate.labels)), NO_CONTROLS)
                assert logits is not None
                found.append(answered(f"{NULL}{null.name}", plate, logits, 0))
            commonest = np.bincount(plate.labels, minlength=classes)
            found.append(answered(NULLS[3], plate, np.tile(commonest, (len(plate.labels), 1)), 0))
    return pd.concat(found, ignore_index=True)


# --- figures ---------------------------------------------------------------------------------------------------------


def accuracy(rows: pd.DataFrame, draws: Resamples) -> Estimate:
    """Share of crops called rightly, all crops alike; interval over dates, then plates, and seeds."""
    right = np.asarray(rows["called"] == rows["truth"], np.float64)
    return draws.ratio(rows, right, np.ones(len(rows)))


def mean_recall(rows: pd.DataFrame, draws: Resamples) -> Estimate:
    """Mean over classes of the share of their crops called rightly: what rare classes weigh in too."""
    by_class = [
        draws.ratio(rows, ((rows["truth"] == label) & (rows["called"] == label)).to_numpy(np.float64),
                    (rows["truth"] == label).to_numpy(np.float64))
        for label in sorted(set(rows["truth"]))
    ]  # fmt: skip
    members = min(recall.members for recall in by_class)
    return Estimate(float(np.mean([r.value for r in by_class])), np.nanmean([r.draws for r in by_class], axis=0), members)


def figures(answers: pd.DataFrame) -> list[Bar]:
    """Accuracy per crop and mean recall of every way, and its accuracy against ERM's on all, one-sided and other plates."""
    draws, found = Resamples(), []
    erm = answers[answers["way"] == "erm source"]
    for way in (*WAYS, *NULLS):
        rows = answers[answers["way"] == way]
        name = way.replace("null: ", "null-").replace("oracle: ", "oracle-").replace("'", "").replace(" ", "_")
        found += [
            _bar(f"crop_accuracy_{name}", accuracy(rows, draws)),
            _bar(f"mean_class_recall_{name}", mean_recall(rows, draws)),
        ]
        if way in WAYS[1:]:
            found.append(_bar(f"{name}_over_erm", accuracy(rows, draws) - accuracy(erm, draws)))
            for one_sided, of in ((True, "one_sided"), (False, "other")):
                both = [part[part["one_sided"] == one_sided] for part in (rows, erm)]
                if not both[0].empty:
                    found.append(
                        _bar(f"{name}_over_erm_on_{of}_plates", accuracy(both[0], draws) - accuracy(both[1], draws))
                    )
    return found


def _bar(name: str, estimate: Estimate) -> Bar:
    return Bar(name, estimate.value, "", interval=estimate.interval)


def confounding(plates: Plates, classes: Sequence[str], split: Sequence[tuple[list[str], list[str]]]) -> str:
    """How crops of each class lie on plates and dates: what a plate's identity alone would tell."""
    lines = ["| class | crops | plates | dates | largest share on one plate | folds that test it without a training crop |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for number, name in enumerate(classes):
        counts = {plate.plate: int((plate.labels == number).sum()) for plate in plates.values()}
        has = [plate for plate, count in counts.items() if count]
        unseen = sum(bool(set(has) & set(test)) and not set(has) & set(train) for train, test in split)
        lines.append(
            f"| {name} | {sum(counts.values())} | {len(has)} | {len({plates[plate].batch for plate in has})} | "
            f"{max(counts.values()) / sum(counts.values()):.2f} | {unseen} |"
        )
    return "\n".join(lines)


def report(answers: pd.DataFrame, bars: list[Bar], confounded: str) -> str:
    """Set the figures with what they can and cannot show."""
    one = answers[answers["way"] == "erm source"].drop_duplicates("plate")
    dates, seeds, one_sided = one["batch"].nunique(), answers["seed"].nunique(), int(one["one_sided"].sum())
    told = (
        f"Real crops, {len(one)} plates of {dates} dates, {seeds} seeds of training; split by date. There are no negative "
        "controls: contexts `controls`, `union` and `panel` cannot be used, and nothing here tells of CS-ARM-BN. It can "
        "show whether statistics of the crops sent (`treated`) help or harm on real plates whose mixture of classes "
        f"differs from plate to plate. {one_sided} plates are one-sided: {ONE_SIDED:.0%} or more of their crops are of one "
        "class. "
        "Intervals: dates and plates drawn again, and seeds."
    )
    cannot = (
        "What it cannot show: class and plate are confounded (table below), so that ordinary BN, trained across plates, may "
        "read the plate where it should read the nucleus, and statistics of a plate's crops carry its class; the oracle "
        "says how far the plate's commonest class alone would go. Crops of one well and movie are near-copies of "
        "each other: there are fewer independent nuclei than crops. One channel, one lab, one kind of microscope, small "
        "networks, few steps. `Interphase` is a phenotype here, not a control. The figures compare methods trained alike; "
        "they are not the best that can be reached."
    )
    return "\n\n".join([told, table(bars), cannot, confounded])


def main() -> None:
    """Run what is missing, then write and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print("mitocheck: skipped, the crops are not beside this checkout (../shared/data/mitocheck_nuclei_crops)")
        return
    started = time.monotonic()
    plates, classes = read_plates(DATA)
    split = folds(plates, arguments.folds)
    tasks = list(itertools.product(NETWORKS, range(arguments.folds), arguments.seeds))
    threads = max(1, torch.get_num_threads() // arguments.workers)
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(networks_part, *task, arguments.folds, arguments.steps, threads) for task in tasks]
        for done, future in enumerate(as_completed(futures), start=1):
            print(f"{done}/{len(tasks)} {future.result().stem}", flush=True)
    parts = [pd.read_parquet(future.result()) for future in futures]
    answers = pd.concat([*parts, nulls(plates, split)], ignore_index=True)
    bars = figures(answers)
    write_bars(bars, Path("build/mitocheck.json"))
    text = report(answers, bars, confounding(plates, classes, split))
    Path("build/mitocheck.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nthis call took {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
