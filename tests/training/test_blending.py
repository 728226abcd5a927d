"""N: recovered where it is known, whatever the number of plates, and not by a few odd features."""

import numpy as np
import pytest

from model.errors import LayoutError
from model.statistics import BatchNormStatistics
from training.blending import FEWEST_WELLS, MOST_WELLS, ControlWells, blend_wells

FEATURES = 400
LAYERS = (slice(0, 100), slice(100, FEATURES))


def statistics(first, second) -> BatchNormStatistics:
    """Statistics with raw moments E[x], E[x²]."""
    mean = first.astype(np.float32)
    return BatchNormStatistics(mean, (second - mean.astype(np.float64) ** 2).astype(np.float32), sites=2, wells=1)


def plates_of(wells_worth, plates=12, wells=8, seed=0):
    """Plates of random effects: wells vary by 1 in either raw moment, plates by 1 / N."""
    rng = np.random.default_rng(seed)
    spread = np.sqrt(1 / np.asarray(wells_worth, float))
    scale = rng.lognormal(0, 2, FEATURES)  # features are not alike in size
    found = []
    for _ in range(plates):
        plate = [rng.normal(size=FEATURES) * spread for _ in range(2)]
        drawn = [[effect + rng.normal(size=FEATURES) for effect in plate] for _ in range(wells)]
        moments = [(0.01 * first * scale, (500 + second) * scale**2) for first, second in drawn]
        whole = [np.mean([well[moment] for well in moments], axis=0) for moment in range(2)]
        found.append(ControlWells(statistics(*whole), [statistics(*well) for well in moments]))
    return found


def worth(first, second):
    """N by feature: one value a layer."""
    return np.concatenate([np.full(100, first, float), np.full(300, second, float)])


@pytest.mark.parametrize(("plates", "wells"), [(4, 4), (12, 8), (40, 16)])
def test_the_true_number_of_wells_is_found_layer_by_layer(plates, wells):
    found = [blend_wells(plates_of(worth(0.5, 4.0), plates, wells, seed), LAYERS) for seed in range(20)]
    assert all(len(set(one[layer])) == 1 for one in found for layer in LAYERS)
    assert np.median([one[0] for one in found]) == pytest.approx(0.5, rel=0.1)
    assert np.median([one[-1] for one in found]) == pytest.approx(4.0, rel=0.1)


def test_the_weight_that_follows_is_the_one_that_misses_the_truth_least():
    """Against brute force: new plates' true moments, guessed from few wells and the training plates' mean."""
    truth = 2.0
    (wells_worth,) = set(blend_wells(plates_of(worth(truth, truth), plates=30), (slice(0, FEATURES),)))
    rng = np.random.default_rng(9)
    plates = rng.normal(0, np.sqrt(1 / truth), 200_000)
    for wells in (1, 3):
        measured = plates + rng.normal(0, np.sqrt(1 / wells), plates.size)
        errors = {weight: np.mean(((1 - weight) * measured - plates) ** 2) for weight in np.linspace(0, 1, 101)}
        found = np.mean(((1 - wells_worth / (wells_worth + wells)) * measured - plates) ** 2)
        assert found <= 1.01 * min(errors.values())


def test_odd_features_and_dead_ones_do_not_move_a_layers_number():
    plain = plates_of(worth(1.0, 1.0), plates=16)
    factor, dead = np.ones(FEATURES), np.zeros(FEATURES, bool)
    factor[:30], dead[200:220] = 50.0, True

    def changed(one, number):
        mean = np.where(dead, 0.0, one.mean * (1 + (factor - 1) * number))
        return BatchNormStatistics(mean.astype(np.float32), np.where(dead, 0, one.variance), sites=2, wells=1)

    odd = [
        ControlWells(changed(plate.whole, number), [changed(well, number) for well in plate.wells])
        for number, plate in enumerate(plain)
    ]
    expected, found = (blend_wells(plates, LAYERS)[0] for plates in (plain, odd))
    assert found == pytest.approx(expected, rel=0.4)
    assert blend_wells(odd, (slice(200, 220), *LAYERS))[0] == pytest.approx(found)
    assert blend_wells(odd, (*LAYERS, slice(200, 220)))[210] == MOST_WELLS, "a dead layer says nothing: the prior is as good"


def test_plates_that_do_not_differ_or_differ_in_everything_stay_within_bounds():
    assert set(blend_wells(plates_of(worth(1e9, 1e9), plates=60), (slice(0, FEATURES),))) == {np.float32(MOST_WELLS)}
    assert set(blend_wells(plates_of(worth(0.02, 0.02)), LAYERS)) == {np.float32(FEWEST_WELLS)}


@pytest.mark.parametrize(("plates", "wells"), [(1, 8), (6, 1)])
def test_what_cannot_be_told_is_refused(plates, wells):
    with pytest.raises(LayoutError, match="two plates are needed, and two control wells"):
        blend_wells(plates_of(worth(1, 1), plates, wells), LAYERS)
