"""A plate's calls as a picture: a colour a class, stronger the surer, a dot where the call is wrong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model.layout import PLATE_FORMATS, row_name, well_position

CELL, GAP, MARGIN, TITLE = 34, 3, 30, 46
LEGEND_ROW, LEGEND_COLUMNS = 26, 4
BACKGROUND, INK, EMPTY, CONTROL = "#ffffff", "#1c1c28", "#f1f1f4", "#c9c9d1"
# Okabe and Ito's colours, told apart by most colour-blind readers, and one more.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b5a700", "#5b4fa2")


@dataclass(frozen=True)
class Call:
    """What a well was called, how surely, and whether it resembles the plate's controls."""

    label: str
    probability: float
    like_control: bool = False


@dataclass(frozen=True)
class PlatePicture:
    """A plate's name, the true label of each treated well, and the calls by panel."""

    name: str
    labels: Mapping[str, str]
    panels: Mapping[str, Mapping[str, Call]]


def draw_plates(plates: Sequence[PlatePicture], classes: Sequence[str], path: Path) -> None:
    """Write a PNG: a row a plate, a panel a way of answering, a legend below."""
    rows, columns = PLATE_FORMATS[96]
    width, height = MARGIN + columns * (CELL + GAP), TITLE + rows * (CELL + GAP) + MARGIN // 2
    panels = max(len(plate.panels) for plate in plates)
    legend = TITLE + LEGEND_ROW * (1 + -(-len(classes) // LEGEND_COLUMNS))
    image = Image.new("RGB", (MARGIN + panels * (width + MARGIN), len(plates) * height + legend + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(image)
    colours = dict(zip(classes, COLOURS, strict=True))
    for down, plate in enumerate(plates):
        for across, (title, calls) in enumerate(plate.panels.items()):
            at = (MARGIN + across * (width + MARGIN), MARGIN // 2 + down * height)
            _draw_panel(draw, at, f"{plate.name} (simulated): {title}", plate.labels, calls, colours)
    _draw_legend(draw, (MARGIN, MARGIN // 2 + len(plates) * height + 10), colours)
    image.save(path, optimize=True)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    title: str,
    labels: Mapping[str, str],
    calls: Mapping[str, Call],
    colours: Mapping[str, str],
) -> None:
    left, top = at
    scored = [well for well, label in labels.items() if label in colours]
    right = sum(calls[well].label == labels[well] for well in scored)
    draw.text((left, top), f"{title}: {right} of {len(scored)} right", INK, _font(15))
    rows, columns = PLATE_FORMATS[96]
    for column in range(columns):
        draw.text((left + MARGIN + column * (CELL + GAP) + 9, top + 24), f"{column + 1:02d}", INK, _font(12))
    for row in range(rows):
        draw.text((left + 8, top + TITLE + row * (CELL + GAP) + 9), row_name(row), INK, _font(12))
        for column in range(columns):
            name = f"{row_name(row)}{column + 1:02d}"
            _draw_well(draw, (left, top), name, labels.get(name), calls.get(name), colours)


def _draw_well(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    well: str,
    label: str | None,
    call: Call | None,
    colours: Mapping[str, str],
) -> None:
    row, column = well_position(well)
    left, top = at[0] + MARGIN + column * (CELL + GAP), at[1] + TITLE + row * (CELL + GAP)
    box = (left, top, left + CELL, top + CELL)
    if call is None:
        outer = column in (0, PLATE_FORMATS[96][1] - 1)  # the simulated plates' control columns
        draw.rounded_rectangle(box, 6, fill=CONTROL if outer else EMPTY)
        return
    outline = INK if call.like_control else None
    draw.rounded_rectangle(box, 6, fill=_faded(colours[call.label], call.probability), outline=outline, width=2)
    centre = (left + CELL // 2, top + CELL // 2)
    if label is None or label not in colours:
        draw.text((centre[0] - 3, centre[1] - 9), "i", INK, _font(15))
    elif label != call.label:
        draw.ellipse(
            (centre[0] - 6, centre[1] - 6, centre[0] + 6, centre[1] + 6), fill=colours[label], outline=BACKGROUND, width=2
        )


def _faded(colour: str, probability: float) -> tuple[int, int, int]:
    """Mix a colour with white: full at probability 1, nearly white at chance."""
    share = 0.15 + 0.85 * max(0.0, (probability - 0.125) / 0.875)
    parts = [int(part, 16) for part in re.findall("..", colour[1:])]
    mixed = [round(255 - share * (255 - part)) for part in parts]
    return mixed[0], mixed[1], mixed[2]


def _draw_legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], colours: Mapping[str, str]) -> None:
    left, top = at
    for number, (name, colour) in enumerate(colours.items()):
        x, y = left + (number % LEGEND_COLUMNS) * 215, top + (number // LEGEND_COLUMNS) * LEGEND_ROW
        draw.rounded_rectangle((x, y, x + 18, y + 18), 4, fill=colour)
        draw.text((x + 26, y + 1), name, INK, _font(14))
    y = top + -(-len(colours) // LEGEND_COLUMNS) * LEGEND_ROW
    words = "fill: the class called, stronger the surer; dot: the true class of a wrong call; i: inactive; grey: DMSO; "
    words += "frame: like a control"
    draw.text((left, y + 2), words, INK, _font(14))
