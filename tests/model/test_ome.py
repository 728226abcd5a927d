"""OME-TIFFs: each channel's own pixels by its name; and what a hostile one gets."""

import io
import struct

import numpy as np
import pytest
import tifffile

from model.errors import ImageError, NotATiffError, TruncatedImageError, UnsupportedImageError
from model.images import ImageLimits, decode_plane
from model.ome import channel_pages
from model.tiff import page_count

NAMES = ["DNA", "ER", "RNA"]
STACK = np.random.default_rng(3).integers(0, 60_000, (3, 40, 30), dtype=np.uint16)


def ome():
    buffer = io.BytesIO()
    metadata = {"axes": "CYX", "Channel": {"Name": NAMES}}
    tifffile.imwrite(buffer, STACK, ome=True, photometric="minisblack", metadata=metadata)
    return buffer.getvalue()


def with_xml(xml):
    """A file of several pages whose first says whatever one likes."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for number, plane in enumerate(STACK):
            said = {"description": xml} if number == 0 else {}
            file.write(plane, photometric="minisblack", metadata=None, contiguous=False, **said)
    return buffer.getvalue()


CHANNELS = "".join(f'<Channel Name="{name}"/>' for name in NAMES)


def xml(channels=CHANNELS, data="", pixels='SizeZ="1" SizeT="1"', head="<OME>"):
    return f"{head}<Image><Pixels {pixels}>{channels}{data}</Pixels></Image></OME>"


WRITING = [{}, {"compression": "zlib"}, {"compression": "zstd"}, {"compression": "lzw"}, {"tile": (16, 16)}]


@pytest.mark.parametrize("options", [*WRITING, {"byteorder": ">"}, {"bigtiff": True}])
def test_each_channel_of_an_ome_tiff_is_what_was_written(options):
    writing = {name: options[name] for name in options if name not in ("byteorder", "bigtiff")}
    buffer = io.BytesIO()
    kind = {name: options[name] for name in options if name in ("byteorder", "bigtiff")}
    with tifffile.TiffWriter(buffer, ome=True, **kind) as file:
        file.write(STACK, photometric="minisblack", metadata={"axes": "CYX", "Channel": {"Name": NAMES}}, **writing)
    pages = channel_pages(buffer.getvalue())
    assert list(pages) == NAMES
    for name, plane in zip(NAMES, STACK, strict=True):
        np.testing.assert_array_equal(decode_plane(buffer.getvalue(), page=pages[name]), plane)


def test_pages_are_taken_as_the_xml_orders_them():
    blocks = '<TiffData IFD="2" FirstC="0"/><TiffData IFD="0" FirstC="1"/><TiffData IFD="1" FirstC="2"/>'
    assert channel_pages(with_xml(xml(data=blocks))) == {"DNA": 2, "ER": 0, "RNA": 1}
    assert channel_pages(with_xml(xml(data='<TiffData FirstC="0" PlaneCount="3"/>'))) == {"DNA": 0, "ER": 1, "RNA": 2}
    assert channel_pages(with_xml(xml())) == {"DNA": 0, "ER": 1, "RNA": 2}


def test_a_file_that_names_itself_is_read():
    blocks = "".join(
        f'<TiffData IFD="{n}" FirstC="{n}"><UUID FileName="a.tif">urn:uuid:1</UUID></TiffData>' for n in range(3)
    )
    assert channel_pages(with_xml(xml(data=blocks, head='<OME UUID="urn:uuid:1">'))) == {"DNA": 0, "ER": 1, "RNA": 2}


def test_a_file_that_names_another_is_refused_and_the_other_is_not_opened(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "canary.tif", STACK[0])
    monkeypatch.chdir(tmp_path)
    elsewhere = '<TiffData IFD="0" FirstC="0"><UUID FileName="canary.tif">urn:uuid:2</UUID></TiffData>'
    data = with_xml(xml(data=elsewhere, head='<OME UUID="urn:uuid:1">'))
    opened = []
    monkeypatch.setattr("builtins.open", lambda *args, **_: opened.append(args))
    with pytest.raises(UnsupportedImageError, match="other files"):
        channel_pages(data)
    assert opened == []


BOMB = '<!DOCTYPE o [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><OME>&b;</OME>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "document type"),
        ('<!DOCTYPE o SYSTEM "file:///etc/passwd"><OME/>', "document type"),
        ('<OME><BinaryOnly MetadataFile="other.ome"/></OME>', "another file"),
        (xml(pixels='SizeZ="5" SizeT="1"'), "focal planes"),
        (xml(pixels='SizeT="2"'), "time points"),
        (xml(channels='<Channel Name="DNA"/><Channel Name="DNA"/><Channel Name="ER"/>'), "every channel a name"),
        (xml(channels="<Channel/><Channel/><Channel/>"), "every channel a name"),
        (xml(channels='<Channel Name="DNA"/>' * 100_000), "100,000 channels"),
        (xml(data='<TiffData IFD="7" FirstC="0"/>'), "a page of its own"),
        (xml(data='<TiffData IFD="0" FirstC="0"/><TiffData IFD="0" FirstC="1"/>'), "a page of its own"),
        (xml(data='<TiffData IFD="-1"/>'), "not a number"),
        (xml(data='<TiffData IFD="0" PlaneCount="999999"/>'), "a page of its own"),
        ("<OME>" + "<a>" * 1_000, "nested"),
        ("<OME><Image>", "not valid"),
        ("<OME>\x01</OME>", "not valid"),
        ("<OME/>", "0 images"),
        (xml() .replace("</OME>", "<Image><Pixels/></Image></OME>"), "2 images"),
        ("<OME>" + " " * (5 << 20) + "</OME>", "bytes"),
        ("ImageJ=1.0\nimages=3", "no OME-XML"),
    ],
)  # fmt: skip
def test_xml_that_is_hostile_or_tells_too_little_is_refused(text, words):
    with pytest.raises(UnsupportedImageError, match=words):
        channel_pages(with_xml(text))


def test_pages_in_a_circle_are_refused():
    data = bytearray(ome())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        first, last = file.pages[0].offset, file.pages[2].offset
    (count,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * count, first)
    with pytest.raises(UnsupportedImageError, match="circle"):
        page_count(bytes(data))


def test_each_page_is_checked_as_a_file_of_its_own_would_be():
    wide = with_xml(xml())
    with pytest.raises(UnsupportedImageError, match="none of them number 9"):
        decode_plane(wide, page=8)
    with pytest.raises(ImageError, match="at most 100"):
        decode_plane(wide, ImageLimits(max_pixels=100), page=1)
    with pytest.raises(TruncatedImageError):
        decode_plane(ome()[:-3_000], page=2)
    with pytest.raises(UnsupportedImageError, match="several pages"):
        decode_plane(wide)
    for data in (b"", b"no TIFF"):
        with pytest.raises(NotATiffError):
            channel_pages(data)
    with pytest.raises(ImageError):
        channel_pages(ome()[:100])


def test_a_file_of_one_page_that_says_it_has_more_is_refused():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, STACK, imagej=True)
    with pytest.raises(ImageError):
        channel_pages(buffer.getvalue())
