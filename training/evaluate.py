"""Evaluation: what a method answers on a plate in a cell of the grid, and how good those answers are.

A plate's control wells and its query are drawn by ``training.queries``; here they become logits and scores. Knows nothing
of run directories, YAML or tables on disk (``training.grid``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from model.context import MAX_CONTEXT_SITES
from model.errors import LayoutError
from model.images import ImageRecipe
from model.network import Normaliser, PerInstance, ResNet
from model.predictions import site_probabilities, well_probabilities
from model.statistics import BatchNormStatistics, Prior
from training.blending import blend_wells, measure_wells
from training.calibrate import fit_temperature
from training.contexts import (
    control_statistics,
    given,
    panel_rows,
    require_controls,
    source_statistics,
    with_panel,
)
from training.dataset import PlateSites
from training.methods import WAYS, Answers, Context, Method, Way, classify, classify_context, measured
from training.metrics import accuracy, calibrated, macro_f1, nll
from training.nulls import Null, fit_nulls
from training.queries import ALL, DEFAULT, Cell, Draws, Wells, control_draws, query_draws
from training.results import NULL
from training.splits import Split

SWEPT_IMAGES = (1, 4, 16, 64, 256, 1024)
"""What N of a swept blend is chosen from."""
SWEPT_SIZES = (1, 4, ALL)
"""Numbers of wells in the context that N is chosen for, all at once."""
MAX_QUERY_SITES = 256
"""Sites at most of a context that holds the query; controls alone are capped as they are when served."""
_CHUNK_SITES = 64

Rows = NDArray[np.int64]
Logits = NDArray[np.float32]


# --- who answers -----------------------------------------------------------------------------------------------------


class Answering(Protocol):
    """What answers queries: a way to use a network, or a null."""

    @property
    def uses_controls(self) -> bool:
        """Whether the number of control wells matters."""
        ...

    def scored(self, plate: PlateSites, rows: Rows) -> NDArray[np.bool_]:
        """Which treated rows of a query count."""
        ...

    def logits(self, plate: PlateSites, rows: Rows, controls: Wells) -> Logits | None:
        """Logits (rows, classes) of treated rows sent together, given these control wells; None if it cannot answer."""
        ...


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A trained network with the plates it was trained on and those of the held-out batches that stopped it.

    ``panel_wells`` of every class are a plate's panel. Source statistics and the blend are measured when first asked for.
    """

    network: ResNet
    method: Method
    recipe: ImageRecipe
    train: Sequence[PlateSites] = ()
    validation: Sequence[PlateSites] = ()
    panel_wells: int = 1

    @cached_property
    def control_statistics(self) -> list[BatchNormStatistics]:
        """Statistics of every training plate's controls."""
        return [control_statistics(self.network, plate, self.recipe) for plate in self.train]

    @cached_property
    def source(self) -> BatchNormStatistics:
        """The statistics without adaptation."""
        return source_statistics(
            self.network, self.method, () if self.method.context == "source" else self.control_statistics
        )

    @cached_property
    def blend_wells(self) -> NDArray[np.float32]:
        """How many control wells the source statistics are worth, (features,)."""
        controls = zip(self.train, self.control_statistics, strict=True)
        alone = [measure_wells(self.network, plate, self.recipe, own) for plate, own in controls]
        return blend_wells(alone, [layer.place for layer in self.network.layers])


@dataclass(frozen=True, eq=False)
class NetworkAnswers:
    """A way to use a trained network; ``swept_images`` is the N of a swept blend.

    What does not depend on the wells sent is computed once for a plate and its control wells.
    """

    trained: TrainedNetwork
    way: Way
    swept_images: float | None = None
    _known: dict[tuple[str, tuple[str, ...]], Logits] = field(default_factory=dict)

    @property
    def uses_controls(self) -> bool:
        """Whether the number of control wells matters: to statistics, or to how images are scaled."""
        return self.way.uses_controls or self.trained.recipe.scaled_by_batch

    def scored(self, plate: PlateSites, rows: Rows) -> NDArray[np.bool_]:
        """All rows but the panel's: what its wells are is known, as of controls."""
        if self.way.context != "panel":
            return np.ones(len(rows), np.bool_)
        return ~np.isin(rows, panel_rows(plate, self.trained.panel_wells))

    def logits(self, plate: PlateSites, rows: Rows, controls: Wells) -> Logits | None:
        """Logits (rows, classes) of treated rows sent together; None where there is nothing to measure."""
        if not self.way.independent:
            found = self.answers(plate, rows, rows, controls)
            return None if found is None else found[0]
        key = plate.plate, tuple(controls.tolist()) if self.uses_controls else ()
        if key not in self._known:
            found = self.answers(plate, plate.treated, plate.treated, controls)
            if found is None:
                return None
            self._known[key] = found[0]
        return self._known[key][np.searchsorted(plate.treated, rows)]

    def answers(self, plate: PlateSites, rows: Rows, sent: Rows, controls: Wells) -> Answers | None:
        """Logits and embeddings of ``rows`` when the treated rows ``sent`` are sent together, given these control wells.

        Raises:
            NoControlsError: the plate has no controls, and the way needs some.
        """
        if self.uses_controls:
            require_controls(plate)
        own = plate.control_rows[np.isin(plate.wells[plate.control_rows], controls)]
        if (self.trained.method.zscore or self.trained.recipe.scaled_by_batch) and not len(own):
            return None
        if self.trained.recipe.scaled_by_batch and len(own) < len(plate.control_rows):
            plate = plate.scaled_by(plate.even_rows(own, MAX_CONTEXT_SITES))
        recipe = plate.zscore_recipe(self.trained.recipe, own) if self.trained.method.zscore else self.trained.recipe
        context = self._context(plate, own, sent)
        prior = self._prior(len(controls), len(context))
        if self.way.context in ("treated", "union") and rows is sent and len(context) <= MAX_QUERY_SITES:
            logits, embeddings = classify_context(self.trained.network, plate.served(context, recipe), prior)
            return logits[-len(rows) :], embeddings[-len(rows) :]
        norm = self._normaliser(plate, context, recipe, prior)
        return None if norm is None else classify_rows(self.trained.network, plate, rows, recipe, norm)

    def _context(self, plate: PlateSites, controls: Rows, sent: Rows) -> Rows:
        """Rows whose statistics are taken, those sent last."""
        match self.way.context:
            case "controls" | "panel":
                return with_panel(controls, plate, self.trained.method, self.trained.panel_wells)
            case "treated":
                return sent
            case "union":
                return np.concatenate([controls, sent])
            case "source" | "instance":
                return sent[:0]

    def _prior(self, wells: int, images: int) -> Prior | None:
        trained = self.trained
        if self.way.blend == "training":
            return Prior.worth(trained.source, trained.blend_wells, wells)
        if self.swept_images is not None:
            return Prior.worth(trained.source, np.full(len(trained.source.mean), self.swept_images, np.float32), images)
        return None

    def _normaliser(self, plate: PlateSites, context: Rows, recipe: ImageRecipe, prior: Prior | None) -> Normaliser | None:
        trained = self.trained
        if self.way.context == "instance":
            return PerInstance()
        if self.way.context == "source" or (prior is not None and not len(context)):
            return given(trained.network, trained.source)
        if not len(context):
            return None
        cap = MAX_QUERY_SITES if self.way.context in ("treated", "union") else MAX_CONTEXT_SITES
        used = context if len(context) <= cap else plate.even_rows(context, cap)
        return measured(trained.network, plate.served(used, recipe), prior)


def classify_rows(network: ResNet, plate: PlateSites, rows: Rows, recipe: ImageRecipe, norm: Normaliser) -> Answers:
    """Classify a plate's rows, a few at a time."""
    parts = [
        classify(network, plate.served(rows[at : at + _CHUNK_SITES], recipe), norm)
        for at in range(0, len(rows), _CHUNK_SITES)
    ]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([embeddings for _, embeddings in parts])


def answers_of(trained: TrainedNetwork, way: Way) -> NetworkAnswers:
    """Make a way ready to answer; N of a swept blend is chosen on validation plates, never on those tested.

    The N is taken that gives their wells the least negative log likelihood, averaged over contexts of few and many wells.
    """
    if way.blend != "swept":
        return NetworkAnswers(trained, way)
    cells = [Cell(controls=n) if way.uses_controls else Cell(query=n) for n in SWEPT_SIZES]
    few = Draws(controls=2, queries=4)

    def loss(images: float) -> float:
        answers = NetworkAnswers(trained, way, images)
        found = [outcome(answers, plate, cell, few) for plate in trained.validation for cell in cells]
        return float(np.mean([nll(one.probabilities(), one.labels) for one in found if one is not None]))

    return NetworkAnswers(trained, way, min(SWEPT_IMAGES, key=loss))


# --- what is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """All wells called in a cell on one plate, draws one after the other.

    ``site_logits`` (sites, 1, classes) are of one member, ``site_wells`` (sites,) say which of the wells each belongs to,
    ``labels`` (wells,), ``wells`` (wells,) their names.
    """

    site_logits: Logits
    site_wells: NDArray[np.int64]
    labels: NDArray[np.int64]
    wells: Wells

    @property
    def in_context(self) -> NDArray[np.bool_]:
        """Of no well called is there an image in a context: a panel's wells are left out before."""
        return np.zeros(len(self.labels), np.bool_)

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float64]:
        """Probabilities (wells, classes), as the service gives them."""
        return well_probabilities(self.site_logits, self.site_wells, len(self.labels), temperature)


def outcome(answers: Answering, plate: PlateSites, cell: Cell, draws: Draws) -> Outcome | None:
    """Answer a plate's queries in a cell; None where the plate has too few wells for it or there is nothing to measure."""
    found: list[Outcome] = []
    for controls, query in _paired(control_draws(plate, cell.controls, draws), query_draws(plate, cell, draws)):
        rows, places = _sent(plate, query)
        logits = answers.logits(plate, rows, controls)
        if logits is None:
            return None
        kept = answers.scored(plate, rows)
        if kept.any():
            found.append(_outcome(plate, logits[kept], rows[kept], places[kept]))
    return _joined(found) if found else None


def _paired(controls: Sequence[Wells], queries: Sequence[Wells]) -> Iterator[tuple[Wells, Wells]]:
    """Each draw of one kind with one of the other; fewer of one kind are used again in turn."""
    count = max(len(controls), len(queries)) if controls and queries else 0
    return ((controls[draw % len(controls)], queries[draw % len(queries)]) for draw in range(count))


def _sent(plate: PlateSites, query: Wells) -> tuple[Rows, NDArray[np.int64]]:
    """All sites of the wells sent, and the place in the query of each one's well."""
    treated = plate.treated
    sites = [treated[plate.wells[treated] == well] for well in query]
    return np.concatenate(sites), np.repeat(np.arange(len(query)), [len(rows) for rows in sites])


def _outcome(plate: PlateSites, logits: Logits, rows: Rows, places: NDArray[np.int64]) -> Outcome:
    _, first, where = np.unique(places, return_index=True, return_inverse=True)
    return Outcome(logits[:, None], where.astype(np.int64), plate.labels[rows[first]], plate.wells[rows[first]])


def _joined(parts: Sequence[Outcome]) -> Outcome:
    starts = np.cumsum([0, *(len(part.labels) for part in parts[:-1])])
    return Outcome(
        site_logits=np.concatenate([part.site_logits for part in parts]),
        site_wells=np.concatenate([part.site_wells + start for part, start in zip(parts, starts, strict=True)]),
        labels=np.concatenate([part.labels for part in parts]),
        wells=np.concatenate([part.wells for part in parts]),
    )


def temperature_of(answers: Answering, validation: Sequence[PlateSites]) -> float:
    """Fit the class temperature on validation plates, all wells sent together with all controls."""
    found = [outcome(answers, plate, DEFAULT, Draws()) for plate in validation]
    return fit_temperature([one for one in found if one is not None])


def scores(found: Outcome, temperature: float) -> dict[str, float]:
    """Score the wells called at a temperature, and how sure the calls are at temperature 1 (``…_before``)."""
    sites, wells = site_probabilities(found.site_logits, temperature), found.probabilities(temperature)
    before = asdict(calibrated(found.probabilities(), found.labels))
    return {
        "images": len(sites),
        "wells": len(wells),
        "image_accuracy": accuracy(sites, found.labels[found.site_wells]),
        "well_accuracy": accuracy(wells, found.labels),
        "macro_f1": macro_f1(wells, found.labels),
        **asdict(calibrated(wells, found.labels)),
        "temperature": temperature,
        **{f"{name}_before": value for name, value in before.items()},
    }


# --- one network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlateScore:
    """How well one plate's treated wells are called, all sent together."""

    image_accuracy: float
    well_accuracy: float
    image_nll: float
    images: int
    wells: int


def score_plate(
    network: ResNet, method: Method, plate: PlateSites, recipe: ImageRecipe, context: Context, *, panel_wells: int = 1
) -> PlateScore:
    """Score a plate whose treated wells are all sent together.

    Raises:
        LayoutError: no treated well of the plate has a class.
    """
    trained = TrainedNetwork(network, method, recipe, panel_wells=panel_wells)
    return _plate_score(NetworkAnswers(trained, way_of(method, context)), plate)


def way_of(method: Method, context: Context) -> Way:
    """Return how a trained network is used with a context, without blending.

    Raises:
        ValueError: it is not used so.
    """
    for way in WAYS:
        if way.trained.name == method.name and way.context == context and way.blend == "none":
            return way
    raise ValueError(f"{method.name} is not evaluated with the context {context!r}")


def evaluate(
    network: ResNet, method: Method, recipe: ImageRecipe, split: Split, plates: Mapping[str, PlateSites], *,
    panel_wells: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Score one network on every test plate in every way it is used but blended: one row a plate and way.

    ``mixed_well_accuracy`` and ``one_class_well_accuracy`` are of queries of as many wells as the plate's smallest class:
    dealt from the whole plate, and of one class each.
    """
    train = [plates[name] for name in split.train]
    trained = TrainedNetwork(network, method, recipe, train, panel_wells=panel_wells)
    answering = [NetworkAnswers(trained, way) for way in WAYS if way.trained == method and way.blend == "none"]
    return _table(answering, split, plates)


def evaluate_nulls(split: Split, plates: Mapping[str, PlateSites]) -> pd.DataFrame:
    """Score the nulls on every test plate, as networks are."""
    return _table(fit_nulls([plates[name] for name in split.train]), split, plates)


def _table(answering: Sequence[NetworkAnswers | Null], split: Split, plates: Mapping[str, PlateSites]) -> pd.DataFrame:
    rows = []
    for answers in answering:
        method, context = named(answers if isinstance(answers, Null) else answers.way)
        for setting, plate in plates_tested(split, plates):
            place = {"setting": setting, "lab": plate.lab, "batch": plate.batch, "plate": plate.plate}
            scored = {**asdict(_plate_score(answers, plate)), **_few_wells(answers, plate)}
            rows.append({"method": method, "context": context, **place, **scored})
    return pd.DataFrame(rows)


def named(subject: Way | Null) -> tuple[str, str]:
    """Return the method and context that tables say."""
    return (f"{NULL}{subject.name}", "-") if isinstance(subject, Null) else (subject.method, subject.context)


def plates_tested(split: Split, plates: Mapping[str, PlateSites]) -> Iterator[tuple[str, PlateSites]]:
    """Every test plate that has something to call, with its setting."""
    for setting, names in split.tests().items():
        for name in names:
            if len(plates[name].treated):
                yield setting, plates[name]


def _plate_score(answers: Answering, plate: PlateSites) -> PlateScore:
    found = outcome(answers, plate, DEFAULT, Draws())
    if found is None:
        raise LayoutError(f"plate {plate.plate} has no treated well of a class to score")
    sites = site_probabilities(found.site_logits)
    labels = found.labels[found.site_wells]
    return PlateScore(
        image_accuracy=accuracy(sites, labels),
        well_accuracy=accuracy(found.probabilities(), found.labels),
        image_nll=nll(sites, labels),
        images=len(labels),
        wells=len(found.labels),
    )


def _few_wells(answers: Answering, plate: PlateSites) -> dict[str, float]:
    labels = dict(zip(plate.wells[plate.treated].tolist(), plate.labels[plate.treated].tolist(), strict=True))
    counts = np.unique(list(labels.values()), return_counts=True)[1]
    draws = Draws(queries=len(counts))  # with even classes, every well is sent once in either
    cells = {"mixed": Cell(query=int(counts.min())), "one_class": Cell(query=int(counts.min()), alpha=0)}
    found = {name: outcome(answers, plate, cell, draws) for name, cell in cells.items()}
    return {
        f"{name}_well_accuracy": accuracy(one.probabilities(), one.labels) for name, one in found.items() if one is not None
    }
