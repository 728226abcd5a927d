"""Embedding baselines: TVN and z-scores against references, strict splits, and what is wrong with a table."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import fractional_matrix_power

from model.errors import AnchorwellError, LayoutError, NoControlsError
from tests.training import made_up
from training.embeddings import (
    Columns,
    Wells,
    evaluate_embeddings,
    read_wells,
    tvn,
    variance_shares,
    write_baselines,
    zscore,
)
from training.results import CELL_COLUMNS, PREDICTION_COLUMNS, read_results

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it sets an option that pandas is about to drop
    import pycytominer

COLUMNS = Columns()


def read(table: pd.DataFrame, folder: Path, name: str = "", train_batches: tuple[str, ...] = ()) -> list[Wells]:
    table.to_parquet(folder / "table.parquet", index=False)
    return read_wells(folder / "table.parquet", name, COLUMNS, train_batches)


@pytest.fixture
def erm(tmp_path: Path) -> Wells:
    return next(wells for wells in read(made_up.embeddings(), tmp_path) if wells.name == "erm source")


def test_tvn_is_whitening_by_the_roots_of_each_batches_control_covariance(erm: Wells) -> None:
    controls = erm.features[erm.controls].astype(np.float64)
    scaled = (erm.features - controls.mean(0)) / controls.std(0)
    values, directions = np.linalg.eigh(np.cov(scaled[erm.controls].T))
    found = tvn(erm)
    for batch in set(erm.about["batch"]):
        rows = (erm.about["batch"] == batch).to_numpy()
        own = scaled[rows & erm.controls]
        root = fractional_matrix_power(np.cov(own.T, ddof=1) + 0.5 * np.eye(own.shape[1]), -0.5)
        # PCA only turns the axes, and so does not change what whitening does.
        expected = (scaled[rows] - own.mean(0)) @ root @ directions[:, np.argsort(-values)]
        signs = np.sign((expected * found[rows]).sum(axis=0))
        np.testing.assert_allclose(found[rows], expected * signs, atol=1e-8)


def test_tvn_centres_every_batch_on_its_controls_and_brings_covariances_together(erm: Wells) -> None:
    found = tvn(erm)
    for batch in set(erm.about["batch"]):
        own = found[(erm.about["batch"] == batch).to_numpy() & erm.controls]
        np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-9)
        assert np.linalg.eigvalsh(np.cov(own.T)).max() < 1, "the ridge keeps every variance below 1"


def test_tvn_takes_fewer_controls_than_features(tmp_path: Path) -> None:
    wide = made_up.embeddings(dim=200)
    assert np.isfinite(tvn(read(wide, tmp_path)[0])).all()


def test_z_scores_are_pycytominers(erm: Wells, tmp_path: Path) -> None:
    table = pd.read_parquet(tmp_path / "table.parquet")
    own = table[table["Metadata_method"] == "erm"].reset_index(drop=True)
    features = [f"e{number:03d}" for number in range(12)]
    found = zscore(erm)
    for plate, rows in own.groupby("Metadata_Plate"):
        expected = pycytominer.normalize(
            rows, features=features, meta_features=[c for c in own if c.startswith("Metadata_")],
            samples="Metadata_pert_type == 'negcon'", method="standardize",
        )  # fmt: skip
        chosen = (erm.about["plate"] == plate).to_numpy()
        np.testing.assert_allclose(found[chosen], expected[features].to_numpy(), rtol=1e-6)


def test_pycytominer_spherizes_the_table_and_agrees_where_there_is_no_ridge(
    erm: Wells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one batch and no ridge, TVN's distances between wells are those after whitening by pycytominer."""
    monkeypatch.setattr("training.embeddings.TVN_RIDGE", 0.0)
    one = erm.about["batch"] == "B0"
    wells = Wells("", 0, erm.features[one.to_numpy()], erm.about[one].reset_index(drop=True))
    table = pd.read_parquet(tmp_path / "table.parquet")
    own = table[(table["Metadata_method"] == "erm") & (table["Metadata_Batch"] == "B0")].reset_index(drop=True)
    features = [f"e{number:03d}" for number in range(12)]
    expected = pycytominer.normalize(
        own, features=features, meta_features=[c for c in own if c.startswith("Metadata_")],
        samples="Metadata_pert_type == 'negcon'", method="spherize", spherize_method="ZCA-cor", spherize_epsilon=0,
    )[features].to_numpy()  # fmt: skip
    found = tvn(wells)
    distances = [np.linalg.norm(values[:20, None] - values[None, 20:40], axis=2) for values in (found, expected)]
    np.testing.assert_allclose(distances[0], distances[1], rtol=1e-6)


def test_controls_cure_a_batch_effect_and_rows_are_those_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    made_up.embeddings().to_parquet(tmp_path / "embeddings.parquet", index=False)
    write_baselines(tmp_path / "embeddings.parquet", folder, "", COLUMNS)
    cells, predictions = read_results(folder).cells, read_results(folder).predictions
    assert set(cells.columns) == set(CELL_COLUMNS)
    assert predictions is not None
    assert set(PREDICTION_COLUMNS) <= set(predictions.columns)
    new = (
        cells[(cells["context"] == "erm source") & (cells["setting"] == "new_batch")]
        .groupby("method")["well_accuracy"]
        .mean()
    )
    assert new["embedding-raw"] < 0.7
    assert new["embedding-zscore"] > 0.9
    assert new["tvn"] > 0.9
    assert new["null: majority"] == pytest.approx(0.25)
    assert new["null: position"] < 0.6
    one = predictions[(predictions["method"] == "tvn") & (predictions["setting"] == "new_batch")]
    assert np.allclose(one.filter(like="p:").sum(axis=1), 1)
    row = cells[(cells["method"] == "tvn") & (cells["context"] == "erm source") & (cells["setting"] == "new_batch")].iloc[0]
    wells = one[(one["plate"] == row["plate"]) & (one["context"] == "erm source")]
    assert row["well_accuracy"] == (wells["called"] == wells["label"]).mean()
    assert row["wells"] == len(wells) == 16


def test_scores_do_not_stand_beside_those_of_other_plates(tmp_path: Path) -> None:
    made_up.embeddings().to_parquet(tmp_path / "dino.parquet", index=False)
    folder = made_up.write(tmp_path / "results")
    with pytest.raises(
        LayoutError, match=r"none of its test plates .* is scored in .* labs such as L.*: name another results folder"
    ):
        write_baselines(tmp_path / "dino.parquet", folder, "", COLUMNS)
    assert not list(folder.glob("*-embedding.parquet"))
    cells = pd.read_parquet(folder / "cells.parquet")
    cells.head(1).assign(lab="L1", batch="B7", plate="B7p2").to_parquet(folder / "cells.parquet", index=False)
    write_baselines(tmp_path / "dino.parquet", folder, "", COLUMNS)
    assert (folder / "cells-embedding.parquet").is_file()
    cells.drop(columns="lab").to_parquet(folder / "cells.parquet", index=False)
    with pytest.raises(LayoutError, match="lacks the columns lab"):
        write_baselines(tmp_path / "dino.parquet", folder, "", COLUMNS)


def test_a_table_without_a_method_has_its_files_name(tmp_path: Path) -> None:
    table = one_network().drop(columns=["Metadata_method", "Metadata_context"])
    table.to_parquet(tmp_path / "dino.v2.parquet", index=False)
    (wells,) = read_wells(tmp_path / "dino.v2.parquet", "", COLUMNS)
    assert wells.name == "dino"
    (wells,) = read_wells(tmp_path / "dino.v2.parquet", "other", COLUMNS)
    assert wells.name == "other"
    table.to_parquet(tmp_path / "open phenom.parquet", index=False)
    for name in ("dino.v2", "open phenom"):
        write_baselines(tmp_path / f"{name}.parquet", tmp_path / "results", "", COLUMNS)
    found = read_results(tmp_path / "results").cells
    assert set(found["context"]) == {"dino", "open_phenom"}


def test_a_table_of_scores_is_no_table_of_embeddings(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path / "results")
    with pytest.raises(LayoutError, match=r"a table of scores: embeddings of wells are in embeddings\.parquet"):
        read_wells(folder / "predictions.parquet", "", COLUMNS)


def test_batches_named_for_training_make_the_settings(tmp_path: Path) -> None:
    table = made_up.embeddings()
    table = table[table["Metadata_method"] == "erm"].drop(
        columns=[f"Metadata_{n}" for n in ("method", "context", "setting", "seed")]
    )
    (wells,) = read(table, tmp_path, "dino", ("B0", "B1"))
    assert wells.name == "dino"
    settings = wells.about.drop_duplicates("batch").set_index("batch")["setting"]
    assert settings.to_dict() == {
        "B0": "train", "B1": "train", "B2": "new_batch", "B7": "new_batch", "B8": "new_batch", "B9": "new_lab"
    }  # fmt: skip
    cells, _ = evaluate_embeddings(wells)
    assert set(cells["context"]) == {"dino"}
    assert set(cells["method"]) == {"embedding-raw", "embedding-zscore", "tvn", "null: majority", "null: position"}


def one_network() -> pd.DataFrame:
    table = made_up.embeddings()
    return table[table["Metadata_method"] == "erm"].reset_index(drop=True)


def relabelled(table: pd.DataFrame, column: str, value: object, **where: object) -> pd.DataFrame:
    rows = np.logical_and.reduce([table[f"Metadata_{name}"] == wanted for name, wanted in where.items()])
    return table.assign(**{column: table[column].where(~rows, value)})


def one_control(table: pd.DataFrame) -> pd.DataFrame:
    """Keep a single plate of batch B9, with a single control."""
    other = table["Metadata_Batch"] != "B9"
    kept = (table["Metadata_Plate"] == "B9p2") & (
        (table["Metadata_pert_type"] != "negcon") | (table["Metadata_Well"] == "A01")
    )
    return table[other | kept]


def put(column: str, value: object, **where: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: relabelled(table, column, value, **where)


WRONG: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], type[AnchorwellError], str]] = [
    (lambda t: t.drop(columns="Metadata_label"), LayoutError, "lacks the columns Metadata_label"),
    (put("e003", np.nan, Plate="B1p0", Well="A02"), LayoutError, "'e003' of plate B1p0 well A02"),
    (lambda t: t.assign(e004="word"), LayoutError, "the feature 'e004' is no number but 'word' in row 1"),
    (put("e003", 1e200, Plate="B1p0", Well="A02"), LayoutError, "'e003' of plate B1p0 well A02"),
    (lambda t: t.head(0), LayoutError, "table.parquet has no rows"),
    (put("Metadata_Plate", None, Plate="B0p0", Well="A02"), LayoutError, "table.parquet row 2: Metadata_Plate is empty"),
    (put("Metadata_method", None, Batch="B0", Well="A01"), LayoutError, "rows 1, 25, 145, 169: Metadata_method is empty"),
    (lambda t: t.assign(Metadata_seed=1.5), LayoutError, "Metadata_seed is no whole number"),
    (lambda t: t.assign(Metadata_seed="x"), LayoutError, "Metadata_seed is no whole number"),
    (put("Metadata_Well", "a1", Plate="B0p0", Well="A02"), LayoutError, "plate B0p0 well A01 has two rows"),
    (put("Metadata_Well", "Q99", Plate="B1p0", Well="A02"), LayoutError, "row 50, plate B1p0: 'Q99' is not a well"),
    (
        lambda t: t.assign(Metadata_label=t["Metadata_label"].where(t["Metadata_setting"] == "train")),
        LayoutError,
        "no treated test well of erm source has a label",
    ),
    *[
        (lambda t, name=name: t.assign(**{name: range(len(t))}), LayoutError, f"the column {name!r} is named as row numbers")
        for name in ("", "index", "level_0", "Unnamed: 0")
    ],
    (
        lambda t: t.assign(Metadata_pert_type="trt"),
        NoControlsError,
        "no well has Metadata_pert_type 'negcon'; there are trt",
    ),
    (put("Metadata_pert_type", "trt", Plate="B7p2"), NoControlsError, "plate B7p2 of batch B7 has no control"),
    (one_control, NoControlsError, "batch B9 of lab L2 has 1 control wells; TVN needs two"),
    (put("Metadata_label", "omega", Plate="B8p3", Well="B01"), LayoutError, "plate B8p3 well B01 is of class 'omega'"),
    (put("Metadata_label", "alpha", setting="train"), LayoutError, "1 labels"),
    (put("Metadata_setting", "elsewhere", Batch="B9"), LayoutError, "Metadata_setting is 'elsewhere'"),
    (lambda t: t.assign(Metadata_setting="train"), LayoutError, "no wells to test on"),
    (
        lambda t: t.drop(columns="Metadata_setting"),
        LayoutError,
        "no column Metadata_setting that says which wells train: name the batches that do (--train-batches)",
    ),
    (put("Metadata_setting", "in_domain", Plate="B0p0", Well="A01"), LayoutError, "plate B0p0 of lab L1 is in training"),
    (put("Metadata_setting", "new_batch", Plate="B0p1"), LayoutError, "batch B0 of lab L1 is in training"),
    (put("Metadata_Source", "L1", Batch="B9"), LayoutError, "lab L1 is in training"),
    (lambda t: pd.concat([t, t.tail(1)]), LayoutError, "has two rows"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_a_table_that_would_mislead_is_refused_by_name(
    change: Callable[[pd.DataFrame], pd.DataFrame], error: type[AnchorwellError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        evaluate_embeddings(read(change(one_network()), tmp_path)[0])


@pytest.mark.parametrize("column", ["label", "control", "setting"])
def test_a_column_that_is_named_for_something_is_no_feature(column: str, tmp_path: Path) -> None:
    """Numbers of classes among the features would be called rightly by any network."""
    table, own = one_network(), getattr(COLUMNS, column)
    names = {value: str(number) for number, value in enumerate(sorted(set(table[own])))}
    numbers = table[own].map(names).astype(int) if column != "setting" else table[own]
    table.assign(moa_id=numbers).drop(columns=own).to_parquet(tmp_path / "named.parquet")
    value = names["negcon"] if column == "control" else "negcon"
    columns = replace(COLUMNS, **{column: "moa_id"}, control_value=value)
    (wells,) = read_wells(tmp_path / "named.parquet", "", columns)
    np.testing.assert_array_equal(wells.features, table.filter(regex="^e").to_numpy())


def test_classes_called_as_missing_values_are_classes_in_a_csv(tmp_path: Path) -> None:
    """And a column that pandas would read as numbers stays as it is written."""
    table = one_network().replace({"alpha": "NA", "beta": "None", "gamma": "null"}).assign(Metadata_Source="007")
    table = table[table["Metadata_setting"] != "new_lab"]
    table.to_csv(tmp_path / "table.csv", index=False)
    (wells,) = read_wells(tmp_path / "table.csv", "", COLUMNS)
    assert set(wells.about["label"]) == {"", "NA", "None", "null", "delta"}
    assert set(wells.about["lab"]) == {"007"}
    np.testing.assert_allclose(wells.features, table.filter(regex="^e").to_numpy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda lines: ["," + lines[0], *(f"{n},{line}" for n, line in enumerate(lines[1:]))],
            "the column '' is named as row",
        ),
        (lambda lines: [lines[0].replace("e003", "e002"), *lines[1:]], "its header names the column 'e002' twice"),
        (lambda lines: [lines[0], *(f"{n},{line}" for n, line in enumerate(lines[1:]))], "cannot be read as a CSV"),
        (lambda lines: [*lines, "1," * 40], "cannot be read as a CSV"),
        (lambda lines: [*lines[:3], "", lines[3].replace("B0p0", ""), *lines[4:]], "row 5: Metadata_Plate is empty"),
        (lambda lines: lines[:1], "has no rows"),
        (lambda _: [], "cannot be read as a CSV"),
    ],
)
def test_a_csv_that_is_not_as_its_header_says_is_refused_by_name(
    change: Callable[[list[str]], list[str]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("\n".join(change(one_network().to_csv(index=False).splitlines())))
    with pytest.raises(LayoutError, match=rf"table\.csv.*{re.escape(words)}"):
        read_wells(path, "", COLUMNS)


def test_columns_of_parquet_are_read_as_they_would_be_from_a_csv(tmp_path: Path) -> None:
    """Labels as categories, plates as numbers of which some batches have none."""
    table = one_network()
    plates = {name: 1_000.0 + number for number, name in enumerate(sorted(set(table["Metadata_Plate"])))}
    table = table.assign(
        Metadata_label=table["Metadata_label"].replace("", None).astype("category"),
        Metadata_Plate=table["Metadata_Plate"].map(plates), Metadata_seed=3.0,
    )  # fmt: skip
    (wells,) = read(table, tmp_path)
    assert wells.seed == 3
    assert set(wells.about["plate"]) == {f"{plate:.0f}" for plate in plates.values()}
    assert set(wells.about["label"]) == {"", *made_up.CLASSES}
    assert "plate 1000 well A01" in wells.at(0)


def test_a_table_that_cannot_be_scored_is_named(tmp_path: Path) -> None:
    relabelled(one_network(), "Metadata_pert_type", "trt", Plate="B7p2").to_parquet(tmp_path / "table.parquet")
    with pytest.raises(NoControlsError, match=r"table\.parquet: plate B7p2 of batch B7 has no control"):
        write_baselines(tmp_path / "table.parquet", tmp_path, "", COLUMNS)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(LayoutError, match=r"table\.parquet cannot be read as Parquet"):
        write_baselines(tmp_path / "table.parquet", tmp_path, "", COLUMNS)


def test_a_scoring_that_is_stopped_leaves_no_cells_beside_other_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_network().to_parquet(tmp_path / "table.parquet")
    write_baselines(tmp_path / "table.parquet", tmp_path, "", COLUMNS)
    written: list[str] = []

    def full(path: Path, _content: bytes) -> None:
        written.append(path.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.embeddings.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write_baselines(tmp_path / "table.parquet", tmp_path, "", COLUMNS)
    assert written == ["predictions-embedding.parquet"]
    assert not (tmp_path / "cells-embedding.parquet").exists()


def test_a_training_well_under_another_plates_name_is_found(tmp_path: Path) -> None:
    table = one_network()
    features = [f"e{number:03d}" for number in range(12)]
    train, test = table.index[table["Metadata_setting"] == "train"][10], table.index[table["Metadata_Plate"] == "B9p3"][10]
    table.loc[test, features] = table.loc[train, features].to_numpy()
    with pytest.raises(LayoutError, match="plate B9p3 well A11 has the features of plate B0p0 well A11, which trains"):
        read(table, tmp_path)


def test_batches_that_are_not_there_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="has no batch B77; it has B0, B1"):
        read(one_network(), tmp_path, train_batches=("B0", "B77"))


def test_a_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not '\.\./dino'"):
        write_baselines(tmp_path / "table.parquet", tmp_path, "../dino", COLUMNS)


def test_shares_of_variance_tell_batches_from_classes() -> None:
    table = made_up.embeddings(each=10)
    test = table[table["Metadata_setting"] != "train"]
    shares = {name: variance_shares(rows) for name, rows in test.groupby("Metadata_method")}
    assert shares["erm"][1] > 0.7
    assert abs(shares["cs-arm-bn"][1]) < 0.05
    assert shares["cs-arm-bn"][0] > shares["erm"][0]
