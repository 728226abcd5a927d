"""Parquet tables of strangers: read as text within bounds, or refused."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from model.errors import AnchorwellError, LayoutError, TableTooLargeError
from service.tables import table_of_any_kind


def written(table, **options):
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def words(count, *different):
    """A column of so many cells that stands for few words."""
    indices = pa.array(np.arange(count) % len(different), pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(different))


SMALL = written(
    pa.table(
        {
            "well": pa.array(["A01", "ü🔬", None] * 2).dictionary_encode(),
            "site": [1, None, 3, 4, 5, 6],
            "dose": [0.5] * 6,
            "used": [True, False, None] * 2,
            "list": [[1]] * 6,
            "bytes": [b"\xff"] * 6,
            "code": words(6, 7, 8),
        }
    ),
    row_group_size=2,
)


def test_text_numbers_and_truth_values_are_read_as_text_and_other_columns_are_left_out():
    table = table_of_any_kind(SMALL)
    assert table.columns == ("well", "site", "dose", "used", "code")
    assert list(table.rows())[:3] == [
        ["A01", "1", "0.5", "True", "7"],
        ["ü🔬", "", "0.5", "False", "8"],
        ["", "3", "0.5", "", "7"],
    ]
    assert len(table) == 6


def not_utf8():
    cell = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")])
    return pa.table({"file": cell})


@pytest.mark.parametrize(
    ("table", "error", "says"),
    [
        (pa.table({"a": words(300_000, "x" * 4_096)}), TableTooLargeError, "67,108,864 bytes"),
        (pa.table({"a": words(2, "x" * 500_001)}), TableTooLargeError, "500,000 bytes"),
        (pa.table({"a": words(400_001, "x")}), TableTooLargeError, "400,000 rows"),
        (pa.table({f"c{at}": words(51_000, "x") for at in range(100)}), TableTooLargeError, "5,000,000 cells"),
        (pa.table({"a": [f"{at:03d}" + "x" * (1 << 20) for at in range(129)]}), TableTooLargeError, "unpacked"),
        (pa.table({"a": words(2, "a\0b")}), LayoutError, "NUL"),
        (not_utf8(), LayoutError, "Parquet"),
        (pa.table({"a": pa.array([], pa.string())}), LayoutError, "no rows"),
        (pa.table({"a": [b"x"]}), LayoutError, "no columns"),
    ],
    ids=["a long word", "a long row", "rows", "cells", "unpacked", "nul", "no utf-8", "no rows", "no columns"],
)
def test_a_parquet_table_that_is_none_or_grows_is_refused(table, error, says):
    with pytest.raises(error, match=says):
        table_of_any_kind(written(table, compression="zstd", store_schema=False, use_dictionary=True))


def test_a_table_of_distinct_text_is_read_whole():
    names = [f"{number:06d}.tif" for number in range(50_000)]
    for options in ({"use_dictionary": False}, {"dictionary_pagesize_limit": 1 << 30, "row_group_size": 7_000}):
        table = table_of_any_kind(written(pa.table({"file": names, "other": names}), **options))
        assert list(table.column("other")) == names


@given(st.integers(4, len(SMALL) - 1), st.integers(1, 255), st.integers(0, 40))
def test_a_damaged_parquet_table_is_read_or_refused(at, change, cut):
    data = bytearray(SMALL)
    data[at] ^= change
    try:
        table = table_of_any_kind(bytes(data[: len(data) - cut]))
    except AnchorwellError:
        return
    assert all(len(row) == len(table.columns) for row in table.rows())
