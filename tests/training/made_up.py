"""Tidy tables of a made-up evaluation whose truth is known: what every method reaches in every setting and cell."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES = ("alpha", "beta", "gamma", "delta")
LEVELS = {
    ("erm", "source"): {"in_domain": 0.9, "new_batch": 0.7, "new_lab": 0.5},
    ("adabn-controls", "controls"): {"in_domain": 0.88, "new_batch": 0.8, "new_lab": 0.7},
    ("cs-arm-bn", "controls"): {"in_domain": 0.92, "new_batch": 0.86, "new_lab": 0.82},
    ("arm-bn", "treated"): {"in_domain": 0.9, "new_batch": 0.85, "new_lab": 0.8},
    ("instancenorm", "instance"): {"in_domain": 0.85, "new_batch": 0.75, "new_lab": 0.6},
    ("null: majority", "-"): {"in_domain": 0.25, "new_batch": 0.25, "new_lab": 0.25},
    ("null: intensity", "-"): {"in_domain": 0.5, "new_batch": 0.4, "new_lab": 0.3},
}
"""Mean accuracy per well of whole plates."""
CONTROLS = (0, 1, 2, 4, 8, 16, -1)
ALPHAS = (math.inf, 1.0, 0.1, 0.01, 0.0)
QUERIES = (1, 2, 4, 8, 16, 32)
SHIFTED_QUERY = 16


@dataclass(frozen=True)
class Plate:
    """One plate of the made-up evaluation, and how much easier than others it is."""

    setting: str
    lab: str
    batch: str
    plate: str
    ease: float


def plates(rng: np.random.Generator, batches: int = 3, each: int = 3, spread: float = 0.02) -> list[Plate]:
    """Plates of two labs in domain and on new batches, and of one other lab; batches and plates differ in ease."""
    found = []
    for setting, labs in (("in_domain", ("L1", "L2")), ("new_batch", ("L1", "L2")), ("new_lab", ("L3",))):
        for lab, number in itertools.product(labs, range(batches)):
            batch, ease = f"{lab}{setting[4:6]}{number}", rng.normal(0, spread)
            found += [Plate(setting, lab, batch, f"{batch}p{p}", ease + rng.normal(0, spread / 2)) for p in range(each)]
    return found


def row(way: tuple[str, str], plate: Plate, seed: int, accuracy: float, **cell: object) -> dict[str, object]:
    """One row of cells: every metric a known function of the accuracy per well."""
    return {
        "method": way[0], "context": way[1], "setting": plate.setting, "seed": seed, "lab": plate.lab, "batch": plate.batch,
        "plate": plate.plate, "controls": -1, "query": -1, "query_wells": -1, "alpha": math.inf, "blended": False,
        "images": 96, "wells": 48,
        "image_accuracy": accuracy - 0.05, "well_accuracy": accuracy, "macro_f1": accuracy - 0.01,
        "nll": 1.5 * (1 - accuracy), "ece": 0.2 * (1 - accuracy), "brier": 1 - accuracy, "temperature": 1.4,
        "nll_before": 2.0 * (1 - accuracy), "ece_before": 0.6 * (1 - accuracy), "brier_before": 1.1 * (1 - accuracy),
        **cell,
    }  # fmt: skip


def cells(seed: int = 0, seeds: int = 2, noise: float = 0.01, **how: float) -> pd.DataFrame:
    """Whole plates for every method; K, label shift and query size for those that have them."""
    rng = np.random.default_rng(seed)
    rows = []
    for plate, number in itertools.product(plates(rng, **how), range(seeds)):  # type: ignore[arg-type]
        for way, levels in LEVELS.items():
            level = levels[plate.setting] + plate.ease + rng.normal(0, noise)
            rows.append(row(way, plate, number, level))
            if way[0] in ("adabn-controls", "cs-arm-bn"):
                few = {k: level - 0.4 / (1 + k) if k >= 0 else level for k in CONTROLS if k != 0}
                rows += [row(way, plate, number, few[k], controls=k) for k in few if k != -1]
                less = {k: 0.1 / (1 + k**2) if k >= 0 else 0.0 for k in CONTROLS}
                rows += [row(way, plate, number, level - less[k], controls=k, blended=True) for k in CONTROLS]
            if not way[0].startswith("null"):
                steep = 0.6 if way[0] == "arm-bn" else 0.0
                lost = {a: steep / (1 + 10 * a) if math.isfinite(a) else 0.0 for a in ALPHAS}
                rows += [
                    row(way, plate, number, level - lost[a], alpha=a, query_wells=SHIFTED_QUERY, query=2 * SHIFTED_QUERY)
                    for a in ALPHAS
                ]
                rows += [
                    row(way, plate, number, level - steep / q, query_wells=q, query=2 * q)
                    for q in QUERIES
                    if q != SHIFTED_QUERY
                ]
    return pd.DataFrame(rows)


def predictions(table: pd.DataFrame, seed: int = 0, wells: int = 48) -> pd.DataFrame:
    """Wells called rightly with the accuracy that the whole plate has; half with confidence 0.65, half with 0.95."""
    rng = np.random.default_rng(seed)
    whole = table[(table["controls"] == -1) & (table["query_wells"] == -1) & np.isinf(table["alpha"]) & ~table["blended"]]
    truth, sure = np.arange(wells) % len(CLASSES), np.where(np.arange(wells) < wells // 2, 0.65, 0.95)
    names = ["method", "context", "setting", "seed", "lab", "batch", "plate"]
    parts = []
    for place in whole[[*names, "well_accuracy"]].to_dict("records"):
        right = rng.permutation(np.arange(wells) < round(place.pop("well_accuracy") * wells))
        called = np.where(right, truth, (truth + 1) % len(CLASSES))
        values = np.repeat((1 - sure[:, None]) / (len(CLASSES) - 1), len(CLASSES), axis=1)
        values[np.arange(wells), called] = sure
        labels = {"label": [CLASSES[t] for t in truth], "called": [CLASSES[c] for c in called]}
        labels |= {"called_before": labels["called"], "confidence_before": np.where(sure < 0.9, 0.75, 0.99)}
        part = pd.DataFrame(values, columns=[f"p:{name}" for name in CLASSES])
        parts.append(part.assign(**place, **labels, well=[f"{'ABCDEFGH'[w // 12]}{w % 12 + 1:02d}" for w in range(wells)]))
    return pd.concat(parts, ignore_index=True)


def embeddings(seed: int = 0, batch_effect: float = 3.0, dim: int = 12, each: int = 4) -> pd.DataFrame:
    """Wells' embeddings of two networks, an unadapted one with a shift of every batch and an adapted one without."""
    rng = np.random.default_rng(seed)
    centres, parts = rng.normal(0, 2, (len(CLASSES), dim)), []
    places = [("train", "L1", f"B{b}", f"B{b}p{p}") for b in range(3) for p in range(2)]
    places += [(s, lab, f"{b}", f"{b}p{p}") for s, lab, b in (("in_domain", "L1", "B0"), ("new_batch", "L1", "B7"),
               ("new_batch", "L1", "B8"), ("new_lab", "L2", "B9")) for p in (2, 3)]  # fmt: skip
    shifts = {batch: rng.normal(0, batch_effect, dim) for batch in sorted({batch for _, _, batch, _ in places})}
    for (setting, lab, batch, plate), (method, context) in itertools.product(
        places, (("erm", "source"), ("cs-arm-bn", "controls"))
    ):
        labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), each))
        shift = shifts[batch] if method == "erm" else 0.0
        scale = 1.0 + 0.5 * (batch in ("B7", "B9")) * (method == "erm")
        treated = scale * (centres[labels] + rng.normal(0, 1, (len(labels), dim))) + shift
        controls = scale * rng.normal(0, 1, (8, dim)) + shift
        part = pd.DataFrame(np.concatenate([controls, treated]), columns=[f"e{n:03d}" for n in range(dim)])
        part.insert(0, "Metadata_Source", lab)
        part.insert(1, "Metadata_Batch", batch)
        part.insert(2, "Metadata_Plate", plate)
        part.insert(3, "Metadata_Well", [f"{'ABCDEFGH'[w // 12]}{w % 12 + 1:02d}" for w in range(len(part))])
        part.insert(4, "Metadata_pert_type", ["negcon"] * 8 + ["trt"] * len(labels))
        part.insert(5, "Metadata_label", [""] * 8 + [CLASSES[label] for label in labels])
        meta = {"method": method, "context": context, "setting": setting, "seed": 0}
        parts.append(part.assign(**{f"Metadata_{name}": value for name, value in meta.items()}))
    return pd.concat(parts, ignore_index=True)


def write(folder: Path, table: pd.DataFrame | None = None) -> Path:
    """Write all three tables into a results folder."""
    table = cells() if table is None else table
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "cells.parquet", index=False)
    predictions(table).to_parquet(folder / "predictions.parquet", index=False)
    embeddings().to_parquet(folder / "embeddings.parquet", index=False)
    return folder


def share_of_gap_closed(adapted: float, unadapted: float, in_domain: float) -> float:
    """How much of what unadapted ERM loses on shifted plates is won back: 1 for all of it; NaN where nothing was lost."""
    gap = in_domain - unadapted
    return (adapted - unadapted) / gap if gap > 0 else float("nan")
