"""The report: what tidy results say of methods, in tables and plots, how sure that is, and what it cannot show.

Figures are taken by the functions that return tables; ``write_report`` sets them in Markdown beside the plots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.errors import LayoutError, RunError
from training import plots
from training.cost import cost_markdown
from training.embeddings import features_of, variance_shares
from training.intervals import Estimate, Resamples, members
from training.metrics import TEMPERATURES, expected_calibration_error, worst_batch
from training.plates import write_whole
from training.queries import ALL
from training.results import (
    BEFORE,
    COST,
    FOCUS,
    METRICS,
    NULL,
    PROBABILITY,
    SETTINGS,
    UNADAPTED,
    Results,
    Way,
    classes_of,
    extent,
    grouped,
    most_seeds,
    of_way,
    places_of,
    read_results,
    way_name,
    ways_of,
)  # fmt: skip

BINS = 10
"""Bins of confidence, equally wide."""
FEW_MEMBERS = 5
"""With fewer independent units than this an interval covers less than it says."""
_BUDGET = {
    "steps_taken": "steps taken", "steps": "of", "images_per_step": "images a step", "depth": "ResNet", "width": "width",
    "size": "network input, pixels", "crop": "crop trained on", "learning_rate": "learning rate",
}  # fmt: skip
_NOTES = {
    "alpha": " Of a class with fewer wells than are drawn of it, wells are sent again.",
    "query_wells": " Of few wells sent together not every well of a plate is scored, so that levels also differ by chance.",
}
CURVES = {
    "controls": ("Control wells", "control wells measured (K)"),
    "alpha": ("Label shift", "label shift (Dirichlet alpha)"),
    "query_wells": ("Query size", "treated wells sent together (L)"),
}
_SAME = 1e-9
_NORMAL = 1.96
_BEHIND = "plates, batches, labs"
_METRIC_NAMES = {
    "image_accuracy": "per image",
    "well_accuracy": "per well",
    "mixed_well_accuracy": "few wells, mixed",
    "one_class_well_accuracy": "few wells, one class",
}

# --- tables of a run's own scores ------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Average scores over plates: one row a method, context and setting, with a 95 % interval per metric."""
    rows, resamples = [], Resamples()
    for key, group in table.groupby(["method", "context", "setting"], sort=False):
        row: dict[str, object] = dict(zip(("method", "context", "setting"), key, strict=True))
        row["plates"] = group["plate"].nunique()
        for metric in _METRIC_NAMES:
            if metric in group and group[metric].notna().all():
                row |= _figure(resamples.mean(group.assign(seed=0), metric), metric)
        rows.append(row)
    return pd.DataFrame(rows)


def markdown_table(summary: pd.DataFrame) -> str:
    """Format a summary: a row a method and setting."""
    rows = []
    for _, row in summary.iterrows():
        place = [str(row["method"]), str(row["context"]), str(row["setting"]).replace("_", " "), str(row["plates"])]
        rows.append([*place, *(_printed(row, metric) for metric in _METRIC_NAMES)])
    return _markdown(["method", "context", "setting", "plates", *_METRIC_NAMES.values()], rows)


# --- figures ---------------------------------------------------------------------------------------------------------


def scores(results: Results, resamples: Resamples) -> pd.DataFrame:
    """Every metric of every method in every setting, one row each: means over plates with their intervals."""
    rows = []
    for place, part in _parts(results.default, results):
        figures = [_figure(resamples.mean(part, metric), metric) for metric in (*METRICS, *BEFORE)]
        worst, accuracy = worst_batch(part)
        figures.append({"worst_batch_accuracy": accuracy})
        found = {name: value for figure in figures for name, value in figure.items()}
        rows.append({**place, **found, "worst_batch": worst, "behind": _behind(part)})
    return pd.DataFrame(rows)


def over_nulls(results: Results, resamples: Resamples) -> pd.DataFrame:
    """Every method's accuracy per well above that of the best null on the same plates: one row a method and setting.

    The null is one of those with most of the method's plates; ``margin`` is NaN where none has any of them. It is ``shown``
    where the interval over plates is above zero, and as many wells do not differ so by chance (95 %, as if not paired).
    """
    nulls = [way for way in results.ways() if way[0].startswith(NULL)]
    rows = []
    for place, part in _parts(results.default, results):
        within = results.default[results.default["setting"] == place["setting"]]
        beside = {null: _same_plates(of_way(within, null), part) for null in nulls}
        beside = {null: table for null, table in beside.items() if not table.empty}
        if place["method"].startswith(NULL):
            continue
        if not beside:
            rows.append({**place, "null": "", "margin": np.nan, "margin_low": np.nan, "margin_high": np.nan, "shown": False})
            continue
        best = max(beside, key=lambda null: (len(beside[null]), float(beside[null]["well_accuracy"].mean())))
        both = _same_plates(part, beside[best])
        own, other = resamples.mean(both, "well_accuracy"), resamples.mean(beside[best], "well_accuracy")
        figure = _figure(own - other, "margin")
        wells = both.drop_duplicates(["lab", "batch", "plate"])["wells"].sum()
        by_chance = _NORMAL * np.sqrt((own.value * (1 - own.value) + other.value * (1 - other.value)) / wells)
        shown = figure["margin_low"] > 0 and figure["margin"] > by_chance
        rows.append({**place, "null": way_name(best), **figure, "shown": bool(shown)})
    return pd.DataFrame(rows)


def gaps(results: Results, resamples: Resamples) -> pd.DataFrame:
    """Points gained per well over unadapted ERM on the same plates and seeds, and the share of ERM's loss that this is.

    Share closed = (adapted - ERM) / (ERM in domain - ERM), Sanchez-Fernandez et al. 2026, per well and per image. It is NaN
    where the interval of ERM's loss is not above zero: it is not sure that there is anything to close.
    """
    unadapted = of_way(results.default, UNADAPTED)
    at_home = unadapted[unadapted["setting"] == "in_domain"]
    rows = []
    for place, part in _parts(results.default, results):
        away = _same_plates(unadapted[unadapted["setting"] == place["setting"]], part)
        home = at_home[at_home["seed"].isin(set(away["seed"]))]
        if place["setting"] == "in_domain" or (place["method"], place["context"]) == UNADAPTED or away.empty:
            continue
        row: dict[str, object] = {**place, "behind": _behind(away)}
        for metric, unit in (("well_accuracy", "well"), ("image_accuracy", "image")):
            erm = resamples.mean(away, metric)
            gain, loss = resamples.mean(_same_plates(part, away), metric) - erm, resamples.mean(home, metric) - erm
            row |= (
                _figure(gain, f"{unit}_gain") | _figure(loss, f"{unit}_loss") | _figure(gain.share_of(loss), f"{unit}_share")
            )
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Curve:
    """Well accuracy along one axis of the grid: ``rows`` of method, setting, blended, x and figure; ``fixed`` other axes."""

    axis: str
    rows: pd.DataFrame
    fixed: dict[str, float]


def curve(results: Results, resamples: Resamples, axis: str) -> Curve | None:
    """Well accuracy against ``controls``, ``query_wells`` or ``alpha``; None where it was not varied.

    The other two axes stay where most values of this one were scored. Unadapted ERM and nulls stand beside the methods that
    were scored along the axis even if they were not, with the one value of whole plates.
    """
    fixed = _fixed(results.cells, axis)
    if fixed is None:
        return None
    rows = []
    for place, part in _parts(results.cells, results):
        line = part[np.logical_and.reduce([part[name] == value for name, value in fixed.items()])]
        if line[axis].nunique() < 2:  # noqa: PLR2004 (a line has two points)
            beside = (place["method"], place["context"]) == UNADAPTED or place["method"].startswith(NULL)
            line = part[part.index.isin(results.default.index)] if beside else part[:0]
        for (blended, x), group in grouped(line, ("blended", axis)):
            figure: dict[str, object] = {**_figure(resamples.mean(group, "well_accuracy"), "value")}
            rows.append({**place, "blended": bool(blended), "x": float(x), **figure, "plates": len(places_of(group))})
    return Curve(axis, pd.DataFrame(rows), fixed) if rows else None


def _fixed(cells: pd.DataFrame, axis: str) -> dict[str, float] | None:
    default = {"controls": float(ALL), "query_wells": float(ALL), "alpha": np.inf}
    others = [name for name in default if name != axis]
    counts = cells.groupby(others)[axis].nunique()
    if counts.max() < 2:  # noqa: PLR2004 (a curve has two points)
        return None
    richest = [dict(zip(others, map(float, key), strict=True)) for key in counts.index[counts == counts.max()]]
    return max(richest, key=lambda fixed: sum(default[name] == value for name, value in fixed.items()))


def reliability(results: Results, resamples: Resamples) -> pd.DataFrame:
    """Share of wells called rightly by confidence: one row a method, setting, stage and bin that has wells.

    ``stage`` is ``before`` or ``after`` temperature.
    """
    assert results.predictions is not None
    found = results.predictions
    stages = (("before", "called_before", found["confidence_before"].to_numpy(np.float64)),
              ("after", "called", _probabilities(found).max(axis=1)))  # fmt: skip
    rows = []
    for stage, called, confidence in stages:
        judged = found.assign(
            confidence=confidence,
            bin=np.minimum((confidence * BINS).astype(int), BINS - 1),
            right=(found[called] == found["label"]).astype(float),
        )
        for place, part in _parts(judged, results):
            for (number,), group in grouped(part, ("bin",)):
                right = resamples.ratio(group, group["right"].to_numpy(np.float64), np.ones(len(group)))
                figures = {"confidence": float(group["confidence"].mean()), **_figure(right, "value")}
                rows.append({**place, "stage": stage, "bin": int(number), "wells": len(group), **figures})
    return pd.DataFrame(rows)


def calibration_by_batch(results: Results, way: Way) -> pd.DataFrame:
    """Calibration error and NLL of each batch, before and after temperature: means over its plates and seeds.

    ``pooled_ece`` is the error over all of the batch's predictions, after temperature: that of single plates is biased
    upwards, the more the fewer wells they have. NaN where there are no predictions.
    """
    batch = ("setting", "lab", "batch")
    pooled = {}
    if results.predictions is not None:
        pooled = {key: _pooled_error(part) for key, part in grouped(of_way(results.predictions, way), batch)}
    rows = []
    for key, part in grouped(of_way(results.default, way), batch):
        means = {name: float(part[name].mean()) for name in ("temperature", "ece_before", "ece", "nll_before", "nll")}
        place = {**dict(zip(batch, key, strict=True)), "plates": len(places_of(part))}
        rows.append({**place, **means, "pooled_ece": pooled.get(key, np.nan)})
    return pd.DataFrame(rows)


def _pooled_error(predictions: pd.DataFrame) -> float:
    labels = pd.Categorical(predictions["label"], categories=classes_of(predictions)).codes
    return expected_calibration_error(_probabilities(predictions), labels.astype(np.int64))


def _probabilities(predictions: pd.DataFrame) -> NDArray[np.float64]:
    """Probabilities (wells, classes), of classes in order; a class that a network does not know has 0."""
    return predictions[[f"{PROBABILITY}{name}" for name in classes_of(predictions)]].fillna(0.0).to_numpy(np.float64)


def confusion(results: Results, way: Way, setting: str) -> pd.DataFrame:
    """Wells by true label (rows) and call (columns), classes in order, over plates and seeds."""
    assert results.predictions is not None
    part = of_way(results.predictions, way)
    part = part[part["setting"] == setting]
    classes = classes_of(part)
    return pd.crosstab(part["label"], part["called"]).reindex(index=classes, columns=classes, fill_value=0)


def cannot_show(results: Results) -> list[str]:
    """What the reader must not take from these results, each with its reason."""
    found = []
    if results.simulated:
        found.append(
            "The plates are simulated: figures show that methods do what they should where the truth is known, and say "
            "nothing of real plates."
        )
    for setting in results.settings:
        part = results.default[results.default["setting"] == setting]
        if part.empty:
            found.append(f"{SETTINGS[setting]}: no method was scored on whole plates (all controls, all wells, no shift).")
            continue
        one = [
            name for name, levels in (("lab", 1), ("batch", 2)) if len({place[:levels] for place in places_of(part)}) == 1
        ]
        if one:
            found.append(f"{SETTINGS[setting]}: one {one[0]} ({part[one[0]].iloc[0]}); intervals say nothing of other ones.")
        if members(places_of(part)) < FEW_MEMBERS:
            found.append(f"{SETTINGS[setting]}: {extent(part)}; so few that 95 % intervals cover less than that.")
    absent = [name for setting, name in SETTINGS.items() if setting not in results.settings]
    if absent:
        found.append(f"Not scored: {', '.join(absent)}.")
    found += [*_of_seeds(most_seeds(results.cells)), *_other_seeds(results), *_at_bound(results)]
    methods = set(results.default["method"])
    if not any(name.startswith(NULL) for name in methods):
        found.append("No null was scored: how much of each figure needs no morphology cannot be told.")
    if of_way(results.default, UNADAPTED).empty:
        found.append("Unadapted ERM was not scored: what adapting gains cannot be told.")
    return [*found, *(f"{line[:1].upper()}{line[1:]}." for line in results.told)]


def _of_seeds(count: int) -> list[str]:
    if count == 1:
        return ["One seed: how much training anew would change is not in the intervals."]
    few = f"{count} seeds: so few that intervals cover less than 95 % of what training anew would change."
    return [few] if count < FEW_MEMBERS else []


def _other_seeds(results: Results) -> list[str]:
    groups: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for way in results.ways():
        rows = of_way(results.default, way)
        seeds, plates = sorted(set(rows["seed"])), len(places_of(rows))
        groups.setdefault((tuple(seeds), plates), []).append(way_name(way))
    if len(groups) < 2:  # noqa: PLR2004 (others)
        return []
    told = "; ".join(
        f"{', '.join(names)}: seeds {', '.join(map(str, seeds))}, {plates} plates"
        for (seeds, plates), names in groups.items()
    )
    return [f"Methods were scored with different seeds or plates, and are compared on those that they share: {told}."]


def _at_bound(results: Results) -> list[str]:
    rows, (least, most) = results.default, TEMPERATURES
    rows = rows[(rows["temperature"] > 0.99 * most) | (rows["temperature"] < 1.01 * least)]
    names = [way_name(way) for way in ways_of(rows) if not way[0].startswith(NULL)]
    if not names:
        return []
    bounds = f"Temperature at its bound ({least:g} or {most:g}) for {', '.join(names)}"
    return [f"{bounds}: on validation plates none makes its probabilities fit; read no confidence of it."]


# --- Markdown --------------------------------------------------------------------------------------------------------


def write_report(folder: Path, out: Path, focus: Way | None = None) -> Path:
    """Write ``report.md`` and its plots from a results folder; ``focus`` is the method that plots of one method show.

    Without one it is ``FOCUS``, or the first that adapts. The text is there only when all its plots are.

    Raises:
        RunError: ``focus`` is not in the results, or the cost is damaged.
        RunError, LayoutError: see ``training.results.read_results``.
    """
    results = read_results(folder)
    resamples, palette = Resamples(), plots.Palette(tuple(results.ways()))
    shown = [way for way in dict.fromkeys((UNADAPTED, _focus(folder, results, focus))) if way in results.ways()]
    cost, wells = _cost_section(folder, results), _wells_by_way(folder, results, shown)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.md"
    path.unlink(missing_ok=True)
    sections = [
        _opening(results),
        _results_section(results, resamples, palette, out),
        _gap_section(results, resamples),
        *(_curve_section(results, resamples, axis, palette, out) for axis in CURVES),
        _calibration_section(results, resamples, shown, palette, out),
        _confusion_section(results, shown, out),
        _embedding_section(wells, out),
        cost,
    ]
    write_whole(path, ("\n\n".join(section for section in sections if section) + "\n").encode())
    return path


def _focus(folder: Path, results: Results, asked: Way | None) -> Way:
    known = results.ways()
    if asked is None:
        adapted = [way for way in known if way != UNADAPTED and not way[0].startswith(NULL)]
        return FOCUS if FOCUS in adapted or not adapted else adapted[0]
    if asked not in known:
        there = ", ".join(f"{method} with context {context}" for method, context in known)
        raise RunError(f"{folder} has no {asked[0]} with context {asked[1]}; it has {there}")
    return asked


def _cost_section(folder: Path, results: Results) -> str:
    if results.cost is None:
        return ""
    try:
        return f"## Cost of adapting\n\n{cost_markdown(results.cost)}"
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise RunError(f"{folder / COST} is damaged ({error!r}): measure the cost again") from None


def _opening(results: Results) -> str:
    cells = results.cells
    behind = [[SETTINGS[setting], extent(cells[cells["setting"] == setting])] for setting in results.settings]
    told = (
        "Accuracies are means over plates, 95 % intervals in brackets: labs, batches in them and plates in those are drawn "
        "again with replacement, and seeds beside them; differences are paired over the same plates. A single plate, lab, "
        "batch or seed is kept as it is, so that no interval speaks of others; what all plates have alike has none."
    )
    return "\n\n".join([
        f"# Evaluation on {'simulated ' if results.simulated else ''}plates",
        told,
        _markdown(["setting", "what stands behind its figures"], behind),
        *_trained_section(results),
        "## What this cannot show",
        "\n".join(f"- {line}" for line in cannot_show(results)) or "Nothing that the tables could tell of.",
    ])  # fmt: skip


def _trained_section(results: Results) -> Iterator[str]:
    """Tell what was trained, a row a network."""
    if not results.runs:
        return
    rows = []
    for network in dict.fromkeys(str(run.get("network")) for run in results.runs):
        runs = [run for run in results.runs if str(run.get("network")) == network]
        facts = [sorted({str(run["budget"].get(name, "")) for run in runs}) for name in _BUDGET]
        rows.append([network, ", ".join(str(run.get("seed")) for run in runs), *(", ".join(values) for values in facts)])
    yield f"## What was trained\n\n{_markdown(['network', 'seeds', *_BUDGET.values()], rows)}"


def _results_section(results: Results, resamples: Resamples, palette: plots.Palette, out: Path) -> str:
    found = scores(results, resamples)
    if found.empty:
        return ""
    plots.accuracies(found, palette, out / "accuracy.png")
    dotted = "\n\nDotted: unadapted ERM." if UNADAPTED in results.ways() else ""
    parts = [f"## Accuracy\n\n![Accuracy per well by method and setting](accuracy.png){dotted}"]
    margins = over_nulls(results, resamples)
    for setting in results.settings:
        rows = [
            [
                _named(row), row["behind"], *(_printed(row, m) for m in METRICS[:3]),
                f"{row['worst_batch_accuracy']:.3f} {row['worst_batch']}",
                *(_before_after(row, metric) for metric in METRICS[3:]),
            ]
            for _, row in found[found["setting"] == setting].iterrows()
        ]  # fmt: skip
        titles = ["method", _BEHIND, "per image", "per well", "macro-F1", "worst batch, per well", "NLL", "ECE", "Brier"]
        if rows:
            parts.append(f"### {SETTINGS[setting].capitalize()}\n\n{_markdown(titles, rows)}")
            parts.append(_beside_nulls(margins[margins["setting"] == setting]) if len(margins) else "")
    parts.append(
        "NLL, ECE and Brier score: before temperature (T = 1) → after; lower is better. Nulls know nothing of morphology; "
        f"{NULL}majority calls the commonest training class everywhere."
        + (" What is blended stands in the sections below." if results.cells["blended"].any() else "")
    )
    return "\n\n".join(part for part in parts if part)


def _beside_nulls(margins: pd.DataFrame) -> str:
    if margins.empty:
        return ""
    doubtful = [row for _, row in margins.iterrows() if not row["shown"]]
    if not doubtful:
        return "Every method is above the best null on the same plates (95 %, over plates and over as many wells)."
    listed = (
        f"{_named(row)} ({_printed(row, 'margin', signed=True)} over {row['null']})"
        if row["null"]
        else f"{_named(row)} (no null was scored on its plates with its seed)"
        for row in doubtful
    )
    return f"**Not shown to be above the best null**, per well: {'; '.join(listed)}."


def _gap_section(results: Results, resamples: Resamples) -> str:
    found = gaps(results, resamples)
    if found.empty:
        return ""
    shares = {"well_share": "share closed, per well", "image_share": "share closed, per image"}
    shares = {name: title for name, title in shares.items() if found[name].notna().any()}
    rows = [
        [
            _named(row), SETTINGS[row["setting"]], row["behind"],
            _printed(row, "well_gain", signed=True), *(_printed(row, name) for name in shares),
        ]
        for _, row in found.iterrows()
    ]  # fmt: skip
    losses = [
        f"{SETTINGS[row['setting']]} {_printed(row, 'well_loss')} per well"
        for _, row in found.drop_duplicates("setting").iterrows()
        if np.isfinite(row["well_loss"])
    ]
    titles = ["method", "setting", _BEHIND, "gain per well over unadapted ERM", *shares.values()]
    lost = f"Unadapted ERM loses from in-domain plates: {'; '.join(losses)}. " + (
        "Share closed = (method - ERM) / (ERM in domain - ERM): above 1 a method does better there than ERM does at home; "
        "empty where it is not sure that ERM loses anything."
        if shares
        else "It is not sure that ERM loses anything: no share of a gap can be told."
    )
    told = lost if losses else "What unadapted ERM loses is not known: it was not scored in domain."
    return "\n\n".join(["## Domain gap closed", told, _markdown(titles, rows)])


def _curve_section(results: Results, resamples: Resamples, axis: str, palette: plots.Palette, out: Path) -> str:
    found = curve(results, resamples, axis)
    if found is None:
        return ""
    title, label = CURVES[axis]
    plots.curves(found.rows, axis, label, palette, out / f"{axis}.png")
    fixed = "; ".join(f"{CURVES[name][1]}: {plots.tick(name, value)}" for name, value in found.fixed.items())
    told = (
        f"Accuracy per well. Held fixed: {fixed}. In square brackets the plates behind a figure, where fewer than elsewhere "
        "in its row. Unadapted ERM and nulls have the one value of whole plates where they were not scored along this axis."
        + _NOTES.get(axis, "")
    )
    picture = f"![Accuracy per well against {label}]({axis}.png)"
    return "\n\n".join([f"## {title}", told, picture, _curve_table(found)])


def _curve_table(found: Curve) -> str:
    rows = found.rows
    order = plots.order(found.axis, set(rows["x"]))
    lines = []
    keys = (rows[name] for name in ("setting", "method", "context", "blended"))
    for setting, method, context, blended in dict.fromkeys(zip(*keys, strict=True)):
        way = (method, context)
        part = of_way(rows[(rows["setting"] == setting) & (rows["blended"] == blended)], way)
        points = {float(row["x"]): _point(row, most=int(part["plates"].max())) for _, row in part.iterrows()}
        cells = [points.get(x, "") for x in order]
        lines.append([way_name(way) + (", blended" if blended else ""), SETTINGS[setting], *cells])
    return _markdown(["method", "setting", *(plots.tick(found.axis, x) for x in order)], lines)


def _point(row: pd.Series, *, most: int) -> str:
    return _printed(row, "value") + (f" [{row['plates']}]" if row["plates"] < most else "")


def _calibration_section(
    results: Results, resamples: Resamples, shown: Sequence[Way], palette: plots.Palette, out: Path
) -> str:
    parts = ["## Calibration"]
    if results.predictions is not None and set(shown) & set(ways_of(results.predictions)):
        plots.reliability(reliability(results, resamples), shown, palette, out / "reliability.png")
        parts.append("![Share of wells called rightly against confidence](reliability.png)")
        parts.append("Dots after temperature, rings before it (T = 1); their area is the share of the wells.")
    by_batch = {way: calibration_by_batch(results, way) for way in shown}
    by_batch = {way: table for way, table in by_batch.items() if not table.empty}
    if not by_batch:
        return ""
    plots.calibration(by_batch, out / "calibration.png")
    parts.append("![Calibration error of each batch before and after temperature](calibration.png)")
    parts.append("A line a batch; named is the worst of each setting.")
    rows = []
    for way, table in by_batch.items():
        worst = set(table.groupby("setting")["ece"].idxmax())
        rows += [
            [
                way_name(way), SETTINGS[row["setting"]], f"{row['lab']}/{row['batch']}{' **worst**' if i in worst else ''}",
                str(row["plates"]), f"{row['temperature']:.2f}", _before_after(row, "ece"), _before_after(row, "nll"),
                _number(row["pooled_ece"]),
            ]
            for i, row in table.iterrows()
        ]  # fmt: skip
    titles = ["method", "setting", "batch", "plates", "T", "ECE, mean of plates", "NLL", "ECE, wells pooled (after)"]
    parts.append(f"By batch, before temperature → after:\n\n{_markdown(titles, rows)}")
    return "\n\n".join(parts)


def _confusion_section(results: Results, shown: Sequence[Way], out: Path) -> str:
    if results.predictions is None:
        return ""
    found = {(way, s): confusion(results, way, s) for way in shown for s in results.settings}
    found = {key: table for key, table in found.items() if table.to_numpy().sum()}
    if not found:
        return ""
    plots.confusions(found, out / "confusion.png")
    wells = ", ".join(f"{way_name(way)} {SETTINGS[s]} {int(t.to_numpy().sum())}" for (way, s), t in found.items())
    return f"## Confusions\n\n![Share of each class's wells by call](confusion.png)\n\nWells (times seeds): {wells}."


def _wells_by_way(folder: Path, results: Results, shown: Sequence[Way]) -> dict[Way, pd.DataFrame]:
    """Embeddings of the methods that are shown and have enough wells and features for two axes."""
    if results.embeddings is None:
        return {}
    tables = {way: _wells_of(folder, results.embeddings, way) for way in shown}
    return {way: table for way, table in tables.items() if min(len(table) - 1, len(features_of(table))) > 1}


def _embedding_section(tables: Mapping[Way, pd.DataFrame], out: Path) -> str:
    if not tables:
        return ""
    plots.embeddings(tables, out / "embedding.png")
    rows = []
    for way, table in tables.items():
        by_class, by_batch = variance_shares(table)
        rows.append([way_name(way), str(len(table)), f"{by_class:.3f}", f"{by_batch:.3f}"])
    titles = ["method", "wells", "between classes (treated wells)", "between batches (controls)"]
    told = (
        "Test plates of the first seed. Share of the variance of wells' embeddings, adjusted for the number of groups: "
        "groups that mean nothing have 0 on average, and may have less:"
    )
    return "\n\n".join([
        "## Embeddings",
        "![Wells on the first two principal components, by class and by batch](embedding.png)",
        f"{told}\n\n{_markdown(titles, rows)}",
    ])  # fmt: skip


def _wells_of(folder: Path, embeddings: pd.DataFrame, way: Way) -> pd.DataFrame:
    """Test plates' wells of one method, first seed, with that network's features alone."""
    chosen = (embeddings["Metadata_method"] == way[0]) & (embeddings["Metadata_context"] == way[1])
    part = embeddings[chosen & (embeddings["Metadata_setting"] != "train")]
    part = part[part["Metadata_seed"] == part["Metadata_seed"].min()]
    empty = [name for name in features_of(part) if part[name].isna().all()]
    kept: pd.DataFrame = part.drop(columns=empty)
    for name in features_of(kept):
        if not np.isfinite(kept[name]).all():
            raise LayoutError(f"{folder}/embeddings.parquet: the feature {name} of {way_name(way)} is not finite everywhere")
    return kept


# --- parts -----------------------------------------------------------------------------------------------------------


def _parts(table: pd.DataFrame, results: Results) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Each method's rows in each setting, in the order of print."""
    for setting in results.settings:
        within = table[table["setting"] == setting]
        for way in results.ways():
            part = of_way(within, way)
            if not part.empty:
                yield {"setting": setting, "method": way[0], "context": way[1]}, part


def _same_plates(rows: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Rows whose plate has a row of the same seed in ``other`` too."""
    keys = ["seed", "lab", "batch", "plate"]
    there = set(other[keys].itertuples(index=False, name=None))
    return rows.loc[[key in there for key in rows[keys].itertuples(index=False, name=None)]]


def _behind(rows: pd.DataFrame) -> str:
    """Numbers of plates, batches and labs."""
    places = places_of(rows)
    return ", ".join(str(len({place[:levels] for place in places})) for levels in (3, 2, 1))


def _named(row: pd.Series) -> str:
    return way_name((str(row["method"]), str(row["context"])))


def _figure(estimate: Estimate, name: str) -> dict[str, float]:
    low, high = estimate.interval or (np.nan, np.nan)
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}


def _printed(row: pd.Series, name: str, *, signed: bool = False) -> str:
    value, low, high = (float(row.get(key, np.nan)) for key in (name, f"{name}_low", f"{name}_high"))
    if not np.isfinite(value):
        return ""
    sign = "+" if signed else ""
    varies = np.isfinite(low) and high - low > _SAME  # members that are all alike say nothing of others
    return f"{value:{sign}.3f}" + (f" ({low:{sign}.3f} to {high:{sign}.3f})" if varies else "")


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else ""


def _before_after(row: pd.Series, metric: str) -> str:
    before, after = _number(float(row[f"{metric}_before"])), _number(float(row[metric]))
    return f"{before} → {after}" if before and after else after


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
