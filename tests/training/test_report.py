"""The report: its figures are the hand-computed ones, and it says what it cannot show."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.bundle import file_sha256
from model.errors import LayoutError, RunError
from tests.training import made_up
from training.embeddings import Columns, write_baselines
from training.grid import Axes, Grid, evaluate_grid
from training.intervals import Resamples
from training.report import (
    calibration_by_batch,
    cannot_show,
    confusion,
    curve,
    gaps,
    over_nulls,
    reliability,
    scores,
    write_report,
)
from training.results import SETTINGS, Results, of_way, read_results
from training.train import Run

ERM, OURS = ("erm", "source"), ("cs-arm-bn", "controls")


@pytest.fixture(scope="module")
def results() -> Results:
    table = made_up.cells()
    return Results(table, made_up.predictions(table))


def whole(cells: pd.DataFrame, way: tuple[str, str], setting: str) -> pd.DataFrame:
    """One method's default cells, picked by hand."""
    rows = cells[(cells["method"] == way[0]) & (cells["context"] == way[1]) & (cells["setting"] == setting)]
    return rows[(rows["controls"] == -1) & (rows["query_wells"] == -1) & (rows["alpha"] == math.inf) & ~rows["blended"]]


def test_every_metric_is_the_mean_over_plates_and_seeds(results: Results) -> None:
    found = scores(results, Resamples(draws=100)).set_index(["method", "context", "setting"])
    assert len(found) == len(made_up.LEVELS) * len(SETTINGS)
    for way in made_up.LEVELS:
        for setting in SETTINGS:
            rows, row = whole(results.cells, way, setting), found.loc[(*way, setting)]
            for metric in ("image_accuracy", "well_accuracy", "macro_f1", "nll", "ece", "brier", "nll_before", "ece_before"):
                assert row[metric] == pytest.approx(rows[metric].mean()), (way, setting, metric)
            assert row["well_accuracy_low"] < row["well_accuracy"] < row["well_accuracy_high"]
            batches = rows.groupby("batch")["well_accuracy"].mean()
            assert row["behind"] == ("9, 3, 1" if setting == "new_lab" else "18, 6, 2")
            assert row["worst_batch_accuracy"] == pytest.approx(batches.min())
            assert row["worst_batch"].endswith(f"/{batches.idxmin()}")


def test_the_share_of_the_gap_closed_is_what_the_tables_were_made_with(results: Results) -> None:
    found = gaps(results, Resamples()).set_index(["method", "setting"])
    assert "in_domain" not in found.index.get_level_values("setting")
    for setting in ("new_batch", "new_lab"):
        means = {way: {s: whole(results.cells, way, s)["well_accuracy"].mean() for s in SETTINGS} for way in (ERM, OURS)}
        row = found.loc["cs-arm-bn", setting]
        assert row["well_gain"] == pytest.approx(means[OURS][setting] - means[ERM][setting])
        expected = made_up.share_of_gap_closed(means[OURS][setting], means[ERM][setting], means[ERM]["in_domain"])
        assert row["well_share"] == pytest.approx(expected)
        assert row["image_share"] == pytest.approx(expected), "per image all are 0.05 lower"
        true = (made_up.LEVELS[OURS][setting] - made_up.LEVELS[ERM][setting]) / (0.9 - made_up.LEVELS[ERM][setting])
        assert row["well_share_low"] < true < row["well_share_high"]
        assert found.loc["null: majority", setting]["well_share"] < 0


def test_methods_that_are_not_above_the_nulls_are_named(results: Results, tmp_path: Path) -> None:
    found = over_nulls(results, Resamples(draws=200)).set_index(["method", "setting"])
    assert set(found["null"]) == {"null: intensity"}, "the best one"
    assert (found["margin_low"] > 0).all()
    assert found["shown"].all()
    few = over_nulls(Results(results.cells.assign(wells=1)), Resamples(draws=200)).set_index(["method", "setting"])
    assert few.loc[("erm", "in_domain"), "shown"], "0.4 above it in 18 wells"
    assert not few.loc[("erm", "new_lab"), "shown"], "0.2 in 9 wells may be chance"
    margin = (
        whole(results.cells, ERM, "new_lab")["well_accuracy"].mean()
        - whole(results.cells, ("null: intensity", "-"), "new_lab")["well_accuracy"].mean()
    )
    assert found.loc[("erm", "new_lab"), "margin"] == pytest.approx(margin)
    low = results.cells["well_accuracy"] - 0.25 * (
        (results.cells["method"] == "erm") & (results.cells["context"] == "source")
    )
    made_up.write(tmp_path, results.cells.assign(well_accuracy=low))
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    away = text.split("### New lab")[1].split("\n#")[0]
    assert "**Not shown to be above the best null**, per well: erm (unadapted) (-0.0" in away
    assert "over null: intensity)" in away
    assert "Every method is above the best null" in text.split("### In domain")[1].split("\n#")[0]


def test_one_plate_shows_nothing_to_be_above_the_nulls(results: Results) -> None:
    one = results.cells[results.cells["plate"] == results.cells["plate"].iloc[0]]
    found = over_nulls(Results(one[one["seed"] == 0]), Resamples(draws=50))
    assert len(found)
    assert found["margin_low"].isna().all()


def test_gains_are_taken_over_the_plates_that_both_have(results: Results) -> None:
    absent = whole(results.cells, OURS, "new_lab")["plate"].iloc[0]
    both = results.cells[results.cells["plate"] != absent]
    cells = results.cells[(results.cells["plate"] != absent) | (results.cells["method"] != "cs-arm-bn")]
    ours, erm = (whole(both, way, "new_lab")["well_accuracy"].mean() for way in (OURS, ERM))
    found = gaps(Results(cells), Resamples(draws=50)).set_index(["method", "setting"])
    assert found.loc[("cs-arm-bn", "new_lab"), "well_gain"] == pytest.approx(ours - erm)
    assert erm != pytest.approx(whole(cells, ERM, "new_lab")["well_accuracy"].mean())


def test_gains_are_taken_over_the_seeds_that_both_have(results: Results) -> None:
    """A method that equals ERM in the one seed it was trained with gains nothing, whatever ERM did in the other."""
    erm = results.cells[(results.cells["method"] == "erm") & (results.cells["context"] == "source")]
    worse = erm.assign(well_accuracy=erm["well_accuracy"] - 0.3 * erm["seed"])
    equal = worse[worse["seed"] == 0].assign(method="cs-arm-bn", context="controls")
    found = gaps(Results(pd.concat([worse, equal])), Resamples(draws=50))
    assert found["well_gain"].tolist() == pytest.approx([0.0, 0.0])


def test_the_curve_of_controls_shows_blended_beside_plain_and_erm_as_a_level(results: Results) -> None:
    found = curve(results, Resamples(draws=50), "controls")
    assert found is not None
    assert found.fixed == {"query_wells": -1.0, "alpha": math.inf}
    rows = found.rows[found.rows["setting"] == "new_lab"]
    ours = rows[rows["method"] == "cs-arm-bn"].set_index(["blended", "x"])["value"]
    assert set(ours[False].index) == {1, 2, 4, 8, 16, -1}
    assert set(ours[True].index) == {0, 1, 2, 4, 8, 16, -1}
    assert ours[False, -1] - ours[False, 1] == pytest.approx(0.2)
    assert ours[True, 1] - ours[False, 1] == pytest.approx(0.15)
    assert rows[rows["method"] == "erm"]["x"].tolist() == [-1]
    assert rows[rows["method"] == "null: intensity"]["x"].tolist() == [-1]
    assert "instancenorm" not in set(rows["method"])


def test_label_shift_is_shown_at_the_query_size_at_which_it_was_varied(results: Results) -> None:
    found = curve(results, Resamples(draws=50), "alpha")
    assert found is not None
    assert found.fixed == {"controls": -1.0, "query_wells": made_up.SHIFTED_QUERY}
    arm = found.rows[(found.rows["method"] == "arm-bn") & (found.rows["setting"] == "in_domain")].set_index("x")["value"]
    assert arm[math.inf] - arm[0.0] == pytest.approx(0.6)
    ours = found.rows[(found.rows["method"] == "cs-arm-bn") & (found.rows["setting"] == "in_domain")]["value"]
    assert np.ptp(ours) == pytest.approx(0)


def test_nothing_varied_is_no_curve(results: Results) -> None:
    assert curve(Results(results.default), Resamples(draws=50), "query_wells") is None


def test_reliability_counts_wells_by_confidence(results: Results) -> None:
    assert results.predictions is not None
    found = reliability(results, Resamples(draws=100))
    mine = found[(found["method"] == "cs-arm-bn") & (found["setting"] == "new_lab")].set_index("bin")
    before, mine = (mine[mine["stage"] == stage] for stage in ("before", "after"))
    rows = results.predictions
    rows = rows[(rows["method"] == "cs-arm-bn") & (rows["setting"] == "new_lab")]
    right = rows["called"] == rows["label"]
    confident = rows.filter(like="p:").max(axis=1)
    assert mine.index.tolist() == [6, 9]
    for number, level in ((6, 0.65), (9, 0.95)):
        chosen = np.isclose(confident, level)
        assert mine.loc[number, "confidence"] == pytest.approx(level)
        assert mine.loc[number, "value"] == pytest.approx(right[chosen].mean())
        assert mine.loc[number, "wells"] == chosen.sum()
    assert before.index.tolist() == [7, 9]
    assert before["confidence"].tolist() == pytest.approx([0.75, 0.99])
    assert before["value"].tolist() == mine["value"].tolist()


def test_calibration_is_told_by_batch_before_and_after_and_pooled(results: Results) -> None:
    assert results.predictions is not None
    found = calibration_by_batch(results, ERM)
    assert len(found) == 6 + 6 + 3
    rows = whole(results.cells, ERM, "new_lab")
    for _, row in found[found["setting"] == "new_lab"].iterrows():
        own = rows[rows["batch"] == row["batch"]]
        assert row["plates"] == 3
        for name in ("ece_before", "ece", "nll_before", "nll"):
            assert row[name] == pytest.approx(own[name].mean())
        wells = results.predictions[
            (results.predictions["batch"] == row["batch"]) & (results.predictions["method"] == "erm")
        ]
        right, confident = wells["called"] == wells["label"], wells.filter(like="p:").max(axis=1)
        by_level = right.groupby(confident.round(6)).agg(["mean", "size"])
        expected = (np.abs(by_level["mean"] - by_level.index) * by_level["size"]).sum() / len(wells)
        assert row["pooled_ece"] == pytest.approx(expected)


def test_confusions_count_every_well_once(results: Results) -> None:
    assert results.predictions is not None
    found = confusion(results, OURS, "new_lab")
    rows = results.predictions
    rows = rows[(rows["method"] == "cs-arm-bn") & (rows["setting"] == "new_lab")]
    assert found.to_numpy().sum() == len(rows)
    assert found.loc["alpha", "beta"] == ((rows["label"] == "alpha") & (rows["called"] == "beta")).sum()
    assert found.index.tolist() == found.columns.tolist() == list(made_up.CLASSES)


def test_what_cannot_be_shown_is_said() -> None:
    table = made_up.cells(seeds=1, batches=1, each=2)
    table = table[(table["setting"] != "new_lab") & (table["method"] != "erm") & ~table["method"].str.startswith("null")]
    told = " ".join(cannot_show(Results(table.assign(lab="simulated_01"))))
    for words in (
        "simulated",
        "one lab (simulated_01)",
        "Not scored: new lab",
        "One seed",
        "No null",
        "Unadapted ERM was not",
    ):
        assert words in told
    assert "so few" in " ".join(cannot_show(Results(table)))
    many = made_up.cells(seeds=5, batches=6)
    many["lab"] = many["batch"].str[-1] + many["lab"]
    assert cannot_show(Results(many)) == []
    assert cannot_show(Results(many, told=("seed 1: erm had 2 of 6 steps",))) == ["Seed 1: erm had 2 of 6 steps."]
    assert "2 seeds: so few" in " ".join(cannot_show(Results(many[many["seed"] < 2])))


def test_other_seeds_are_said_and_not_added_up() -> None:
    cells = made_up.cells(seeds=1, batches=6)
    other = cells["method"] == "arm-bn"
    told = " ".join(cannot_show(Results(cells.assign(seed=np.where(other, 7, 0)))))
    assert "One seed" in told
    assert "arm-bn (treated): seeds 7, 90 plates" in told
    assert "different seeds" not in " ".join(cannot_show(Results(cells)))


def test_a_method_without_a_null_of_its_plates_is_not_said_to_be_above_one(tmp_path: Path) -> None:
    cells = made_up.cells(seeds=1)
    apart = cells["method"] == "arm-bn"
    made_up.write(tmp_path, cells.assign(seed=np.where(apart, 7, 0)))
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    home = text.split("### In domain")[1].split("\n#")[0]
    assert "Every method is above" not in home
    assert "arm-bn (treated) (no null was scored on its plates with its seed)" in home


def test_a_null_of_few_plates_is_not_the_one_to_be_above(results: Results) -> None:
    one = results.cells[results.cells["method"] == "null: majority"].head(1).assign(method="null: lucky", well_accuracy=0.99)
    found = over_nulls(Results(pd.concat([results.cells, one])), Resamples(draws=50))
    assert set(found["null"]) == {"null: intensity"}


def test_without_plates_in_domain_what_erm_loses_is_not_told(tmp_path: Path) -> None:
    cells = made_up.cells(seeds=1)
    made_up.write(tmp_path, cells[cells["setting"] != "in_domain"])
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "What unadapted ERM loses is not known" in text


def test_a_temperature_at_its_bound_is_said() -> None:
    cells = made_up.cells(seeds=1, batches=6)
    hot = cells.assign(temperature=np.where(cells["method"].isin(["arm-bn", "null: majority"]), 99.99, 1.4))
    (told,) = [line for line in cannot_show(Results(hot)) if "Temperature" in line]
    assert "(0.05 or 100) for arm-bn (treated): on" in told


def test_what_all_plates_have_alike_has_no_interval_and_no_loss_no_share(tmp_path: Path) -> None:
    cells = made_up.cells(seeds=1)
    made_up.write(tmp_path, cells.assign(well_accuracy=0.25, image_accuracy=0.25))
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "| 0.250 | 0.250 |" in text.split("### In domain")[1]
    gap = text.split("## Domain gap closed")[1].split("\n#")[0]
    assert "no share of a gap can be told" in gap
    assert "share closed" not in gap


def test_a_report_has_every_plot_and_nulls_in_every_table_of_methods(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path / "results")
    path = write_report(folder, tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    pictures = ("accuracy", "controls", "alpha", "query_wells", "reliability", "calibration", "confusion", "embedding")
    for name in pictures:
        assert f"({name}.png)" in text
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for section in (
        "### In domain",
        "### New batches",
        "### New lab",
        "## Domain gap",
        "## Control wells",
        "## Label shift",
    ):
        table = text.split(section)[1].split("\n#")[0]
        assert "null: majority" in table, section
        assert ("erm (unadapted)" in table) is (section != "## Domain gap"), section
    assert "18 plates, 6 batches, 2 labs, 2 seeds" in text


def test_a_grids_tables_are_reported_as_they_are(run: Run, erm_run: Run, tmp_path: Path) -> None:
    few = Axes(controls=(0, 1)), Axes(query_wells=(3,), alpha=(math.inf, 0))
    methods = ("erm", "adabn-treated", "cs-arm-bn controls", "cs-arm-bn controls blended")
    grid = Grid(methods=methods, cells=few, embeddings=("cs-arm-bn controls",))
    cells = evaluate_grid(grid, [run, erm_run], tmp_path, tell=lambda _: None, progress=lambda _done, _total: None)
    write_baselines(tmp_path / "embeddings.parquet", tmp_path, "", Columns())
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    trained = text.split("## What was trained")[1].split("\n#")[0]
    assert f"| erm | 1 | {erm_run.config.steps} | {erm_run.config.steps} |" in trained
    assert "| cs-arm-bn | 1 |" in trained
    assert text.startswith("# Evaluation on simulated plates")
    new_batch = text.split("### New batches")[1].split("\n#")[0]
    for method in (
        "erm (unadapted)",
        "adabn-treated",
        "cs-arm-bn (controls)",
        "tvn (cs-arm-bn controls)",
        "null: intensity",
    ):
        assert f"| {method} |" in new_batch
    assert "null: majority (cs-arm-bn controls)" not in text, "it stands by itself"
    alone = replace(read_results(tmp_path), cells=pd.read_parquet(tmp_path / "cells-embedding.parquet"))
    assert ("null: majority", "cs-arm-bn controls") in alone.ways()
    ours = whole(cells, OURS, "new_batch")["well_accuracy"].mean()
    assert f"| {ours:.3f} (" in new_batch
    assert "| cs-arm-bn (controls), blended |" in text.split("## Control wells")[1]
    assert "one class" in text.split("## Label shift")[1]
    assert (tmp_path / "report" / "embedding.png").is_file()


def test_a_report_that_is_stopped_leaves_none_rather_than_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.cells(seeds=1).to_parquet(tmp_path / "cells.parquet", index=False)
    (tmp_path / "report").mkdir()
    path = tmp_path / "report" / "report.md"
    path.write_text("of other results")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("training.plots.accuracies", "training.report.write_whole"):
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                write_report(tmp_path, tmp_path / "report")
        assert not path.exists()


def test_nulls_alone_are_reported_without_plots_of_methods(tmp_path: Path) -> None:
    cells = made_up.cells(seeds=1)
    made_up.write(tmp_path, cells[cells["method"].str.startswith("null")])
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "| null: majority |" in text
    assert "## Calibration" not in text
    assert not (tmp_path / "report" / "reliability.png").exists()


def test_a_method_named_outright_is_shown_or_refused(tmp_path: Path) -> None:
    cells = made_up.cells(seeds=1)
    whole_plates = Results(cells).default
    made_up.write(tmp_path, whole_plates[whole_plates["method"] != "cs-arm-bn"])
    with pytest.raises(RunError, match=r"has no nope with context controls; it has erm with context source, adabn-controls"):
        write_report(tmp_path, tmp_path / "report", ("nope", "controls"))
    assert not (tmp_path / "report").exists()
    shown = {
        ERM: "erm (unadapted) in domain",
        ("arm-bn", "treated"): "arm-bn (treated) in domain",
        None: "adabn-controls in",
    }
    for asked, words in shown.items():
        text = write_report(tmp_path, tmp_path / "report", asked).read_text(encoding="utf-8")
        assert text.split("## Confusions")[1].split("\n##")[0].count(words) == 1


def test_methods_that_were_scored_at_one_point_each_make_no_curve(results: Results) -> None:
    apart = [of_way(results.default, way).assign(controls=k) for way, k in ((OURS, 4), (("arm-bn", "treated"), 8))]
    assert curve(Results(pd.concat(apart)), Resamples(draws=50), "controls") is None


def test_cells_alone_are_reported_and_cost_beside_them(tmp_path: Path) -> None:
    made_up.cells(seeds=1).to_parquet(tmp_path / "cells.parquet", index=False)
    row = {"way": "forward", "needs": "nothing", "flops": 2e9, "seconds": 1.0, "seconds_low": 0.9, "seconds_high": 1.1,
           "kept_bytes": 0, "peak_bytes": 3e8, "added_bytes": 1e8}  # fmt: skip
    measure = {**row, "way": "measure", "needs": "controls", "flops": 5e8, "seconds": 0.3}
    work = {
        "spec": {"depth": 18, "width": 8, "channels": 5},
        "size": 64,
        "treated": 4,
        "controls": 2,
        "minibatch": 2,
        "steps": 9,
    }
    cost = {"workload": work, "rounds": 3, "machine": {"processor": "x", "cores": 2, "threads": 1, "torch": "2"}}
    (tmp_path / "cost.json").write_text(json.dumps({**cost, "rows": [row, measure]}))
    text = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "| measure | controls | 0.5 | 0.25 | 0.30 (0.90 to 1.10) | 0.30 |" in text
    assert "reliability.png" not in text
    assert not (tmp_path / "report" / "confusion.png").exists()


def test_more_tables_of_a_folder_are_read_together(tmp_path: Path) -> None:
    table = made_up.cells(seeds=1)
    table.to_parquet(tmp_path / "cells.parquet", index=False)
    table[table["method"] == "erm"].assign(method="tvn", context="dino").to_parquet(
        tmp_path / "cells-dino.parquet", index=False
    )
    assert ("tvn", "dino") in read_results(tmp_path).ways()


def test_tables_that_do_not_hold_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no cells\.parquet"):
        read_results(tmp_path)
    table = made_up.cells(seeds=1)
    path = tmp_path / "cells.parquet"
    for wrong, error in (
        (table.drop(columns=["brier", "lab"]), r"cells\.parquet lacks the columns lab, brier"),
        (table.assign(setting="elsewhere"), "setting 'elsewhere'"),
        (pd.concat([table, table.head(1)]), "is scored twice for erm"),
        (table.head(0), "has no row"),
    ):
        wrong.to_parquet(path, index=False)
        with pytest.raises(LayoutError, match=error):
            read_results(tmp_path)


Change = Callable[[pd.DataFrame], pd.DataFrame]


def emptied(column: str, value: object = None) -> Change:
    return lambda table: table.assign(**{column: table[column].where(table.index != 2, value)})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cells", lambda t: t.assign(well_accuracy="0.5"), "the column well_accuracy holds no numbers"),
        ("cells", emptied("well_accuracy"), " row 3: well_accuracy is empty"),
        ("cells", emptied("lab"), " row 3: lab is empty"),
        ("cells", emptied("lab", ""), " row 3: lab is empty"),
        ("predictions", lambda t: t.drop(columns=list(t.filter(like="p:"))), " has no probabilities"),
        ("predictions", lambda t: t.assign(**{"p:alpha": "0.5"}), "the column p:alpha holds no numbers"),
        ("predictions", emptied("confidence_before"), " row 3: confidence_before is empty"),
        ("embeddings", lambda t: t.drop(columns="Metadata_setting"), " lacks the columns Metadata_setting"),
        ("embeddings", lambda t: t.assign(e003="word"), "the column e003 holds no numbers"),
    ],
)
def test_a_table_with_values_that_cannot_be_is_refused_by_file(
    name: str, change: Change, words: str, tmp_path: Path
) -> None:
    cells = made_up.cells(seeds=1)
    path = made_up.write(tmp_path, Results(cells).default.reset_index(drop=True)) / f"{name}.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    with pytest.raises(LayoutError, match=rf"{name}\.parquet.*{words}"):
        read_results(tmp_path)


def test_embeddings_that_are_not_finite_are_refused_by_feature(tmp_path: Path) -> None:
    path = made_up.write(tmp_path) / "embeddings.parquet"
    table = pd.read_parquet(path)
    table.assign(e003=table["e003"].where(table["Metadata_Plate"] != "B9p2")).to_parquet(path, index=False)
    with pytest.raises(LayoutError, match=r"embeddings\.parquet: the feature e003 of erm \(unadapted\) is not finite"):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists(), "what is refused leaves an earlier report as it was"


@pytest.mark.parametrize("name", ["about.json", "cost.json"])
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"rows": [', '{"told": 1, "workload": {"spec": {}}}'])
def test_a_damaged_file_beside_the_tables_is_refused_by_name(name: str, content: str, tmp_path: Path) -> None:
    made_up.cells(seeds=1).head(20).to_parquet(tmp_path / "cells.parquet", index=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=rf"{re.escape(name)} is damaged \(.*: (evaluate|measure the cost) again"):
        write_report(tmp_path, tmp_path / "report")


def test_a_table_that_is_cut_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("cells", "predictions", "embeddings"):
        path = made_up.write(tmp_path, made_up.cells(seeds=1)) / f"{name}.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(LayoutError, match=rf"{name}\.parquet cannot be read as Parquet"):
            read_results(tmp_path)


def test_tables_that_are_not_those_of_their_evaluation_are_refused(tmp_path: Path) -> None:
    made_up.write(tmp_path, made_up.cells(seeds=1))
    tables = {f"{name}.parquet": tmp_path / f"{name}.parquet" for name in ("cells", "predictions", "embeddings")}
    digests = {name: file_sha256(path) for name, path in tables.items()}
    (tmp_path / "about.json").write_text(json.dumps({"told": ["seed 1: cut short"], "tables": digests}))
    assert read_results(tmp_path).told == ("seed 1: cut short",)
    for path in tables.values():
        content = path.read_bytes()
        for damage in (lambda path=path: path.unlink(), lambda path=path, content=content: path.write_bytes(content[:-1])):
            damage()
            with pytest.raises(RunError, match=rf"{path.name} was changed or only half written after its evaluation"):
                read_results(tmp_path)
        path.write_bytes(content)


def test_tables_without_word_of_what_was_left_out_are_said_to_be_so(tmp_path: Path) -> None:
    made_up.cells(seeds=1).to_parquet(tmp_path / "cells.parquet", index=False)
    assert "What was left out of the evaluation is not known" in " ".join(cannot_show(read_results(tmp_path)))
    (tmp_path / "about.json").write_text(json.dumps({"told": []}))
    assert "not known" not in " ".join(cannot_show(read_results(tmp_path)))
