"""JUMP's published tables become an index, and all that is wrong with them is told at once."""

import gzip
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from model.errors import LayoutError
from model.layout import well_name
from tests.service.s3 import s3
from training.index import KEYS, index_tree, path_column, read_index
from training.jump import POSITIVE_CONTROLS, Selection, write_jump_index
from training.objects import ObjectAccess, Objects
from training.simulate import CHANNELS, NEGATIVE_CONTROL, SimulationPlan, simulate
from training.tables import Problem

CONTROLS = "Metadata_JCP2022,Metadata_pert_type,Metadata_Name,Metadata_modality\nJCP2022_999999,empty,Empty,any\n" + "".join(
    f"{compound},{kind},{name},compound\n"
    for compound, kind, name in [
        (NEGATIVE_CONTROL, "negcon", "DMSO"),
        *((c, "poscon", name) for c, (name, _) in POSITIVE_CONTROLS.items()),
    ]
)
PLATES = """Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_PlateType
source_3,B1,P1,COMPOUND
source_3,B1,P2,TARGET2
source_8,B2,P3,COMPOUND
source_9,B3,P4,COMPOUND
"""
NAMES = ("A01", "A02", "A03", "B01")
COMPOUNDS = (NEGATIVE_CONTROL, "JCP2022_025848", "JCP2022_000001", "JCP2022_046054")
EVERYTHING = Selection()
TEMPLATE = "{Metadata_Source}/{Metadata_Batch}/{Metadata_Plate}/load_data.csv"


def wells_csv(plates: dict[str, str]) -> str:
    """Four wells a plate: DMSO, two positive controls, and a compound of the library."""
    rows = [
        f"{source},{plate},{well},{c}" for plate, source in plates.items() for well, c in zip(NAMES, COMPOUNDS, strict=True)
    ]
    return "\n".join(["Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_JCP2022", *rows]) + "\n"


def load_data_csv(source: str, batch: str, plate: str) -> str:
    """Two sites of every well, as the real table has them: URLs first."""
    columns = [*(f"URL_Orig{channel}" for channel in CHANNELS), "Metadata_Source", "Metadata_Batch", "Metadata_Plate",
               "Metadata_Well", "Metadata_Site", "Metadata_PositionX", "Metadata_ImageResolutionX"]  # fmt: skip
    rows = [
        [*(f"s3://gallery/{plate}/{well}_{site}_{channel}.tiff" for channel in CHANNELS),
         source, batch, plate, well, str(site), "0.1", "5.98e-07"]
        for well in NAMES for site in (1, 2)
    ]  # fmt: skip
    return "\n".join(map(",".join, [columns, *rows])) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tables").mkdir()
    with gzip.open(tmp_path / "tables" / "plate.csv.gz", "wt") as file:
        file.write(PLATES)
    with gzip.open(tmp_path / "tables" / "well.csv.gz", "wt") as file:
        file.write(wells_csv({"P1": "source_3", "P2": "source_3", "P3": "source_8", "P4": "source_9"}))
    (tmp_path / "tables" / "perturbation_control.csv").write_text(CONTROLS)
    for line in PLATES.splitlines()[1:]:
        source, batch, plate, _ = line.split(",")
        path = tmp_path / "load" / source / batch / plate / "load_data.csv"
        path.parent.mkdir(parents=True)
        path.write_text(load_data_csv(source, batch, plate))
    return tmp_path


def indexed(
    folder: Path,
    selection: Selection = EVERYTHING,
    *,
    compounds: Path | None = None,
    load_data: list[str] | None = None,
    channels: tuple[str, ...] = CHANNELS,
) -> tuple[pd.DataFrame, list[Problem]]:
    places = load_data or [str(folder / "load" / TEMPLATE)]
    out = folder / "index.parquet"
    warnings = write_jump_index(folder / "tables", places, channels, compounds, selection, Objects(), out)
    return read_index(out), warnings


def refused(folder: Path, selection: Selection = EVERYTHING, **kwargs: object) -> list[str]:
    """What is told of tables that cannot be indexed."""
    with pytest.raises(LayoutError) as told:
        indexed(folder, selection, **kwargs)  # type: ignore[arg-type]
    assert not (folder / "index.parquet").exists()
    first, *lines = told.value.detail.replace(f"{folder}/", "").splitlines()
    assert first == f"{len(lines)} problems in the tables:"
    return lines


def changed(path: Path, *changes: tuple[str, str]) -> None:
    """Replace text in a table, once each."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        text = file.read()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    with opened(path, "wt") as file:
        file.write(text)


# --- what is indexed -------------------------------------------------------------------------------------------------


def test_the_positive_controls_of_chosen_plates_are_labelled_by_their_mechanism(folder: Path) -> None:
    index, warnings = indexed(folder, Selection(sources=("source_3", "source_8"), plate_types=("COMPOUND",)))
    assert sorted(index["Metadata_Plate"].unique()) == ["P1", "P3"]
    by_well = index.drop_duplicates(["Metadata_Plate", "Metadata_Well"]).set_index("Metadata_Well")
    assert set(by_well.loc["A01", "role"]) == {"control"}
    assert set(by_well.loc["A02", "label"]) == {"glucocorticoid receptor"}
    assert set(by_well.loc["B01", "label"]) == {"NAMPT"}
    assert "A03" not in by_well.index
    assert len(index) == 2 * 3 * 2
    assert index["pixel_size_um"].tolist() == pytest.approx([0.598] * 12)
    assert index["Path_Mito"].iloc[0] == "s3://gallery/P1/A01_1_Mito.tiff"
    assert [str(warning).partition(": ")[2] for warning in warnings] == [
        "1 compounds are in no other table: JCP2022_000001",
        *(f"no image of label {label}" for _, label in POSITIVE_CONTROLS.values() if label not in set(index["label"])),
    ]


def test_published_columns_ride_along(folder: Path) -> None:
    index, _ = indexed(folder, Selection(plates=("P1",)))
    assert set(index["Metadata_PlateType"]) == {"COMPOUND"}
    assert set(index["Metadata_JCP2022"]) == {NEGATIVE_CONTROL, "JCP2022_025848", "JCP2022_046054"}
    assert set(index["Metadata_pert_type"]) == {"negcon", "poscon"}
    assert set(index["Metadata_Name"]) == {"DMSO", "dexamethasone", "FK-866"}
    assert set(index["Metadata_PositionX"]) == {"0.1"}


def test_every_well_is_kept_when_asked_for(folder: Path) -> None:
    index, _ = indexed(folder, Selection(plates=("P1",), all_wells=True))
    assert len(index) == 8
    assert set(index.loc[index["Metadata_Well"] == "A03", ["label", "role", "Metadata_pert_type"]].iloc[0]) == {
        "",
        "treated",
        "trt",
    }


def test_compounds_of_a_table_are_labelled_by_it(folder: Path) -> None:
    (folder / "moa.csv").write_text(
        "Metadata_JCP2022,moa,note\nJCP2022_000001,tubulin,x\nJCP2022_025848,,y\nJCP2022_046054,NAMPT,\n"
    )
    index, _ = indexed(folder, compounds=folder / "moa.csv")
    assert set(index.loc[index["role"] == "treated", "label"]) == {"tubulin", "NAMPT"}
    only, _ = indexed(folder, Selection(labels=("tubulin",)), compounds=folder / "moa.csv")
    assert set(only.loc[only["role"] == "treated", "label"]) == {"tubulin"}


def test_compounds_may_be_named_by_their_inchikey(folder: Path) -> None:
    (folder / "moa.tsv").write_text("InChIKey\tmoa\nAAA\ttubulin\nZZZ\tHDAC\n")
    assert "only compound.csv.gz explains" in refused(folder, compounds=folder / "moa.tsv")[0]
    (folder / "tables" / "compound.csv").write_text(
        "Metadata_JCP2022,Metadata_InChIKey,Metadata_SMILES\nJCP2022_000001,AAA,C\nJCP2022_000002,BBB,CC\n"
    )
    index, warnings = indexed(folder, compounds=folder / "moa.tsv")
    assert set(index.loc[index["role"] == "treated", "label"]) == {"tubulin"}
    assert set(index.loc[index["role"] == "treated", "Metadata_SMILES"]) == {"C"}
    assert f"{folder}/moa.tsv row 3: 1 compounds are not in compound.csv" in map(str, warnings)


def test_load_data_may_be_parquet_with_paths_and_file_names_in_one_file(folder: Path) -> None:
    tables = [pd.read_csv(path, dtype=str) for path in sorted((folder / "load").rglob("load_data.csv"))]
    rows = pd.concat(tables, ignore_index=True).drop(columns=["Metadata_Source", "Metadata_Batch"])
    for channel in CHANNELS:
        places = rows.pop(f"URL_Orig{channel}").str.rpartition("/")
        rows[f"PathName_Orig{channel}"], rows[f"FileName_Orig{channel}"] = places[0] + "/", places[2]
    rows.to_parquet(folder / "all.parquet")
    expected, _ = indexed(folder)
    found, _ = indexed(folder, load_data=[str(folder / "all.parquet")])
    pd.testing.assert_frame_equal(found[expected.columns], expected)


def test_a_folder_is_searched_and_one_table_of_each_is_read(folder: Path) -> None:
    expected, _ = indexed(folder)
    path = folder / "load" / "source_3" / "B1" / "P1" / "load_data.csv"
    pd.read_csv(path, dtype=str).to_parquet(path.parent / "load_data_with_illum.parquet")
    path.write_text("not read\n")
    found, _ = indexed(folder, load_data=[str(folder / "load")])
    pd.testing.assert_frame_equal(found, expected)


def test_relative_paths_are_relative_to_their_table(folder: Path) -> None:
    path = folder / "load" / "source_3" / "B1" / "P1" / "load_data.csv"
    rows = pd.read_csv(path, dtype=str)
    for channel in CHANNELS:
        rows[f"FileName_Orig{channel}"] = rows.pop(f"URL_Orig{channel}").str.rpartition("/")[2]
        rows[f"PathName_Orig{channel}"] = "../images"
    rows.to_csv(path, index=False)
    index, _ = indexed(folder, Selection(plates=("P1",)))
    assert index["Path_DNA"].iloc[0] == str(folder / "load" / "source_3" / "B1" / "images" / "A01_1_DNA.tiff")


def test_simulated_plates_by_jumps_tables_are_those_of_the_folder_tree(tmp_path: Path) -> None:
    plan = SimulationPlan(labs=1, batches=1, plates=1, sites=1, size_px=48, wells_per_class=1, inactive_wells=1)
    simulate(plan, tmp_path / "plates")
    metadata, out = tmp_path / "plates" / "metadata", tmp_path / "jump.parquet"
    labels = metadata / "moa.csv"
    write_jump_index(metadata, [str(tmp_path / "plates")], CHANNELS, labels, EVERYTHING, Objects(ObjectAccess()), out)
    same = [*KEYS, "role", "pixel_size_um", *(path_column(channel) for channel in CHANNELS)]
    jump, tree = read_index(out), index_tree(tmp_path / "plates", CHANNELS)
    pd.testing.assert_frame_equal(jump[same], tree[same])
    treated = jump["role"] == "treated"
    pd.testing.assert_series_equal(jump.loc[treated, "label"], tree.loc[treated, "label"])


def test_pixel_sizes_that_load_data_lacks_are_the_microscopes(folder: Path) -> None:
    changed(folder / "load" / "source_8" / "B2" / "P3" / "load_data.csv", *[("5.98e-07", "")] * 8)
    assert indexed(folder, Selection(plates=("P3",)))[0]["pixel_size_um"].isna().all()
    (folder / "tables" / "microscope_config.csv").write_text(
        "Metadata_Source,Metadata_Pixel_Size_Microns\nsource_8,0.7032\n"
    )
    index, _ = indexed(folder)
    sizes = index.groupby("Metadata_Plate")["pixel_size_um"].first()
    assert sizes.to_dict() == pytest.approx({"P1": 0.598, "P2": 0.598, "P3": 0.7032, "P4": 0.598})


def microscopes(folder: Path, rows: str) -> None:
    """A microscope table, and LoadData of P3 that states no pixel size."""
    changed(folder / "load" / "source_8" / "B2" / "P3" / "load_data.csv", *[("5.98e-07", "")] * 8)
    (folder / "tables" / "microscope_config.csv").write_text(f"Metadata_Source,Metadata_Pixel_Size_Microns\n{rows}")


def test_a_microscope_table_may_number_the_sources(folder: Path) -> None:
    microscopes(folder, "3,0.6\n8,0.7032\n")
    index, _ = indexed(folder, Selection(plates=("P3",)))
    assert index["pixel_size_um"].tolist() == pytest.approx([0.7032] * 6)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("source_8,0.6\nsource_8,0.7\n", "row 3: the microscope of source_8 is in row 2 already"),
        ("source_8,0.6\n8,0.6\n", "row 3: the microscope of source_8 is in row 2 already"),
        *(
            (f"source_8,{cell}\n", f"row 2: Metadata_Pixel_Size_Microns '{cell}' of source_8 is no pixel size in µm")
            for cell in ("598", "-0.6", "0.6 um", "0", "inf", "nan")
        ),
    ],
)
def test_a_microscopes_pixel_size_that_is_none_or_there_twice_is_told(folder: Path, rows: str, told: str) -> None:
    microscopes(folder, rows)
    assert refused(folder, Selection(plates=("P3",))) == [f"tables/microscope_config.csv {told}"]


@pytest.mark.parametrize(("metres", "listed"), [("1.3e-06", "1.3, 0.598"), ("", "none, 0.598")])
def test_a_plate_has_one_pixel_size(folder: Path, metres: str, listed: str) -> None:
    path = "load/source_8/B2/P3/load_data.csv"
    changed(folder / path, ("5.98e-07", metres))
    assert refused(folder, Selection(plates=("P3",))) == [
        f"{path} rows 2-9: plate P3 has several pixel sizes (µm): {listed}"
    ]


def test_space_around_cells_means_nothing(folder: Path) -> None:
    (folder / "moa.csv").write_text("Metadata_JCP2022,label\nJCP2022_000001 ,tubulin\nJCP2022_046054,NAMPT\n")
    expected, _ = indexed(folder, compounds=folder / "moa.csv")
    (folder / "moa.csv").write_text(" Metadata_JCP2022,label\nJCP2022_000001, tubulin \nJCP2022_046054 ,NAMPT\n")
    changed(folder / "tables" / "well.csv.gz", *[(f"{NEGATIVE_CONTROL}\n", f"{NEGATIVE_CONTROL} \n")] * 2)
    changed(folder / "tables" / "plate.csv.gz", ("B1,P1", "B1, P1"))
    changed(folder / "tables" / "perturbation_control.csv", ("negcon", "negcon "))
    found, _ = indexed(folder, compounds=folder / "moa.csv")
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("kind", ["Negcon", "control", ""])
def test_a_kind_of_control_that_is_not_known_is_told(folder: Path, kind: str) -> None:
    changed(folder / "tables" / "perturbation_control.csv", ("negcon", kind))
    say = f"{NEGATIVE_CONTROL} has the pert_type '{kind}': expected negcon, poscon, empty or trt"
    assert refused(folder) == [f"tables/perturbation_control.csv row 3: {say}"]


@pytest.mark.parametrize("kind", ["poscon_cp", "poscon_diverse", "poscon_orf", "empty", "trt"])
def test_published_kinds_of_control_are_known(folder: Path, kind: str) -> None:
    changed(folder / "tables" / "perturbation_control.csv", ("JCP2022_046054,poscon", f"JCP2022_046054,{kind}"))
    index, _ = indexed(folder, Selection(plates=("P1",)))
    assert set(index.loc[index["Metadata_Well"] == "B01", "Metadata_pert_type"]) == {kind}


def test_a_label_of_a_negative_control_is_told(folder: Path) -> None:
    changed(folder / "tables" / "perturbation_control.csv", ("JCP2022_046054,poscon", "JCP2022_046054,negcon"))
    (folder / "moa.csv").write_text("Metadata_JCP2022,label\nJCP2022_000001,a\nJCP2022_046054,b\n")
    assert refused(folder, compounds=folder / "moa.csv") == [
        "moa.csv row 3: JCP2022_046054 is a negative control and has the label b"
    ]
    assert refused(folder) == [
        "the built-in table of positive controls: JCP2022_046054 is a negative control by the table of controls"
    ]


@pytest.mark.parametrize("table", ["compound", "orf", "crispr"])
def test_compounds_that_a_table_knows_are_not_warned_of(folder: Path, table: str) -> None:
    say = f"{folder}/tables/well.csv.gz rows 4, 8, 12, 16: 1 compounds are in no other table: JCP2022_000001"
    assert say in map(str, indexed(folder)[1])
    (folder / "tables" / f"{table}.csv").write_text("Metadata_JCP2022\nJCP2022_000001\n")
    assert say not in map(str, indexed(folder)[1])


def test_tables_are_read_from_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = indexed(folder)
    with s3(monkeypatch) as server:
        for path in (folder / "load").rglob("load_data.csv"):
            server.objects[f"/gallery/{path.relative_to(folder)}"] = path.read_bytes()
        server.hiccups = 2
        places = [f"s3://gallery/load/{TEMPLATE}"]
        access = ObjectAccess(anonymous=True)
        warnings = write_jump_index(
            folder / "tables", places, CHANNELS, None, Selection(), Objects(access), folder / "s3.parquet"
        )
        pd.testing.assert_frame_equal(read_index(folder / "s3.parquet"), expected)
        del server.objects["/gallery/load/source_8/B2/P3/load_data.csv"]
        warnings = write_jump_index(
            folder / "tables", places, CHANNELS, None, Selection(), Objects(access), folder / "s3.parquet"
        )
    assert "s3://gallery/load/source_8/B2/P3/load_data.csv: it is not there" in map(str, warnings)
    assert f"{folder}/tables/plate.csv.gz: plate P3 has no LoadData: left out" in map(str, warnings)
    assert "P3" not in set(read_index(folder / "s3.parquet")["Metadata_Plate"])


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once_with_file_and_rows(folder: Path) -> None:
    changed(folder / "tables" / "plate.csv.gz", ("source_9,B3,P4", "source_3,B1,P1"))
    changed(
        folder / "tables" / "well.csv.gz", ("P1,A02", "P1,A01"), ("P2,B01", "P2,Z99"), ("P3,A01,JCP2022_033924", "P3,A01,")
    )
    path = folder / "load" / "source_8" / "B2" / "P3" / "load_data.csv"
    changed(
        path,
        ("s3://gallery/P3/A02_1_ER.tiff", ""), ("s3://gallery/P3/A02_2_ER.tiff", "s3://gallery/P3/A02_2_DNA.tiff"),
        ("A03,2,0.1", "A03,one,0.1"), ("B01,1,0.1", "B01,2,0.1"), ("B2,P3,A01,2", "B7,P3,A01,2"),
        ("A01,1,0.1,5.98e-07", "A01,1,0.1,0.598"),
    )  # fmt: skip
    load_data = [str(folder / "load" / source) for source in ("source_3/B1/P1", "source_8")]
    load = "load/source_8/B2/P3/load_data.csv"
    assert sorted(refused(folder, load_data=load_data)) == sorted(
        [
            "tables/plate.csv.gz row 5: plate P1 is in row 2 already",
            "tables/well.csv.gz row 10: no Metadata_JCP2022 for well A01 of plate P3",
            "tables/well.csv.gz row 9: 'Z99' is not a well of plate P2: expected A01 to AF48",
            "tables/well.csv.gz row 3: plate and well P1 A01 is in row 2 already",
            "load/source_3/B1/P1/load_data.csv rows 4-5: well A02 of plate P1 has no row in well.csv.gz",
            f"{load} row 3: plate P3 is of Metadata_Batch B2, not B7",
            f"{load} row 7: site 'one' of well A03 is not a whole number",
            f"{load} row 9: plate, well and site P3 B01 2 is in row 8 already",
            f"{load} row 4: no ER image of plate P3 well A02",
            f"{load} row 5: s3://gallery/P3/A02_2_DNA.tiff is named 2 times: one image for several wells, sites or channels",
            f"{load} row 2: Metadata_ImageResolutionX 0.598 of plate P3 is no pixel size in metres",
        ]
    )


def test_rows_of_which_the_same_is_wrong_are_told_together(folder: Path) -> None:
    path = folder / "load" / "source_3" / "B1" / "P1" / "load_data.csv"
    changed(path, *[("source_3,B1", "source_3,B9")] * 3, ("P1,B01,2", "P1,H12,2"))
    assert refused(folder, Selection(plates=("P1",))) == [
        "load/source_3/B1/P1/load_data.csv rows 2-4: plate P1 is of Metadata_Batch B1, not B9",
        "load/source_3/B1/P1/load_data.csv row 9: well H12 of plate P1 has no row in well.csv.gz",
    ]


def test_what_need_not_stop_is_a_warning(folder: Path) -> None:
    changed(
        folder / "tables" / "well.csv.gz",
        ("P1,A01,JCP2022_033924", "P1,A01,JCP2022_999999"),
        ("source_9,P4,A01", "source_9,P7,A01"),
    )
    path = folder / "load" / "source_8" / "B2" / "P3" / "load_data.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if ",B01," not in line))
    (folder / "tables" / "compound.csv").write_text("Metadata_JCP2022,Metadata_InChIKey\nJCP2022_000002,AAA\n")
    index, warnings = indexed(folder, Selection(plates=("P1", "P3")))
    told = [str(warning).replace(f"{folder}/", "") for warning in warnings]
    assert "tables/well.csv.gz row 14: plate P7 is not in the plate table" in told
    assert "tables/plate.csv.gz row 2: plate P1 has no controls in the well table" in told
    assert "tables/well.csv.gz rows 4, 12: 1 compounds are in no other table: JCP2022_000001" in told
    assert "tables/well.csv.gz row 13: no image of 1 wells of plate P3" in told
    assert set(index["Metadata_Plate"]) == {"P1", "P3"}


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        (Selection(sources=("source_99",)), "no Metadata_Source source_99; there are source_3, source_8, source_9"),
        (Selection(plate_types=("POSCON8",)), "no Metadata_PlateType POSCON8; there are COMPOUND, TARGET2"),
        (Selection(plates=("P1",), sources=("source_8",)), "no plate is of all that was asked for"),
        (
            Selection(labels=("magic",)),
            "the built-in table of positive controls: no label magic; there are Aurora kinases, ",
        ),
    ],
)
def test_what_is_not_there_to_be_chosen_is_told(folder: Path, selection: Selection, told: str) -> None:
    assert any(told in line for line in refused(folder, selection))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("JCP2022_000001,a\nJCP2022_000001,b\n", "moa.csv rows 2-3: compound JCP2022_000001 has several labels"),
        ("JCP2022_777777,a\n", "moa.csv row 2: compound JCP2022_777777 is not in compound.csv"),
        (f"{NEGATIVE_CONTROL},a\n", f"moa.csv row 2: {NEGATIVE_CONTROL} is a negative control and has the label a"),
    ],
)
def test_a_label_table_is_checked(folder: Path, table: str, told: str) -> None:
    (folder / "moa.csv").write_text("Metadata_JCP2022,label\n" + table)
    (folder / "tables" / "compound.csv").write_text(f"Metadata_JCP2022\nJCP2022_000001\n{NEGATIVE_CONTROL}\n")
    assert told in refused(folder, compounds=folder / "moa.csv")


def test_tables_without_their_columns_or_that_are_none_are_told(folder: Path) -> None:
    (folder / "tables" / "well.csv.gz").write_bytes(b"no gzip")
    (folder / "tables" / "perturbation_control.csv").write_text("Metadata_JCP2022,kind\n")
    (folder / "tables" / "plate.csv.gz").unlink()
    assert [line.partition(": ")[0] for line in refused(folder)] == [
        "tables", "tables/well.csv.gz", "tables/perturbation_control.csv"
    ]  # fmt: skip


def test_load_data_without_a_channel_or_its_keys_is_told(folder: Path) -> None:
    first, second = (folder / "load" / "source_3" / "B1" / plate / "load_data.csv" for plate in ("P1", "P2"))
    changed(second, ("Metadata_Site", "Site"))
    lines = refused(folder, Selection(sources=("source_3",)), channels=("DNA", "Brightfield"))
    assert (
        lines[0]
        == f"{first.relative_to(folder)}: the LoadData table has no column URL_OrigBrightfield or FileName_OrigBrightfield"
    )
    assert lines[1].startswith(f"{second.relative_to(folder)}: no column Metadata_Site; it has URL_OrigDNA, ")


def test_a_plate_in_two_tables_and_one_that_nobody_knows_are_told(folder: Path) -> None:
    (folder / "more.csv").write_text(load_data_csv("source_3", "B1", "P1"))
    (folder / "stray.csv").write_text(load_data_csv("source_3", "B1", "P77"))
    lines = refused(
        folder, load_data=[str(folder / "load"), str(folder / "more.csv"), str(folder / "stray.csv"), "absent.csv"]
    )
    assert lines == [
        "more.csv rows 2-9: plate P1 is in load/source_3/B1/P1/load_data.csv already",
        "stray.csv rows 2-9: plate 'P77' is not in plate.csv.gz",
        "absent.csv: it is not there",
    ]


# --- the real tables -------------------------------------------------------------------------------------------------


@pytest.fixture
def real_tables(shared_data: Path, tmp_path: Path) -> Path:
    """JUMP's published plate and control tables, with a well table made up in the published format."""
    source = shared_data / "jump_metadata" / "datasets"
    (tmp_path / "tables").mkdir()
    for name in ("plate.csv.gz", "perturbation_control.csv", "microscope_config.csv"):
        (tmp_path / "tables" / name).write_bytes((source / name).read_bytes())
    return tmp_path


def test_the_built_in_controls_are_the_published_ones(shared_data: Path) -> None:
    table = pd.read_csv(shared_data / "jump_metadata" / "datasets" / "perturbation_control.csv").set_index(
        "Metadata_JCP2022"
    )
    compounds = table[table["Metadata_modality"] == "compound"]
    poscon = compounds.loc[compounds["Metadata_pert_type"] == "poscon", "Metadata_Name"]
    assert poscon.to_dict() == {compound: name for compound, (name, _) in POSITIVE_CONTROLS.items()}
    assert compounds.loc[NEGATIVE_CONTROL, "Metadata_pert_type"] == "negcon"


def test_the_real_load_data_is_indexed(real_tables: Path, shared_data: Path) -> None:
    load_data = shared_data / "jump_metadata" / "load_data_example" / "load_data.csv"
    (real_tables / "tables" / "well.csv").write_text(
        "Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_JCP2022\nsource_4,BR00117035,A01,JCP2022_033924\n"
    )
    index, _ = indexed(real_tables, Selection(sources=("source_4",)), load_data=[str(load_data)])
    (row,) = index.to_dict("records")
    assert (row["Metadata_Batch"], row["Metadata_PlateType"], row["role"]) == ("2021_04_26_Batch1", "ORF", "control")
    assert row["pixel_size_um"] == pytest.approx(0.5979760809567617)
    assert row["Path_DNA"].endswith("Images/r01c01f01p01-ch5sk1fk1fl1.tiff")
    assert row["Metadata_ChannelName"] == "HOECHST 33342"


def test_a_thousand_real_plates_are_indexed_in_seconds_and_flat_memory(real_tables: Path) -> None:
    plates = pd.read_csv(real_tables / "tables" / "plate.csv.gz", dtype=str)
    plates = plates[plates["Metadata_PlateType"] == "COMPOUND"]
    names = [well_name(row, column) for row in range(16) for column in range(24)]
    compounds = [*POSITIVE_CONTROLS, *[NEGATIVE_CONTROL] * 30, *(f"JCP2022_{number:06d}" for number in range(346))]
    wells = pd.concat(
        [
            plates[["Metadata_Source", "Metadata_Plate"]].assign(Metadata_Well=well, Metadata_JCP2022=compound)
            for well, compound in zip(names, compounds, strict=True)
        ]
    )
    wells.to_csv(real_tables / "tables" / "well.csv.gz", index=False, compression={"method": "gzip", "compresslevel": 1})
    few = plates[plates["Metadata_Source"] == "source_8"].head(20)
    for number, (_, row) in enumerate(few.iterrows()):
        path = real_tables / "load" / f"{number}" / "load_data.csv"
        path.parent.mkdir(parents=True)
        text = [
            ",".join(
                [
                    *(f"s3://g/{row['Metadata_Plate']}/{well}_{channel}" for channel in CHANNELS),
                    row["Metadata_Plate"],
                    well,
                    "1",
                ]
            )
            for well in names
        ]
        header = [*(f"URL_Orig{channel}" for channel in CHANNELS), "Metadata_Plate", "Metadata_Well", "Metadata_Site"]
        path.write_text("\n".join([",".join(header), *text]) + "\n")
    started = time.process_time()
    index, warnings = indexed(
        real_tables,
        Selection(sources=("source_3", "source_8"), plate_types=("COMPOUND",)),
        load_data=[str(real_tables / "load")],
    )
    assert time.process_time() - started < 30
    assert len(index) == 20 * 38
    assert set(np.round(index["pixel_size_um"], 4)) == {0.7032}
    assert sum("has no LoadData" in str(warning) for warning in warnings) == 237 + 199 - 20
