"""The two stories: **adapt** a batch to its own controls, and **classify** its wells.

Knows nothing of HTTP, onnxruntime or a database; decides nothing that ``model`` decides.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from datetime import UTC, datetime
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from model.bundle import Bundle, recipe_digest, recipe_json
from model.context import Context, choose_context, require_wells, wells_needed
from model.errors import ContextError, NoControlsError, NonFiniteImageError, TooFewControlsError
from model.layout import PlaneKey, SiteKey
from model.predictions import ControlCentre, WellAnswer, classify_well, mean_of_wells
from model.statistics import BatchNormStatistics, statistics_id
from service import schemas
from service.engine import Engine
from service.errors import (
    BatchBusyError,
    BatchNotFoundError,
    ControlConflictError,
    PixelSizeConflictError,
    PlateConflictError,
    RecipeChangedError,
    TreatedAsControlError,
)
from service.reports import CONTEXT, context_report, notices, provenance, saturation_report, skipped_report, well_prediction
from service.store import Adaptation, BatchRecord, Change, ControlSite, RevisionConflictError, Store
from service.uploads import PreparedSite, Preparer, RefusedSite, Upload

SITES_PER_CALL = 64
COMMIT_ATTEMPTS = 20

Float = NDArray[np.float32]
T = TypeVar("T")


class Stopwatch:
    """Seconds by stage of one request."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        yield
        self._stages[name] += time.perf_counter() - start

    def lap(self, name: str) -> None:
        """Count everything so far as one stage."""
        self._stages[name] += time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, and in total."""
        stages = {**self._stages, "total": time.perf_counter() - self._start}
        return {name: round(value, 4) for name, value in stages.items()}


@dataclass(frozen=True, eq=False)
class Frame:
    """What a request's wells are normalised with: the batch's adaptation, or the source statistics."""

    statistics: BatchNormStatistics
    adaptation: Adaptation | None


@dataclass(frozen=True, eq=False)
class Batches:
    """Adapts batches and classifies their wells with one bundle, on one engine, over one store."""

    bundle: Bundle
    engine: Engine
    store: Store
    preparer: Preparer
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    # --- the two stories ---------------------------------------------------------------------------------------------

    def adapt(self, batch_id: str, upload: Upload, watch: Stopwatch, *, replace: bool = False) -> schemas.ControlsReport:
        """Keep control images, and measure the batch's statistics on all that are kept when they are enough.

        Raises:
            BatchError: the upload does not fit what is kept. ImageError, ContextError: it cannot be measured.
        """
        self.preparer.require_room(len(upload.sites))
        pixel_size_um = agreed_pixel_size(self._batch(batch_id), upload.pixel_size_um)
        with watch.stage("prepare"):
            sent = {site.key: site for site in self._prepared_controls(upload, pixel_size_um)}
        measured: dict[str, Adaptation] = {}

        def story(batch: BatchRecord) -> tuple[Change | None, schemas.ControlsReport]:
            refuse_treated(batch, upload.wells)
            require_pixel_size(batch, pixel_size_um)
            require_plate(batch, upload.plate)
            new = self._new_controls(batch, sent, replace=replace)
            kept = {**batch.controls, **{site.key: site for site, _ in new}}
            after = replace_fields(batch, controls=kept, pixel_size_um=pixel_size_um, plate=batch.plate or upload.plate)
            usable = self._usable(after)
            adaptation = None
            if not self._wells_needed(usable):
                adaptation = self._adaptation(after, usable, sent, measured, watch)
            stored = adaptation is None or _names(adaptation) in batch.adaptations
            change = None
            if new or not stored or after.plate != batch.plate:
                measured_now = None if stored else adaptation
                change = Change(self.now(), pixel_size_um, new, adaptation=measured_now, plate=upload.plate)
            return change, self._controls_report(after, usable, adaptation, upload, sent.values())

        report = self._retold(batch_id, story, watch)
        return report.model_copy(update={"seconds": watch.seconds()})

    def classify(self, batch_id: str, upload: Upload, watch: Stopwatch, *, source: bool = False) -> schemas.Prediction:
        """Answer one class per well sent, from its own images and the batch's kept statistics alone.

        Raises:
            ContextError, BatchError: the batch has no statistics, or others. ImageError: a well cannot be answered.
            BatchNotFoundError: the batch was deleted meanwhile, whether or not it was made anew.
        """
        self.preparer.require_room(max(Counter(site.well for site in upload.sites).values()))
        batch, frame = self._frame(batch_id, watch, source=source)
        pixel_size_um = agreed_pixel_size(batch, upload.pixel_size_um)
        require_plate(batch, upload.plate)
        wells: list[schemas.WellPrediction] = []
        seen: list[PreparedSite] = []
        with self.preparer.prepared(upload, pixel_size_um) as prepared:
            for well, sites, refused in _by_well(prepared):
                with watch.stage("classify"):
                    answer = self._answer(well, sites, frame)
                wells.append(
                    well_prediction(
                        answer, self.bundle.manifest.classes, refused, frame.adaptation, control=well in batch.control_wells
                    )
                )
                seen += [_without_image(site) for site in sites]
        if not source:
            self._retold(batch_id, lambda now: (self._answered(now, batch, frame, upload.wells), None), watch)
        return self._prediction(batch, frame, pixel_size_um, wells, upload, seen, watch)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def summaries(self) -> schemas.BatchList:
        """Every batch kept."""
        batches = (self.store.batch(batch_id) for batch_id in self.store.batch_ids())
        return schemas.BatchList(batches=tuple(self._summary(batch) for batch in batches if batch is not None))

    def summary(self, batch_id: str) -> schemas.BatchSummary:
        """What is kept of a batch.

        Raises:
            BatchNotFoundError: nothing.
        """
        batch = self.store.batch(batch_id)
        if batch is None:
            raise not_found(batch_id)
        return self._summary(batch)

    def delete(self, batch_id: str) -> None:
        """Forget a batch.

        Raises:
            BatchNotFoundError: nothing is kept under that id.
        """
        if not self.store.delete(batch_id):
            raise not_found(batch_id)

    def model_card(self) -> schemas.ModelCard:
        """The served bundle."""
        manifest = self.bundle.manifest
        return schemas.ModelCard(
            **provenance(self.bundle, self.engine),
            name=manifest.name,
            classes=manifest.classes,
            channels=manifest.channels,
            recipe=recipe_json(manifest.recipe),
            method=manifest.method,
            trained_context=manifest.context,
            minimum_control_wells=manifest.minimum_control_wells,
            max_context_sites=manifest.max_context_sites,
            features=manifest.features,
            temperature=manifest.temperature,
            network=manifest.network,
            training=manifest.training,
        )

    def ready(self) -> schemas.Ready:
        """Say that the store answers, and what the engine is."""
        self.store.check()
        return schemas.Ready(**provenance(self.bundle, self.engine))

    # --- steps of adapt ----------------------------------------------------------------------------------------------

    def _prepared_controls(self, upload: Upload, pixel_size_um: float | None) -> Iterator[PreparedSite]:
        with self.preparer.prepared(upload, pixel_size_um) as prepared:
            for site in prepared:
                if isinstance(site, RefusedSite):
                    raise site.error
                yield site

    def _new_controls(
        self, batch: BatchRecord, sent: Mapping[SiteKey, PreparedSite], *, replace: bool
    ) -> list[tuple[ControlSite, Float]]:
        """Return the sites that are not kept yet as they were sent."""
        recipe = recipe_digest(self.bundle.manifest.recipe)
        new = []
        for key, site in sent.items():
            kept = batch.controls.get(key)
            if kept is not None and dict(kept.planes) != dict(site.planes) and not replace:
                raise control_conflict(batch.batch_id, kept, site)
            control = ControlSite(key, site.planes, recipe)
            if kept != control:
                new.append((control, site.image))
        return new

    def _adaptation(
        self,
        batch: BatchRecord,
        usable: Mapping[SiteKey, ControlSite],
        sent: Mapping[SiteKey, PreparedSite],
        measured: dict[str, Adaptation],
        watch: Stopwatch,
    ) -> Adaptation:
        """Return the statistics of the usable control sites: measured before, or now."""
        context, name = self._name(batch, usable)
        if name not in measured:
            kept = self.store.adaptation(batch.batch_id, self.bundle.digest, name)
            if kept is None:
                images = [self._image(batch, site, sent) for site in context.used]
                if self._batch(batch.batch_id).revision != batch.revision:  # an image may be another than its name says
                    raise RevisionConflictError
                with watch.stage("measure"):
                    kept = self._measure(context, np.stack(images), name)
            measured[name] = kept
        return replace_fields(measured[name], left_out=context.left_out)  # more may be left out since it was measured

    def _image(self, batch: BatchRecord, site: SiteKey, sent: Mapping[SiteKey, PreparedSite]) -> Float:
        image = sent[site].image if site in sent else self.store.image(batch.batch_id, site)
        if image is None:  # the batch was deleted since it was read: the commit would not stand either
            raise RevisionConflictError
        return image

    def _measure(self, context: Context, images: Float, name: str) -> Adaptation:
        """Measure a context in one pass, and where its wells lie under its own statistics."""
        mean, variance = self.engine.measure(images)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise ContextError("the statistics of these controls are not finite: an image of them is out of scale")
        statistics = BatchNormStatistics(mean, variance, sites=len(context.used), wells=len(context.wells))
        wells = [site.well for site in context.used]
        embeddings = [self._classify(images[_where(wells, well)], statistics)[1] for well in context.wells]
        distance = self.bundle.training_statistics.distance(statistics)
        return Adaptation(
            bundle_digest=self.bundle.digest,
            statistics_id=name,
            statistics=statistics,
            control_centre=mean_of_wells(wells, np.concatenate(embeddings)),
            used=context.used,
            left_out=context.left_out,
            distance=distance,
            percentile=self.bundle.training_statistics.percentile(distance),
            out_of_range=distance > self.bundle.training_statistics.out_of_range_distance,
            provider=self.engine.provider,
            precision=self.engine.precision,
            created_at=self.now(),
        )

    # --- steps of classify -------------------------------------------------------------------------------------------

    def _frame(self, batch_id: str, watch: Stopwatch, *, source: bool) -> tuple[BatchRecord, Frame]:
        """Return the batch and its statistics under the served bundle, measured again when the bundle is a new one."""
        if source:
            return self._batch(batch_id), Frame(self.bundle.training_statistics.source, None)

        def story(batch: BatchRecord) -> tuple[None, tuple[BatchRecord, Frame]]:
            usable = self._usable(batch)
            self._require_controls(batch, usable)
            adaptation = self._adaptation(batch, usable, {}, {}, watch)
            return None, (batch, Frame(adaptation.statistics, adaptation))

        return self._retold(batch_id, story, watch)

    def _require_controls(self, batch: BatchRecord, usable: Mapping[SiteKey, ControlSite]) -> None:
        manifest = self.bundle.manifest
        if not batch.controls:
            raise NoControlsError(
                f"batch {batch.batch_id} has no controls: send the images of at least {manifest.minimum_control_wells} of "
                f"its negative-control wells to /batches/{batch.batch_id}/controls, each site with "
                f"{', '.join(manifest.channels)}; or ask for ?context=source, the answer without adaptation",
                batch_id=batch.batch_id,
                wells_needed=manifest.minimum_control_wells,
            )
        if self._wells_needed(usable) and len(usable) < len(batch.controls):
            raise RecipeChangedError(
                f"{len(batch.controls) - len(usable)} of the {len(batch.controls)} control sites of batch "
                f"{batch.batch_id} were prepared for a bundle with another image recipe: send the controls again",
                batch_id=batch.batch_id,
                wells_needed=self._wells_needed(usable),
            )
        try:
            require_wells(len({site.well for site in usable}), manifest.minimum_control_wells)
        except TooFewControlsError as error:
            raise error.about(batch_id=batch.batch_id) from None

    def _answer(self, well: str, sites: Sequence[PreparedSite], frame: Frame) -> WellAnswer:
        manifest = self.bundle.manifest
        try:
            logits, embeddings = self._classify(np.stack([site.image for site in sites]), frame.statistics)
        except NonFiniteImageError as error:
            raise error.about(well=well) from None
        adaptation = frame.adaptation
        controls = None if adaptation is None else ControlCentre(adaptation.control_centre, len(adaptation.wells))
        return classify_well(
            well, logits, embeddings, manifest.classes, manifest.temperature, self.bundle.embedding_reference, controls
        )

    def _classify(self, images: Float, statistics: BatchNormStatistics) -> tuple[Float, Float]:
        """Classify one well's sites: its calls' shapes, and so its answer's last bit, depend on nothing else."""
        parts = [
            self.engine.classify(images[start : start + SITES_PER_CALL], statistics)
            for start in range(0, len(images), SITES_PER_CALL)
        ]
        logits, embeddings = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if not (np.isfinite(logits).all() and np.isfinite(embeddings).all()):
            raise NonFiniteImageError("the network's answer is not finite: an image is out of scale")
        return logits, embeddings

    def _answered(self, batch: BatchRecord, asked: BatchRecord, frame: Frame, wells: frozenset[str]) -> Change | None:
        """Remember which wells were answered as treated, and statistics that were measured on the way."""
        if batch.incarnation != asked.incarnation:
            raise BatchNotFoundError(
                f"batch {batch.batch_id} was deleted while its wells were answered; nothing of the answers was kept",
                batch_id=batch.batch_id,
            )
        treated = wells - batch.control_wells - batch.treated
        adaptation = frame.adaptation
        new = adaptation is not None and _names(adaptation) not in batch.adaptations
        if not treated and not new:
            return None
        return Change(self.now(), treated=treated, adaptation=adaptation if new else None)

    # --- shared steps ------------------------------------------------------------------------------------------------

    def _batch(self, batch_id: str) -> BatchRecord:
        return self.store.batch(batch_id) or BatchRecord(batch_id)

    def _retold(self, batch_id: str, story: Callable[[BatchRecord], tuple[Change | None, T]], watch: Stopwatch) -> T:
        """Tell a story of the batch as it is now, and again whenever another request changed it meanwhile."""
        for _ in range(COMMIT_ATTEMPTS):
            batch = self._batch(batch_id)
            try:
                change, result = story(batch)
                if change is not None:
                    with watch.stage("keep"):
                        self.store.commit(batch_id, batch.revision, change)
            except RevisionConflictError:
                continue
            return result
        raise BatchBusyError(f"batch {batch_id} kept changing under this request; nothing was kept: send it again")

    def _usable(self, batch: BatchRecord) -> dict[SiteKey, ControlSite]:
        """Return the control sites prepared as the served bundle wants them."""
        recipe = recipe_digest(self.bundle.manifest.recipe)
        return {key: site for key, site in batch.controls.items() if site.recipe_digest == recipe}

    def _wells_needed(self, usable: Iterable[SiteKey]) -> int:
        return wells_needed(len({site.well for site in usable}), self.bundle.manifest.minimum_control_wells)

    def _name(self, batch: BatchRecord, usable: Mapping[SiteKey, ControlSite]) -> tuple[Context, str]:
        """Choose the context and name its statistics."""
        context = choose_context(usable, self.bundle.manifest.max_context_sites)
        planes = [
            (PlaneKey(site.well, site.site, channel), sha256)
            for site in context.used
            for channel, sha256 in usable[site].planes.items()
        ]
        return context, statistics_id(
            bundle_digest=self.bundle.digest,
            recipe=recipe_json(self.bundle.manifest.recipe),
            pixel_size_um=batch.pixel_size_um,
            context=CONTEXT,
            precision=self.engine.precision,
            planes=planes,
        )

    # --- reports -----------------------------------------------------------------------------------------------------

    def _controls_report(
        self,
        batch: BatchRecord,
        usable: Mapping[SiteKey, ControlSite],
        adaptation: Adaptation | None,
        upload: Upload,
        sent: Iterable[PreparedSite],
    ) -> schemas.ControlsReport:
        unusable = len(batch.controls) - len(usable)
        return schemas.ControlsReport.model_validate(
            {
                **provenance(self.bundle, self.engine),
                **context_report(self.bundle.manifest, adaptation),
                "batch_id": batch.batch_id,
                "pixel_size_um": batch.pixel_size_um,
                "notices": notices(self.bundle.manifest, adaptation, batch, upload, unusable_sites=unusable),
                "adapted": adaptation is not None,
                "wells_needed": self._wells_needed(usable),
                "control_wells": len(batch.control_wells),
                "control_sites": len(batch.controls),
                "unusable_sites": unusable,
                "context": CONTEXT,
                "created_at": adaptation.created_at if adaptation else None,
                "saturation": saturation_report(sent),
                "skipped": skipped_report(upload.skipped),
                "seconds": {},
            }
        )

    def _prediction(
        self,
        batch: BatchRecord,
        frame: Frame,
        pixel_size_um: float | None,
        wells: Sequence[schemas.WellPrediction],
        upload: Upload,
        seen: Iterable[PreparedSite],
        watch: Stopwatch,
    ) -> schemas.Prediction:
        unusable = len(batch.controls) - len(self._usable(batch)) if frame.adaptation else 0
        prepared = replace_fields(batch, pixel_size_um=pixel_size_um)
        return schemas.Prediction.model_validate(
            {
                **provenance(self.bundle, self.engine),
                **context_report(self.bundle.manifest, frame.adaptation),
                "batch_id": batch.batch_id,
                "pixel_size_um": pixel_size_um,
                "notices": notices(self.bundle.manifest, frame.adaptation, prepared, upload, unusable_sites=unusable),
                "adapted": frame.adaptation is not None,
                "context": CONTEXT if frame.adaptation else "source",
                "wells": tuple(wells),
                "saturation": saturation_report(seen),
                "skipped": skipped_report(upload.skipped),
                "seconds": watch.seconds(),
            }
        )

    def _summary(self, batch: BatchRecord) -> schemas.BatchSummary:
        usable = self._usable(batch)
        needed = self._wells_needed(usable)
        name = None if needed else self._name(batch, usable)[1]
        adapted = (self.bundle.digest, name) in batch.adaptations
        assert batch.changed_at is not None
        return schemas.BatchSummary(
            batch_id=batch.batch_id,
            adapted=adapted,
            statistics_id=name if adapted else None,
            wells_needed=needed,
            control_wells=tuple(sorted(batch.control_wells)),
            control_sites=len(batch.controls),
            unusable_sites=len(batch.controls) - len(usable),
            treated_wells=tuple(sorted(batch.treated)),
            pixel_size_um=batch.pixel_size_um,
            plate=batch.plate,
            changed_at=batch.changed_at,
        )


# --- rules of a batch ------------------------------------------------------------------------------------------------


def agreed_pixel_size(batch: BatchRecord, sent: float | None) -> float | None:
    """Return the batch's pixel size, which the first controls set; a request that names none means that one.

    Raises:
        PixelSizeConflictError: another one was sent.
    """
    if sent is None:
        return batch.pixel_size_um
    require_pixel_size(batch, sent)
    return sent


def require_pixel_size(batch: BatchRecord, pixel_size_um: float | None) -> None:
    """Check the pixel size that images were prepared at.

    Raises:
        PixelSizeConflictError: the batch's controls were prepared at another one.
    """
    if batch.controls and pixel_size_um != batch.pixel_size_um:
        raise PixelSizeConflictError(
            f"the controls of batch {batch.batch_id} are kept {_at(batch.pixel_size_um)}, these images come "
            f"{_at(pixel_size_um)}: send the same, or delete the batch and send its controls again",
            batch_id=batch.batch_id,
        )


def require_plate(batch: BatchRecord, plate: str | None) -> None:
    """Check the plate that an upload's table names.

    Raises:
        PlateConflictError: the batch's controls are of another one.
    """
    if batch.controls and batch.plate and plate and plate.casefold() != batch.plate.casefold():
        raise PlateConflictError(
            f"the controls of batch {batch.batch_id} are of plate {_short(batch.plate)}, these images are of plate "
            f"{_short(plate)}: send them to that plate's batch",
            batch_id=batch.batch_id,
        )


def _short(name: str | None) -> str:
    return repr((name or "")[:80])


def _at(pixel_size_um: float | None) -> str:
    return "without a pixel size" if pixel_size_um is None else f"at {pixel_size_um} µm per pixel"


def refuse_treated(batch: BatchRecord, wells: frozenset[str]) -> None:
    """Let no treated well into the statistics.

    Raises:
        TreatedAsControlError: a well was answered as a treated one.
    """
    treated = sorted(wells & batch.treated)
    if treated:
        raise TreatedAsControlError(
            f"well {', '.join(treated[:10])} of batch {batch.batch_id} was answered as treated and is no control: "
            "leave it out, or delete the batch if it was answered by mistake",
            batch_id=batch.batch_id,
            well=treated[0],
            wells=treated,
        )


def control_conflict(batch_id: str, kept: ControlSite, sent: PreparedSite) -> ControlConflictError:
    """Say that other images are kept for a control site."""
    channels = [channel for channel, sha256 in sent.planes.items() if kept.planes.get(channel) != sha256]
    return ControlConflictError(
        f"batch {batch_id} keeps another image for well {kept.key.well} site {kept.key.site} "
        f"channel {', '.join(channels)}; ?replace=true puts the new one in its place",
        batch_id=batch_id,
        well=kept.key.well,
        site=kept.key.site,
        channel=channels[0],
    )


def not_found(batch_id: str) -> BatchNotFoundError:
    """Say that a batch is not kept."""
    return BatchNotFoundError(f"there is no batch {batch_id}; GET /batches lists them", batch_id=batch_id)


def _names(adaptation: Adaptation) -> tuple[str, str]:
    return adaptation.bundle_digest, adaptation.statistics_id


def _where(wells: Sequence[str], well: str) -> list[int]:
    return [index for index, name in enumerate(wells) if name == well]


# --- wells -----------------------------------------------------------------------------------------------------------


def _by_well(
    prepared: Iterator[PreparedSite | RefusedSite],
) -> Iterator[tuple[str, list[PreparedSite], list[RefusedSite]]]:
    """Group sorted sites by well.

    Raises:
        ImageError: every site of a well is refused.
    """
    for well, outcomes in groupby(prepared, key=lambda site: site.key.well):
        sites: list[PreparedSite] = []
        refused: list[RefusedSite] = []
        for outcome in outcomes:
            if isinstance(outcome, RefusedSite):
                refused.append(outcome)
            else:
                sites.append(outcome)
        if not sites:
            raise refused[0].error
        yield well, sites, refused


def _without_image(site: PreparedSite) -> PreparedSite:
    return PreparedSite(site.key, site.planes, site.saturation, np.empty(0, np.float32))
