"""The reports of measuring scripts say what the numbers say."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from benchmarks import real_images, train_profile
from benchmarks.bars import Bar, conclude, table, write_bars
from benchmarks.first_light import LABS, bars, by_split, headline, measures, resampled
from examples.small import fetched_plates
from model.images import ImageRecipe
from training.plates import open_plates, plates_recipe
from training.simulate import CHANNELS, SimulationPlan

WAYS = (
    ("erm", "source"), ("cs-arm-bn", "controls"), ("cs-arm-bn", "source"), ("arm-bn", "treated"),
    ("instancenorm", "instance"), ("erm-zscore", "source"), ("erm-zscore-raw", "source"), ("erm", "controls"),
)  # fmt: skip


def made_up(ours: float, instancenorm: float) -> pd.DataFrame:
    """Scores in which ERM falls from 0.9 to 0.5 on a new lab, and ARM-BN loses 0.2 with one class."""
    rng = np.random.default_rng(0)
    new_lab = {"cs-arm-bn": ours, "instancenorm": instancenorm}
    return pd.DataFrame([
        {"seed": seed, "test_lab": lab, "plate": f"{lab}{setting}{plate}", "setting": setting, "method": method,
         "context": context, "image_accuracy": level, "well_accuracy": level + rng.normal(0, 0.01),
         "mixed_well_accuracy": level, "one_class_well_accuracy": level - 0.2 * (method == "arm-bn")}
        for seed in (1, 2) for lab in LABS for method, context in WAYS
        for setting, plates in (("in_domain", 2), ("new_batch", 2), ("new_lab", 3))
        for level in [new_lab.get(method, 0.5) if setting == "new_lab" else 0.9] for plate in range(plates)
    ])  # fmt: skip


def test_the_measures_are_what_the_scores_were_made_with() -> None:
    found = measures(made_up(ours=0.86, instancenorm=0.7))
    assert found["erm_loss_in_domain_to_new_lab"] == pytest.approx(40, abs=2)
    assert found["cs_arm_bn_share_of_loss_closed"] == pytest.approx(0.9, abs=0.05)
    assert found["cs_arm_bn_share_of_way_to_its_own_in_domain"] == pytest.approx(0.9, abs=0.05)
    assert found["cs_arm_bn_one_class_drop"] == pytest.approx(0)
    assert found["arm_bn_one_class_drop"] == pytest.approx(20)
    assert found["cs_arm_bn_over_instancenorm"] == pytest.approx(16, abs=2)
    assert found["cs_arm_bn_over_adabn_erm"] == pytest.approx(36, abs=2)


def test_the_headline_says_beaten_only_when_the_interval_does() -> None:
    clear, close = made_up(ours=0.86, instancenorm=0.7), made_up(ours=0.70, instancenorm=0.70)
    assert "beats InstanceNorm, z-score + ERM, raw z-score + ERM, AdaBN of ERM on" in headline(resampled(clear, draws=40), 6)
    assert "does NOT clearly beat InstanceNorm on" in headline(resampled(close, draws=40), 6)


def test_every_bound_has_a_row_and_every_split_a_line() -> None:
    scores = made_up(ours=0.86, instancenorm=0.7)
    rows = bars(scores, resampled(scores, draws=20))
    assert [row.holds for row in rows[:9]] == [True] * 9
    assert {f"well_accuracy_{m}_{c}_new_lab" for m, c in WAYS} <= {row.name for row in rows}
    assert by_split(scores).count("\n") == 1 + 6


def test_bars_are_written_with_their_bounds_and_say_whether_they_hold(tmp_path: Path) -> None:
    rows = [Bar("a", 2.0, "s", at_most=1.0), Bar("b", 0.9, "", at_least=0.8, interval=(0.7, 1.0)), Bar("c", 3.0, "")]
    write_bars(rows, tmp_path / "bars.json")
    assert json.loads((tmp_path / "bars.json").read_text()) == [
        {"name": "a", "value": 2.0, "unit": "s", "at_most": 1.0},
        {"name": "b", "value": 0.9, "unit": "", "at_least": 0.8},
        {"name": "c", "value": 3.0, "unit": ""},
    ]
    lines = table(rows).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["FAILS", "holds", ""]


def test_a_run_ends_badly_where_a_bar_does_not_hold_once_all_are_written(tmp_path: Path) -> None:
    conclude([Bar("b", 0.9, "", at_least=0.8), Bar("c", 3.0, "")], tmp_path / "good.json")
    with pytest.raises(SystemExit) as ended:
        conclude([Bar("b", 0.9, "", at_least=0.8), Bar("a", 2.0, "s", at_most=1.0)], tmp_path / "bad.json")
    assert ended.value.code == 1
    assert len(json.loads((tmp_path / "bad.json").read_text())) == 2


def drawn_fields() -> dict[tuple[str, int], NDArray[np.float32]]:
    """Fields of four rows whose GFP moves into the nuclei and grows dimmer as the column rises."""
    y, x = np.mgrid[:160, :160] % 40 - 20
    cell, nucleus = (x**2 + y**2 < 15**2), (x**2 + y**2 < 6**2)
    return {
        (row, column): np.stack([
            np.where(nucleus, 20 + 8 * column, 20 + 100 * cell) - 2.0 * column, np.where(nucleus, 150.0, 5.0)
        ]).astype(np.float32)
        for row in real_images.ROWS for column in real_images.COLUMNS
    }  # fmt: skip


def test_measures_without_a_network_take_their_sign_from_the_training_rows() -> None:
    found = real_images.without_network(drawn_fields(), "AD", [0])
    assert set(found["images"]) == {"as taken", "degraded"}
    assert found[found["images"] == "as taken"]["rho"].to_list() == pytest.approx([1.0] * 4)


def test_another_microscope_is_outside_the_training_ones_and_keeps_all_light_positive() -> None:
    field = np.full((2, 64, 64), 50, np.float32)
    for row, seed in itertools.product(real_images.ROWS, range(5)):
        microscope = real_images.unseen_microscope(row, seed)
        noiseless = replace(microscope, noise=(0.0, 0.0)).photograph(field, 1)
        assert all((noiseless[c] > microscope.offset[c]).all() for c in range(2))
    assert any(
        max(real_images.unseen_microscope(row, seed).gain) > real_images.TRAINING.gain[1]
        for row, seed in itertools.product(real_images.ROWS, range(5))
    )


def test_each_row_and_seed_is_scored_by_rank_and_by_its_trained_columns() -> None:
    columns = [2, *real_images.DOSES, 12]
    answers = pd.DataFrame([
        {"training": "plain", "images": "as taken", "method": "erm", "adapted": adapted, "row": "A", "seed": 0,
         "column": column, "p": column / 13 if adapted else 0.9 - column / 100}
        for adapted in (True, False) for column in columns
    ])  # fmt: skip
    scores = real_images.scored(answers).set_index("adapted")
    assert scores["rho"].to_dict() == pytest.approx({True: 1.0, False: -1.0})
    assert scores["negative_called"].to_dict() == {True: 1.0, False: 0.0}
    assert "1.00 (1.00 to 1.00)" in real_images.by_row(scores.reset_index())


def test_a_steps_time_is_divided_without_the_first_steps() -> None:
    clock = train_profile.Clock()
    clock.recorded_durations = {
        "[Strategy]One.backward": [9.0, 9.0, 1.0, 2.0, 7.0], "[Strategy]One.training_step": [9.0, 9.0, 1.0, 1.0, 7.0]
    }  # fmt: skip
    assert clock.seconds("One.backward", 4) == 1.5
    inline = train_profile.Shares(step_s=2.0, forward_s=0.5, backward_s=1.3, optimiser_s=0.1, waiting_s=0.05)
    starved = replace(inline, step_s=3.0, waiting_s=1.2)
    rows = {bar.name: bar for bar in train_profile.share_bars("net", inline, starved)}
    assert rows["train_net_computing_share"].value == pytest.approx(0.9)
    assert rows["train_net_computing_share"].holds
    assert rows["train_net_worker_waiting_share"].value == pytest.approx(0.4)
    assert rows["train_net_worker_waiting_share"].holds is False


def test_a_profiled_plate_has_controls_and_every_class() -> None:
    plate = train_profile.simulated_plate(1, treated=16, controls=4)
    assert plate.controls.sum() == 4
    assert set(plate.labels[plate.treated]) == set(range(train_profile.CLASSES))
    assert len(set(plate.wells)) == len(plate.wells) == 20


def test_simulated_plates_are_made_and_fetched_once_for_every_recipe(tmp_path: Path) -> None:
    plan = SimulationPlan(labs=1, batches=1, plates=1, sites=1, size_px=48, wells_per_class=0, inactive_wells=0)
    sizes = {tmp_path / "small": 16, tmp_path / "large": 24}
    recipes = {folder: ImageRecipe(channels=CHANNELS, size=size) for folder, size in sizes.items()}
    fetched_plates(plan, tmp_path / "data", recipes, workers=1)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    fetched_plates(plan, tmp_path / "data", recipes, workers=1)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for folder, size in sizes.items():
        assert plates_recipe(folder).size == size
        assert len(open_plates(folder)["SIM01B01P01"].wells) == 16
