"""Tables of text: what is read as one, what is refused, and that neither costs much memory."""

import json
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model import tables
from model.errors import AnchorwellError, LayoutError, TableTooLargeError
from model.layout import load_data_places, parse_layout, parse_platemap, read_platemap
from model.tables import read_table, table_of

CHANNELS = ("DNA", "ER", "RNA")
LAYOUT = "file,well,site,channel"


def listed(text):
    return [dict(row) for row in read_table(text)]


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,\nx,2\n",
        b"a,b\n1,\nx,2\n",
        "\ufeff\r\na;b\r\n1;\r\n\r\nx;2\r\n\r\n",
        b"\xef\xbb\xbfa\tb\n1\t\n\nx\t2",
        '"a","b"\n"1",""\n"x","2"\n',
        '[{"a": 1, "b": null}, {"b": "2", "a": "x"}]',
        ' [ {"a":1,"b":""}\n,\t{"a":"x","b":2} ] \n',
    ],
)
def test_csv_tsv_and_json_are_read_as_rows_of_text(text):
    assert listed(text) == [{"a": "1", "b": ""}, {"a": "x", "b": "2"}]
    assert list(read_table(text).column("b")) == ["", "2"]
    assert list(read_table(text).column("c")) == []


@pytest.mark.parametrize("cell", ['a "quoted" {brace} [and] \\ stroke', "line\nbreak, and comma", "ü 🔬", " "])
def test_a_cell_may_hold_any_text(cell):
    quoted = cell.replace('"', '""')
    rows = [{"well": "A01", "note": cell}, {"well": "A02", "note": ""}]
    for text in (f'well,note\nA01,"{quoted}"\nA02,\n', json.dumps(rows), json.dumps(rows, ensure_ascii=False)):
        assert listed(text) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no columns"),
        ("a,b\n", "no rows"),
        ("[]", "no rows"),
        ("[{}]", "no columns"),
        ("{}", "list of objects"),
        ("[1]", "entry 1"),
        ('[{"a": 1} {"a": 2}]', "entry 1"),
        ('[{"a": 1},]', "entry 2"),
        ('[{"a": 1}', "entry 1"),
        ('[{"a": 1}] 2', "goes on"),
        ("[] 2", "goes on"),
        ('[{"a": [1]}]', "plain values"),
        ('[{"a": {"b": 1}}]', "plain values"),
        ('[{"a" 1}]', "object 1 of the table is not valid JSON"),
        (f'[{{"a": {"1" * 5_000}}}]', "not valid JSON"),
        ('[{"a": 1}, {"b": 1}]', "object 2"),
        ("[" * 100_000, "entry 1"),
        ("a,a\n1,2\n", "twice"),
        ("a,b\n1,2\n1\n", "line 3"),
        ('a,b\n"1\n2",3\n1,2,3\n', "line 4"),
        ('a,b\n"1,2\n', "CSV"),
        ("a,b\n1,\0\n", "NUL"),
        ('[{"a": "\\u0000"}]', "NUL"),
        ('[{"a": "\\ud800"}]', "surrogate"),
        ('[{"\\udfff": ""}]', "surrogate"),
        ("a,b\n\ud800,1\n", "surrogate"),
        (b"a,b\n\xff,1\n", "UTF-8"),
        (b"a,b\n\xed\xa0\x80,1\n", "UTF-8"),
        (b'[{"a": "\xff"}]', "UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(text, words):
    with pytest.raises(LayoutError, match=words):
        read_table(text)


# --- any text at all -------------------------------------------------------------------------------------------------

_CHARACTERS = st.characters() | st.sampled_from('\ud800\udfff\0",;\t\n\r[]{}\\:')
_CELLS = st.text(_CHARACTERS, max_size=6)
_WELLS = st.sampled_from(["A01", "b2", "AF48", "Z99"]) | _CELLS
_VALUES = _CELLS | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers(), max_size=2)
_OBJECTS = st.lists(
    st.fixed_dictionaries(
        {"file": _VALUES, "well": _WELLS, "site": st.integers() | _VALUES, "channel": st.sampled_from(CHANNELS) | _VALUES},
        optional={"Metadata_Plate": _VALUES, "role": _VALUES, "Metadata_ImageResolutionX": _VALUES},
    ),
    max_size=3,
)
_TEXTS = st.text(_CHARACTERS, max_size=60)
_TABLES = (
    _OBJECTS.map(json.dumps)
    | _OBJECTS.map(lambda value: json.dumps(value, ensure_ascii=False))
    | _TEXTS
    | _TEXTS.map(lambda text: f"{LAYOUT}\n{text}")
    | _TEXTS.map(lambda text: f"Metadata_Well,Metadata_Site,FileName_OrigDNA,FileName_OrigER,FileName_OrigRNA\n{text}")
    | _TEXTS.map(lambda text: f"well,role\nA01,{text}")
    | _TEXTS.map(lambda text: f"[{text}]")
)


@given(_TABLES)
@example('[{"well": "A01", "role": "control", "note": "\\ud800"}]')
@example('[{"file": "\\ud800", "well": "A01", "site": 1, "channel": "DNA"}]')
def test_any_text_is_a_table_or_is_refused_as_none(text):
    readers = (
        lambda given: [dict(row) for row in read_table(given)],
        lambda given: dict(read_platemap(given).rows),
        parse_platemap,
        lambda given: list(parse_layout(given, CHANNELS).files),
        lambda given: list(load_data_places(read_table(given), CHANNELS).addresses.values()),
    )
    for reader in readers:
        with suppress(AnchorwellError):
            json.dumps(reader(text), ensure_ascii=False).encode()


@given(st.binary(max_size=60) | _TABLES.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_table_or_are_refused_as_none(data):
    try:
        table = read_table(data)
    except AnchorwellError:
        return
    assert all(len(row) == len(table.columns) for row in table.rows())
    assert "".join("".join(row) for row in table.rows()).encode().decode()


@given(st.lists(_CELLS, min_size=1, max_size=4, unique=True), st.data())
def test_rows_that_are_kept_come_back_as_they_were(columns, data):
    rows = data.draw(st.lists(st.lists(_CELLS, min_size=len(columns), max_size=len(columns)), min_size=1, max_size=4))
    try:
        table = table_of(columns, rows)
    except LayoutError as error:
        assert "NUL" in error.detail or "surrogate" in error.detail  # noqa: PT017 (most draws are kept)
        return
    assert (table.columns, list(table.rows())) == (tuple(columns), rows)


# --- bounds ----------------------------------------------------------------------------------------------------------

FEW_ROWS = 20_000
PLANES_1536 = 1_536 * 16 * 8
WIDE = ["Metadata_Well", "Metadata_Site", "FileName_OrigDNA", *(f"Metadata_Column_{number}" for number in range(57))]
MIB = 1 << 20


def peak_bytes(text):
    """The most memory that reading a table takes beside the table itself, and whether it is taken."""
    tracemalloc.start()
    try:
        taken = len(read_table(text)) > 0
    except AnchorwellError:
        taken = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, taken


def long_layout(rows):
    return "\n".join([f"{LAYOUT},plate,note", *(f"{n:07d}.tif,A01,1,DNA,BR00116991,-" for n in range(rows))]).encode()


def test_a_plate_of_1536_wells_16_sites_and_8_channels_is_taken_a_row_a_plane_and_so_is_a_jump_plate():
    peak, taken = peak_bytes(long_layout(PLANES_1536))
    assert taken
    assert peak < 40 * MIB
    row = ",".join(["A01", "1", "a.tif", *["some text of a column"] * 57])
    assert len(read_table("\n".join([",".join(WIDE), *[row] * 384 * 16]))) == 384 * 16


@pytest.fixture
def few_rows(monkeypatch):
    """A bound that a test reaches in no time."""
    monkeypatch.setattr(tables, "MAX_ROWS", FEW_ROWS)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("short lines", b"b\n" * (2 * MIB)),
        ("blank lines", b"a\n" + b"\n" * (4 * MIB) + b"b"),
        ("one line", b"x," * (2 * MIB)),
        ("an open quote", b'a\n"' + b"\n" * (4 * MIB)),
        ("a cell a line", b'a\n"' + b'\n","' * MIB),
        ("small objects", b"[" + b'{"b":1},' * FEW_ROWS + b'{"b":1}]'),
        ("empty lists", b"[" + b"[]," * MIB + b"[]]"),
        ("an object of many keys", b"[{" + b",".join(b'"%d":1' % at for at in range(MIB // 2)) + b"}]"),
        ("an object of lists", b'[{"a":[' + b"[]," * MIB + b"[]]}]"),
        ("a long string", b'[{"a":"' + b"x" * (4 * MIB) + b'"}]'),
    ],
)
def test_a_table_that_grows_in_memory_is_refused_before_it_does(name, data):
    peak, taken = peak_bytes(data)
    assert not taken, name
    assert peak < 2 * len(data) + 8 * MIB, f"{peak / MIB:.0f} MiB"


@pytest.mark.usefixtures("few_rows")
def test_a_row_of_one_cell_costs_no_more_than_its_own_few_bytes():
    data = b"b\n" * (FEW_ROWS + 1)
    peak, taken = peak_bytes(data)
    assert taken
    assert peak < 80 * FEW_ROWS
    assert not peak_bytes(data + b"b\n")[1]


def test_a_load_data_table_of_more_images_than_a_plate_has_is_refused():
    head = ",".join(["Metadata_Well", "Metadata_Site", *(f"FileName_Orig{channel}" for channel in CHANNELS)])
    table = "\n".join([head, *["A01,1,a,b,c"] * 133_334])
    with pytest.raises(TableTooLargeError, match="400,000 images"):
        parse_layout(table, CHANNELS)
