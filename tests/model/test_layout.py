"""Wells, file names, tables and plate maps: those of textbooks, and real ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import DuplicatePlaneError, LayoutError, MissingChannelError, UnknownChannelError, WellNameError
from model.layout import (
    MAX_COLUMNS,
    MAX_ROWS,
    PLATE_FORMATS,
    PlaneKey,
    Role,
    load_data_places,
    parse_file_name,
    parse_layout,
    parse_platemap,
    parse_site,
    parse_well,
    plane_key,
    read_platemap,
    well_name,
    well_position,
)
from model.tables import read_table

CHANNELS = ("DNA", "ER", "RNA")


@given(st.integers(0, MAX_ROWS - 1), st.integers(0, MAX_COLUMNS - 1))
def test_every_well_of_every_format_has_a_name_that_reads_back(row, column):
    assert well_position(well_name(row, column)) == (row, column)
    assert well_position(well_name(row, column).lower()) == (row, column)


def test_plates_end_where_they_should():
    ends = {wells: well_name(rows - 1, columns - 1) for wells, (rows, columns) in PLATE_FORMATS.items()}
    assert ends == {6: "B03", 12: "C04", 24: "D06", 48: "F08", 96: "H12", 384: "P24", 1536: "AF48"}
    assert all(rows * columns == wells for wells, (rows, columns) in PLATE_FORMATS.items())


@pytest.mark.parametrize("text", ["Z99", "A00", "A49", "AG01", "BA01", "", "A", "01", "A1x", "A01\n01", "Ä01", "A1\u0661"])
def test_what_is_no_well_is_refused(text):
    with pytest.raises(WellNameError):
        parse_well(text)


@given(st.text(max_size=8))
def test_any_text_is_a_well_or_is_refused(text):
    try:
        name = parse_well(text)
    except WellNameError:
        return
    assert parse_well(name) == name


@pytest.mark.parametrize("site", ["-1", "1.5", "", "\u0661", "1" * 7])
def test_what_is_no_site_number_is_refused(site):
    with pytest.raises(LayoutError):
        parse_site(site)


@pytest.mark.parametrize(
    ("name", "well", "site", "channel", "thumbnail"),
    [
        ("r01c01f01p01-ch5sk1fk1fl1.tiff", "A01", 1, 5, False),
        ("r32c48f12p01-ch1sk1fk1fl1.tiff", "AF48", 12, 1, False),
        ("Projection-Mix_E07_s1_w2B14915F6-0679-4494-82D1-F80894B32A66.tif", "E07", 1, 2, False),
        ("Projection-Mix_E08_s2_w3_thumb4D88636E-181E-4AF6-BC53-E7A435959C8F.tif", "E08", 2, 3, True),
        ("Mix_E07_s1_w102B14915F-0679-4494-82D1-F80894B32A66.tif", "E07", 1, 10, False),
        ("Mix_E07_s1_w10B14915F-0679-4494-82D1-F80894B32A66.tif", "E07", 1, 1, False),
        ("Mix_E07_s1_w10.tif", "E07", 1, 10, False),
        ("Plate_AB12_w4.TIF".replace("TIF", "tif"), "AB12", 1, 4, False),
        ("CV8000-Minimal-DataSet-2C-3W-4S-FP2-stack_D08_T0001F002L01A01Z04C01.tif", "D08", 2, 1, False),
        ("a1_3_dna.tif", "A01", 3, "dna", False),
        ("P24_0_Mito.ome.tiff", "P24", 0, "Mito", False),
        ("C:\\plates\\P1\\B02_1_ER.tif", "B02", 1, "ER", False),
        ("s3://bucket/P1/B02_1_ER.tif", "B02", 1, "ER", False),
    ],
)
def test_file_names_of_every_convention_are_read(name, well, site, channel, thumbnail):
    parsed = parse_file_name(name)
    assert (parsed.well, parsed.site, parsed.channel, parsed.thumbnail) == (well, site, channel, thumbnail)


@pytest.mark.parametrize(
    "name",
    [
        "holiday.tif",
        "A01_1_DNA.png",
        f"A01_{'9' * 30}_DNA.tif",
        "A01_1234567_DNA.tif",
        "Mix_A01_s1_w10A.tif",
        "DC_DCAM#2_CAM4.tif",
        "",
        "A01.tif",
    ],
)
def test_a_name_that_says_nothing_is_refused(name):
    with pytest.raises(LayoutError):
        parse_file_name(name)


def test_a_convention_with_a_well_that_does_not_exist_is_refused():
    for name in ("r33c01f01p01-ch1sk1fk1fl1.tiff", "r00c01f01p01-ch1sk1fk1fl1.tiff", "Z99_1_DNA.tif"):
        with pytest.raises(WellNameError):
            parse_file_name(name)


def test_numbered_channels_take_the_names_given_or_the_bundles():
    parsed = parse_file_name("r01c01f01p01-ch2sk1fk1fl1.tiff")
    assert plane_key(parsed, CHANNELS) == PlaneKey("A01", 1, "ER")
    assert plane_key(parsed, CHANNELS, ["ER", "RNA", "DNA"]) == PlaneKey("A01", 1, "RNA")
    with pytest.raises(UnknownChannelError, match="number 2 has no name"):
        plane_key(parsed, CHANNELS, ["DNA"])
    with pytest.raises(UnknownChannelError, match="Brightfield"):
        plane_key(parsed, CHANNELS, ["DNA", "Brightfield"])


ROWS = [
    {"file": "x/1.tif", "well": "a1", "site": "2", "channel": "dna"},
    {"file": "2.tif", "well": "B02", "site": "1", "channel": "ER"},
]
EXPECTED = {"1.tif": PlaneKey("A01", 2, "DNA"), "2.tif": PlaneKey("B02", 1, "ER")}


@pytest.mark.parametrize(
    "text",
    [
        "file,well,site,channel\nx/1.tif,a1,2,dna\n2.tif,B02,1,ER\n",
        "\ufefffile\twell\tsite\tchannel\textra\r\nx/1.tif\ta1\t2\tdna\t?\r\n2.tif\tB02\t1\tER\t?\r\n",
        json.dumps(ROWS),
    ],
)
def test_layouts_are_read_as_csv_tsv_and_json(text):
    assert parse_layout(text, CHANNELS).files == EXPECTED


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", LayoutError),
        ("file,well,site,channel\n", LayoutError),
        ("file,well,site\n1.tif,A01,1\n", LayoutError),
        ("file,well,site,channel\n1.tif,A01,1\n", LayoutError),
        ("[1, 2]", LayoutError),
        ("[" * 100_000, LayoutError),
        ('{"file": 1}', LayoutError),
        ('[{"file": "1.tif", "well": "A01", "site": 1, "channel": "DNA"}, {}]', LayoutError),
        ("file,well,site,channel,well\n1.tif,A01,1,DNA,A02\n", LayoutError),
        ("file,well,site,channel\n1.tif,Z99,1,DNA\n", WellNameError),
        ("file,well,site,channel\n1.tif,A01,1,Mito\n", UnknownChannelError),
        ("file,well,site,channel\n1.tif,A01,1,DNA\n1.tif,A02,1,DNA\n", LayoutError),
        ("file,well,site,channel\n1.tif,A01,1,DNA\n2.tif,a1,1,dna\n", DuplicatePlaneError),
        ("Metadata_Well,Metadata_Site,FileName_OrigDNA\nA01,1,a.tif\n", MissingChannelError),
    ],
)
def test_a_layout_that_does_not_hold_together_is_refused(text, error):
    with pytest.raises(error):
        parse_layout(text, CHANNELS)


def test_the_jump_load_data_table_is_a_layout(shared_data):
    text = (shared_data / "jump_metadata" / "load_data_example" / "load_data.csv").read_text(encoding="utf-8")
    layout = parse_layout(text, ("DNA", "ER", "RNA", "AGP", "Mito")).files
    assert len(layout) == 5 * (len(text.strip().splitlines()) - 1)
    assert {key.channel for key in layout.values()} == {"DNA", "ER", "RNA", "AGP", "Mito"}


@pytest.mark.parametrize(
    ("name", "controls", "wells"),
    [("JUMP-MOA/JUMP-MOA_compound_platemap.tsv", 24, 384), ("JUMP-Target/JUMP-Target-2_compound_platemap.tsv", 64, 384)],
)
def test_a_jump_plate_map_tells_its_control_wells(name, controls, wells, shared_data):
    roles = parse_platemap((shared_data / "jump_metadata" / name).read_text(encoding="utf-8"))
    assert (sum(role is Role.CONTROL for role in roles.values()), len(roles)) == (controls, wells)


@pytest.mark.parametrize("column", ["role", "pert_type", "control_type", "Metadata_pert_type"])
def test_positive_controls_are_treated(column):
    roles = parse_platemap(f"well,{column}\nA01,negcon\nA02,poscon\nA03,trt\n")
    assert roles == {"A01": Role.CONTROL, "A02": Role.TREATED, "A03": Role.TREATED}


@pytest.mark.parametrize("text", ["place,role\nA01,control\n", "well,dose\nA01,1\n", "well,role\nA01,control\na1,treated\n"])
def test_a_plate_map_that_does_not_hold_together_is_refused(text):
    with pytest.raises(LayoutError):
        parse_platemap(text)


def test_real_vendor_names_are_read(shared_data):
    folder = shared_data / "vendor_layouts"
    thumbnails = [parse_file_name(str(path)).thumbnail for path in (folder / "imagexpress").glob("*.tif")]
    assert 0 < sum(thumbnails) < len(thumbnails)
    fields = [parse_file_name(str(path)) for path in (folder / "cv8000").glob("*_T0001F*.tif")]
    assert {field.well for field in fields} == {"D08", "E03", "F08"}
    assert {parse_file_name(str(path)).well for path in (folder / "operetta").rglob("*.tiff")} == {"C03"}


def test_a_load_data_table_tells_the_pixel_size_in_micrometres() -> None:
    head = "Metadata_Well,Metadata_Site,FileName_OrigDNA,Metadata_ImageResolutionX\n"
    one = parse_layout(head + "A01,1,a.tif,5.98e-07\nA01,2,b.tif,5.98e-07\n", ["DNA"])
    assert one.pixel_size_um == 0.598
    assert parse_layout("file,well,site,channel\na.tif,A01,1,DNA\n", ["DNA"]).pixel_size_um is None
    several = parse_layout(head + "A01,1,a.tif,5.98e-07\nA01,2,b.tif,6.5e-07\n", ["DNA"])
    assert several.pixel_sizes_um == (0.598, 0.65)
    with pytest.raises(LayoutError, match=r"gives 0\.598, 0\.65 µm"):
        _ = several.pixel_size_um
    with pytest.raises(LayoutError, match="not a number"):
        parse_layout(head + "A01,1,a.tif,wide\n", ["DNA"])


def test_a_load_data_table_tells_where_images_lie() -> None:
    head = "Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigDNA,PathName_OrigDNA,URL_OrigER\n"
    rows = read_table(head + "BR1,A01,1,a.tif,/data/x/,s3://plates/b.tif\n")
    places = load_data_places(rows, ["DNA", "ER"])
    assert places.addresses == {
        PlaneKey("A01", 1, "DNA"): "/data/x/a.tif",
        PlaneKey("A01", 1, "ER"): "s3://plates/b.tif",
    }
    assert places.plate == "BR1"
    with pytest.raises(MissingChannelError, match="RNA"):
        load_data_places(rows, ["DNA", "RNA"])
    with pytest.raises(LayoutError, match="LoadData"):
        load_data_places(read_table("well\nA01\n"), ["DNA"])
    with pytest.raises(DuplicatePlaneError):
        load_data_places(read_table(head + "BR1,A01,1,a.tif,/data/x/,s3://plates/b.tif\n" * 2), ["DNA", "ER"])


def test_a_plate_map_is_read_with_all_its_columns_and_may_tell_no_roles() -> None:
    platemap = read_platemap("Well,role,compound\na1,DMSO,\nB2,trt,BRD-1\n")
    assert platemap.columns == ("Well", "role", "compound")
    assert platemap.rows == {"A01": ("a1", "DMSO", ""), "B02": ("B2", "trt", "BRD-1")}
    assert (platemap.wells(Role.CONTROL), platemap.wells(Role.TREATED)) == ({"A01"}, {"B02"})
    assert read_platemap("well,compound\nA01,DMSO\n").roles == {}
    with pytest.raises(LayoutError, match="needs a role"):
        parse_platemap("well,compound\nA01,DMSO\n")


@pytest.mark.parametrize(
    "table",
    [
        "Well;Role\nA01;DMSO\nA02;trt\n",
        "Metadata_Well,Metadata_control_type\nA01,negcon\nA02,poscon_cp\n",
        "well_position\tbroad_sample\nA02\tBRD-1\nA01\t\n",
    ],
)
def test_plate_maps_as_instruments_and_jump_write_them(table: str) -> None:
    assert parse_platemap(table) == {"A01": Role.CONTROL, "A02": Role.TREATED}


@pytest.mark.parametrize("table", ["well,role\nA01,ctrl\n", "well,role\nA01,empty\n", "well,pert_type\nA01,control\n"])
def test_a_role_that_might_mean_either_is_refused(table: str) -> None:
    with pytest.raises(LayoutError, match="A01"):
        parse_platemap(table)


def test_a_load_data_table_of_several_plates_is_refused() -> None:
    table = "Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigDNA\nP1,A01,1,a.tif\nP2,A02,1,b.tif\n"
    with pytest.raises(LayoutError, match="2 plates"):
        parse_layout(table, ["DNA"])


def test_an_upper_case_suffix_is_the_same_name() -> None:
    assert parse_file_name("P_A01_s1_w1.TIF") == parse_file_name("P_A01_s1_w1.tif")


def test_a_tables_plate_is_read_and_bounded():
    def plate_of(*plates):
        rows = (f"{number}.tif,A01,{number},DNA,{plate}" for number, plate in enumerate(plates))
        return parse_layout("\n".join(["file,well,site,channel,Metadata_Plate", *rows]), ["DNA"]).plate

    assert plate_of("BR1", "BR1", " ") == "BR1"
    assert plate_of("") is None
    assert (
        parse_layout('[{"file": "a", "well": "A01", "site": 1, "channel": "DNA", "Metadata_Plate": null}]', ["DNA"]).plate
        is None
    )
    with pytest.raises(LayoutError, match="2 plates"):
        plate_of("BR1", "BR2")
    with pytest.raises(LayoutError, match="200 characters"):
        plate_of("x" * 200)
