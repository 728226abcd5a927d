"""Plots: what is ordered, named and moved apart before it is drawn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import plots


def test_a_method_looks_the_same_in_every_plot_and_unlike_any_other() -> None:
    methods = [(f"method-{number}", "source") for number in range(14)]
    ways = (("erm", "source"), *methods, ("cs-arm-bn", "controls"), ("null: majority", "-"), ("null: position", "-"))
    palette = plots.Palette(ways)
    looks = [(palette.colour(way), palette.marker(way)) for way in ways[:-2]]
    assert len(set(looks)) == len(looks)
    assert palette.colour(("erm", "source")) == plots.INK
    assert {palette.colour(way) for way in ways[-2:]} == {plots.QUIET}
    assert palette.colour(("cs-arm-bn", "controls")) == plots.COLOURS[0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_do_not_touch(values: list[float], step: float) -> None:
    moved = plots.spread(values, step)
    assert (np.diff(np.sort(moved)) >= step * (1 - 1e-6)).all()
    assert (np.diff(moved[np.argsort(values, kind="stable")]) > 0).all()
    assert moved.mean() == pytest.approx(np.mean(values), abs=1e-9)


def test_labels_far_apart_stay_where_they_are() -> None:
    assert plots.spread([0.9, 0.1, 0.5], 0.1).tolist() == [0.9, 0.1, 0.5]


def test_axes_run_from_little_to_much() -> None:
    assert plots.order("controls", [-1, 8, 0, 2]) == [0, 2, 8, -1]
    assert plots.order("alpha", [0.0, math.inf, 0.01, 1.0]) == [math.inf, 1.0, 0.01, 0.0]
    assert [plots.tick("alpha", x) for x in (math.inf, 0.01, 0.0)] == ["none", "0.01", "one class"]
    assert [plots.tick("query_wells", x) for x in (-1, 4)] == ["all", "4"]
