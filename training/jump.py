"""JUMP's published tables → the index: which plates, what is in their wells, where their planes lie.

Reads ``plate.csv``, ``well.csv``, ``perturbation_control.csv``, ``compound.csv``, ``orf.csv``, ``crispr.csv`` and
``microscope_config.csv`` (each also gzipped) of the JUMP Cell Painting datasets, LoadData tables (CSV or Parquet), and a
table of labels. All that is wrong with them is told, with file and row numbers as in the file. LoadData is read plate by
plate, so that memory does not grow with the number of plates.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from model.layout import Role
from training.index import KEYS, path_column, write_index_of
from training.load_data import PLATE, SITE, WELL, checked_sites, in_um, pixel_sizes, with_places, with_well_names
from training.objects import Objects, is_remote
from training.simulate import NEGATIVE_CONTROL
from training.tables import ROW, Problem, Problems, Table, among, looked_up, read_table

POSITIVE_CONTROLS: Mapping[str, tuple[str, str]] = {
    "JCP2022_012818": ("TC-S-7004", "DYRK1A/B"),
    "JCP2022_025848": ("dexamethasone", "glucocorticoid receptor"),
    "JCP2022_035095": ("LY2109761", "TGFBR1/2"),
    "JCP2022_037716": ("AMG900", "Aurora kinases"),
    "JCP2022_046054": ("FK-866", "NAMPT"),
    "JCP2022_050797": ("quinidine", "ion channels"),
    "JCP2022_064022": ("NVS-PAK1-1", "PAK1"),
    "JCP2022_085227": ("aloxistatin", "cathepsin"),
}
"""Compound → its name and mechanism of action: one compound a mechanism, on every plate of type COMPOUND."""
_CONTROLS: Mapping[str, str] = {NEGATIVE_CONTROL: "negcon", **dict.fromkeys(POSITIVE_CONTROLS, "poscon")}
_BUILT_IN = "the built-in table of positive controls"
LABEL_COLUMNS = ("label", "Metadata_label", "Metadata_moa", "moa")
COMPOUND, PERT_TYPE = "Metadata_JCP2022", "Metadata_pert_type"
_LOAD_DATA = tuple(
    f"{stem}{ending}" for stem in ("load_data_with_illum", "load_data") for ending in (".parquet", ".csv.gz", ".csv")
)
"""LoadData files; of those in one folder the first is read."""
_TABLES_AHEAD = 16
_LISTED = 30


# --- published tables ------------------------------------------------------------------------------------------------


def find_table(folder: Path, name: str) -> Path | None:
    """Find a published table in a folder, gzipped or not."""
    found = [path for path in (folder / f"{name}.csv.gz", folder / f"{name}.csv") if path.is_file()]
    return found[0] if found else None


def _published(folder: Path, name: str, columns: Sequence[str], problems: Problems, *, needed: bool = True) -> Table | None:
    path = find_table(folder, name)
    if path is None:
        if needed:
            problems.error(str(folder), f"no {name}.csv or {name}.csv.gz in it")
        return None
    table = read_table(str(path), path.read_bytes(), problems)
    return None if table is None or table.lacks(columns, problems) else table


# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which plates and wells: nothing named means all. ``all_wells`` keeps wells that have no label, too."""

    sources: tuple[str, ...] = ()
    batches: tuple[str, ...] = ()
    plates: tuple[str, ...] = ()
    plate_types: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    all_wells: bool = False


def write_jump_index(
    folder: Path,
    load_data: Sequence[str],
    channels: Sequence[str],
    compounds: Path | None,
    selection: Selection,
    objects: Objects,
    out: Path,
) -> list[Problem]:
    """Index what was asked for of JUMP's tables in ``folder``, write it as Parquet, and return warnings.

    The arguments are those of ``read_jump_tables`` and ``index_jump``.

    Raises:
        LayoutError: something is wrong with the tables; tells all of it, and nothing is written.
        FetchError: the storage is away.
    """
    problems = Problems()
    tables = read_jump_tables(folder, compounds, selection, problems)

    def plates() -> Iterator[pd.DataFrame]:
        written = False
        for rows in index_jump(tables, load_data, channels, selection, objects, problems):
            written = True
            yield rows
        if not written and not problems.errors:
            problems.error(str(folder), "no plate is left to index")
        problems.stop()

    write_index_of(plates(), out)
    return problems.warnings


@dataclass(frozen=True, eq=False)
class JumpTables:
    """What the tables say of the plates that were asked for.

    ``plates`` by name; ``known`` names all plates there are. ``wells``: of each of those plates, every well with its role
    and label.
    """

    plate_file: str
    well_file: str
    plates: pd.DataFrame
    known: frozenset[str]
    wells: Mapping[str, pd.DataFrame]
    labels: tuple[str, ...]
    pixel_sizes_um: Mapping[str, float]


def read_jump_tables(folder: Path, compounds: Path | None, selection: Selection, problems: Problems) -> JumpTables:
    """Read and check the published tables.

    Args:
        folder: where they lie.
        compounds: a table with a column ``Metadata_JCP2022`` (or ``InChIKey``, to be looked up in ``compound.csv``) and one
            of ``LABEL_COLUMNS``; without it the positive controls are labelled by their mechanism.
        selection: which plates.
        problems: takes up what is wrong.

    Raises:
        LayoutError: nothing more can be checked; tells all that was found.
    """
    plate_table = _published(folder, "plate", [*KEYS[:3], "Metadata_PlateType"], problems)
    well_table = _published(folder, "well", [KEYS[0], PLATE, WELL, COMPOUND], problems)
    control_table = _published(folder, "perturbation_control", [COMPOUND, PERT_TYPE], problems, needed=False)
    compound_table, orf_table, crispr_table = (
        _published(folder, name, [COMPOUND], problems, needed=False) for name in ("compound", "orf", "crispr")
    )
    label_table = None if compounds is None else _label_table(compounds, compound_table, problems)
    tables = [table for table in (compound_table, orf_table, crispr_table, control_table, label_table) if table is not None]
    known_compounds = {*_CONTROLS, *(compound for table in tables for compound in table.rows[COMPOUND])}
    types = _control_types(control_table, problems)
    labels = _labels(label_table, compound_table, types, problems) if compounds else _built_in_labels(types, problems)
    labels = _chosen(labels, str(compounds or _BUILT_IN), selection, problems)
    if plate_table is None or well_table is None:
        problems.stop()
    assert plate_table is not None
    assert well_table is not None
    plates = _selected_plates(plate_table, selection, problems)
    known = frozenset(plate_table.rows[PLATE])
    wells = _selected_wells(well_table, plates, known, problems)
    _tell_unknown(wells, known_compounds, problems)
    roles = _roles(wells, control_table, compound_table, types, labels)
    _tell_plates(plates, roles, plate_table.file, problems)
    return JumpTables(
        plate_table.file,
        well_table.file,
        plates.drop(columns=ROW).set_index(PLATE, drop=False),
        known,
        {**dict.fromkeys(plates[PLATE], roles.iloc[:0]), **{str(plate): rows for plate, rows in roles.groupby(PLATE)}},
        tuple(dict.fromkeys(labels.values())),
        _microscope_pixel_sizes(folder, problems),
    )


def _selected_plates(table: Table, selection: Selection, problems: Problems) -> pd.DataFrame:
    table.report_twice([PLATE], "plate", problems)
    rows = table.rows.drop_duplicates(PLATE)
    asked = {
        KEYS[0]: selection.sources,
        KEYS[1]: selection.batches,
        PLATE: selection.plates,
        "Metadata_PlateType": selection.plate_types,
    }
    for column, values in asked.items():
        there = set(rows[column])
        absent = [value for value in values if value not in there]
        if absent:
            listed = ", ".join([*sorted(there)[:_LISTED], *["…"] * (len(there) > _LISTED)])
            problems.error(table.file, f"no {column} {', '.join(absent)}; there are {listed}")
    chosen = rows
    for column, values in asked.items():
        chosen = chosen[chosen[column].isin(values)] if values else chosen
    if not len(chosen):
        problems.error(table.file, "no plate is of all that was asked for")
    return chosen.reset_index(drop=True)


def _selected_wells(table: Table, plates: pd.DataFrame, known: frozenset[str], problems: Problems) -> Table:
    """Wells of the selected plates, their names in order; wrong ones are reported and left out."""
    stray = table.rows[~among(table.rows[PLATE], known)]
    for plate, rows in stray.groupby(PLATE, sort=False):
        problems.warn(table.file, f"plate {plate} is not in the plate table", rows[ROW])
    chosen = table.where(among(table.rows[PLATE], set(plates[PLATE])))
    sources = chosen.rows[PLATE].map(dict(zip(plates[PLATE], plates[KEYS[0]], strict=True)))
    other = sources != chosen.rows[KEYS[0]]
    problems.each(chosen, other, "plate {Metadata_Plate} is not of {Metadata_Source} by the plate table")
    problems.each(
        chosen, chosen.rows[COMPOUND] == "", "no Metadata_JCP2022 for well {Metadata_Well} of plate {Metadata_Plate}"
    )
    chosen = with_well_names(chosen, problems)
    chosen.report_twice([PLATE, WELL], "plate and well", problems)
    return Table(chosen.file, chosen.rows.drop_duplicates([PLATE, WELL]).reset_index(drop=True))


def _label_table(path: Path, compounds: Table | None, problems: Problems) -> Table | None:
    """Read a table of labels, its compounds named and its labels in the column ``label``."""
    if not path.is_file():
        problems.error(str(path), "it is not there")
        return None
    table = read_table(str(path), path.read_bytes(), problems)
    if table is None:
        return None
    column = next((name for name in LABEL_COLUMNS if name in table.columns), None)
    if column is None:
        table.lacks([LABEL_COLUMNS[0]], problems)
        return None
    return _with_compounds(table.with_columns(label=table.rows[column]), compounds, problems)


def _labels(table: Table | None, compounds: Table | None, types: Mapping[str, str], problems: Problems) -> dict[str, str]:
    """Label of every compound that has one; no negative control has."""
    if table is None:
        return {}
    table = table.where((table.rows["label"] != "") & (table.rows[COMPOUND] != ""))
    rows = table.rows
    several = rows.groupby(COMPOUND)["label"].transform("nunique") > 1
    problems.each(table, several, "compound {Metadata_JCP2022} has several labels")
    if compounds is not None:
        known = {*compounds.rows[COMPOUND], *types, *_CONTROLS}
        say = "compound {Metadata_JCP2022} is not in {file}"
        problems.each(table, ~rows[COMPOUND].isin(known), say, file=Path(compounds.file).name)
    negative = rows[COMPOUND].isin(_negative(types))
    problems.each(table, negative, "{Metadata_JCP2022} is a negative control and has the label {label}")
    return dict(zip(rows[COMPOUND], rows["label"], strict=True))


def _built_in_labels(types: Mapping[str, str], problems: Problems) -> dict[str, str]:
    for compound in sorted(_negative(types) & POSITIVE_CONTROLS.keys()):
        problems.error(_BUILT_IN, f"{compound} is a negative control by the table of controls")
    return {compound: label for compound, (_, label) in POSITIVE_CONTROLS.items()}


def _negative(types: Mapping[str, str]) -> set[str]:
    return {NEGATIVE_CONTROL, *(compound for compound, kind in types.items() if kind == "negcon")}


def _chosen(labels: dict[str, str], file: str, selection: Selection, problems: Problems) -> dict[str, str]:
    absent = [label for label in selection.labels if label not in labels.values()]
    if absent:
        problems.error(file, f"no label {', '.join(absent)}; there are {', '.join(sorted(set(labels.values())))}")
    return {compound: label for compound, label in labels.items() if not selection.labels or label in selection.labels}


def _with_compounds(table: Table, compounds: Table | None, problems: Problems) -> Table | None:
    """Give a table of labels its compounds, by their InChIKey where they are not named."""
    if COMPOUND in table.columns:
        return table
    key = next((name for name in ("InChIKey", "Metadata_InChIKey") if name in table.columns), None)
    if key is None:
        table.lacks([COMPOUND], problems)
        return None
    if compounds is None or compounds.lacks(["Metadata_InChIKey"], problems):
        problems.error(table.file, f"its compounds are named by {key}, which only compound.csv.gz explains")
        return None
    names = dict(zip(compounds.rows["Metadata_InChIKey"], compounds.rows[COMPOUND], strict=True))
    found = looked_up(table.rows[key], names)
    unknown = table.rows[(found == "") & (table.rows[key] != "")]
    if len(unknown):
        problems.warn(table.file, f"{len(unknown)} compounds are not in {Path(compounds.file).name}", unknown[ROW])
    return table.with_columns(**{COMPOUND: found})


def _control_types(controls: Table | None, problems: Problems) -> dict[str, str]:
    if controls is None:
        return dict(_CONTROLS)
    controls.report_twice([COMPOUND], "compound", problems)
    kinds = controls.rows[PERT_TYPE]
    known = kinds.isin(["negcon", "empty", "trt"]) | kinds.str.startswith("poscon")  # poscon_cp, poscon_diverse, poscon_orf
    say = "{Metadata_JCP2022} has the pert_type {Metadata_pert_type!r}: expected negcon, poscon, empty or trt"
    problems.each(controls, ~known, say)
    return dict(zip(controls.rows[COMPOUND], kinds, strict=True))


def _tell_unknown(wells: Table, known: set[str], problems: Problems) -> None:
    """Warn of compounds that no table knows."""
    unknown = wells.rows[~among(wells.rows[COMPOUND], {*known, ""})]
    names = unknown[COMPOUND].unique()
    if len(names):
        listed = ", ".join([*names[:_LISTED], *["…"] * (len(names) > _LISTED)])
        problems.warn(wells.file, f"{len(names)} compounds are in no other table: {listed}", unknown[ROW])


def _roles(
    wells: Table, controls: Table | None, compounds: Table | None, types: Mapping[str, str], labels: Mapping[str, str]
) -> pd.DataFrame:
    """Wells with role, label and what the compound tables say of them."""
    rows = wells.rows.copy()
    rows[PERT_TYPE] = looked_up(rows[COMPOUND], types, "trt")
    negative = rows[PERT_TYPE] == "negcon"
    rows["role"] = np.where(negative, Role.CONTROL.value, Role.TREATED.value)
    rows["label"] = looked_up(rows[COMPOUND], labels).mask(negative, "negcon")
    for table in (compounds, controls):
        if table is not None:
            new = [name for name in table.columns if name.startswith("Metadata_") and name not in rows.columns]
            rows = rows.merge(table.rows.drop_duplicates(COMPOUND)[[COMPOUND, *new]], on=COMPOUND, how="left")
            rows[new] = rows[new].fillna("")
    return rows.drop(columns=KEYS[0])


def _tell_plates(plates: pd.DataFrame, wells: pd.DataFrame, file: str, problems: Problems) -> None:
    """Warn of plates without controls, and of those without a labelled well."""
    control = wells["role"] == Role.CONTROL.value
    rules = (
        ("wells", wells[PLATE]),
        ("controls", wells.loc[control, PLATE]),
        ("labelled wells", wells.loc[~control & (wells["label"] != ""), PLATE]),
    )
    told: set[str] = set()
    for what, there in rules:
        without = plates[~plates[PLATE].isin(set(there) | told)]
        told |= set(without[PLATE]) if what == "wells" else set()
        for plate, row in zip(without[PLATE], without[ROW], strict=True):
            problems.warn(file, f"plate {plate} has no {what} in the well table", [row])


def _microscope_pixel_sizes(folder: Path, problems: Problems) -> dict[str, float]:
    column = "Metadata_Pixel_Size_Microns"
    table = _published(folder, "microscope_config", [KEYS[0], column], problems, needed=False)
    if table is None:
        return {}
    sources = table.rows[KEYS[0]].str.replace(r"^([0-9]+)$", r"source_\1", regex=True)  # older tables number them
    table = table.with_columns(**{KEYS[0]: sources})
    table.report_twice([KEYS[0]], "the microscope of", problems)
    sizes, wrong = in_um(table.rows[column], 1)
    problems.each(table, wrong, f"{column} {{{column}!r}} of {{{KEYS[0]}}} is no pixel size in µm")
    return dict(zip(sources, sizes, strict=True))


# --- LoadData --------------------------------------------------------------------------------------------------------


def index_jump(
    tables: JumpTables,
    load_data: Sequence[str],
    channels: Sequence[str],
    selection: Selection,
    objects: Objects,
    problems: Problems,
) -> Iterator[pd.DataFrame]:
    """Yield the index of every plate: see ``training.index``; published columns ride along as text.

    Args:
        tables: of the plates that were asked for.
        load_data: tables, folders with tables below them, or templates with columns of the plate table in braces, such as
            ``s3://bucket/{Metadata_Source}/{Metadata_Batch}/{Metadata_Plate}/load_data_with_illum.parquet``.
        channels: which channels, in order.
        selection: which wells.
        objects: reads them.
        problems: takes up what is wrong with the tables; plates of which something is wrong are not yielded.

    Raises:
        FetchError: the storage is away.
    """
    seen: dict[str, str] = {}
    labels: set[str] = set()
    for table in _load_data_tables(tables, load_data, objects, problems):
        for plate in _plates_of(table, tables, channels, seen, problems):
            index = _indexed(plate, tables, channels, selection, problems)
            if index is not None:
                labels |= set(index["label"])
                yield index
    for plate in tables.plates.index.difference(list(seen)):
        problems.warn(tables.plate_file, f"plate {plate} has no LoadData: left out")
    for label in tables.labels:
        if label not in labels:
            problems.warn(tables.well_file, f"no image of label {label}")


def _load_data_tables(tables: JumpTables, load_data: Sequence[str], objects: Objects, problems: Problems) -> Iterator[Table]:
    """Read LoadData tables, some ahead of their turn."""
    places = iter(_places(tables, load_data, problems))
    reading: deque[tuple[str, bool, Future[bytes]]] = deque()
    with ThreadPoolExecutor(_TABLES_AHEAD) as threads:
        while True:
            for place, named in islice(places, _TABLES_AHEAD - len(reading)):
                reading.append((place, named, threads.submit(objects.read, place)))
            if not reading:
                return
            place, named, future = reading.popleft()
            try:
                table = read_table(place, future.result(), problems)
            except FileNotFoundError:
                (problems.error if named else problems.warn)(place, "it is not there")
                continue
            if table is not None:
                yield table


def _places(tables: JumpTables, load_data: Sequence[str], problems: Problems) -> Iterator[tuple[str, bool]]:
    """Places of LoadData tables, and whether they were named outright."""
    for entry in load_data:
        if "{" in entry:
            yield from _filled(entry, tables, problems)
        elif not is_remote(entry) and Path(entry).is_dir():
            found = _below(Path(entry))
            if not found:
                problems.error(entry, f"no LoadData below it: {', '.join(_LOAD_DATA)}")
            yield from ((path, True) for path in found)
        else:
            yield entry, True


def _filled(template: str, tables: JumpTables, problems: Problems) -> Iterator[tuple[str, bool]]:
    for _, row in tables.plates.iterrows():
        try:
            yield template.format(**row), False
        except (KeyError, IndexError, ValueError) as error:
            problems.error(template, f"{error} is no column of the plate table: {', '.join(tables.plates.columns)}")
            return


def _below(folder: Path) -> list[str]:
    """LoadData tables below a folder, one a folder."""
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in folder.rglob("load_data*"):
        if path.name in _LOAD_DATA:
            by_folder[path.parent].append(path)
    return [str(min(paths, key=lambda path: _LOAD_DATA.index(path.name))) for _, paths in sorted(by_folder.items())]


def _plates_of(
    table: Table, tables: JumpTables, channels: Sequence[str], seen: dict[str, str], problems: Problems
) -> Iterator[Table]:
    """Yield a LoadData table's plates that were asked for, each with its planes' places."""
    if table.lacks([PLATE, WELL, SITE], problems):
        return
    unknown = table.rows[~among(table.rows[PLATE], tables.known)]
    for plate, rows in unknown.groupby(PLATE, sort=False):
        problems.error(table.file, f"plate {plate!r} is not in {Path(tables.plate_file).name}", rows[ROW])
    chosen = table.where(among(table.rows[PLATE], tables.plates.index))
    placed = with_places(chosen, _columns(channels), problems)
    if placed is None:
        return
    for plate, rows in placed.rows.groupby(PLATE, sort=True):
        if str(plate) in seen:
            problems.error(table.file, f"plate {plate} is in {seen[str(plate)]} already", rows[ROW])
        else:
            seen[str(plate)] = table.file
            yield Table(table.file, rows.reset_index(drop=True))


def _indexed(
    plate: Table, tables: JumpTables, channels: Sequence[str], selection: Selection, problems: Problems
) -> pd.DataFrame | None:
    """Index one plate's LoadData; None where something is wrong with it, or nothing is to be kept."""
    before = len(problems.errors)
    name = str(plate.rows[PLATE].iloc[0])
    own = tables.plates.loc[[name]].iloc[0]
    for column in KEYS[:2]:
        if column in plate.columns:
            problems.each(
                plate,
                plate.rows[column] != own[column],
                "plate {Metadata_Plate} is of {column} {expected}, not {" + column + "}",
                column=column,
                expected=str(own[column]),
            )
    plate = checked_sites(plate, _columns(channels), problems)
    wells = tables.wells[name]
    absent = ~among(plate.rows[WELL], set(wells[WELL]))
    say = "well {Metadata_Well} of plate {Metadata_Plate} has no row in {file}"
    problems.each(plate, absent, say, file=Path(tables.well_file).name)
    sizes = pixel_sizes(plate, tables.pixel_sizes_um.get(str(own[KEYS[0]]), float("nan")), problems)
    if len(problems.errors) > before:
        return None
    unseen = wells[~among(wells[WELL], set(plate.rows[WELL]))]
    if len(unseen):
        problems.warn(tables.well_file, f"no image of {len(unseen)} wells of plate {name}", unseen[ROW])
    return _joined(plate.with_columns(pixel_size_um=sizes), own, wells, channels, selection)


def _columns(channels: Sequence[str]) -> dict[str, str]:
    return {channel: path_column(channel) for channel in channels}


def _joined(
    plate: Table, own: pd.Series, wells: pd.DataFrame, channels: Sequence[str], selection: Selection
) -> pd.DataFrame | None:
    rows = plate.rows.drop(columns=[*KEYS[:2], ROW], errors="ignore")
    published = wells.drop(columns=[PLATE, ROW])
    clash = [name for name in published.columns if name != WELL and name in rows.columns]
    merged = rows.drop(columns=clash).merge(published, on=WELL, how="left")
    if not selection.all_wells:
        merged = merged[merged["label"] != ""]
    if not len(merged):
        return None
    merged = merged.assign(**{name: own[name] for name in own.index if name != PLATE})
    first = [*KEYS, "label", "role", "pixel_size_um", *map(path_column, channels)]
    extra = [name for name in merged.columns if name.startswith("Metadata_") and name not in first]
    return merged[[*first, *extra]].sort_values(KEYS, ignore_index=True)
