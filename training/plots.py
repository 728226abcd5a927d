"""Plots of a report: drawn from tables of figures, small multiples by setting, lines labelled where they end.

Knows nothing of how figures are taken. Colours are Okabe and Ito's, told apart by most colour-blind readers, and every
method has a marker too, the same in all plots of a report; unadapted ERM is black and nulls are grey, and what is blended is
dashed.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from training.queries import ALL
from training.results import FOCUS, NULL, SETTINGS, UNADAPTED, Way, of_way, way_name, ways_of

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4fa2", "#8a6d00")
INK, QUIET, GRID = "#1c1c28", "#8c8c96", "#e4e4ea"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_COLOURED = 8
"""Groups that an embedding's panel tells apart by colour."""
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": QUIET, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "savefig.dpi": 130, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Palette:
    """A colour and a marker for each of a report's methods."""

    ways: tuple[Way, ...]

    def colour(self, way: Way) -> str:
        """Its colour."""
        if way == UNADAPTED:
            return INK
        return QUIET if way[0].startswith(NULL) else COLOURS[self._place(way) % len(COLOURS)]

    def marker(self, way: Way) -> str:
        """Its marker; no two methods have both in common."""
        if way == UNADAPTED or way[0].startswith(NULL):
            return "o" if way == UNADAPTED else "|"
        place = self._place(way)
        return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]

    def _place(self, way: Way) -> int:
        others = sorted((w for w in self.ways if w != UNADAPTED and not w[0].startswith(NULL)), key=lambda w: w != FOCUS)
        return others.index(way)


def order(axis: str, values: Iterable[float]) -> list[float]:
    """Order an axis's values from little to much: all last for numbers of wells, no shift first for label shift."""
    return sorted(values, key=lambda x: -x if axis == "alpha" else np.inf if x == ALL else x)


def tick(axis: str, value: float) -> str:
    """Write one value of an axis."""
    if axis == "alpha":
        return "none" if np.isinf(value) else "one class" if value == 0 else f"{value:g}"
    return "all" if value == ALL else f"{value:g}"


def accuracies(scores: pd.DataFrame, palette: Palette, path: Path) -> None:
    """Accuracy per well with intervals: a panel a setting, a line a method, unadapted ERM's level through all."""
    settings = _settings(scores)
    ways = ways_of(scores)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(settings), 1.1 + 0.27 * len(ways)))
        panels = figure.subplots(1, len(settings), sharex=True, sharey=True, squeeze=False)[0]
        for panel, setting in zip(panels, settings, strict=True):
            for place, way in enumerate(ways):
                for _, row in of_way(scores[scores["setting"] == setting], way).iterrows():
                    value, colour = float(row["well_accuracy"]), palette.colour(way)
                    if way == UNADAPTED:
                        panel.axvline(value, color=INK, linewidth=0.8, linestyle=":")
                    panel.plot(
                        [row["well_accuracy_low"], row["well_accuracy_high"]], [place, place], color=colour, linewidth=1.6
                    )
                    panel.plot(value, place, palette.marker(way), color=colour, markersize=5)
            panel.set(title=SETTINGS[setting], xlabel="accuracy per well")
            panel.grid(visible=False, axis="y")
        panels[0].set_yticks(range(len(ways)), [way_name(way) for way in ways])
        panels[0].invert_yaxis()
        figure.savefig(path)


def curves(rows: pd.DataFrame, axis: str, label: str, palette: Palette, path: Path) -> None:
    """Accuracy per well along an axis of the grid: a panel a setting; what was not varied is a level through the panel."""
    rows = rows[~rows["method"].str.startswith(NULL) | (rows["context"] == "-")]
    settings, ways, ticks = _settings(rows), ways_of(rows), order(axis, set(rows["x"]))
    place = {value: number for number, value in enumerate(ticks)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.7 * len(settings), 4.2))
        panels = figure.subplots(1, len(settings), sharex=True, sharey=True, squeeze=False)[0]
        for panel, setting in zip(panels, settings, strict=True):
            ends: list[tuple[float, str, str]] = []
            within = rows[rows["setting"] == setting]
            for way, (blended, dashed) in itertools.product(ways, ((False, ""), (True, ", blended"))):
                line = of_way(within[within["blended"] == blended], way)
                if not line.empty:
                    end = _line(panel, way, line, place, palette, blended=blended)
                    ends.append((end, way_name(way) + dashed, palette.colour(way)))
            panel.set(title=SETTINGS[setting], xlabel=label)
            panel.set_xticks(range(len(ticks)), [tick(axis, value).replace(" ", "\n") for value in ticks])
            panel.set_xlim(-0.3, len(ticks) - 0.7)
            _label_ends(panel, ends, len(ticks) - 0.62)
        panels[0].set_ylabel("accuracy per well")
        figure.savefig(path)


def _line(
    panel: Axes, way: Way, line: pd.DataFrame, place: Mapping[float, int], palette: Palette, *, blended: bool
) -> float:
    """Draw one method's line, or level where it has one point; return the height at which it ends."""
    colour, points = palette.colour(way), line.assign(at=line["x"].map(place)).sort_values("at")
    if len(points) == 1:
        value = float(points["value"].iloc[0])
        panel.axhline(value, color=colour, linewidth=1.0, linestyle=":")
        if not way[0].startswith(NULL):
            panel.axhspan(*points[["value_low", "value_high"]].iloc[0], color=colour, alpha=0.06, linewidth=0)
        return value
    panel.fill_between(points["at"], points["value_low"], points["value_high"], color=colour, alpha=0.10, linewidth=0)
    panel.plot(points["at"], points["value"], palette.marker(way), linestyle="--" if blended else "-", color=colour,
               markersize=4.5, markerfacecolor="white" if blended else colour, linewidth=1.5)  # fmt: skip
    return float(points["value"].iloc[-1])


def _label_ends(panel: Axes, ends: list[tuple[float, str, str]], x: float) -> None:
    """Write each line's name beside its end, moved apart where names would touch."""
    low, high = panel.get_ylim()
    step = (high - low) * 0.045
    heights = spread([value for value, _, _ in ends], step)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        panel.text(x, height, text, color=colour, fontsize=7.5, va="center", clip_on=False)


def spread(values: Sequence[float], step: float) -> NDArray[np.float64]:
    """Move values apart until they differ by ``step`` or more, in their order and as little as that needs together."""
    ranks = np.argsort(values, kind="stable")
    groups: list[tuple[float, int]] = []  # (mean of its values, members), from low to high
    for value in np.asarray(values, np.float64)[ranks]:
        groups.append((float(value), 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < step * (groups[-1][1] + groups[-2][1]) / 2:
            (a, n), (b, m) = groups.pop(-2), groups.pop()
            groups.append(((a * n + b * m) / (n + m), n + m))
    placed = [mean + step * (number - (count - 1) / 2) for mean, count in groups for number in range(count)]
    found = np.empty(len(values))
    found[ranks] = placed
    return found


def reliability(rows: pd.DataFrame, shown: Sequence[Way], palette: Palette, path: Path) -> None:
    """Share called rightly against confidence, before temperature (rings) and after: a row a method, a column a setting."""
    settings = _settings(rows)
    ways = [way for way in shown if way in ways_of(rows)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 2.6 * len(settings), 0.5 + 2.5 * len(ways)))
        panels = figure.subplots(len(ways), len(settings), sharex=True, sharey=True, squeeze=False)
        for way, across in zip(ways, panels, strict=True):
            for panel, setting in zip(across, settings, strict=True):
                chosen = of_way(rows[rows["setting"] == setting], way)
                before, part = (chosen[chosen["stage"] == stage] for stage in ("before", "after"))
                colour = palette.colour(way)
                panel.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
                areas = 160 * before["wells"] / before["wells"].sum()
                panel.plot(before["confidence"], before["value"], ":", color=QUIET, linewidth=0.8)
                panel.scatter(before["confidence"], before["value"], s=areas, facecolors="none", edgecolors=QUIET)
                panel.vlines(part["confidence"], part["value_low"], part["value_high"], color=colour, linewidth=1.0)
                panel.plot(part["confidence"], part["value"], color=colour, linewidth=0.8, alpha=0.5)
                panel.scatter(part["confidence"], part["value"], s=160 * part["wells"] / part["wells"].sum(), color=colour)
                panel.set(title=f"{way_name(way)}, {SETTINGS[setting]}", aspect="equal", xlim=(0, 1.03), ylim=(-0.03, 1.03))
            across[0].set_ylabel("share called rightly")
        for panel in panels[-1]:
            panel.set_xlabel("probability of the class called")
        figure.savefig(path)


def calibration(by_batch: Mapping[Way, pd.DataFrame], path: Path) -> None:
    """Calibration error of every batch before and after temperature: a panel a method, the worst batch after it named."""
    settings = [name for name in SETTINGS if any(name in set(table["setting"]) for table in by_batch.values())]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 3.4 * len(by_batch), 3.4))
        panels = figure.subplots(1, len(by_batch), sharey=True, squeeze=False)[0]
        for panel, (way, table) in zip(panels, by_batch.items(), strict=True):
            for setting in settings:
                part = table[table["setting"] == setting]
                colour = COLOURS[settings.index(setting)]
                for _, row in part.iterrows():
                    panel.plot([0, 1], [row["ece_before"], row["ece"]], MARKERS[settings.index(setting)] + "-", color=colour,
                               linewidth=1.0, markersize=4)  # fmt: skip
            worst = table.loc[table.groupby("setting")["ece"].idxmax()]
            named = [
                (float(ece), f"{batch} ({SETTINGS[setting]})", COLOURS[settings.index(setting)])
                for setting, batch, ece in zip(worst["setting"], worst["batch"], worst["ece"], strict=True)
            ]
            panel.set(title=way_name(way), xlim=(-0.15, 1.1))
            panel.set_xticks([0, 1], ["before (T = 1)", "after"])
            panel.set_ylim(bottom=0)
            _label_ends(panel, named, 1.06)
        panels[0].set_ylabel("calibration error, mean of plates")
        figure.savefig(path)


def confusions(found: Mapping[tuple[Way, str], pd.DataFrame], path: Path) -> None:
    """Share of each class's wells by call: a row a method, a column a setting; shares of 0.05 and more are written."""
    ways, settings = list(dict.fromkeys(way for way, _ in found)), list(dict.fromkeys(setting for _, setting in found))
    classes = next(iter(found.values())).index
    side = max(2.4, 0.36 * len(classes))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.6 + side * len(settings), 1.4 + side * len(ways)))
        panels = figure.subplots(len(ways), len(settings), sharex=True, sharey=True, squeeze=False)
        for way, across in zip(ways, panels, strict=True):
            for panel, setting in zip(across, settings, strict=True):
                counts = found.get((way, setting))
                panel.set_title(f"{way_name(way)}, {SETTINGS[setting]}")
                if counts is not None:
                    _matrix(panel, counts.to_numpy(float))
            across[0].set_yticks(range(len(classes)), classes)
            across[0].set_ylabel("true class")
        for panel in panels[-1]:
            panel.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor")
            panel.set_xlabel("called")
        figure.savefig(path)


def _matrix(panel: Axes, counts: NDArray[np.float64]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(shares) > 12:  # noqa: PLR2004 (numbers would touch)
        return
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.05:  # noqa: PLR2004
            dark = share > 0.6  # noqa: PLR2004
            panel.text(column, row, f"{share:.2f}".removeprefix("0"), ha="center", va="center", fontsize=6.5,
                       color="white" if dark else INK)  # fmt: skip


def embeddings(tables: Mapping[Way, pd.DataFrame], path: Path) -> None:
    """Wells on the first two principal components of each method's embeddings: coloured by class, and by batch."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9.6, 0.4 + 3.5 * len(tables)))
        panels = figure.subplots(len(tables), 2, squeeze=False)
        for (left, right), (way, table) in zip(panels, tables.items(), strict=True):
            features = table[[name for name in table if not str(name).startswith("Metadata_")]].to_numpy(np.float64)
            fitted = PCA(2).fit(features)
            points, shares = fitted.transform(features), fitted.explained_variance_ratio_
            controls = (table["Metadata_pert_type"] == "negcon").to_numpy()
            labels = table["Metadata_label"].fillna("").where(~controls, "").astype(str)
            labs = table["Metadata_Source"].astype(str)
            _scatter(left, points, labels, controls, f"{way_name(way)}: by class")
            by_lab = len(set(labs)) > 1 and len(set(labs + table["Metadata_Batch"].astype(str))) > MAX_COLOURED
            places = labs if by_lab else labs + "/" + table["Metadata_Batch"].astype(str)
            _scatter(right, points, places, controls, f"{way_name(way)}: by {'lab' if by_lab else 'batch'}")
            for panel in (left, right):
                panel.set(xlabel=f"PC 1 ({shares[0]:.0%} of variance)", ylabel=f"PC 2 ({shares[1]:.0%})")
        figure.savefig(path)


def _scatter(panel: Axes, points: NDArray[np.float64], groups: pd.Series, controls: NDArray[np.bool_], title: str) -> None:
    """Treated wells as dots and controls as crosses, a colour and a marker a group, grey where there is no group."""
    names = sorted(set(groups) - {""})
    for number, name in enumerate(["", *names]):
        member = (groups == name).to_numpy()
        colour = QUIET if not name else COLOURS[(number - 1) % len(COLOURS)]
        marker = "o" if not name else MARKERS[(number - 1) // len(COLOURS) % len(MARKERS)]
        treated, own = points[member & ~controls], points[member & controls]
        panel.scatter(own[:, 0], own[:, 1], s=12, marker="x", color=colour, linewidth=0.8, alpha=0.7)
        if name or len(treated):
            panel.scatter(treated[:, 0], treated[:, 1], s=11, marker=marker, color=colour, alpha=0.8, linewidth=0,
                          label=name or "no class")  # fmt: skip
    panel.scatter([], [], s=12, marker="x", color=QUIET, label="controls")
    panel.set(title=title, xticks=[], yticks=[])
    panel.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5, handletextpad=0.2, markerscale=1.5
    )


def _settings(rows: pd.DataFrame) -> list[str]:
    return [name for name in SETTINGS if name in set(rows["setting"])]
