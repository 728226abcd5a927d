"""Statistics: bytes, identity, distance."""

import numpy as np
import pytest

from model.layout import PlaneKey
from model.statistics import (
    BatchNormStatistics,
    Prior,
    blended,
    canonical_json,
    log_variances,
    statistics_id,
    summarise_training,
)


def statistics(mean=0.0, variance=1.0, features=4):
    return BatchNormStatistics(
        np.full(features, mean, np.float32), np.full(features, variance, np.float32), sites=9, wells=3
    )


def test_bytes_read_back_as_the_same_values():
    values = np.random.default_rng(0).random(7, np.float32)
    written = BatchNormStatistics(values, values**2, sites=9, wells=3)
    read = BatchNormStatistics.from_bytes(written.to_bytes())
    assert read.to_bytes() == written.to_bytes()
    assert (read.sites, read.wells) == (9, 3)
    np.testing.assert_array_equal(read.mean, values)


@pytest.mark.parametrize(
    "data", [b"", b"ANCHSTAT", b"PICKLE" * 20, statistics().to_bytes()[:-4], statistics().to_bytes() + b"0000"]
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError, match=r"statistics|values|multiple"):
        BatchNormStatistics.from_bytes(data)


@pytest.mark.parametrize(
    ("mean", "variance"), [([0.0], [1.0, 1.0]), ([np.nan], [1.0]), ([0.0], [np.inf]), ([0.0], [-1.0]), ([[0.0]], [[1.0]])]
)
def test_what_cannot_be_statistics_is_refused(mean, variance):
    with pytest.raises(ValueError, match=r"vector|finite|negative"):
        BatchNormStatistics(np.array(mean, np.float32), np.array(variance, np.float32), sites=1, wells=1)


def test_distance_counts_spreads_and_percentile_counts_held_out_plates():
    plates = [statistics(mean, variance) for mean, variance in ((-1, np.exp(-1)), (1, np.exp(1)))]
    held_out = [statistics(mean, 1.0) for mean in (3.0, 1.0, 2.0)]
    training = summarise_training(plates, statistics(), held_out)
    assert training.distance(statistics(0, 1)) == pytest.approx(0, abs=1e-6)
    assert training.distance(statistics(2, 1)) == pytest.approx(np.sqrt(2), rel=1e-6)
    assert list(training.held_out_distances) == sorted(training.held_out_distances)
    middle = training.distance(statistics(2, 1))
    assert training.percentile(middle) == pytest.approx(200 / 3)
    assert training.percentile(0) == 0
    assert training.out_of_range_distance == pytest.approx(1.5 * training.distance(statistics(3, 1)))


def test_a_feature_that_hardly_moved_in_training_cannot_rule_alone():
    means = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    means[:, 0] = 0
    ones = np.ones(10, np.float32)
    training = summarise_training(
        [BatchNormStatistics(mean, ones, sites=1, wells=1) for mean in means],
        statistics(features=10),
        [statistics(features=10)],
    )
    assert training.mean_spread[0] == pytest.approx(0.1 * float(np.median(means.std(0))))


def test_log_variances_have_a_floor():
    assert log_variances(statistics(0, 0.0))[0] == pytest.approx(np.log(1e-6))


BASE = {
    "bundle_digest": "b",
    "recipe": {"size": 8, "scaling": "percentile-8bit"},
    "pixel_size_um": None,
    "context": "controls",
    "precision": "fp32",
    "planes": [(PlaneKey("A01", 1, "DNA"), "x"), (PlaneKey("A01", 2, "DNA"), "y")],
}


def test_statistics_are_named_by_everything_that_made_them_and_by_no_order():
    name = statistics_id(**BASE)
    assert (
        statistics_id(**{**BASE, "planes": BASE["planes"][::-1], "recipe": dict(reversed(BASE["recipe"].items()))}) == name
    )
    others = [
        {"bundle_digest": "c"},
        {"recipe": {"size": 9, "scaling": "percentile-8bit"}},
        {"pixel_size_um": 0.6},
        {"context": "panel"},
        {"precision": "fp16"},
        {"planes": BASE["planes"][:1]},
        {"planes": [(PlaneKey("A01", 1, "DNA"), "y"), (PlaneKey("A01", 2, "DNA"), "x")]},
        {"panel": ("A01",)},
        {"blend_wells": 1},
        {"blend_wells": 2},
    ]
    assert len({name, *(statistics_id(**{**BASE, **other}) for other in others)}) == len(others) + 1


def test_plain_statistics_keep_the_names_that_they_had_before_there_were_blends_and_panels():
    assert statistics_id(**BASE) == "0f1f2ab6194364f6a50df9090da29824f486cd2381dcb8aaeea4dcbe974c04ce"


def test_a_blend_is_the_mixture_of_samples():
    rng = np.random.default_rng(2)
    measured, prior = rng.normal(1.0, 2.0, (3_000, 5)), rng.normal(-2.0, 0.5, (1_000, 5))
    mean, variance = blended(measured.mean(0), measured.var(0), prior.mean(0), prior.var(0), np.full(5, 0.25))
    both = np.concatenate([measured, prior])  # a quarter of which is the prior's
    np.testing.assert_allclose(mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, both.var(0), rtol=1e-12)
    assert variance.min() > 1.2 * (0.75 * measured.var(0) + 0.25 * prior.var(0)).max(), "the term between counts"


def test_a_prior_weighs_n_against_the_control_wells_and_none_weighs_nothing():
    plates = [statistics(mean, 1.0) for mean in (0.0, 1.0)]
    wells = np.array([0.5, 1.0, 3.0, 8.0], np.float32)
    training = summarise_training(plates, statistics(7.0, 2.0), plates, wells)
    prior = training.prior(2)
    np.testing.assert_allclose(prior.weight, [0.2, 1 / 3, 0.6, 0.8], rtol=1e-6)
    assert prior.share == pytest.approx((0.2 + 1 / 3 + 0.6 + 0.8) / 4)
    assert (prior.mean[0], prior.variance[0]) == (7.0, 2.0)
    assert training.prior(0).weight.tolist() == [1.0] * 4, "no control at all leaves the prior"
    none, values = Prior.none(4), np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) ** 2
    for found, expected in zip(blended(*values, none.mean, none.variance, none.weight), values, strict=True):
        assert found.tobytes() == expected.tobytes()


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1.5, "µ"]}) == '{"a":[1.5,"µ"],"b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
