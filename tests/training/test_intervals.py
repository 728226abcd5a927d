"""Intervals over plates: what is drawn, how differences are paired, and how often the truth is covered."""

import numpy as np
import pandas as pd
import pytest

from training.intervals import Estimate, Resamples, expanded_tails


def scored(values: np.ndarray, seeds: int = 1, lab: str = "L") -> pd.DataFrame:
    """Values (batches, plates) as rows, the same for every seed."""
    return pd.DataFrame([
        {"seed": seed, "lab": lab, "batch": f"B{b}", "plate": f"B{b}P{p}", "score": value}
        for seed in range(seeds) for (b, p), value in np.ndenumerate(values)
    ])  # fmt: skip


@pytest.mark.parametrize(("batches", "plates", "between", "least"), [(6, 3, 1.0, 0.90), (1, 10, 0.0, 0.90)])
def test_a_95_percent_interval_covers_the_truth_about_that_often(
    batches: int, plates: int, between: float, least: float
) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for number in range(150):
        values = rng.normal(0, between, (batches, 1)) + rng.normal(0, 1, (batches, plates))
        low, high = Resamples(draws=400, seed=number).mean(scored(values), "score").interval or (np.nan, np.nan)
        covered.append(low <= 0 <= high)
    assert least <= np.mean(covered) <= 0.995


def test_batches_are_drawn_whole_so_that_many_plates_of_few_batches_are_not_many() -> None:
    values = np.repeat([[0.2], [0.5], [0.8]], 40, axis=1)
    found = Resamples().mean(scored(values), "score")
    assert found.members == 3
    assert found.value == pytest.approx(0.5)
    assert found.draws.std() == pytest.approx(np.std([0.2, 0.5, 0.8]) / np.sqrt(3), rel=0.05)


def test_labs_are_drawn_before_batches_and_batches_before_plates() -> None:
    table = pd.concat([scored(np.zeros((2, 2)), lab="A"), scored(np.ones((2, 2)), lab="B")])
    draws = Resamples().mean(table, "score").draws
    assert np.mean(draws == 0) == pytest.approx(0.25, abs=0.03)
    assert np.mean(draws == 1) == pytest.approx(0.25, abs=0.03)


def test_a_difference_of_methods_is_paired_over_plates() -> None:
    rng = np.random.default_rng(0)
    plates = rng.normal(0.7, 0.1, (4, 5))
    draws = Resamples()
    one, other = (draws.mean(scored(plates + gain + rng.normal(0, 0.001, plates.shape)), "score") for gain in (0.1, 0.0))
    low, high = (one - other).interval or (np.nan, np.nan)
    assert low == pytest.approx(0.1, abs=0.005)
    assert high == pytest.approx(0.1, abs=0.005)
    assert one.interval is not None
    assert one.interval[1] - one.interval[0] > 0.02


def test_seeds_are_drawn_beside_plates_and_one_seed_is_never_absent() -> None:
    same = scored(np.full((1, 3), 0.5), seeds=2)
    table = same.assign(score=same["score"] + 0.2 * same["seed"])
    draws = Resamples()
    assert set(np.round(draws.mean(table, "score").draws, 6)) == {0.5, 0.6, 0.7}
    assert draws.mean(table[table["seed"] == 1], "score").draws == pytest.approx(0.7)


def test_seeds_that_have_plates_of_their_own_are_not_drawn_apart_from_these() -> None:
    """Each seed leaves out another lab: no draw may take one's seed and the other's plates, and so have nothing."""
    one, other = (
        scored(np.full((1, 2), level), lab=lab).assign(seed=seed) for level, lab, seed in ((0.0, "A", 1), (1.0, "B", 2))
    )
    draws = Resamples().mean(pd.concat([one, other]), "score").draws
    assert set(draws) == {0.0, 0.5, 1.0}
    assert np.mean(draws == 0.5) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("own_plates", [True, False])
def test_intervals_cover_what_training_anew_changes(own_plates: bool) -> None:
    """Five seeds that differ more than plates do, on plates of their own or on the same ones."""
    rng = np.random.default_rng(3)
    covered = []
    for number in range(100):
        tables = [
            scored(
                rng.normal(0, 1) + rng.normal(0, 0.2, (4, 3)), lab=f"L{seed}" if own_plates else "L"
            ).assign(seed=seed)
            for seed in range(5)
        ]  # fmt: skip
        low, high = Resamples(draws=400, seed=number).mean(pd.concat(tables), "score").interval or (np.nan, np.nan)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.88


def test_a_seed_counts_alike_on_plates_that_other_seeds_scored_too() -> None:
    """Plates of three seeds, of two and of one: when a seed is drawn twice, it is on all of them."""
    patterns = {"A": (1, 2, 3), "B": (1, 2), "C": (1, 3), "D": (2, 3)}
    rows = [scored(np.full((1, 1), float(seed)), lab=lab).assign(seed=seed) for lab, own in patterns.items() for seed in own]
    draws = Resamples(draws=4000).mean(pd.concat(rows), "score").draws
    assert np.mean(draws == 1) == pytest.approx(1 / 27, abs=0.05)
    assert draws.std() > 0.4, "seeds drawn apart for each of the four would average out"


def test_a_ratio_of_sums_weighs_plates_by_their_rows() -> None:
    table = scored(np.array([[0.0, 1.0]]))
    wells = np.array([1.0, 3.0])
    found = Resamples().ratio(table, table["score"].to_numpy() * wells, wells)
    assert found.value == 0.75
    assert set(found.draws) == {0.0, 0.75, 1.0}


def test_what_does_not_vary_has_no_interval() -> None:
    assert Resamples().mean(scored(np.array([[0.5]])), "score").interval is None
    nothing = Resamples().mean(scored(np.full((2, 2), np.nan)), "score")
    assert np.isnan(nothing.value)
    assert nothing.interval is None


def test_a_share_of_nothing_is_undefined() -> None:
    gain = Estimate(0.1, np.full(100, 0.1), 9)
    assert gain.share_of(Estimate(0.2, np.full(100, 0.2), 9)).interval == pytest.approx((0.5, 0.5))
    unsure = gain.share_of(Estimate(0.2, np.where(np.arange(100) < 10, -0.1, 0.2), 9))
    assert np.isnan(unsure.value), "ERM may have lost nothing"
    assert unsure.interval is None
    assert np.isnan(gain.share_of(Estimate(-0.1, np.full(100, -0.1), 9)).value)
    rounding = gain.share_of(Estimate(0.2, np.where(np.arange(100) < 3, 1e-17, 0.2), 3))
    assert np.isnan(rounding.value), "in some draws it lost nothing, which three members may not show more often"
    assert not (np.abs(rounding.draws) > 10).any()


def test_tails_are_wider_for_few_plates_and_plain_for_many() -> None:
    assert expanded_tails(10_000)[0] == pytest.approx(0.025, abs=1e-4)
    assert expanded_tails(4)[0] < 0.001 < expanded_tails(12)[0] < 0.025
