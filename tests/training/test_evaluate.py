"""Evaluation by plate, the nulls, calibration, and the tables made of them."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import LayoutError, NoControlsError
from model.images import ImageRecipe
from model.network import Ensemble, NetworkSpec, ResNet, Running
from model.statistics import Prior
from tests.training.plates import made_up_plate
from training.calibrate import calibrate
from training.contexts import context_rows, panel_rows
from training.dataset import NO_LABEL
from training.evaluate import (
    SWEPT_IMAGES,
    SWEPT_SIZES,
    NetworkAnswers,
    TrainedNetwork,
    answers_of,
    evaluate_nulls,
    outcome,
    score_plate,
    scores,
    temperature_of,
)
from training.methods import NETWORKS, WAYS, classify, measured
from training.metrics import nll
from training.nulls import fit_nulls
from training.queries import DEFAULT, Cell, Draws
from training.release import evaluate_run, load_run_plates
from training.report import markdown_table, summarise
from training.splits import Split
from training.train import Run, load_network


def network(classes: int = 2) -> ResNet:
    torch.manual_seed(0)
    return ResNet(NetworkSpec(channels=2, classes=classes, width=4)).eval()


RECIPE = ImageRecipe(channels=("A", "B"), size=64, mean=(0.5, 0.5), std=(0.3, 0.3))
PLATE = made_up_plate("P", classes=4, sites=2)
TREATED, CONTROLS = PLATE.treated, np.unique(PLATE.wells[PLATE.controls])


def answers(name: str, **more) -> NetworkAnswers:
    """A way of the table on a random network, with two training plates."""
    way = next(way for way in WAYS if way.name == name)
    train = [made_up_plate(plate, seed=seed, classes=4, controls=4) for seed, plate in enumerate("AB")]
    return NetworkAnswers(TrainedNetwork(network(4), way.trained, RECIPE, train), way, **more)


def rows_of(wells) -> np.ndarray:
    return np.flatnonzero(np.isin(PLATE.wells, wells))


def test_controls_answer_from_the_given_control_wells_alone():
    some = CONTROLS[:3]
    own = answers("cs-arm-bn controls")
    images = PLATE.served(TREATED, RECIPE)
    norm = measured(own.trained.network, PLATE.served(rows_of(some), RECIPE))
    expected, _ = classify(own.trained.network, images, norm)
    np.testing.assert_allclose(own.logits(PLATE, TREATED, some), expected, atol=1e-5)
    np.testing.assert_allclose(own.logits(PLATE, TREATED[5:9], some), expected[5:9], atol=1e-5)
    assert not np.allclose(own.logits(PLATE, TREATED, CONTROLS), expected, atol=1e-3)


@pytest.mark.parametrize(("name", "control_wells"), [("adabn-treated", []), ("adabn-union", CONTROLS[:2])])
def test_treated_and_union_answer_from_what_is_sent(name, control_wells):
    own, sent = answers(name), TREATED[:6]
    context = np.concatenate([rows_of(control_wells), sent])
    norm = measured(own.trained.network, PLATE.served(context, RECIPE))
    expected, _ = classify(own.trained.network, PLATE.served(sent, RECIPE), norm)
    found = own.logits(PLATE, sent, np.array(control_wells))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    whole = own.logits(PLATE, TREATED, np.array(control_wells))[:6]
    assert not np.allclose(whole, expected, atol=1e-3)


def test_without_controls_only_what_needs_none_answers():
    none = CONTROLS[:0]
    assert answers("cs-arm-bn controls").logits(PLATE, TREATED, none) is None
    assert answers("erm-zscore").logits(PLATE, TREATED, none) is None
    blended = answers("cs-arm-bn controls blended").logits(PLATE, TREATED, none)
    np.testing.assert_allclose(blended, answers("cs-arm-bn source").logits(PLATE, TREATED, none), atol=1e-6)
    union = answers("adabn-union").logits(PLATE, TREATED[:6], none)
    np.testing.assert_allclose(union, answers("adabn-treated").logits(PLATE, TREATED[:6], none), atol=1e-6)


def test_a_blend_leans_on_the_source_less_the_more_control_wells_there_are():
    own, plain = answers("cs-arm-bn controls blended"), answers("cs-arm-bn controls")
    apart = [
        np.abs(own.logits(PLATE, TREATED, CONTROLS[:n]) - plain.logits(PLATE, TREATED, CONTROLS[:n])).mean() for n in (1, 8)
    ]
    assert apart[0] > apart[1] > 0


def test_a_swept_blend_weighs_the_source_by_images():
    own = answers("prior-bn controls", swept_images=8.0)
    trained, context = own.trained, rows_of(CONTROLS[:4])  # 8 images
    half = np.full(trained.network.features, 0.5, np.float32)
    prior = Prior(trained.source.mean, trained.source.variance, half)
    norm = measured(trained.network, PLATE.served(context, RECIPE), prior)
    expected, _ = classify(trained.network, PLATE.served(TREATED, RECIPE), norm)
    np.testing.assert_allclose(own.logits(PLATE, TREATED, CONTROLS[:4]), expected, atol=1e-5)


def test_n_is_chosen_where_validation_plates_are_called_best():
    way = next(way for way in WAYS if way.name == "prior-bn treated")
    validation = [made_up_plate("V", seed=5)]
    trained = TrainedNetwork(network(), way.trained, RECIPE, validation=validation)

    def loss(images: float) -> float:
        own = NetworkAnswers(trained, way, images)
        found = [outcome(own, validation[0], Cell(query=n), Draws(2, 4)) for n in SWEPT_SIZES]
        return np.mean([nll(one.probabilities(), one.labels) for one in found])

    assert answers_of(trained, way).swept_images == min(SWEPT_IMAGES, key=loss)


def test_zscored_inputs_are_those_of_the_given_control_wells():
    own, some = answers("erm-zscore"), CONTROLS[:2]
    pixels = PLATE.unit(rows_of(some)).astype(np.float64)
    recipe = replace(RECIPE, mean=tuple(pixels.mean((0, 2, 3))), std=tuple(pixels.std((0, 2, 3))))
    expected, _ = classify(own.trained.network, PLATE.served(TREATED, recipe), Running(update=False))
    np.testing.assert_allclose(own.logits(PLATE, TREATED, some), expected, atol=1e-4)


def test_images_scaled_by_controls_are_scaled_by_the_given_control_wells() -> None:
    by_controls = ImageRecipe(channels=("A", "B"), size=64, scaling="control-scale", mean=(0.5, 0.5), std=(0.3, 0.3))
    gain = np.linspace(1, 3, len(PLATE.wells), dtype=np.float32)[:, None, None, None]
    plate = replace(PLATE, recipe=by_controls, images=PLATE.images[:] * gain).scaled_by()
    erm = answers("erm")
    own, some = replace(erm, trained=replace(erm.trained, recipe=by_controls)), CONTROLS[:2]
    assert own.uses_controls
    assert own.logits(plate, TREATED, CONTROLS[:0]) is None
    images = plate.scaled_by(rows_of(some)).served(TREATED, by_controls)
    expected, _ = classify(own.trained.network, images, Running(update=False))
    np.testing.assert_allclose(own.logits(plate, TREATED, some), expected, atol=1e-4)
    assert not np.allclose(own.logits(plate, TREATED, CONTROLS), expected, atol=1e-3)


def test_the_panels_wells_are_measured_and_not_scored():
    own = answers("cs-arm-bn panel")
    panel = panel_rows(PLATE, 1)
    found = outcome(own, PLATE, DEFAULT, Draws())
    assert len(found.labels) == 40 - 4
    assert not set(found.wells) & set(PLATE.wells[panel])
    norm = measured(own.trained.network, PLATE.served(np.concatenate([PLATE.control_rows, panel]), RECIPE))
    expected, _ = classify(own.trained.network, PLATE.served(TREATED, RECIPE), norm)
    np.testing.assert_allclose(own.logits(PLATE, TREATED, CONTROLS), expected, atol=1e-4)


def test_a_plate_without_controls_is_refused_by_what_needs_them_and_by_nothing_else():
    bare = made_up_plate("bare", controls=0)
    with pytest.raises(NoControlsError, match="plate bare has no negative-control wells"):
        outcome(answers("cs-arm-bn controls"), bare, DEFAULT, Draws())
    for name in ("adabn-treated", "erm", "instancenorm"):
        assert len(outcome(answers(name), bare, DEFAULT, Draws()).labels) == 48


@dataclass(frozen=True)
class Fixed:
    """Answers that are written down: (sites, classes), by row."""

    table: np.ndarray
    uses_controls = False

    def scored(self, _plate, rows):
        return np.ones(len(rows), bool)

    def logits(self, _plate, rows, _controls):
        return self.table[rows]


def test_a_well_is_called_by_the_mean_of_its_sites_probabilities():
    plate = replace(PLATE, wells=np.array(["B02"] * 3 + ["A01"]), labels=np.array([1, 1, 1, 0]),
                    controls=np.zeros(4, bool))  # fmt: skip
    table = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])).astype(np.float32)
    found = outcome(Fixed(table), plate, DEFAULT, Draws())
    assert found.wells.tolist() == ["A01", "B02"]
    np.testing.assert_allclose(found.probabilities(), [[0.2, 0.8], [1.6 / 3, 1.4 / 3]], atol=1e-6)
    scored = scores(found, 1.0)
    assert (scored["images"], scored["wells"]) == (4, 2)
    assert scored["image_accuracy"] == pytest.approx(0.5)
    assert scored["well_accuracy"] == 0
    assert scored["nll"] == scored["nll_before"] == pytest.approx(-np.log([0.2, 1.4 / 3]).mean())


def test_a_cell_pools_its_queries_and_a_well_sent_twice_counts_twice():
    logits = np.eye(4, dtype=np.float32)[np.maximum(PLATE.labels, 0)]
    found = outcome(Fixed(logits), PLATE, Cell(query=15, alpha=0), Draws(queries=4))
    assert len(found.labels) == 4 * 15
    assert len(found.site_logits) == 4 * 15 * 2
    assert set(np.unique(found.wells, return_counts=True)[1]) == {1, 2}
    assert scores(found, 1.0)["well_accuracy"] == 1
    assert outcome(Fixed(logits), PLATE, Cell(query=41), Draws()) is None


def test_the_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(96, 4)).astype(np.float32)
    labels = np.array([rng.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in truth])
    plate = replace(made_up_plate("V", classes=4, sites=2), wells=np.array([f"well {n}" for n in range(96)]), labels=labels,
                    controls=np.zeros(96, bool))  # fmt: skip
    own, sure = (temperature_of(Fixed(truth * factor), [plate]) for factor in (1, 3))
    assert sure == pytest.approx(3 * own, rel=1e-3)
    assert own == pytest.approx(1, abs=0.4)
    before = scores(outcome(Fixed(truth * 3), plate, DEFAULT, Draws()), sure)
    assert before["nll_before"] > before["nll"]


def test_a_run_is_validated_as_its_method_is_used(run: Run) -> None:
    plate = load_run_plates(run)[run.split.validation[0]]
    found = score_plate(load_network(run), run.method, plate, run.recipe, run.method.context)
    assert found.wells == len(np.unique(plate.wells[plate.treated]))
    assert found.images == len(plate.treated)
    with pytest.raises(ValueError, match="arm-bn is not evaluated with the context 'controls'"):
        score_plate(load_network(run), NETWORKS["arm-bn"], plate, run.recipe, "controls")
    bare = replace(plate, labels=np.full(len(plate.labels), -1))
    with pytest.raises(LayoutError, match="no treated well of a class"):
        score_plate(load_network(run), run.method, bare, run.recipe, "controls")


def test_the_nulls_find_intensity_where_it_tells_and_not_position() -> None:
    plates = {name: made_up_plate(name, seed=seed) for seed, name in enumerate("ABCD")}
    table = evaluate_nulls(Split(train=("A", "B"), validation=("C",), new_batch=("D",)), plates)
    accuracy = table.set_index("method")["well_accuracy"]
    assert accuracy["null: intensity"] > 0.95
    assert accuracy["null: intensity-relative"] > 0.95
    assert accuracy["null: position"] < 0.75
    assert 0.3 < accuracy["null: majority"] < 0.7


def test_the_position_null_knows_a_layout_that_plates_share() -> None:
    """A class by well that no smooth function of row and column tells, the same on every plate."""
    plates = []
    for seed in range(4):
        plate = made_up_plate(f"P{seed}", seed=seed)
        scattered = [int(hashlib.sha256(str(well).encode()).hexdigest(), 16) % 2 for well in plate.wells]
        plates.append(replace(plate, labels=np.where(plate.labels >= 0, scattered, -1)))
    position = next(null for null in fit_nulls(plates[:3]) if null.name == "position")
    rows = plates[3].treated
    logits = position.logits(plates[3], rows, np.array([], str))
    assert logits is not None
    assert (logits.argmax(axis=1) == plates[3].labels[rows]).mean() > 0.95


def test_the_majority_null_says_the_training_frequencies() -> None:
    train = made_up_plate("A", classes=3, controls=8)
    rare = replace(train, labels=np.where(train.labels == 2, -1, train.labels))
    plates = [rare, replace(train, plate="B")]  # 13 wells of classes 0 and 1 on each, 14 of class 2 on one
    majority = next(null for null in fit_nulls(plates) if null.name == "majority")
    found = np.exp(majority.logits(train, train.treated, CONTROLS))
    np.testing.assert_allclose(found, np.tile(np.array([26, 26, 14]) / 66, (40, 1)), atol=1e-6)


def test_the_null_that_needs_controls_is_left_out_where_there_are_none() -> None:
    names = {null.name for null in fit_nulls([made_up_plate("A", controls=0), made_up_plate("B", seed=1)])}
    assert names == {"majority", "position", "intensity"}


def test_context_rows_are_even_over_wells(run: Run) -> None:
    plate = load_run_plates(run)[run.split.train[0]]
    rows = context_rows(plate, 8)
    assert plate.controls[rows].all()
    assert len(set(plate.wells[rows])) == 8


def test_a_run_is_scored_on_every_test_plate_in_every_context(run: Run) -> None:
    table = evaluate_run(run.path)
    own = table[table["method"] == "cs-arm-bn"]
    assert set(own["context"]) == {"controls", "source"}
    assert set(own["setting"]) == set(run.split.tests())
    assert own["well_accuracy"].between(0, 1).all()
    assert len(own) == 2 * sum(len(plates) for plates in run.split.tests().values())
    controls = own[own["context"] == "controls"]
    for few in ("one_class_well_accuracy", "mixed_well_accuracy"):
        assert np.allclose(controls[few], controls["well_accuracy"]), "controls: who else is sent must not matter"
    text = markdown_table(summarise(table))
    assert "null: intensity-relative" in text
    assert text.count("\n") == 1 + len(table.groupby(["method", "context", "setting"]))


def test_a_panel_is_calibrated_by_statistics_of_controls_and_panel(run: Run) -> None:
    plates = load_run_plates(run)
    train, held_out = ([plates[name] for name in names] for names in (run.split.train, run.split.validation))
    held_out = [replace(p, labels=np.where(p.labels == NO_LABEL, NO_LABEL, p.labels % 4)) for p in held_out]  # two a class
    network = Ensemble([load_network(run)])
    found = calibrate(network, NETWORKS["cs-arm-bn-panel"], run.recipe, train, held_out, [run.split.train])
    panels = [panel_rows(plate, 1) for plate in train]
    assert all(len(rows) == len(run.classes) for rows in panels), "one site a well"
    assert found.training_statistics.source.sites == sum(
        len(context_rows(plate)) + len(rows) for plate, rows in zip(train, panels, strict=True)
    )


def test_calibration_describes_held_out_wells(run: Run) -> None:
    plates = load_run_plates(run)
    train, held_out = ([plates[name] for name in names] for names in (run.split.train, run.split.validation))
    found = calibrate(Ensemble([load_network(run)]), run.method, run.recipe, train, held_out, [run.split.train])
    reference = found.embedding_reference
    assert reference.class_centres.shape == (8, 32)
    assert reference.projection.shape[0] == 32
    assert reference.control_wells.tolist() == [1, 2, 4, 8]
    assert (reference.control_distances > 0).all()
    assert reference.class_distance > 0
    assert len(found.training_statistics.held_out_distances) == len(held_out)


def test_a_summary_averages_plates_not_wells() -> None:
    table = pd.DataFrame({
        "method": "m", "context": "c", "setting": "new_lab", "lab": "L", "batch": "1", "plate": ["A", "B"],
        "image_accuracy": [0.0, 1.0], "well_accuracy": [0.5, 1.0], "wells": [1, 99],
    })  # fmt: skip
    assert summarise(table)["well_accuracy"].item() == 0.75
