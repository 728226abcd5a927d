"""Evaluation by plate, the nulls, calibration, and the tables made of them."""

import numpy as np
import pandas as pd
import pytest

from model.network import Ensemble
from training.calibrate import calibrate
from training.contexts import context_rows
from training.dataset import PlateSites
from training.evaluate import by_well, evaluate_nulls, score
from training.release import evaluate_run, load_run_plates
from training.report import bootstrap, markdown_table, summarise
from training.splits import Split
from training.train import Run, load_network


def test_a_well_is_called_by_the_mean_of_its_sites_probabilities() -> None:
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.3, 0.7], [0.2, 0.8]])
    calls, truth = by_well(probabilities, np.array([1, 1, 1, 0]), np.array(["B02", "B02", "B02", "A01"]))
    assert calls.tolist() == [1, 0]
    assert truth.tolist() == [0, 1]


def test_scores_count_images_and_wells() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])).astype(np.float32)
    found = score(logits, np.array([0, 0, 1]), np.array(["A01", "A01", "A02"]))
    assert found.image_accuracy == pytest.approx(2 / 3)
    assert found.well_accuracy == 1.0
    assert found.image_nll == pytest.approx(-np.log([0.9, 0.4, 0.7]).mean(), abs=1e-5)


def made_up_plate(seed: int, name: str) -> PlateSites:
    """A plate whose classes differ in raw intensity, and not in where they lie."""
    rng = np.random.default_rng(seed)
    wells = np.array([f"{row}{column:02d}" for row in "ABCDEFGH" for column in range(1, 7)])
    labels = rng.permutation(np.arange(48) % 2)
    controls = np.array([well.endswith("01") for well in wells])
    intensities = rng.normal(100, 1, size=(48, 1, 2)) + 20 * (labels * ~controls)[:, None, None]
    return PlateSites(
        plate=name, lab="L", batch=name, wells=wells, names=labels.astype(str), labels=np.where(controls, -1, labels),
        controls=controls, images=np.zeros((48, 1, 8, 8), np.uint8), intensities=intensities.astype(np.float32),
    )  # fmt: skip


def test_the_nulls_find_intensity_where_it_tells_and_not_position() -> None:
    plates = {name: made_up_plate(seed, name) for seed, name in enumerate("ABCD")}
    table = evaluate_nulls(Split(train=("A", "B"), validation=("C",), new_batch=("D",)), plates)
    accuracy = table.set_index("method")["well_accuracy"]
    assert accuracy["null: intensity"] > 0.95
    assert accuracy["null: intensity-zscore"] > 0.95
    assert accuracy["null: position"] < 0.75
    assert 0.3 < accuracy["null: majority"] < 0.7


def test_context_rows_are_even_over_wells(run: Run) -> None:
    plate = load_run_plates(run)[run.split.train[0]]
    rows = context_rows(plate, 8)
    assert plate.controls[rows].all()
    assert len(set(plate.wells[rows])) == 8


def test_a_run_is_scored_on_every_test_plate_in_every_context(run: Run) -> None:
    table = evaluate_run(run.path)
    own = table[table["method"] == "cs-arm-bn"]
    assert set(own["context"]) == {"controls", "union", "source"}
    assert set(own["setting"]) == set(run.split.tests())
    assert own["well_accuracy"].between(0, 1).all()
    assert len(own) == 3 * sum(len(plates) for plates in run.split.tests().values())
    controls = own[own["context"] == "controls"]
    for few in ("one_class_well_accuracy", "mixed_well_accuracy"):
        assert np.allclose(controls[few], controls["well_accuracy"]), "controls: who else is sent must not matter"
    text = markdown_table(summarise(table))
    assert "null: intensity-zscore" in text
    assert text.count("\n") == 1 + len(table.groupby(["method", "context", "setting"]))


def test_calibration_describes_held_out_wells(run: Run) -> None:
    plates = load_run_plates(run)
    train, held_out = ([plates[name] for name in names] for names in (run.split.train, run.split.validation))
    found = calibrate(Ensemble([load_network(run)]), run.method, run.recipe, train, held_out, [run.split.train])
    reference = found.embedding_reference
    assert reference.class_centres.shape == (8, 32)
    assert reference.projection.shape[0] == 32
    assert reference.control_wells.tolist() == [4, 8]
    assert (reference.control_distances > 0).all()
    assert reference.class_distance > 0
    assert len(found.training_statistics.held_out_distances) == len(held_out)


def test_an_interval_covers_the_mean_and_shrinks_with_plates() -> None:
    rng = np.random.default_rng(0)
    few, many = (bootstrap(rng.normal(0.8, 0.05, size=n)) for n in (5, 200))
    assert few[0] < 0.8 < few[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_a_summary_averages_plates_not_wells() -> None:
    table = pd.DataFrame({
        "method": "m", "context": "c", "setting": "new_lab", "plate": ["A", "B"],
        "image_accuracy": [0.0, 1.0], "well_accuracy": [0.5, 1.0], "wells": [1, 99],
    })  # fmt: skip
    assert summarise(table)["well_accuracy"].item() == 0.75
