"""Screens without a server: what stands in the index comes out answered, as a service would answer it."""

import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from pyarrow import csv, parquet

from model.errors import LayoutError
from model.layout import Role
from service.app import compose
from service.blobs import open_blobs
from service.index import ScreenIndex
from service.screen import Outcome, Screener, answered, folder_of, part_of, summary
from tests.service.conftest import inline_decoder, running
from tests.service.plates import CHANNELS, FakeEngine, fake_bundle, plane, tiff
from tests.service.s3 import s3

CONTROLS, TREATED = ("A01", "B01", "C01", "D01"), ("E05", "F06", "G07")
ROOT = Path(__file__).resolve().parents[2]


def rows_of(folder, plate, wells=(*CONTROLS, *TREATED), sites=(1, 2)):
    """Write a plate's files and return its rows, paths relative to the folder."""
    rows = []
    for well in wells:
        for site in sites:
            paths = {}
            for channel in CHANNELS:
                path = folder / f"{plate.replace('/', '-')}_{well}_{site}_{channel}.tif"
                path.write_bytes(tiff(plane((plate, well, site, channel))))
                paths[f"Path_{channel}"] = path.name
            role = "control" if well in CONTROLS else "treated"
            names = {"Metadata_Source": "lab", "Metadata_Batch": "b1", "Metadata_Plate": plate, "Metadata_Well": well}
            rows.append({**names, "Metadata_Site": site, "role": role, "label": f"of {well}", "seen": site, **paths})
    return rows


def written(folder, rows, name="index.parquet"):
    path, table = folder / name, pa.Table.from_pylist(rows)
    if name.endswith(".csv"):
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    return path


@pytest.fixture
def rows(tmp_path):
    return [row for plate in ("P1", "P 2/b", "P3") for row in rows_of(tmp_path, plate)]


@contextmanager
def screening(settings, out, engine=None, *, fetched=False):
    composition = compose(settings, engine=engine or FakeEngine(), decoder=inline_decoder(settings))
    served = composition.served
    spool = settings.data / "spool"
    to, limits = open_blobs(str(out)), (served.max_plane_bytes, settings.image_limits)
    yield Screener(served.batches, served.kept, to, spool, *limits, fetched_by_decoder=fetched)
    composition.end()


def screened(settings, out, index, engine=None, *, fetched=False):
    with screening(settings, out, engine, fetched=fetched) as screener:
        outcomes = {outcome.plate: outcome for outcome in answered(screener.answer, index.plates(), 2)}
        assert screener.kept.storage.of("screen").page("", 10) == [], "nothing of a plate is left behind"
    return outcomes


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.parquet", "index.csv"])
def test_an_index_is_read_plate_by_plate(name, rows, tmp_path):
    index = ScreenIndex.open(written(tmp_path, rows, name))
    assert index.names == ("P1", "P 2/b", "P3")
    plates = list(index.plates())
    assert [plate.name for plate in plates] == list(index.names)
    planes = plates[1].planes(CHANNELS, Role.CONTROL)
    assert {key.well for key in planes} == set(CONTROLS)
    assert planes[min(planes)] == f"{tmp_path}/{rows[14]['Path_' + min(planes).channel]}"
    platemap = plates[0].platemap
    assert platemap.wells(Role.CONTROL) == set(CONTROLS)
    assert "label" in platemap.columns
    assert "seen" not in platemap.columns, "what differs from site to site is nothing of a well's"


def test_the_same_rows_in_either_form_are_the_same_plate(rows, tmp_path):
    one, other = (ScreenIndex.open(written(tmp_path, rows, name)) for name in ("index.parquet", "index.csv"))
    assert [plate.digest for plate in one.plates()] == [plate.digest for plate in other.plates()]


def test_roles_are_read_in_the_words_of_plate_maps(rows, tmp_path):
    words = {"control": "negcon", "treated": "trt"}
    told = [{**row, "role": words[row["role"]]} for row in rows]
    one, other = (next(ScreenIndex.open(written(tmp_path, some, name)).plates()) for some, name in
                  ((rows, "a.parquet"), (told, "b.parquet")))  # fmt: skip
    assert other.platemap.roles == one.platemap.roles
    assert other.planes(CHANNELS, Role.CONTROL) == one.planes(CHANNELS, Role.CONTROL)


def test_rows_that_lie_apart_are_told_of_and_their_plate_comes_once(rows, tmp_path):
    index = ScreenIndex.open(written(tmp_path, [*rows[1:], rows[0]]))
    assert index.apart == {"P1"}
    assert Counter(plate.name for plate in index.plates()) == {"P1": 1, "P 2/b": 1, "P3": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read|has no rows|lacks"),
        (b"Metadata_Plate,role\nP1,control\n", "lacks the columns Metadata_Source"),
        (b"Metadata_Plate;role\nP1;control\n", "lacks the columns .*; its columns are to be separated by commas"),
        (b"PAR1 not really", "lacks|cannot be read"),
    ],
)
def test_what_is_no_index_is_told_as_such(content, says, tmp_path):
    path = tmp_path / "index.csv"
    path.write_bytes(content)
    with pytest.raises(LayoutError, match=says):
        ScreenIndex.open(path)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetched", [False, True])
def test_a_screen_from_object_storage_into_object_storage(fetched, rows, settings, tmp_path, monkeypatch):
    settings = settings.model_copy(update={"keep_control_images": False})  # as the command has it
    near = screened(settings, tmp_path / "near", ScreenIndex.open(written(tmp_path, rows)))
    assert {outcome.state for outcome in near.values()} == {"answered"}
    far = [{**row, **{f"Path_{name}": f"s3://plates/lab/{row[f'Path_{name}']}" for name in CHANNELS}} for row in rows]
    index = ScreenIndex.open(written(tmp_path, far, "far.parquet"))
    with s3(monkeypatch) as server:
        server.objects |= {f"/plates/lab/{path.name}": path.read_bytes() for path in tmp_path.glob("*.tif")}
        del server.objects["/plates/lab/P3_F06_1_DNA.tif"]
        for state in ("answered", "kept"):
            outcomes = screened(settings, "s3://answers/screen", index, fetched=fetched)
            states = {name: outcome.state for name, outcome in outcomes.items()}
            assert states == {"P1": state, "P 2/b": state, "P3": "refused"}, outcomes
        assert "P3_F06_1_DNA.tif" in outcomes["P3"].detail
        assert "/answers/screen/plate=P3/error.json" in server.objects
        for plate in ("P1", "P 2/b"):
            name = f"{folder_of(plate)}/answers.parquet"
            tables = [parquet.read_table(pa.BufferReader(data)).drop(["answered_at"]) for data in
                      (server.objects[f"/answers/screen/{name}"], (tmp_path / "near" / name).read_bytes())]  # fmt: skip
            assert tables[0].equals(tables[1])


def test_every_plate_is_answered_as_a_service_answers_it(rows, settings, tmp_path):
    index, out = ScreenIndex.open(written(tmp_path, rows)), tmp_path / "answers"
    outcomes = screened(settings, out, index)
    assert {outcome.state for outcome in outcomes.values()} == {"answered"}
    found = pads.dataset(out, partitioning="hive", format="parquet", exclude_invalid_files=True).to_table().to_pandas()
    assert sorted(set(found["Metadata_Plate"])) == ["P 2/b", "P1", "P3"]
    assert sorted(found["Metadata_Well"]) == sorted(TREATED * 3)
    assert set(found["Metadata_label"]) == {f"of {well}" for well in TREATED}
    with running(settings.model_copy(update={"data": tmp_path / "served"}), FakeEngine()) as client:
        for plate in ("P1", "P3"):
            for what, wells in (("controls", CONTROLS), ("predict", TREATED)):
                names = [f"{plate}_{well}_{site}_{channel}.tif" for well in wells for site in (1, 2) for channel in CHANNELS]
                files = [("images", (name.removeprefix(f"{plate}_"), (tmp_path / name).read_bytes())) for name in names]
                answer = client.post(f"/batches/{plate}/{what}", files=files)
            for well in answer.json()["wells"]:
                (row,) = found[(found["Metadata_Plate"] == plate) & (found["Metadata_Well"] == well["well"])].to_dict(
                    "records"
                )
                assert row["statistics_id"] == answer.json()["statistics_id"]
                for label, probability in well["probabilities"].items():
                    assert abs(row[f"p_{label}"] - probability) < 1e-5


def test_a_second_run_keeps_what_is_done_and_another_bundle_or_row_does_it_again(rows, settings, tmp_path):
    out, engine = tmp_path / "answers", FakeEngine()
    screened(settings, out, ScreenIndex.open(written(tmp_path, rows)))
    again = screened(settings, out, ScreenIndex.open(written(tmp_path, rows)), engine)
    assert {outcome.state for outcome in again.values()} == {"kept"}
    assert engine.passes == 0
    rows[0]["label"] = "another"
    third = screened(settings, out, ScreenIndex.open(written(tmp_path, rows)))
    assert {plate: outcome.state for plate, outcome in third.items()} == {"P1": "answered", "P 2/b": "kept", "P3": "kept"}
    other = fake_bundle(tmp_path / "other", temperature=2.0)
    fourth = screened(settings.model_copy(update={"bundle": other.path}), out, ScreenIndex.open(written(tmp_path, rows)))
    assert {outcome.state for outcome in fourth.values()} == {"answered"}


def test_a_bad_plate_is_told_of_and_the_others_go_on_and_it_is_tried_again(rows, settings, tmp_path):
    out = tmp_path / "answers"
    files = [tmp_path / rows[place]["Path_DNA"] for place in (14, 16, 18, 20)]  # a site of each control of the second plate
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"II*\0 not an image")
    outcomes = screened(settings, out, ScreenIndex.open(written(tmp_path, rows)))
    assert {plate: outcome.state for plate, outcome in outcomes.items()} == {
        "P1": "answered", "P 2/b": "refused", "P3": "answered"
    }  # fmt: skip
    error = json.loads((out / folder_of("P 2/b") / "error.json").read_text())
    assert error["type"].endswith("too-few-controls")
    assert "0 control wells" in error["detail"]
    assert "A01" in error["detail"]
    for file, data in zip(files, whole, strict=True):
        file.write_bytes(data)
    again = screened(settings, out, ScreenIndex.open(written(tmp_path, rows)))
    assert again["P 2/b"].state == "answered"
    assert not (out / folder_of("P 2/b") / "error.json").exists()


def test_a_well_that_cannot_be_answered_is_left_out_and_told(rows, settings, tmp_path):
    broken, lacking = tmp_path / rows[9]["Path_DNA"], rows[11]
    broken.write_bytes(b"II*\0 not an image")
    lacking |= dict.fromkeys((f"Path_{channel}" for channel in CHANNELS), None)
    out = tmp_path / "answers"
    outcome = screened(settings, out, ScreenIndex.open(written(tmp_path, rows)))["P1"]
    assert (outcome.state, outcome.wells, sorted(outcome.left_out)) == ("answered", 1, ["E05", "F06"])
    report = json.loads((out / "plate=P1" / "report.json").read_text())
    assert report["wells"] == ["G07"]
    assert "E05" in report["wells_left_out"]
    assert "site 2 has no image of" in report["wells_left_out"]["F06"]


def test_a_file_that_is_not_there_refuses_its_plate_for_it_may_be_there_next_time(rows, settings, tmp_path):
    (tmp_path / rows[9]["Path_DNA"]).unlink()
    outcomes = screened(settings, tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows)))
    assert outcomes["P1"].state == "refused"
    assert "cannot be read: No such file" in outcomes["P1"].detail
    assert outcomes["P3"].state == "answered"


def test_what_was_answered_before_does_not_stand_beside_a_refusal(rows, settings, tmp_path):
    out, index = tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows))
    screened(settings, out, index)
    (tmp_path / rows[9]["Path_DNA"]).unlink()
    again = screened(settings, out, index)
    assert {plate: outcome.state for plate, outcome in again.items()} == {"P1": "refused", "P 2/b": "kept", "P3": "kept"}
    assert [path.name for path in (out / "plate=P1").iterdir()] == ["error.json"]


def test_a_file_that_was_cut_short_and_is_whole_now_is_answered_anew(rows, settings, tmp_path):
    out, index, broken = tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows)), tmp_path / rows[9]["Path_DNA"]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    first, second = (screened(settings, out, index)["P1"] for _ in range(2))
    assert (first.state, second.state) == ("answered", "kept")
    assert first.left_out == second.left_out != {}, "told again of what is kept, too"
    broken.write_bytes(whole)
    third = screened(settings, out, index)["P1"]
    assert (third.state, third.wells, third.left_out) == ("answered", 3, {})


def test_answers_that_are_not_those_of_their_report_are_answered_anew(rows, settings, tmp_path):
    out, index = tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows))
    screened(settings, out, index)
    (out / "plate=P1" / "answers.parquet").write_bytes((out / "plate=P3" / "answers.parquet").read_bytes())
    (out / "plate=P3" / "answers.parquet").unlink()
    again = screened(settings, out, index)
    assert {plate: outcome.state for plate, outcome in again.items()} == {
        "P1": "answered", "P 2/b": "kept", "P3": "answered"
    }  # fmt: skip


def test_two_plates_of_one_name_are_not_taken_for_one(tmp_path, settings):
    rows = rows_of(tmp_path, "P1")
    for row in rows[7:]:
        row["Metadata_Batch"] = "b2"
    outcome = screened(settings, tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows)))["P1"]
    assert outcome.state == "refused"
    assert "several batches" in outcome.detail


def test_a_fault_that_nobody_thought_of_refuses_its_plate_alone(rows, settings, tmp_path):
    with screening(settings, tmp_path / "answers") as screener:
        first, *others = ScreenIndex.open(written(tmp_path, rows)).plates()
        outcomes = [screener.answer(plate) for plate in (replace(first, rows=[{**first.rows[0], "role": []}]), *others)]
    assert [outcome.state for outcome in outcomes] == ["refused", "answered", "answered"]


def test_names_that_are_too_long_for_a_folder_are_cut(rows, tmp_path, settings):
    names = ["プ" * 90 + end for end in ("a", "b")]
    for row in rows:
        row["Metadata_Plate"] = {"P1": names[0], "P3": names[1]}.get(row["Metadata_Plate"], row["Metadata_Plate"])
    outcomes = screened(settings, tmp_path / "answers", ScreenIndex.open(written(tmp_path, rows)))
    assert {outcome.state for outcome in outcomes.values()} == {"answered"}
    assert len({folder_of(name) for name in names}) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"role": "blank"}, "the role 'blank', which is neither"),
        ({"role": "panel"}, "the role 'panel', which is neither"),
        ({"pixel_size_um": "0,656"}, "no one pixel size"),
        ({"Path_DNA": "gs://bucket/key"}, "neither an s3:// URL nor a path"),
        ({"Metadata_Well": "ZZ99"}, "ZZ99"),
        ({"Metadata_Site": 2}, "two files|Two files|claim|site 2"),
        ({"Path_DNA": "P1_B01_1_DNA.tif"}, "given for two planes"),
        ({"role": "treated"}, "both control and treated"),
    ],
)
def test_a_row_that_says_what_no_plate_has_refuses_its_plate(change, says, rows, settings, tmp_path):
    for row in rows if "pixel_size_um" in change else rows[:1]:
        row.update(change)
    with screening(settings, tmp_path / "answers") as screener:
        first = next(ScreenIndex.open(written(tmp_path, rows)).plates())
        outcome = screener.answer(first)
    assert outcome.state == "refused"
    assert any(word in outcome.detail for word in says.split("|"))


def test_parts_share_a_screen(rows, tmp_path):
    index = ScreenIndex.open(written(tmp_path, rows))
    parts = [[plate.name for plate in part_of(index.plates(), part, 2)] for part in (1, 2)]
    assert parts == [["P1", "P3"], ["P 2/b"]]


def test_what_ends_a_run_is_raised_and_begins_nothing_more(rows, tmp_path):
    begun = []

    def answer(plate):
        begun.append(plate.name)
        raise RuntimeError(plate.name)

    with pytest.raises(RuntimeError):
        list(answered(answer, ScreenIndex.open(written(tmp_path, rows)).plates(), 1))
    assert len(begun) <= 2


def test_outcomes_come_as_they_are_done(rows, tmp_path):
    found = answered(lambda plate: Outcome(plate.name, "kept"), ScreenIndex.open(written(tmp_path, rows)).plates(), 2)
    assert sorted(outcome.plate for outcome in found) == ["P 2/b", "P1", "P3"]


def test_a_plate_that_is_unlike_training_is_told_of_each_time(rows, settings, tmp_path):
    for row in rows[:8]:
        for channel in CHANNELS:
            dark = plane((row["Path_DNA"], channel), brightness=0.02)
            (tmp_path / row[f"Path_{channel}"]).write_bytes(tiff(dark))
    index, out = ScreenIndex.open(written(tmp_path, rows)), tmp_path / "answers"
    first, second = (screened(settings, out, index)["P1"] for _ in range(2))
    report = json.loads((out / "plate=P1" / "report.json").read_text())
    assert report["out_of_range"]
    assert list(first.notices) == list(second.notices) == report["notices"] != []


def test_the_summary_tells_what_is_to_be_read_before_the_answers(rows, tmp_path):
    index = ScreenIndex.open(written(tmp_path, rows))
    outcomes = [
        Outcome("P1", "answered", 3, {"E05": "blank"}, notices=("far from training",)),
        Outcome("P 2/b", "refused", detail="no controls"),
        Outcome("P3", "kept", 3, {}),
    ]
    told = json.loads(summary(index, outcomes))
    assert (told["answered"], told["kept"], told["refused"]) == (1, 1, 1)
    assert told["notices"] == {"P1": ["far from training"]}
    assert (told["wells_left_out"], told["refused_plates"]) == ({"P1": {"E05": "blank"}}, {"P 2/b": "no controls"})


# --- the command -----------------------------------------------------------------------------------------------------


def screen_command(*options):
    command = [str(Path(sys.executable).with_name("anchorwell")), "screen", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_the_command_answers_simulated_plates_and_says_what_became_of_them(tmp_path):
    from training.index import index_tree, write_index
    from training.simulate import SimulationPlan, simulate

    plan = SimulationPlan(labs=1, batches=1, plates=2, seed=3, sites=1, wells_per_class=1, inactive_wells=0, size_px=256)
    simulate(plan, tmp_path / "plates")
    index = index_tree(tmp_path / "plates", ("DNA", "ER", "RNA", "AGP", "Mito"))
    write_index(index, tmp_path / "index.csv")
    options = [
        str(tmp_path / "index.csv"),
        "--bundle",
        str(ROOT / "examples/bundles/cs-arm-bn"),
        "--out",
        str(tmp_path / "out"),
    ]
    ran = screen_command(*options)
    assert ran.returncode == 0, ran.stderr
    treated = index[index["role"] == "treated"]["Metadata_Well"]
    assert f"2 plates answered, 0 were there already, 0 refused; {len(treated)} wells" in ran.stdout
    table = parquet.read_table(next((tmp_path / "out").glob("plate=*/answers.parquet")))
    assert np.isclose(sum(table[name].to_numpy() for name in table.column_names if name.startswith("p_")), 1).all()
    ran = screen_command(*options, "--part", "2/2")
    assert "0 plates answered, 1 were there already, 0 refused; " in ran.stdout
    ran = screen_command(*options, "--part", "3/2")
    assert (ran.returncode, "not like 2/10" in ran.stderr) == (1, True)
