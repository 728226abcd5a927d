"""Tables are read as they are written, or not at all."""

import gzip
import io
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.tables import ROW, Problems, read_table


def told(name: str, data: bytes) -> list[str]:
    """What is told of a table that cannot be read."""
    problems = Problems()
    assert read_table(name, data, problems) is None
    return [str(problem) for problem in problems.errors]


def rows_of(name: str, data: bytes) -> list[list[str]]:
    """A table's cells, each row's number first."""
    problems = Problems()
    table = read_table(name, data, problems)
    assert table is not None
    assert not problems.errors
    return table.rows[[ROW, *table.columns]].to_numpy().tolist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3,4,5\n", "t.csv row 3: 3 cells in a row, where the header names 2 columns"),
        ("a,b\n1,2,9\n3,4,9\n5,6\n", "t.csv rows 2-3: 3 cells in a row, where the header names 2 columns"),
        ("a,b\n1,2,\n3,4,\n", "t.csv rows 2-3: 3 cells in a row, where the header names 2 columns"),
        ("a,b\n1,2\n\n3\n", "t.csv row 4: 1 cells in a row, where the header names 2 columns"),
        ("a,name,label\nx,1,3-dihydro-x,A\n", "t.csv row 2: 4 cells in a row, where the header names 3 columns"),
    ],
)
def test_a_row_of_another_width_is_told_with_its_number(text: str, said: str) -> None:
    assert told("t.csv", text.encode()) == [said]


@pytest.mark.parametrize("header", ["a,label,label", "a,label, label "])
def test_a_header_that_names_a_column_twice_is_refused(header: str) -> None:
    said = "it cannot be read: its header names a column twice: label"
    assert told("t.csv", f"{header}\n1,2,3\n".encode()) == [f"t.csv: {said}"]
    file = io.BytesIO()
    pq.write_table(pa.table([["1"], ["2"]], names=["label", "label"]), file)
    assert told("t.parquet", file.getvalue()) == [f"t.parquet: {said}"]


def test_rows_are_numbered_as_in_the_file_and_those_that_say_nothing_are_left_out() -> None:
    text = '\ufeffa,b\r\n1,2\r\n\r\n3,"x,\ny"\r\n,\r\n5,\r\n\r\n'
    assert rows_of("t.csv", text.encode()) == [[2, "1", "2"], [4, "3", "x,\ny"], [6, "5", ""]]
    assert rows_of("t.csv", b"a,b\n") == []


def test_cells_have_no_space_around_them_and_stay_text() -> None:
    expected = [["0012", "NA", "1E05"], ["None", "", "x y"]]
    text = " a ,b,c\n 0012 ,NA\t,1E05\nNone, ,x y \n"
    assert [row[1:] for row in rows_of("t.csv", text.encode())] == expected
    assert [
        row[1:] for row in rows_of("t.tsv.gz", gzip.compress(text.replace("\t", "").replace(",", "\t").encode()))
    ] == expected


def test_cells_of_parquet_are_text() -> None:
    file = io.BytesIO()
    pd.DataFrame({"plate": [1086293492, 2], "site": [1.0, None], "kind": pd.Categorical(["a ", None])}).to_parquet(file)
    assert rows_of("t.parquet", file.getvalue()) == [[1, "1086293492", "1", "a"], [2, "2", "", ""]]


def damaged_gzip() -> bytes:
    data = bytearray(gzip.compress(b"a,b\n1,2\n", mtime=0))
    data[10] = 0xFF  # deflate has no such block
    return bytes(data)


def damaged_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": ["x"] * 9}), file, compression="snappy")
    data = bytearray(file.getvalue())
    data[20:60] = b"\xff" * 40
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t.csv.gz", damaged_gzip(), "Error -3 while decompressing data"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-12], "Compressed file ended before"),
        ("t.csv.gz", b"a,b\n1,2\n", "Not a gzipped file"),
        ("t.parquet", damaged_parquet(), ""),
        ("t.parquet", b"PAR1", ""),
        ("t.csv", b"", "its first line names no columns"),
        ("t.csv", b"a,b\n1,\xe9\n", "can't decode byte 0xe9"),
        ("t.csv", b'a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
    ],
)
def test_what_is_no_table_is_told(name: str, data: bytes, said: str) -> None:
    (line,) = told(name, data)
    assert line.startswith(f"{name}: it cannot be read: ")
    assert said in line


def test_many_rows_are_told_by_the_first_of_them() -> None:
    (line,) = told("t.csv", b"a,b\n" + b"1,2\n1\n" * 1000)
    assert line.startswith("t.csv rows 3, 5, 7, ")
    assert line.endswith("39, 41, …: 1 cells in a row, where the header names 2 columns")


def test_a_million_cells_are_read_in_seconds() -> None:
    text = "a,b,c,d\n" + "".join(f"source_{n % 13},plate_{n // 384},A01,JCP2022_{n:06d}\n" for n in range(250_000))
    started = time.process_time()
    assert len(rows_of("t.csv", text.encode())) == 250_000
    assert time.process_time() - started < 5
