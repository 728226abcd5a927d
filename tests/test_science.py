"""The figures of the simulated grid, from cells made by hand; and the grid file itself."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.science import GRID, Figures, pattern
from tests.training.made_up import Plate, row
from training.grid import read_grid
from training.methods import NETWORKS

PLATES = [Plate(setting, lab, f"{lab}b", f"{lab}b{n}", 0.0) for setting, lab in (("in_domain", "L1"), ("new_lab", "L2"))
          for n in range(3)]  # fmt: skip
BY_WELLS = {1: 0.5, 2: 0.66, 4: 0.65, 8: 0.8}


def made(ours_one_class: float = 0.85) -> pd.DataFrame:
    rows = []
    for plate in PLATES:
        home = plate.setting == "in_domain"
        rows += [row(("erm", "source"), plate, 1, 0.9 if home else 0.4)]
        for way, mixed, one_class, single in (
            (("cs-arm-bn", "controls"), 0.85, ours_one_class, 0.85),
            (("arm-bn", "treated"), 0.84, 0.2, 0.3),
        ):
            rows += [row(way, plate, 1, 0.85), row(way, plate, 1, mixed, query_wells=8)]
            rows += [row(way, plate, 1, one_class, query_wells=8, alpha=0.0), row(way, plate, 1, single, query_wells=1)]
        for wells, accuracy in BY_WELLS.items():
            rows += [row(("cs-arm-bn", "controls"), plate, 1, accuracy, controls=wells)]
            rows += [row(("cs-arm-bn", "controls"), plate, 1, accuracy + 0.05, controls=wells, blended=True)]
    return pd.DataFrame(rows)


def test_the_pattern_is_read_off_the_cells() -> None:
    bars = {bar.name: bar for bar in pattern(Figures(made()))}
    values = {name: round(bar.value, 6) for name, bar in bars.items()}
    assert values == {
        "erm_in_domain": 0.9,
        "cs_arm_bn_in_domain": 0.85,
        "erm_loss_in_domain_to_new_lab": 50.0,
        "cs_arm_bn_over_erm_new_lab": 45.0,
        "cs_arm_bn_share_of_loss_closed": 0.9,
        "cs_arm_bn_one_class_drop": 0.0,
        "cs_arm_bn_single_well_drop": 0.0,
        "arm_bn_one_class_drop": 64.0,
        "arm_bn_single_well_drop": 55.0,
        "largest_fall_with_more_control_wells": 1.0,
        "blended_1_over_unadapted": 15.0,
        "blended_1_over_plain": 5.0,
        "blended_2_over_unadapted": 31.0,
        "blended_2_over_plain": 5.0,
    }
    assert all(bar.holds is not False for bar in bars.values())


def test_a_method_that_falls_with_one_class_fails_its_bar() -> None:
    bars = {bar.name: bar for bar in pattern(Figures(made(ours_one_class=0.7)))}
    assert bars["cs_arm_bn_one_class_drop"].value == pytest.approx(15)
    assert bars["cs_arm_bn_one_class_drop"].holds is False


def test_the_grid_trains_every_network_with_one_budget_and_holds_every_figure() -> None:
    grid = read_grid(GRID)
    assert {way.network for way in grid.ways} == set(NETWORKS)
    configs = [grid.config(grid.seeds[0], method) for method in NETWORKS.values()]
    assert len({replace(config, method="erm", context="controls", stop_gradient=False) for config in configs}) == 1
    assert len({asked.test_lab for asked in grid.seeds}) == len(grid.seeds) == 3
    cells = {(cell.controls, cell.query, cell.alpha) for cell in grid.every_cell}
    assert {(1, -1, math.inf), (2, -1, math.inf), (-1, 1, math.inf), (-1, 8, math.inf), (-1, 8, 0.0)} <= cells
