"""The MitoCheck comparison: no date trains and is tested, and its figures say what the answers say."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import mitocheck
from training.intervals import Resamples


def made_up() -> pd.DataFrame:
    """Answers in which ERM is right on two crops of three, and ARM-BN never where a plate is one-sided."""
    ways = (*mitocheck.WAYS, *mitocheck.NULLS)
    rows = [
        {"way": way, "truth": crop % 2, "called": crop % 2 if right else 2, "seed": seed, "one_sided": plate == 0,
         "lab": "M", "batch": f"d{date}", "plate": f"d{date}p{plate}"}
        for way, date, plate, crop, seed in itertools.product(ways, range(3), range(2), range(6), range(2))
        for right in [crop < 4 if way != "arm-bn treated" else plate == 1]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_figures_are_those_of_the_answers() -> None:
    bars = {bar.name: bar.value for bar in mitocheck.figures(made_up())}
    assert bars["crop_accuracy_erm_source"] == pytest.approx(2 / 3)
    assert bars["mean_class_recall_erm_source"] == pytest.approx(2 / 3)
    assert bars["arm-bn_treated_over_erm"] == pytest.approx(0.5 - 2 / 3)
    assert bars["arm-bn_treated_over_erm_on_one_sided_plates"] == pytest.approx(-2 / 3)
    assert bars["arm-bn_treated_over_erm_on_other_plates"] == pytest.approx(1 / 3)
    assert {"crop_accuracy_null-intensity", "crop_accuracy_oracle-plates_commonest_class"} <= set(bars)


def test_rare_classes_weigh_as_much_as_common_ones() -> None:
    answers = made_up()
    answers = answers[answers["way"] == "erm source"]
    rare = answers.assign(truth=np.where(answers.index % 12 == 0, 3, 0), called=0)
    assert mitocheck.mean_recall(rare, Resamples(draws=50)).value == pytest.approx(0.5)
    assert mitocheck.accuracy(rare, Resamples(draws=50)).value > 0.8


def test_the_report_says_what_it_cannot_show() -> None:
    answers = made_up()
    text = mitocheck.report(answers, mitocheck.figures(answers), "(table)")
    for words in (
        "6 plates of 3 dates, 2 seeds",
        "3 plates are one-sided",
        "no negative controls",
        "cannot show",
        "(table)",
    ):
        assert words in text


def test_no_date_of_the_real_plates_trains_and_is_tested(shared_data: Path) -> None:
    plates, classes = mitocheck.read_plates(shared_data / "mitocheck_nuclei_crops")
    assert len(plates) == 67
    assert sum(len(plate.labels) for plate in plates.values()) == 3277
    assert len(classes) == 16
    split = mitocheck.folds(plates, 3)
    assert sorted(name for _, test in split for name in test) == sorted(plates)
    for train, test in split:
        assert not {plates[name].batch for name in train} & {plates[name].batch for name in test}
        labels = [set(np.concatenate([plates[name].labels for name in names])) for names in (train, test)]
        assert labels[1] <= labels[0], "every class tested is trained"
    answers = mitocheck.nulls(plates, split[:1])
    right = (answers["called"] == answers["truth"]).groupby(answers["way"]).mean()
    tested = [plates[name].labels for name in split[0][1]]
    assert right["null: majority"] < 0.2
    commonest = sum(np.bincount(labels).max() for labels in tested) / sum(map(len, tested))
    assert right["oracle: plate's commonest class"] == pytest.approx(commonest)
    assert "| Grape | 99 | 10 |" in mitocheck.confounding(plates, classes, split)
