"""From finished runs to what others use of them: an evaluation table, a bundle of one run or of several as an ensemble."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from model.bundle import SERVED_CONTEXTS, Bundle, Manifest, Parity
from model.context import MAX_CONTEXT_SITES
from model.errors import RunError
from model.images import ImageRecipe
from model.network import Ensemble
from training.calibrate import Calibration, calibrate
from training.contexts import context_rows
from training.dataset import PlateSites
from training.evaluate import evaluate, evaluate_nulls
from training.export import export_bundle
from training.methods import Method
from training.plates import open_plates, plate_table, require_recipe
from training.splits import check_split
from training.train import Run, load_network

GOLDEN_SITES = 4


def load_run_plates(run: Run) -> dict[str, PlateSites]:
    """Open the plates that have a purpose in a run, with the classes that it was trained on.

    Raises:
        RunError: they are not all there any more, were prepared otherwise, or are not those that it was begun with.
        LeakError: they let training see what it is tested on.
    """
    folder = Path(run.config.plates)
    require_recipe(folder, run.recipe)
    plates = open_plates(folder, run.classes)
    absent = sorted(run.split.purposes().keys() - plates.keys())
    if absent:
        raise RunError(f"{folder} lacks the plates {', '.join(absent)} of {run.path}: fetch them again")
    own = {name: plates[name] for name in run.split.purposes()}
    changed = sorted(name for name, plate in own.items() if plate.sha256 != run.plates.get(name))
    if changed:
        raise RunError(
            f"images, labels or wells on the plates {', '.join(changed)} of {folder} are not those that {run.path} was "
            f"begun with: fetch the plates as they were, or train anew"
        )
    check_split(run.split, plate_table(own))
    return own


def evaluate_run(path: Path) -> pd.DataFrame:
    """Score a run's network and the nulls on its test plates."""
    run = Run.load(path)
    plates = load_run_plates(run)
    scores = evaluate(load_network(run), run.method, run.recipe, run.split, plates, panel_wells=run.config.shape.panel_wells)
    return pd.concat([scores, evaluate_nulls(run.split, plates)], ignore_index=True)


def release(paths: Sequence[Path], out: Path, *, name: str, minimum_control_wells: int) -> tuple[Bundle, Parity]:
    """Calibrate the networks of runs, together, on their training and validation plates and export them as one bundle.

    Raises:
        RunError: the runs do not go together, or no plate was held out by all of them.
        BundleError: ONNX and torch disagree, or the method has no statistics to serve.
    """
    runs = [Run.load(path) for path in paths]
    require_one_ensemble(runs)
    first = runs[0]
    served_context(first.method)  # told before anything is read
    network = ensemble_of(runs)
    plates = load_plates_of_runs(runs)
    parts = calibration_plates(runs, plates)
    trained_on = [frozenset(run.split.train) for run in runs]
    calibration = calibrate(
        network, first.method, first.recipe, parts.train, parts.held_out, trained_on, first.config.shape.panel_wells
    )
    golden = parts.held_out[0]
    return calibrated_bundle(
        network, out, calibration, golden, name=name, classes=first.classes, recipe=first.recipe, method=first.method,
        minimum_control_wells=minimum_control_wells, training=provenance(runs, parts),
    )  # fmt: skip


def calibrated_bundle(
    network: Ensemble,
    out: Path,
    calibration: Calibration,
    golden: PlateSites,
    *,
    name: str,
    classes: Sequence[str],
    recipe: ImageRecipe,
    method: Method,
    minimum_control_wells: int,
    training: Mapping[str, object],
) -> tuple[Bundle, Parity]:
    """Export networks with what they were calibrated to; a few controls of the plate ``golden`` are replayed.

    Raises:
        BundleError: ONNX and torch disagree. ValueError: see ``served_context``.
    """
    manifest = Manifest(
        name=name,
        classes=tuple(classes),
        recipe=recipe,
        method=method.name,
        context=served_context(method),
        features=network.features,
        embedding_dim=network.embedding_dim,
        minimum_control_wells=minimum_control_wells,
        max_context_sites=MAX_CONTEXT_SITES,
        members=len(network.networks),
        temperature=calibration.temperature,
        network=network.spec.to_json(),
        training=training,
    )
    images = golden.served(context_rows(golden, GOLDEN_SITES), recipe)
    return export_bundle(network, out, manifest, calibration.training_statistics, calibration.embedding_reference, images)


# --- several runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CalibrationPlates:
    """Plates that any member was trained on, and plates of batches that every member held out; both by name."""

    train: tuple[PlateSites, ...]
    held_out: tuple[PlateSites, ...]


def require_one_ensemble(runs: Sequence[Run]) -> None:
    """Check that runs were made alike: their classes, method, context, network and recipe agree.

    The recipe's mean and std may differ, since each run takes them from its own training plates.

    Raises:
        RunError: they were not; names the runs and what differs.
    """

    def made(run: Run) -> dict[str, object]:
        recipe = {name: value for name, value in vars(run.recipe).items() if name not in ("mean", "std")}
        method = {"method": run.method.name, "context": run.method.context, "stop_gradient": run.method.stop_gradient}
        return {**vars(run.spec), **recipe, **method, "classes": run.classes}  # names say more than their numbers

    first = made(runs[0])
    for run in runs[1:]:
        other = made(run)
        differing = [f"{key} ({first[key]} and {other[key]})" for key in first if first[key] != other[key]]
        if differing:
            raise RunError(
                f"{runs[0].path} and {run.path} make no ensemble: they differ in {', '.join(differing)}; "
                f"export each by itself, or train them alike"
            )


def ensemble_of(runs: Sequence[Run]) -> Ensemble:
    """Load the runs' networks as one that takes images as the first run's recipe normalises them."""
    mean, std = (np.array([getattr(run.recipe, name) for run in runs], np.float64) for name in ("mean", "std"))
    networks = [load_network(run) for run in runs]
    if (mean == mean[0]).all() and (std == std[0]).all():
        return Ensemble(networks)
    scales, shifts = (torch.from_numpy(value).float() for value in (std[0] / std, (mean[0] - mean) / std))
    return Ensemble(networks, shifts=shifts, scales=scales)


def load_plates_of_runs(runs: Sequence[Run]) -> dict[str, PlateSites]:
    """Open every run's plates.

    Raises:
        RunError: two runs know different plates by one name.
    """
    plates: dict[str, PlateSites] = {}
    known: dict[str, str] = {}
    for run in runs:
        other = sorted(name for name, digest in run.plates.items() if known.setdefault(name, digest) != digest)
        if other:
            raise RunError(f"{', '.join(other)} of {run.path} are other plates than those of the runs before")
        plates |= load_run_plates(run)
    return plates


def calibration_plates(runs: Sequence[Run], plates: Mapping[str, PlateSites]) -> CalibrationPlates:
    """Choose what calibrates runs together: plates that some run validated on, of batches that none trained or tests on.

    Raises:
        RunError: there is no such plate.
    """
    train = {name for run in runs for name in run.split.train}
    tested = {name for run in runs for names in run.split.tests().values() for name in names}
    seen = {(plates[name].lab, plates[name].batch) for name in train}
    validated = {name for run in runs for name in run.split.validation}
    held_out = [name for name in sorted(validated - train - tested) if (plates[name].lab, plates[name].batch) not in seen]
    if not held_out:
        raise RunError(
            f"no plate was held out by all {len(runs)} runs: of {len(validated)} validation plates, "
            f"{len(validated & train)} are training plates and {len(validated & tested)} test plates of another run, and "
            f"the rest are of batches that another trained on; temperature and thresholds need a batch that all held out"
        )
    return CalibrationPlates(
        train=tuple(plates[name] for name in sorted(train)), held_out=tuple(plates[name] for name in held_out)
    )


# --- what the bundle says --------------------------------------------------------------------------------------------


def served_context(method: Method) -> str:
    """Return the context a method's bundle is served with.

    Raises:
        ValueError: the service has no such context.
    """
    if method.context in SERVED_CONTEXTS and not method.zscore:
        return method.context
    raise ValueError(f"{method.name} is a baseline for evaluation; the service serves erm and cs-arm-bn")


def provenance(runs: Sequence[Run], parts: CalibrationPlates) -> dict[str, object]:
    """Return what the weights were made from and calibrated on, without paths; ``members`` has what is each run's own."""
    return {
        "anchorwell": version("anchorwell"),
        "labs": sorted({plate.lab for plate in parts.train}),
        "batches": sorted({plate.batch for plate in parts.train}),
        "plates": [plate.plate for plate in parts.train],
        "held_out_plates": [plate.plate for plate in parts.held_out],
        "sites": int(sum(len(plate.wells) for plate in parts.train)),
        "members": [_how_trained(run) for run in runs],
    }


def _how_trained(run: Run) -> dict[str, object]:
    config = run.config
    return {
        "seed": config.seed,
        "steps": config.steps,
        "treated_per_plate": config.shape.treated,
        "controls_per_plate": [config.shape.controls_min, config.shape.controls_max],
        "plates_per_step": config.shape.plates,
        "learning_rate": config.learning_rate,
        "plates": list(run.split.train),
        "held_out_plates": list(run.split.validation),
    }
