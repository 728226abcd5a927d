"""What the demo bundle answers on wells that have none of its classes: inactive compounds, and a phenotype never taught.

Simulates plates of labs that the bundle never saw, asks the real service, and measures how well ``distance_to_controls``
tells inactive wells from wells with a class, and ``distance_to_class`` a novel phenotype from them (ROC), with the marks
``resembles_controls`` and ``out_of_range`` as operating points. Writes ``build/open-set.json``, ``.md`` and ``.png``.

Run: ``python -m benchmarks.open_set``.
"""

import shutil
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.bars import Bar, table, write_bars
from examples.demo import BUNDLES, Server, read_plate
from service.client import AnchorwellClient
from training.intervals import Resamples
from training.simulate import CLASSES, SimulationPlan, simulate

OUT = Path("build/open-set")
SURE = 0.9
PLAN = SimulationPlan(
    labs=3, first_lab=6, batches=2, plates=1, seed=2025, sites=2, wells_per_class=4, inactive_wells=24, novel_wells=24
)


def answers() -> pd.DataFrame:
    """Adapt and classify every simulated plate; one row a treated well, with what is truly in it."""
    shutil.rmtree(OUT, ignore_errors=True)
    report = simulate(PLAN, OUT / "plates", workers=2)
    server = Server(BUNDLES / "cs-arm-bn", OUT)
    rows = []
    try:
        with AnchorwellClient(server.url) as client:
            for folder in report.plates:
                plate = read_plate(OUT / "plates" / folder)
                client.adapt(plate.name, plate.controls, pixel_size_um=plate.pixel_size_um)
                found = client.predict(plate.name, plate.treated, pixel_size_um=plate.pixel_size_um)
                place = dict(zip(("lab", "batch", "plate"), Path(folder).parts, strict=True))
                rows += [
                    {**place, "seed": 0, "truth": plate.labels[well.well], "plate_out_of_range": found.out_of_range}
                    | well.model_dump(exclude={"probabilities", "refused"})
                    for well in found.wells
                ]
    finally:
        server.stop()
    wells = pd.DataFrame(rows)
    return wells.assign(kind=wells["truth"].where(~wells["truth"].isin(CLASSES), "class"))


def auc(wells: pd.DataFrame, kind: str, score: str, sign: int) -> pd.DataFrame:
    """Area under the ROC of each plate: wells of ``kind`` against wells with a class."""
    found = []
    for _, plate in wells[wells["kind"].isin([kind, "class"])].groupby("plate"):
        area = float(roc_auc_score(plate["kind"] == kind, sign * plate[score]))
        found.append({**plate.iloc[0][["seed", "lab", "batch", "plate"]].to_dict(), "auc": area})
    return pd.DataFrame(found)


def figures(wells: pd.DataFrame) -> list[Bar]:
    """Turn the answers into figures."""
    found = []
    for kind, score, sign in (("inactive", "distance_to_controls", -1), ("novel", "distance_to_class", 1)):
        area = Resamples().mean(auc(wells, kind, score, sign), "auc")
        name = f"ROC area, {kind} against class, by {score}"
        found.append(Bar(name, area.value, "", interval=area.interval))
    for _, group in wells.groupby("kind"):
        kind = str(group["kind"].iloc[0])
        sure = (group["probability"] > SURE) & ~group["resembles_controls"] & ~group["out_of_range"]
        found += [
            Bar(f"{kind} wells marked resembles_controls", float(group["resembles_controls"].mean()), ""),
            Bar(f"{kind} wells marked out_of_range", float(group["out_of_range"].mean()), ""),
            Bar(f"{kind} wells with a class above 0.9 and no mark", float(sure.mean()), ""),
            Bar(f"{kind} wells, median probability of the class called", float(group["probability"].median()), ""),
        ]
    right = wells[wells["kind"] == "class"]
    found.append(Bar("class wells called rightly", float((right["label"] == right["truth"]).mean()), ""))
    found.append(Bar("plates out of range", float(wells.groupby("plate")["plate_out_of_range"].first().mean()), ""))
    return found


def called(wells: pd.DataFrame) -> str:
    """Which classes the wells without one are given."""
    shares = pd.crosstab(wells["kind"], wells["label"], normalize="index")
    lines = ["| what is in the well | " + " | ".join(shares.columns) + " |", "| --- |" + " ---: |" * len(shares.columns)]
    lines += [f"| {kind} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for kind, row in shares.iterrows()]
    return "\n".join(lines)


def draw(wells: pd.DataFrame, path: Path) -> None:
    """Draw both ROC curves, plates pooled, with the marks' operating points."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the backend is chosen)

    figure, axis = plt.subplots(figsize=(5, 5))
    for kind, score, sign, mark in (
        ("inactive", "distance_to_controls", -1, "resembles_controls"),
        ("novel", "distance_to_class", 1, "out_of_range"),
    ):
        part = wells[wells["kind"].isin([kind, "class"])]
        truth = part["kind"] == kind
        false, true, _ = roc_curve(truth, sign * part[score])
        (line,) = axis.plot(false, true, label=f"{kind} against class, {score}")
        axis.plot(part.loc[~truth, mark].mean(), part.loc[truth, mark].mean(), "o", color=line.get_color(), label=mark)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axis.set(xlabel="share of wells with a class", ylabel="share of wells without one")
    axis.legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Ask, write and print."""
    wells = answers()
    bars = figures(wells)
    write_bars(bars, Path("build/open-set.json"))
    report = f"{table(bars)}\n\nClasses called:\n\n{called(wells)}"
    Path("build/open-set.md").write_text(report + "\n", encoding="utf-8")
    draw(wells, Path("build/open-set.png"))
    print(report)


if __name__ == "__main__":
    main()
