"""Logits to answers, with numbers that can be checked in the head."""

import numpy as np
import pytest

from model.predictions import (
    ControlCentre,
    EmbeddingReference,
    classify_well,
    mean_of_wells,
    site_probabilities,
    softmax,
    well_probabilities,
    whitened_distance,
)

REFERENCE = EmbeddingReference(
    projection=np.diag([1.0, 2.0]).astype(np.float32),
    class_centres=np.array([[0, 0], [10, 0]], np.float32),
    control_wells=np.array([4, 8]),
    control_distances=np.array([1.0, 0.25]),
    class_distance=3.0,
)


def answer(logits, embeddings, centre=None, temperature=1.0, wells=4):
    """One well's answer, of one member: (sites, classes)."""
    given = (np.array(logits, np.float32)[:, None], np.array(embeddings, np.float32))
    centre = None if centre is None else ControlCentre(np.array(centre, np.float32), wells)
    return classify_well("A01", *given, ("a", "b"), temperature, REFERENCE, centre)


def test_softmax_is_stable_and_takes_a_temperature():
    logits = np.array([[1e4, 0], [0, np.log(3)]], np.float32)
    np.testing.assert_allclose(softmax(logits), [[1, 0], [0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(softmax(logits[1:], 2.0), [[1, 3**0.5] / (1 + 3**0.5 * np.ones(2))], rtol=1e-6)


def test_a_well_is_the_mean_of_its_sites_probabilities():
    told = answer([[0, np.log(3)], [0, 0]], [[1, 0], [3, 0]])
    assert told.label == "b"
    assert told.probability == pytest.approx(0.625)
    assert told.probabilities == pytest.approx((0.375, 0.625))
    assert told.entropy == pytest.approx(-(0.375 * np.log(0.375) + 0.625 * np.log(0.625)))
    assert told.spread == pytest.approx(0.125)
    assert (told.sites, told.distance_to_controls, told.resembles_controls) == (2, None, None)
    assert told.distance_to_class == pytest.approx(2)


def logits_of(probabilities):
    return np.log(np.array(probabilities)).astype(np.float32)


def test_members_are_averaged_in_probability_and_spread_is_over_sites_of_their_mean():
    sites = [[[0.9, 0.1], [0.5, 0.5]], [[0.4, 0.6], [0.2, 0.8]]]  # (sites, members, classes)
    np.testing.assert_allclose(site_probabilities(logits_of(sites)), [[0.7, 0.3], [0.3, 0.7]], rtol=1e-6)
    told = classify_well("A01", logits_of(sites), np.zeros((2, 2), np.float32), ("a", "b"), 1.0, REFERENCE, None)
    assert told.probabilities == pytest.approx((0.5, 0.5))
    assert (told.spread, told.sites) == (pytest.approx(0.2), 2)


def test_temperature_is_applied_to_each_member_before_they_are_averaged():
    sites = np.array([[[0.0, 4.0], [4.0, 0.0], [0.0, 4.0]]], np.float32)
    cooled = 1 / (1 + np.exp(-4.0 / 2.0))
    np.testing.assert_allclose(site_probabilities(sites, 2.0)[0, 1], (2 * cooled + 1 - cooled) / 3, rtol=1e-6)


def test_wells_are_means_over_their_sites_in_whatever_order_these_come():
    sites = logits_of([[[0.9, 0.1]], [[0.2, 0.8]], [[0.5, 0.5]]])
    found = well_probabilities(sites, np.array([1, 0, 1]), 2)
    np.testing.assert_allclose(found, [[0.2, 0.8], [0.7, 0.3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("embedding", "resembles", "out_of_range"),
    [([0, 5], False, True), ([5.5, 0], True, False), ([10, 1], False, False), ([5, 0.6], False, True)],
)
def test_a_well_is_out_of_range_when_it_is_like_nothing_seen(embedding, resembles, out_of_range):
    told = answer([[0, 0]], [embedding], centre=[5, 0])
    assert (told.resembles_controls, told.out_of_range) == (resembles, out_of_range)


@pytest.mark.parametrize(("wells", "resembles"), [(1, True), (4, True), (7, True), (8, False), (30, False)])
def test_the_more_control_wells_the_nearer_a_well_must_lie_to_resemble_them(wells, resembles):
    assert answer([[0, 0]], [[5.5, 0]], centre=[5, 0], wells=wells).resembles_controls is resembles


def test_distances_are_whitened():
    assert whitened_distance(np.array([3, 2], np.float32), np.zeros(2, np.float32), REFERENCE) == pytest.approx(5)


def test_every_well_counts_once_whatever_its_sites():
    embeddings = np.array([[0, 0], [2, 0], [4, 8]], np.float32)
    np.testing.assert_allclose(mean_of_wells(["A01", "A01", "B01"], embeddings), [2.5, 4])
