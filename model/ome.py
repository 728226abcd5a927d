"""OME-TIFF: which page of a file is which channel, by the names in its OME-XML.

The XML comes from strangers: no document type, entity or other file is ever read, and a file that says that its planes lie
elsewhere is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

from model.errors import UnsupportedImageError
from model.tiff import MAX_PAGES, first_description, page_count

_MAX_XML_BYTES = 4 << 20
_MAX_DEPTH = 64


@dataclass
class _Planes:
    """What the elements of the XML say, as they come."""

    depth: int = 0
    images: int = 0
    own_uuid: str = ""
    names: list[str | None] = field(default_factory=list)
    blocks: list[dict[str, str]] = field(default_factory=list)
    uuids: list[str] = field(default_factory=list)
    in_uuid: bool = False

    def start(self, element: str, attributes: dict[str, str]) -> None:
        """Take an element's attributes."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise UnsupportedImageError("the OME-XML is nested too deeply")
        kind = element.rpartition(":")[2]
        if kind == "OME":
            self.own_uuid = attributes.get("UUID", "")
        elif kind == "BinaryOnly":
            raise UnsupportedImageError("the OME-TIFF says that its metadata lie in another file: send whole files")
        elif kind == "Pixels":
            self.images += 1
            if any(attributes.get(name, "1") != "1" for name in ("SizeZ", "SizeT")):
                raise UnsupportedImageError("the OME-TIFF has several focal planes or time points: send one")
        elif kind == "Channel" and attributes.get("SamplesPerPixel", "1") == "1":
            self.names.append(attributes.get("Name"))
        elif kind == "TiffData":
            self.blocks.append(attributes)
        elif kind == "UUID":
            self.in_uuid = True
            self.uuids.append("")

    def end(self, element: str) -> None:
        """Leave an element."""
        self.depth -= 1
        if element.rpartition(":")[2] == "UUID":
            self.in_uuid = False

    def text(self, text: str) -> None:
        """Take text: only that of a UUID says anything here."""
        if self.in_uuid:
            self.uuids[-1] += text

    def pages(self, count: int) -> dict[int, int]:
        """Page by channel number, of a file with so many pages."""
        if self.images != 1:
            raise UnsupportedImageError(f"the OME-TIFF has {self.images} images: send one field of view a file")
        if {uuid.strip() for uuid in self.uuids} - {self.own_uuid}:
            raise UnsupportedImageError("the OME-TIFF says that planes lie in other files: send each as its own file")
        pages: dict[int, int] = {}
        for block in self.blocks or [{}]:
            first, page = _number(block, "FirstC", 0), _number(block, "IFD", 0)
            planes = _number(block, "PlaneCount", 1 if "IFD" in block else len(self.names))
            pages |= {first + number: page + number for number in range(min(planes, MAX_PAGES))}
        if any(page >= count for page in pages.values()) or len(set(pages.values())) != len(pages):
            raise UnsupportedImageError(f"the OME-XML does not give each channel a page of its own; the file has {count}")
        return pages


def channel_pages(data: bytes) -> Mapping[str, int]:
    """Return the page of each named channel of an OME-TIFF with one plane a channel.

    Raises:
        UnsupportedImageError: it has no OME-XML, or one that does not tell; ImageError: it is no TIFF that can be read.
    """
    description = first_description(data)
    if b"<OME" not in description[:2_000] and b":OME" not in description[:2_000]:
        raise UnsupportedImageError(
            "the file has no OME-XML that names its channels: name the channel in the file's name, one plane a file"
        )
    planes = _read(description)
    pages = planes.pages(page_count(data))
    named = {name: pages[number] for number, name in enumerate(planes.names) if name and number in pages}
    if not planes.names or len(named) != len(planes.names):
        raise UnsupportedImageError("the OME-XML does not give every channel a name and a page; no two may have one name")
    return named


def _read(xml: bytes) -> _Planes:
    if len(xml) > _MAX_XML_BYTES:
        raise UnsupportedImageError(f"the OME-XML has more than {_MAX_XML_BYTES:,} bytes")
    planes = _Planes()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    parser.StartElementHandler = planes.start
    parser.EndElementHandler = planes.end
    parser.CharacterDataHandler = planes.text
    try:
        parser.Parse(xml.rstrip(b"\0 \r\n"), True)
    except expat.ExpatError as error:
        raise UnsupportedImageError(f"the OME-XML is not valid: {error}") from None
    if len(planes.names) > MAX_PAGES:
        raise UnsupportedImageError(f"the OME-XML has {len(planes.names):,} channels; at most {MAX_PAGES} are read")
    return planes


def _refuse(*_: object) -> NoReturn:
    raise UnsupportedImageError("the OME-XML has a document type, which is not read")


def _number(block: Mapping[str, str], name: str, default: int) -> int:
    text = block.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 6):  # noqa: PLR2004
        raise UnsupportedImageError(f"the OME-XML's {name} {text[:40]!r} is not a number")
    return int(text)
