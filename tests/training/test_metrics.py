"""Every metric against scikit-learn or a number worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn

from tests.training.made_up import share_of_gap_closed
from training.metrics import (
    accuracy,
    brier,
    expected_calibration_error,
    macro_f1,
    nll,
    worst_batch,
)


def drawn(classes: int = 4, rows: int = 300):
    rng = np.random.default_rng(3)
    labels = rng.integers(classes, size=rows)
    probabilities = rng.dirichlet(np.ones(classes), rows) + np.eye(classes)[labels] * rng.random((rows, 1))
    return probabilities / probabilities.sum(1, keepdims=True), labels


def test_accuracy_f1_and_log_loss_are_scikit_learns():
    probabilities, labels = drawn()
    calls = probabilities.argmax(1)
    assert accuracy(probabilities, labels) == pytest.approx(sklearn.accuracy_score(labels, calls))
    assert macro_f1(probabilities, labels) == pytest.approx(sklearn.f1_score(labels, calls, average="macro"))
    assert nll(probabilities, labels) == pytest.approx(sklearn.log_loss(labels, probabilities))


def test_the_brier_score_is_scikit_learns():
    probabilities, labels = drawn()
    expected = sklearn.brier_score_loss(labels, probabilities, scale_by_half=False)
    assert brier(probabilities, labels) == pytest.approx(expected)
    assert brier(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx(2.0)


def test_macro_f1_is_over_the_classes_that_are_there():
    called = np.eye(3)[[0, 0, 1, 2]]
    found = macro_f1(called, np.array([0, 0, 1, 1]))
    assert found == pytest.approx((1.0 + 2 / 3) / 2), "class 2 was called and is not there"


def test_the_calibration_error_weighs_bins_by_their_wells():
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 0, 1, 1, 1])
    expected = (4 * abs(0.75 - 0.9) + 2 * abs(0.0 - 0.6)) / 6
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_bins_of_the_calibration_error_have_equal_widths():
    probabilities = np.array([[0.50, 0.5], [0.66, 0.34], [0.67, 0.33]])  # edges at 7/15 = 0.467, 8/15, …, 10/15 = 0.667
    labels = np.array([0, 1, 0])
    expected = (0.50 + 0.66 + 0.33) / 3
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_certain_and_right_is_perfectly_calibrated_and_uncertain_by_chance_is_too():
    labels = np.array([0, 1, 2, 3])
    assert expected_calibration_error(np.eye(4)[labels], labels) == 0
    assert expected_calibration_error(np.full((4, 4), 0.25), labels) == pytest.approx(0)


def test_an_impossible_label_costs_much_and_not_infinitely_much():
    assert nll(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx(-np.log(1e-12))


def test_the_worst_batch_is_the_one_whose_plates_fare_worst_on_average():
    cells = pd.DataFrame({
        "lab": ["L", "L", "L", "M"], "batch": ["1", "1", "2", "1"], "well_accuracy": [0.2, 1.0, 0.7, 0.9],
    })  # fmt: skip
    assert worst_batch(cells) == ("L/1", pytest.approx(0.6))


def test_the_share_of_the_gap_closed():
    assert share_of_gap_closed(0.9, 0.8, 1.0) == pytest.approx(0.5)
    assert share_of_gap_closed(0.7, 0.8, 1.0) == pytest.approx(-0.5)
    assert np.isnan(share_of_gap_closed(0.9, 1.0, 0.9))
