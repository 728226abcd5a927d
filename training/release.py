"""From a finished run to what others use of it: its evaluation table, its bundle."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from model.bundle import SERVED_CONTEXTS, Bundle, Manifest, Parity
from model.context import MAX_CONTEXT_SITES
from training.calibrate import calibrate
from training.contexts import context_rows
from training.dataset import PlateSites
from training.evaluate import evaluate, evaluate_nulls
from training.export import export_bundle
from training.methods import Method
from training.plates import open_plates, require_recipe
from training.train import Run, load_network

GOLDEN_SITES = 4


def load_run_plates(run: Run) -> dict[str, PlateSites]:
    """Open a run's plates, with the classes that it was trained on.

    Raises:
        RunError: they are not there any more, or were prepared otherwise.
    """
    folder = Path(run.config.plates)
    require_recipe(folder, run.recipe)
    return open_plates(folder, run.classes)


def evaluate_run(path: Path) -> pd.DataFrame:
    """Score a run's network and the nulls on its test plates."""
    run = Run.load(path)
    plates = load_run_plates(run)
    scores = evaluate(load_network(run), run.method, run.recipe, run.split, plates)
    return pd.concat([scores, evaluate_nulls(run.split, plates)], ignore_index=True)


def release(path: Path, out: Path, *, name: str, minimum_control_wells: int) -> tuple[Bundle, Parity]:
    """Calibrate a run's network on its training and validation plates and export it.

    Raises:
        BundleError: ONNX and torch disagree, or the method has no statistics to serve.
    """
    run = Run.load(path)
    context = served_context(run.method)
    network = load_network(run)
    plates = load_run_plates(run)
    train = [plates[plate] for plate in run.split.train]
    held_out = [plates[plate] for plate in run.split.validation]
    calibration = calibrate(network, run.method, run.recipe, train, held_out)
    manifest = Manifest(
        name=name,
        classes=run.classes,
        recipe=run.recipe,
        method=run.method.name,
        context=context,
        features=network.features,
        embedding_dim=network.embedding_dim,
        minimum_control_wells=minimum_control_wells,
        max_context_sites=MAX_CONTEXT_SITES,
        temperature=calibration.temperature,
        network=run.spec.to_json(),
        training=provenance(run, train),
    )
    golden = _golden_images(held_out[0], run)
    return export_bundle(network, out, manifest, calibration.training_statistics, calibration.embedding_reference, golden)


def served_context(method: Method) -> str:
    """Return the context a method's bundle is served with.

    Raises:
        ValueError: the service has no such context.
    """
    if method.context in SERVED_CONTEXTS and not method.zscore:
        return method.context
    raise ValueError(f"{method.name} is a baseline for evaluation; the service serves erm and cs-arm-bn")


def provenance(run: Run, train: list[PlateSites]) -> dict[str, object]:
    """Return what the weights were made from, without paths."""
    config = run.config
    return {
        "anchorwell": version("anchorwell"),
        "seed": config.seed,
        "steps": config.steps,
        "treated_per_plate": config.shape.treated,
        "controls_per_plate": [config.shape.controls_min, config.shape.controls_max],
        "plates_per_step": config.shape.plates,
        "learning_rate": config.learning_rate,
        "labs": sorted({plate.lab for plate in train}),
        "batches": sorted({plate.batch for plate in train}),
        "plates": list(run.split.train),
        "held_out_plates": list(run.split.validation),
        "sites": int(sum(len(plate.wells) for plate in train)),
    }


def _golden_images(plate: PlateSites, run: Run) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return plate.served(context_rows(plate, GOLDEN_SITES), run.recipe)
