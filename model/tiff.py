"""The directory of a TIFF, read and reduced before a decoder meets the file.

A decoder follows every value that a directory names: repeated and overlapping values cost it memory without bound, and
vendors' own values lead it to readers of their own. Here the directory is held against the file's size, and only the
values that describe one grey plane are passed on. Knows nothing of pixels.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.errors import NotATiffError, TruncatedImageError, UnsupportedImageError

_MAX_TAGS = 256
MAX_PAGES = 64
"""Most pages of one file that are looked at."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_DESCRIPTION = 270
_METAMORPH_PLANES = 33629  # a MetaMorph stack has one directory; the count of this tag is its number of planes
_PASSED_ON = frozenset({
    254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 32997,
})  # fmt: skip
"""Size, type, colour, compression, predictor, strips, tiles, depth, and the description, where stacks tell themselves."""


@dataclass(frozen=True)
class _Variant:
    """How one of the four kinds of TIFF lays its directory out: formats of struct."""

    order: str
    first: tuple[str, int]
    count: str
    entry: str
    word: str


_CLASSIC = (("I", 4), "H", "HHI4s", "I")
_BIG = (("Q", 8), "Q", "HHQ8s", "Q")
_VARIANTS = {
    b"II*\x00": _Variant("<", *_CLASSIC),
    b"MM\x00*": _Variant(">", *_CLASSIC),
    b"II+\x00": _Variant("<", *_BIG),
    b"MM\x00+": _Variant(">", *_BIG),
}


@dataclass(frozen=True)
class _Entry:
    """One tag: ``value`` is the tag's own value when it is short, else where that lies."""

    code: int
    kind: int
    count: int
    value: bytes


@dataclass(frozen=True)
class _Directory:
    """One directory: where it starts, its tags, and where the next one starts (0: nowhere)."""

    start: int
    entries: list[_Entry]
    following: int


def grey_plane_stream(data: bytes, page: int | None = None) -> io.BytesIO:
    """Return the file with its directory reduced to what describes one grey plane.

    Args:
        data: the file's bytes.
        page: which of several pages; without it the file must have one alone.

    Raises:
        NotATiffError: another format. TruncatedImageError: a directory that the file cannot hold.
        UnsupportedImageError: several pages, a stack in one, or a directory that no writer makes.
    """
    variant = _variant(data)
    try:
        return _reduced(data, variant) if page is None else _page(data, variant, page)
    except struct.error:
        raise TruncatedImageError("the file ends before its directory does") from None


def page_count(data: bytes) -> int:
    """Return how many pages a file has; raises as ``grey_plane_stream`` does."""
    variant = _variant(data)
    try:
        return len(_starts(data, variant))
    except struct.error:
        raise TruncatedImageError("the file ends before its directory does") from None


def first_description(data: bytes) -> bytes:
    """Return the first page's longest description; nothing when it has none. Raises as ``grey_plane_stream`` does."""
    variant = _variant(data)
    try:
        directory = _directory_at(data, variant, _first(data, variant))
        _check_entries(directory.entries, variant, len(data))
        texts = [_value(entry, variant, data) for entry in directory.entries if entry.code == _DESCRIPTION]
    except struct.error:
        raise TruncatedImageError("the file ends before its directory does") from None
    return max(texts, key=len, default=b"")


def _variant(data: bytes) -> _Variant:
    variant = _VARIANTS.get(data[:4])
    if variant is None:
        raise NotATiffError("an empty file" if not data else "the file is not a TIFF (its first bytes are another format's)")
    return variant


def _reduced(data: bytes, variant: _Variant) -> io.BytesIO:
    directory = _directory_at(data, variant, _first(data, variant))
    _check_entries(directory.entries, variant, len(data))
    if directory.following:
        raise UnsupportedImageError("the TIFF has several pages; send one plane a file, or an OME-TIFF with named channels")
    return _with_directory(data, variant, directory, _PASSED_ON)


def _page(data: bytes, variant: _Variant, page: int) -> io.BytesIO:
    """Make one page the only one; its description, which may speak of the others, is left out."""
    starts = _starts(data, variant)
    if page >= len(starts):
        raise UnsupportedImageError(f"the TIFF has {len(starts)} pages, none of them number {page + 1}")
    directory = _directory_at(data, variant, starts[page])
    _check_entries(directory.entries, variant, len(data))
    return _with_directory(data, variant, directory, _PASSED_ON - {_DESCRIPTION})


def _starts(data: bytes, variant: _Variant) -> list[int]:
    """Follow the chain of directories."""
    starts: list[int] = []
    at = _first(data, variant)
    while at:
        if at in starts or len(starts) >= MAX_PAGES:
            raise UnsupportedImageError(f"the TIFF's pages go round in a circle, or are more than {MAX_PAGES}")
        starts.append(at)
        at = _directory_at(data, variant, at).following
    return starts


def _first(data: bytes, variant: _Variant) -> int:
    (start,) = _unpack(variant, variant.first[0], data, variant.first[1])
    return int(start)


def _directory_at(data: bytes, variant: _Variant, start: int) -> _Directory:
    (count,) = _unpack(variant, variant.count, data, start)
    if count > _MAX_TAGS:
        raise UnsupportedImageError(f"the TIFF has {count:,} tags; at most {_MAX_TAGS} are read")
    at = start + struct.calcsize(variant.order + variant.count)
    size = struct.calcsize(variant.order + variant.entry)
    entries = [_Entry(*_unpack(variant, variant.entry, data, at + size * number)) for number in range(count)]
    (following,) = _unpack(variant, variant.word, data, at + size * count)
    return _Directory(start, entries, int(following))


def _with_directory(data: bytes, variant: _Variant, directory: _Directory, passed_on: frozenset[int]) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.seek(variant.first[1])
    stream.write(struct.pack(variant.order + variant.first[0], directory.start))
    stream.seek(directory.start)
    stream.write(_directory([entry for entry in directory.entries if entry.code in passed_on], variant))
    stream.seek(0)
    return stream


def _value(entry: _Entry, variant: _Variant, data: bytes) -> bytes:
    """The bytes of a tag's value, which was found to lie in the file."""
    size = _TYPE_BYTES.get(entry.kind, 0) * entry.count
    if size <= len(entry.value):
        return entry.value[:size]
    (start,) = struct.unpack(variant.order + variant.word, entry.value)
    return data[start : start + size]


def _unpack(variant: _Variant, layout: str, data: bytes, at: int) -> tuple[Any, ...]:
    values: tuple[Any, ...] = struct.unpack_from(variant.order + layout, data, at)
    return values


def _check_entries(entries: list[_Entry], variant: _Variant, file_bytes: int) -> None:
    codes = [entry.code for entry in entries if entry.code != _DESCRIPTION]  # tifffile writes its own beside the caller's
    if len(set(codes)) != len(codes) or len(entries) - len(codes) > 2:  # noqa: PLR2004
        raise UnsupportedImageError("the TIFF has a tag twice")
    ends = list(_value_ends(entries, variant))
    if any(end > file_bytes for _, end in ends) or sum(size for size, _ in ends) > file_bytes:
        raise TruncatedImageError(f"the file has {file_bytes:,} bytes; the values of its directory reach beyond them")
    if any(entry.code == _METAMORPH_PLANES and entry.count > 1 for entry in entries):
        raise UnsupportedImageError("the TIFF is a stack of several planes; send one plane a file")


def _value_ends(entries: list[_Entry], variant: _Variant) -> Iterator[tuple[int, int]]:
    """Size and end of every value that lies outside the directory."""
    for entry in entries:
        size = _TYPE_BYTES.get(entry.kind, 0) * entry.count
        if size > len(entry.value):
            yield size, struct.unpack(variant.order + variant.word, entry.value)[0] + size


def _directory(entries: list[_Entry], variant: _Variant) -> bytes:
    packed = [struct.pack(variant.order + variant.entry, e.code, e.kind, e.count, e.value) for e in entries]
    end = struct.pack(variant.order + variant.word, 0)
    return struct.pack(variant.order + variant.count, len(entries)) + b"".join(packed) + end
