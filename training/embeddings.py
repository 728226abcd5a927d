"""Embedding baselines: any network's wells, made comparable between plates by their controls, then logistic regression.

Takes a table in pycytominer's shape, one row a well: ``Metadata_*`` columns and numeric features, of any origin, so that
foundation models are compared without their weights. Knows nothing of images or of this project's networks.

embedding-raw     features as they are, scaled by the training wells
embedding-zscore  each plate's features in standard deviations from its own controls
tvn               typical variation normalisation (Ando et al. 2017): scale and PCA fitted on all controls, then each batch
                  centred on its controls and whitened by (covariance of its controls + 0.5 I)^(-1/2)
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from gzip import BadGzipFile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from model.errors import AnchorwellError, LayoutError, NoControlsError, WellNameError
from model.layout import parse_well
from training.metrics import accuracy, calibrated, macro_f1
from training.nulls import position_features, position_regression
from training.plates import write_whole
from training.queries import ALL
from training.results import METADATA, NULL, PROBABILITY, SETTINGS, as_text, grouped, places_of, read_parquet
from training.tables import Problem

TRAIN = "train"
TVN_RIDGE = 0.5
SEED = "Metadata_seed"
_NETWORK = ("Metadata_method", "Metadata_context", SEED)
_ROW_NUMBERS = re.compile(r"|unnamed: \d+|index|level_\d+|__index_level_\d+__", re.IGNORECASE)
_LARGEST = float(np.finfo(np.float32).max)

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """What a table's columns are called, and which value marks a negative control.

    ``batch`` is what TVN whitens by; z-scores are always by plate.
    """

    label: str = "Metadata_label"
    control: str = "Metadata_pert_type"
    control_value: str = "negcon"
    setting: str = "Metadata_setting"
    lab: str = "Metadata_Source"
    batch: str = "Metadata_Batch"
    plate: str = "Metadata_Plate"
    well: str = "Metadata_Well"


@dataclass(frozen=True, eq=False)
class Wells:
    """Wells of one network: features (wells, dim) and, of each well, what ``about`` says.

    ``about`` has the columns lab, batch, plate, well, setting, label and control; ``name`` and ``seed`` tell the network.
    """

    name: str
    seed: int
    features: Float
    about: pd.DataFrame

    @property
    def controls(self) -> NDArray[np.bool_]:
        """Which wells are negative controls."""
        return self.about["control"].to_numpy(bool)

    def where(self, setting: str) -> NDArray[np.int64]:
        """Treated wells with a class, of one setting."""
        chosen = ~self.controls & (self.about["label"] != "") & (self.about["setting"] == setting)
        return np.flatnonzero(chosen)

    @property
    def tested(self) -> pd.DataFrame:
        """What ``about`` says of the wells that are not trained on."""
        return self.about[self.about["setting"] != TRAIN]

    def at(self, row: int) -> str:
        """Name a well in a message."""
        about = self.about.iloc[row]
        return f"plate {about['plate']} well {about['well']}"


# --- tables ----------------------------------------------------------------------------------------------------------


def features_of(table: pd.DataFrame, columns: Columns = Columns()) -> list[str]:
    """Columns that hold features: all that are not ``Metadata_*`` and that ``columns`` does not name."""
    return [name for name in map(str, table) if _is_feature(name, columns)]


def _is_feature(name: str, columns: Columns) -> bool:
    return not name.startswith(METADATA) and name not in astuple(columns)


def read_wells(path: Path, name: str, columns: Columns, train_batches: Sequence[str] = ()) -> list[Wells]:
    """Read a table (.parquet or .csv): the wells of every network in it, which are named by its method, context and seed.

    Where it says no method, the name is ``name`` or the file's.

    ``train_batches`` says which batches train where no setting column does; other batches of their labs are then
    ``new_batch``, other labs ``new_lab``.

    Raises:
        LayoutError: the table cannot be read or has no rows, a column is absent, named twice, holds row numbers or words for
            features, a row lacks its plate or network, a well's name is none, a feature is not finite, a well is there
            twice, or training and test share a plate, a batch that should be new, a lab that should be new, or a row.
        NoControlsError: no well is a control.
    """
    table = _read(path, columns)
    keys = [key for key in _NETWORK if key in table]
    settings = [] if train_batches or columns.setting not in table else [columns.setting]
    needed = [columns.lab, columns.batch, columns.plate, columns.well]
    absent = [column for column in (columns.label, columns.control, *needed) if column not in table]
    if absent:
        evaluated = {"method", "context", "setting"} <= set(table)
        instead = "; this is a table of scores: embeddings of wells are in embeddings.parquet, where a grid names them"
        raise LayoutError(
            f"{path} lacks the columns {', '.join(absent)}; it has {', '.join(table.columns)[:300]}" + instead * evaluated
        )
    if table.empty:
        raise LayoutError(f"{path} has no rows under its header: one row a well is expected")
    for column in (*needed, *settings, *keys):
        _refuse(path, table, table[column] == "", f"{column} is empty: fill it in, or leave such rows out")
    if SEED in keys:
        seeds = pd.to_numeric(table[SEED], errors="coerce")
        _refuse(path, table, seeds % 1 != 0, f"{SEED} is no whole number")
        table = table.assign(**{SEED: seeds.astype(np.int64)})
    groups = list(grouped(table, keys)) if keys else [((), table)]
    name = name if name or _NETWORK[0] in keys else _file_name(path)
    return [_wells(path, _name(name, keys, key), _seed(keys, key), part, columns, train_batches) for key, part in groups]


def _read(path: Path, columns: Columns) -> pd.DataFrame:
    """Read a table, its rows numbered as in the file; what is no feature is text, so that names stay as they are written."""
    if path.suffix == ".parquet":
        table = read_parquet(path).rename(columns=str)
        table.index = pd.RangeIndex(1, len(table) + 1)
        _check_names(path, list(table.columns), columns)
    else:
        table = _read_csv(path, columns)
    features = set(features_of(table, columns))
    return table.assign(**{name: as_text(table[name]) for name in map(str, table) if name not in features})


def _read_csv(path: Path, columns: Columns) -> pd.DataFrame:
    """Read a CSV, in which only a feature can be missing: a class may be called NA or None."""
    how: dict[str, Any] = {"keep_default_na": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
    try:
        # A second row that is wider is an error here; under a header, pandas would take its first cells for an index.
        names = pd.read_csv(path, header=None, nrows=2, dtype=str, **how).iloc[0].tolist()
        _check_names(path, names, columns)
        features = [name for name in names if _is_feature(name, columns)]
        table = pd.read_csv(
            path, header=0, names=names, dtype=dict.fromkeys(set(names) - set(features), str),
            na_values={name: [""] for name in features}, low_memory=False, **how,
        )  # fmt: skip
    except (ValueError, EOFError, zlib.error, BadGzipFile) as error:
        raise LayoutError(f"{path} cannot be read as a CSV: {' '.join(str(error).split())}") from None
    table.index = pd.RangeIndex(2, len(table) + 2)  # the header is row 1
    filled: pd.DataFrame = table[~table.replace("", np.nan).isna().all(axis=1)]
    return filled


def _check_names(path: Path, names: Sequence[str], columns: Columns) -> None:
    """Refuse columns that would count as features and are none: row numbers, which tell a sorted label, and copies."""
    header = pd.Index(names)
    if header.has_duplicates:
        raise LayoutError(f"{path}: its header names the column {header[header.duplicated()][0]!r} twice")
    numbers = [name for name in names if _is_feature(name, columns) and _ROW_NUMBERS.fullmatch(name.strip())]
    if numbers:
        raise LayoutError(f"{path}: the column {numbers[0]!r} is named as row numbers are, and would count as a feature: "
                          "drop it (pandas writes none with index=False), or name it Metadata_row")  # fmt: skip


def _refuse(path: Path, table: pd.DataFrame, wrong: pd.Series, what: str) -> None:
    if wrong.any():
        raise LayoutError(str(Problem(str(path), tuple(table.index[wrong]), what)))


def _name(name: str, keys: Sequence[str], key: tuple[Any, ...]) -> str:
    parts = [str(value) for column, value in zip(keys, key, strict=True) if column != SEED]
    return " ".join([name, *parts]).strip()


def _seed(keys: Sequence[str], key: tuple[Any, ...]) -> int:
    return int(dict(zip(keys, key, strict=True)).get(SEED, 0))


def _wells(path: Path, name: str, seed: int, table: pd.DataFrame, columns: Columns, train_batches: Sequence[str]) -> Wells:
    about = pd.DataFrame({
        "lab": table[columns.lab], "batch": table[columns.batch], "plate": table[columns.plate],
        "well": _well_names(path, table, columns), "label": table[columns.label],
        "control": table[columns.control] == columns.control_value,
    }).reset_index(drop=True)  # fmt: skip
    about["setting"] = _settings(path, table, about, columns, train_batches)
    if not about["control"].any():
        values = ", ".join(sorted(set(table[columns.control]))[:8])
        raise NoControlsError(f"{path}: no well has {columns.control} {columns.control_value!r}; there are {values}")
    wells = Wells(name, seed, _features(path, table, about, columns), about)
    _check(path, wells)
    return wells


def _well_names(path: Path, table: pd.DataFrame, columns: Columns) -> list[str]:
    """Name every row's well in one way, so that A1 and A01 are one."""
    found = []
    for row, plate, well in zip(table.index, table[columns.plate], table[columns.well], strict=True):
        try:
            found.append(parse_well(well))
        except WellNameError as error:
            raise LayoutError(f"{path} row {row}, plate {plate}: {error.detail}") from None
    return found


def _features(path: Path, table: pd.DataFrame, about: pd.DataFrame, columns: Columns) -> Float:
    names = [name for name in features_of(table, columns) if not table[name].isna().all()]  # other networks' features
    words = [name for name in names if not pd.api.types.is_numeric_dtype(table[name])]
    if words:
        found = table[words[0]]
        first = found[pd.to_numeric(found, errors="coerce").isna() & found.notna()]
        raise LayoutError(f"{path}: the feature {words[0]!r} is no number" + (
            f" but {first.iloc[0]!r} in row {first.index[0]}" if len(first) else ""
        ) + ": drop the column, or name it Metadata_… where it is no feature")  # fmt: skip
    if not names:
        raise LayoutError(f"{path}: there are no features")
    features = table[names].to_numpy(np.float64)
    bad = np.argwhere(~(np.abs(features) <= _LARGEST))
    if len(bad):
        row, column = bad[0]
        place = f"{names[column]!r} of plate {about['plate'][row]} well {about['well'][row]}"
        raise LayoutError(f"{path}: {len(bad)} features are not finite or beyond {_LARGEST:.1e}, the first {place}: drop "
                          "such columns or impute them (pycytominer.feature_select, operation drop_na_columns)")  # fmt: skip
    return features


def _settings(
    path: Path, table: pd.DataFrame, about: pd.DataFrame, columns: Columns, train_batches: Sequence[str]
) -> Sequence[str]:
    if train_batches:
        unknown = sorted(set(train_batches) - set(about["batch"]))
        if unknown:
            raise LayoutError(
                f"{path} has no batch {', '.join(unknown)}; it has {', '.join(sorted(set(about['batch'])))[:300]}"
            )
        trains = about["batch"].isin(train_batches)
        labs = set(about.loc[trains, "lab"])
        return [TRAIN if train else "new_batch" if lab in labs else "new_lab"
                for train, lab in zip(trains, about["lab"], strict=True)]  # fmt: skip
    if columns.setting not in table:
        raise LayoutError(f"{path} has no column {columns.setting} that says which wells train: name the batches that do "
                          "(--train-batches)")  # fmt: skip
    settings = table[columns.setting].tolist()
    unknown = sorted(set(settings) - {TRAIN, *SETTINGS})
    if unknown:
        raise LayoutError(f"{path}: {columns.setting} is {unknown[0]!r}; known are {TRAIN}, {', '.join(SETTINGS)}")
    return settings


def _check(path: Path, wells: Wells) -> None:
    """Refuse what would let a test plate be known from training."""
    about = wells.about
    twice = about[about.duplicated(["lab", "batch", "plate", "well"])]
    if not twice.empty:
        raise LayoutError(f"{path}: {wells.at(int(twice.index[0]))} has two rows: aggregate sites to wells first "
                          "(pycytominer.aggregate)")  # fmt: skip
    train = about["setting"] == TRAIN
    if not train.any() or train.all():
        raise LayoutError(f"{path}: {wells.name or 'the table'} has {'no' if train.all() else 'only'} wells to test on; "
                          "both training and test wells are needed")  # fmt: skip
    for level, settings in (
        (("lab", "batch", "plate"), set(SETTINGS)), (("lab", "batch"), {"new_batch", "new_lab"}), (("lab",), {"new_lab"}),
    ):  # fmt: skip
        tests = about[about["setting"].isin(settings)]
        shared = set(about.loc[train, list(level)].itertuples(index=False, name=None))
        leaked = sorted(shared & set(tests[list(level)].itertuples(index=False, name=None)))
        if leaked:
            place = f"{level[-1]} {leaked[0][-1]}" + (f" of lab {leaked[0][0]}" if len(level) > 1 else "")
            raise LayoutError(f"{path}: {place} is in training and in the test")
    known = {row.tobytes(): number for number, row in enumerate(wells.features) if train[number]}
    for number in np.flatnonzero(~train):
        same = known.get(wells.features[number].tobytes())
        if same is not None:
            raise LayoutError(f"{path}: {wells.at(int(number))} has the features of {wells.at(same)}, which trains")


# --- normalisation ---------------------------------------------------------------------------------------------------


def raw(wells: Wells) -> Float:
    """Features in standard deviations of the training wells."""
    scaler = StandardScaler().fit(wells.features[wells.where(TRAIN)])
    scaled: Float = scaler.transform(wells.features)
    return scaled


def zscore(wells: Wells) -> Float:
    """Features in standard deviations from each plate's controls; as ``pycytominer.normalize`` with ``standardize``.

    Raises:
        NoControlsError: a plate has no control.
    """
    scaled = np.empty_like(wells.features)
    for name, part in grouped(wells.about, ("lab", "batch", "plate")):
        rows = part.index.to_numpy()
        controls = rows[wells.controls[rows]]
        if not len(controls):
            raise NoControlsError(f"plate {name[-1]} of batch {name[1]} has no control well to be held against")
        scaled[rows] = StandardScaler().fit(wells.features[controls]).transform(wells.features[rows])
    return scaled


def tvn(wells: Wells) -> Float:
    """Typical variation normalisation; see the module's docstring.

    Scale and PCA see the controls of test batches too, as published; neither sees a treated well of them, or a label.

    Raises:
        NoControlsError: a batch has fewer than two controls: no covariance.
    """
    controls = wells.features[wells.controls]
    scaler = StandardScaler().fit(controls)
    components: Float = PCA().fit(scaler.transform(controls)).transform(scaler.transform(wells.features))
    for name, part in grouped(wells.about, ("lab", "batch")):
        rows = part.index.to_numpy()
        own = components[rows[wells.controls[rows]]]
        if len(own) < 2:  # noqa: PLR2004 (a covariance)
            raise NoControlsError(f"batch {name[1]} of lab {name[0]} has {len(own)} control wells; TVN needs two or more")
        components[rows] = (components[rows] - own.mean(axis=0)) @ _inverse_root(np.atleast_2d(np.cov(own, rowvar=False)))
    return components


def _inverse_root(covariance: Float) -> Float:
    values, vectors = np.linalg.eigh(covariance + TVN_RIDGE * np.eye(len(covariance)))
    root: Float = (vectors / np.sqrt(values)) @ vectors.T
    return root


NORMALISATIONS: MappingProxyType[str, Callable[[Wells], Float]] = MappingProxyType(
    {
        "embedding-raw": raw,
        "embedding-zscore": zscore,
        "tvn": tvn,
    }
)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate_embeddings(wells: Wells) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train on the training wells, call the others: cells and predictions (see ``training.results``), nulls beside.

    Logistic regression has its default penalty everywhere: nothing is chosen on test plates. There is one row a well, so
    accuracy per image is not known, and no temperature is fitted.

    Raises:
        LayoutError: fewer than two classes to learn, no test well with a label, or one of a class that training does not
            have.
        NoControlsError: see ``zscore`` and ``tvn``.
    """
    train = wells.where(TRAIN)
    classes = sorted(set(wells.about["label"].iloc[train]))
    if len(classes) < 2:  # noqa: PLR2004 (a classifier)
        raise LayoutError(f"the training wells of {wells.name or 'the table'} have {len(classes)} labels; two are needed")
    tests = np.concatenate([wells.where(setting) for setting in SETTINGS])
    if not len(tests):
        raise LayoutError(f"no treated test well of {wells.name or 'the table'} has a label: there is nothing to score")
    for row in tests:
        if wells.about["label"][row] not in classes:
            raise LayoutError(f"{wells.at(int(row))} is of class {wells.about['label'][row]!r}, which no training well has")
    numbers = np.array([classes.index(label) if label in classes else -1 for label in wells.about["label"]])
    answers = {name: _probabilities(normalise(wells), numbers, train, tests) for name, normalise in NORMALISATIONS.items()}
    shares = np.bincount(numbers[train]) / len(train)
    answers[f"{NULL}majority"] = np.tile(shares, (len(tests), 1))
    answers[f"{NULL}position"] = _probabilities(
        position_features(wells.about["well"].tolist()), numbers, train, tests, position_regression()
    )
    tables = [_tables(wells, method, tests, found, classes, numbers) for method, found in answers.items()]
    return pd.concat([cells for cells, _ in tables]), pd.concat([predictions for _, predictions in tables])


def _probabilities(
    features: Float, numbers: NDArray[np.int64], train: NDArray[np.int64], tests: NDArray[np.int64], model: Any = None
) -> Float:
    model = model or LogisticRegression(max_iter=5000)
    return np.asarray(model.fit(features[train], numbers[train]).predict_proba(features[tests]), np.float64)


def _tables(
    wells: Wells, method: str, tests: NDArray[np.int64], probabilities: Float, classes: list[str], numbers: NDArray[np.int64]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    who: dict[str, Any] = {"method": method, "context": wells.name or "-", "seed": wells.seed}
    about = wells.about.iloc[tests].reset_index(drop=True)
    predictions = about[["setting", "lab", "batch", "plate", "well", "label"]].assign(**who)
    predictions["called"] = predictions["called_before"] = [classes[number] for number in probabilities.argmax(axis=1)]
    predictions["confidence_before"] = probabilities.max(axis=1)
    predictions[[f"{PROBABILITY}{name}" for name in classes]] = probabilities
    rows = []
    for key, part in grouped(about, ("setting", "lab", "batch", "plate")):
        found, labels = probabilities[part.index], numbers[tests][part.index]
        same = asdict(calibrated(found, labels))
        rows.append({
            **who, **dict(zip(("setting", "lab", "batch", "plate"), key, strict=True)),
            "controls": ALL, "query": ALL, "query_wells": ALL, "alpha": np.inf, "blended": False,
            "images": 0, "wells": len(part),
            "image_accuracy": np.nan, "well_accuracy": accuracy(found, labels), "macro_f1": macro_f1(found, labels),
            **same, "temperature": 1.0, **{f"{name}_before": value for name, value in same.items()},
        })  # fmt: skip
    return pd.DataFrame(rows), predictions


def write_baselines(path: Path, out: Path, name: str, columns: Columns, train_batches: Sequence[str] = ()) -> pd.DataFrame:
    """Evaluate a table's embeddings into the results folder ``out``, beside what lies there; returns the cells.

    Raises:
        ValueError: a name that is no part of a file's name.
        LayoutError: the folder is of other plates; or see ``read_wells`` and ``evaluate_embeddings``.
        NoControlsError: see ``evaluate_embeddings``.
    """
    if not re.fullmatch(r"[\w.-]*", name):
        raise ValueError(f"an embedding's name has letters, digits, dots, dashes and underscores, not {name!r}")
    networks = read_wells(path, name, columns, train_batches)
    _require_same_plates(path, networks, out)
    try:
        tables = [evaluate_embeddings(wells) for wells in networks]
    except AnchorwellError as error:
        raise error.about(table=str(path)) from None
    cells = pd.concat([found for found, _ in tables], ignore_index=True)
    predictions = pd.concat([found for _, found in tables], ignore_index=True)
    out.mkdir(parents=True, exist_ok=True)
    own = name or next(iter({wells.name for wells in networks} & {_file_name(path)}), "")  # that the table does not say
    suffix = f"embedding-{own}" if own else "embedding"
    (out / f"cells-{suffix}.parquet").unlink(missing_ok=True)  # so that no cells stand beside predictions of another table
    write_whole(out / f"predictions-{suffix}.parquet", predictions.to_parquet(index=False))
    write_whole(out / f"cells-{suffix}.parquet", cells.to_parquet(index=False))
    return cells


def _file_name(path: Path) -> str:
    """A file's name without what follows the first dot, as part of other files' names."""
    return re.sub(r"[^\w-]", "_", path.name.partition(".")[0])


def _require_same_plates(path: Path, networks: Sequence[Wells], out: Path) -> None:
    """Refuse to put scores beside those of other plates: they would be read as comparable."""
    there = out / "cells.parquet"
    if not there.is_file():
        return
    cells = read_parquet(there)
    absent = [name for name in ("lab", "batch", "plate") if name not in cells]
    if absent:
        raise LayoutError(f"{there} lacks the columns {', '.join(absent)}: evaluate again")
    known, own = set(places_of(cells)), {place for wells in networks for place in places_of(wells.tested)}
    if own and not known & own:
        (lab, batch, plate), (other, *_) = min(own), min(known, default=("none", "", ""))
        raise LayoutError(
            f"{path}: none of its test plates (such as {plate} of lab {lab}, batch {batch}) is scored in {there} (with labs "
            f"such as {other}): name another results folder"
        )


# --- structure -------------------------------------------------------------------------------------------------------


def variance_shares(table: pd.DataFrame) -> tuple[float, float]:
    """Share of the variance of embeddings that lies between classes (treated wells) and between batches (controls).

    Adjusted for the number of groups, so that groups that mean nothing give 0 on average.
    """
    controls = table["Metadata_pert_type"] == "negcon"
    treated = table[~controls & (table["Metadata_label"].fillna("") != "")]
    batches = [name for name in ("Metadata_Source", "Metadata_Batch") if name in table]
    return _between(treated, ["Metadata_label"]), _between(table[controls], batches)


def _between(table: pd.DataFrame, by: list[str]) -> float:
    features = table[features_of(table)].to_numpy(np.float64)
    groups = table.groupby(by).ngroup().to_numpy()
    free = len(table) - len(set(groups))
    if len(set(groups)) < 2 or free < 1:  # noqa: PLR2004 (something to compare)
        return np.nan
    within = sum(
        np.square(features[groups == group] - features[groups == group].mean(axis=0)).sum() for group in set(groups)
    )
    total = np.square(features - features.mean(axis=0)).sum()
    return float(1 - (within / free) / (total / (len(table) - 1)))
