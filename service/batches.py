"""The two stories: **adapt** a batch to its own controls, and **classify** its wells.

Knows nothing of HTTP, onnxruntime or a database; decides nothing that ``model`` decides.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from datetime import UTC, datetime
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from model.bundle import Bundle
from model.context import require_wells
from model.errors import ContextError, NoControlsError, NonFiniteImageError, TooFewControlsError
from model.images import PreparedImage, finish_site, measure_scale
from model.layout import Role, SiteKey
from model.predictions import ControlCentre, WellAnswer, classify_well, mean_of_wells
from model.scale import BatchScale
from model.statistics import BatchNormStatistics, with_scale
from service import schemas
from service.deeds import Deed
from service.engine import Engine, sum_or_none
from service.errors import PanelNotMeasuredError, RecipeChangedError, StoreLostError, StoreUnavailableError
from service.keeping import ControlFile, kept_files
from service.kept import BundleView, Wanted, retold
from service.reports import (
    BLENDED,
    CONTROLS,
    SOURCE,
    context_report,
    kept_answers,
    notices,
    provenance,
    saturation_report,
    skipped_report,
    well_prediction,
)
from service.rules import (
    agreed_pixel_size,
    control_conflict,
    refuse_panel,
    refuse_treated,
    require_incarnation,
    require_pixel_size,
    require_plate,
)
from service.storage import Storage
from service.store import (
    Adaptation,
    BatchRecord,
    BatchStore,
    Change,
    ControlSite,
    KeptFile,
    RevisionConflictError,
    image_bytes,
    new_blob,
    new_shard,
)
from service.uploads import Keeper, PreparedSite, Preparer, RefusedSite, SeenSite, Upload

ADAPTED = "batch.adapted"
CLASSIFIED = "batch.classified"
PREPARED = "controls.prepared"
NOT_FRESH = (
    "the store cannot be reached: these are the statistics that this process knows, and controls that others sent since are "
    "not in them; the answers are not kept"
)
BLEND_MEANWHILE = (
    "until there are enough control wells, ?context=blended answers on these and the mean of the training plates"
)
SUPERSEDED = (
    "the controls were changed while these wells were answered: the answers stand on superseded statistics; ask again"
)

Float = NDArray[np.float32]


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
        self.add(name, time.perf_counter() - start)

    def lap(self, name: str) -> None:
        """Count everything so far as one stage."""
        self.add(name, time.perf_counter() - self._start)

    def add(self, name: str, seconds: float) -> None:
        """Add time to a stage."""
        self._stages[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, and in total."""
        stages = {**self._stages, "total": time.perf_counter() - self._start}
        return {name: round(value, 4) for name, value in stages.items()}


@dataclass(frozen=True, eq=False)
class Frame:
    """What a request's wells are normalised with: the batch's adaptation, or the source statistics; and its scale.

    It is ``fresh`` when the store said so now, and not only this process remembers it.
    """

    statistics: BatchNormStatistics
    adaptation: Adaptation | None
    scale: BatchScale | None = None
    fresh: bool = True


@dataclass(frozen=True, eq=False)
class ClassifiedSite(SeenSite):
    """What the network said of a site: logits (members, classes), embedding (dim,), and how long it took.

    And how long it took to make the batch's own network for it, as ``Classified`` tells.
    """

    logits: Float
    embedding: Float
    seconds: float
    network_seconds: float | None


@dataclass(frozen=True, eq=False)
class Batches:
    """Adapts batches and classifies their wells with one bundle, on one engine, over one store."""

    view: BundleView
    engine: Engine
    storage: Storage
    preparer: Preparer
    keep_files: bool = True
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self.view.bundle

    # --- the two stories ---------------------------------------------------------------------------------------------

    def adapt(
        self,
        deed: Deed,
        batch_id: str,
        upload: Upload,
        watch: Stopwatch,
        *,
        replace: bool = False,
        role: Role = Role.CONTROL,
    ) -> schemas.ControlsReport:
        """Keep control images, or the panel's, and measure the batch's statistics on all that are kept when they are enough.

        Raises:
            BatchError: the upload does not fit what is kept. ImageError, ContextError: it cannot be measured.
        """
        store = self.storage.of(deed.tenant)
        self._require_measured(batch_id, role)
        self.preparer.require_room(len(upload.sites))
        begun = store.batch(batch_id) or BatchRecord(batch_id)
        pixel_size_um = agreed_pixel_size(begun, upload.pixel_size_um)
        measured: dict[str, Adaptation] = {}
        with kept_files(store) as files:
            with watch.stage("prepare"):
                keep = files if self.keep_files else None
                sent = {site.key: site for site in self._prepared_controls(upload, pixel_size_um, keep)}

            def story(batch: BatchRecord) -> schemas.ControlsReport:
                require_incarnation(batch, upload.incarnation or begun.incarnation)
                if role is Role.PANEL:
                    refuse_panel(batch, upload.wells, store.platemap(batch_id))
                else:
                    refuse_treated(batch, upload.wells)
                require_pixel_size(batch, pixel_size_um)
                require_plate(batch, upload.plate)
                new = self._new_controls(batch, sent, role, replace=replace)
                kept = {**batch.controls, **{site.key: site for site, _ in new}}
                after = replace_fields(batch, controls=kept, pixel_size_um=pixel_size_um, plate=batch.plate or upload.plate)
                usable = self.view.usable(after)
                adaptation = None
                if not self.view.wells_needed(usable):
                    wanted = self.view.wanted(after, usable)
                    adaptation = self._adaptation(store, deed, batch, wanted, sent, measured, watch)
                stored = adaptation is None or _names(adaptation) in batch.adaptations
                report = self._controls_report(after, usable, adaptation, upload, sent.values(), watch)
                change = None
                if new or not stored or after.plate != batch.plate:
                    measured_now = None if stored else adaptation
                    change = Change(self.now(), pixel_size_um, new, adaptation=measured_now, plate=upload.plate)
                told = {**_planes_of(sent.values()), **({"role": role.value} if role is Role.PANEL else {})}
                self._keep(store, deed, batch, change, ADAPTED, report, told)
                files.named = frozenset(blob for site, _ in new for blob in site.blobs)
                return report

            return retold(store, batch_id, story)

    def classify(
        self, deed: Deed, batch_id: str, upload: Upload, watch: Stopwatch, *, context: str = CONTROLS
    ) -> schemas.Prediction:
        """Answer one class per well sent, from its own images and the batch's kept statistics alone; keep the answers.

        The ``context`` is controls (with the panel, for a bundle that measures one), blended, or source: without adaptation.
        Answers without adaptation are not kept; nor is anything while the store is away, when the statistics are known.

        Raises:
            ContextError, BatchError: the batch has no statistics, or others. ImageError: a well cannot be answered.
            BatchNotFoundError: the batch was deleted meanwhile, whether or not it was made anew.
        """
        store = self.storage.of(deed.tenant)
        batch, frame = self._frame(store, deed, batch_id, upload, watch, context)
        pixel_size_um = agreed_pixel_size(batch, upload.pixel_size_um)
        require_plate(batch, upload.plate)
        wells: list[schemas.WellPrediction] = []
        embeddings: list[Float] = []
        seen: list[ClassifiedSite] = []
        classifying = self.preparer.prepared(upload, pixel_size_um, lambda site: self._classified(site, frame))
        with watch.stage("images"), classifying as classified:
            for well, sites, refused in _by_well(classified):
                answer, embedding = self._answer(well, sites, frame.adaptation)
                control = well in batch.control_wells
                classes = self.bundle.manifest.classes
                wells.append(well_prediction(answer, classes, refused, frame.adaptation, control=control))
                embeddings.append(embedding)
                seen += sites
                deed.progress(len(wells), len(upload.wells))
        watch.add("classify", sum(site.seconds for site in seen))
        network_seconds = sum_or_none(site.network_seconds for site in seen)
        if network_seconds is not None:
            watch.add("network", network_seconds)
        told = self._prediction(batch, frame, pixel_size_um, wells, upload, seen, watch)
        answers = kept_answers(told, embeddings) if frame.adaptation is not None else []

        def story(now: BatchRecord) -> schemas.Prediction:
            if frame.adaptation is None:
                self._answered(store, deed, now, told)
                return told
            require_incarnation(now, batch.incarnation)
            unchanged = now.revision == batch.revision
            current = None if unchanged else self._current_answers(store, now, frame.adaptation)
            prediction = told if current is None else _superseded(told)
            treated = upload.wells - now.control_wells - now.treated
            new = None if _names(frame.adaptation) in now.adaptations else frame.adaptation
            kept = [answer for answer in answers if answer.well not in (current or ())]
            change = Change(self.now(), treated=treated, adaptation=new, answers=kept)
            self._keep(store, deed, now, change, CLASSIFIED, prediction, _planes_of(seen))
            return prediction

        try:
            return retold(store, batch_id, story)
        except StoreUnavailableError:
            if frame.adaptation is None or frame.fresh or deed.beside:
                raise
            return told.model_copy(update={"kept": False})

    # --- steps of adapt ----------------------------------------------------------------------------------------------

    def _prepared_controls(self, upload: Upload, pixel_size_um: float | None, keep: Keeper | None) -> Iterator[PreparedSite]:
        with self.preparer.prepared(upload, pixel_size_um, lambda site: site, keep) as prepared:
            for site in prepared:
                if isinstance(site, RefusedSite):
                    raise site.error
                yield site

    def _require_measured(self, batch_id: str, role: Role) -> None:
        """Refuse a panel that would never be measured."""
        if role is Role.PANEL and not self.view.measures_panel:
            raise PanelNotMeasuredError(
                f"the served bundle was trained for the context {self.bundle.manifest.context!r} and measures no panel: "
                f"send controls alone, and the panel's wells to /batches/{batch_id}/predict",
                batch_id=batch_id,
            )

    def _new_controls(
        self, batch: BatchRecord, sent: Mapping[SiteKey, PreparedSite], role: Role, *, replace: bool
    ) -> list[tuple[ControlSite, bytes]]:
        """Return the sites that are not kept yet as they were sent, as they were prepared."""
        new, shard = [], new_shard()
        for key, site in sent.items():
            kept = batch.controls.get(key)
            same = kept is not None and site.planes.items() <= kept.planes.items()
            if kept is not None and not same and not replace:
                raise control_conflict(batch.batch_id, kept, site)
            if not same or kept is None or kept.recipe_digest != self.view.recipe_digest or (site.files and not kept.files):
                new.append(self._control_site(site, site.files, shard, role))
        return new

    def _control_site(
        self, site: PreparedSite, files: Mapping[str, KeptFile], shard: str, role: Role
    ) -> tuple[ControlSite, bytes]:
        image = image_bytes(site.image)
        size = len(image) + sum({file.blob: file.size for file in files.values()}.values())
        return ControlSite(site.key, site.planes, self.view.recipe_digest, new_blob(image, shard), size, files, role), image

    def _require_prepared(
        self, store: BatchStore, deed: Deed, batch: BatchRecord, sites: Iterable[SiteKey], watch: Stopwatch
    ) -> None:
        """Prepare kept controls from their files, when it was another bundle's recipe that they were prepared by.

        Raises:
            RevisionConflictError: they were: the batch keeps them anew. ImageError: one of them is nothing to this bundle.
        """
        kept = [batch.controls[key] for key in sites if key in batch.controls]
        old = {site.key: site for site in kept if site.recipe_digest != self.view.recipe_digest}
        if not old:
            return
        channels = self.bundle.manifest.channels
        files = {
            key: {channel: ControlFile(store, batch, site, channel) for channel in channels} for key, site in old.items()
        }
        with watch.stage("prepare"):
            prepared = list(self._prepared_controls(Upload(files), batch.pixel_size_um, None))
        self._keep_prepared(store, deed, batch, old, prepared)
        raise RevisionConflictError

    def _keep_prepared(
        self,
        store: BatchStore,
        deed: Deed,
        batch: BatchRecord,
        old: Mapping[SiteKey, ControlSite],
        prepared: Sequence[PreparedSite],
    ) -> None:
        def story(now: BatchRecord) -> None:
            require_incarnation(now, batch.incarnation)
            shard = new_shard()
            new = [
                self._control_site(replace_fields(site, planes=was.planes), was.files, shard, was.role)
                for site, was in ((site, old[site.key]) for site in prepared)
                if now.controls.get(site.key) == was
            ]
            if new:
                also = deed.alone().done(PREPARED, batch.batch_id, {"recipe": self.view.recipe_digest, "sites": len(new)})
                store.commit(now, Change(self.now(), controls=new), also)

        retold(store, batch.batch_id, story)

    def _adaptation(
        self,
        store: BatchStore,
        deed: Deed,
        batch: BatchRecord,
        wanted: Wanted,
        sent: Mapping[SiteKey, PreparedSite],
        measured: dict[str, Adaptation],
        watch: Stopwatch,
    ) -> Adaptation:
        """Return the statistics that are wanted of a batch, with what was sent to it just now: measured before, or now."""
        context, name = wanted.context, wanted.name
        if name not in measured:
            known = wanted.statistics_id
            kept = None if known is None else store.adaptation(batch.batch_id, self.bundle.digest, known)
            if kept is None:
                self._require_prepared(store, deed, batch, set(context.used) - set(sent), watch)
                images = [self._image(store, batch, site, sent) for site in context.used]
                with watch.stage("measure"):
                    kept = self._measure(wanted, images)
            measured[name] = kept
        return replace_fields(measured[name], left_out=context.left_out)  # more may be left out since it was measured

    def _image(
        self, store: BatchStore, batch: BatchRecord, site: SiteKey, sent: Mapping[SiteKey, PreparedSite]
    ) -> PreparedImage:
        image = sent[site].image if site in sent else store.image(batch, site)
        if image is None:
            raise RevisionConflictError
        return image

    def _measure(self, wanted: Wanted, prepared: Sequence[PreparedImage]) -> Adaptation:
        """Measure a context's scale, its statistics in one pass, and where its control wells lie under them."""
        context, prior = wanted.context, wanted.prior
        of_controls = [image for site, image in zip(context.used, prepared, strict=True) if site.well not in wanted.panel]
        scale = measure_scale(of_controls, self.bundle.manifest.recipe)
        images = self._finished(context.used, prepared, scale)
        mean, variance, embeddings = self.engine.measure(images, prior)
        if not all(np.isfinite(part).all() for part in (mean, variance, embeddings)):
            raise ContextError("the statistics of these controls are not finite: an image of them is out of scale")
        statistics = BatchNormStatistics(mean, variance, sites=len(context.used), wells=len(context.wells))
        controls = [place for place, site in enumerate(context.used) if site.well not in wanted.panel]
        wells = [context.used[place].well for place in controls]
        distance = self.bundle.training_statistics.distance(statistics)
        return Adaptation(
            bundle_digest=self.bundle.digest,
            statistics_id=wanted.name if scale is None else with_scale(wanted.name, scale.digest),
            statistics=statistics,
            control_centre=mean_of_wells(wells, embeddings[controls]),
            used=context.used,
            left_out=context.left_out,
            distance=distance,
            percentile=self.bundle.training_statistics.percentile(distance),
            out_of_range=distance > self.bundle.training_statistics.out_of_range_distance,
            provider=self.engine.provider,
            precision=self.engine.precision,
            created_at=self.now(),
            context=wanted.rule,
            panel=tuple(sorted(wanted.panel)),
            prior_weight=None if prior is None else prior.share,
            scale=scale,
            unscaled_id="" if scale is None else wanted.name,
        )

    def _finished(self, sites: Sequence[SiteKey], prepared: Sequence[PreparedImage], scale: BatchScale | None) -> Float:
        """Return sites as the network takes them: (sites, channels, size, size)."""
        recipe = self.bundle.manifest.recipe
        images = np.empty((len(sites), len(recipe.channels), recipe.size, recipe.size), np.float32)
        for place, (site, image) in enumerate(zip(sites, prepared, strict=True)):
            try:
                images[place] = finish_site(image, recipe, scale)
            except NonFiniteImageError as error:
                raise error.about(well=site.well, site=site.site) from None
        return images

    # --- steps of classify -------------------------------------------------------------------------------------------

    def _frame(
        self, store: BatchStore, deed: Deed, batch_id: str, upload: Upload, watch: Stopwatch, context: str
    ) -> tuple[BatchRecord, Frame]:
        """Return the batch and its statistics under the served bundle, measured again when the bundle is a new one.

        A recipe that takes its scale from the controls needs them for source statistics, too. While the store is away they
        are those that this process knows.
        """

        def story(batch: BatchRecord) -> tuple[BatchRecord, Frame]:
            require_incarnation(batch, upload.incarnation)
            scaled, blend = self.bundle.manifest.recipe.scaled_by_batch, context == BLENDED
            if context == SOURCE and not scaled:
                return batch, Frame(self.bundle.training_statistics.source, None)
            usable = self.view.usable(batch)
            if context == SOURCE:  # any controls give a scale
                blend = self.view.wells_needed(usable) > 0
            self._require_controls(batch, usable, blend=blend)
            adaptation = self._adaptation(store, deed, batch, self.view.wanted(batch, usable, blend=blend), {}, {}, watch)
            if context == SOURCE:
                return batch, Frame(self.bundle.training_statistics.source, None, adaptation.scale)
            return batch, Frame(adaptation.statistics, adaptation, adaptation.scale)

        try:
            return retold(store, batch_id, story)
        except StoreLostError:
            raise
        except StoreUnavailableError:
            known = store.last_known(batch_id)
            if known is None:
                raise
            batch, frame = story(known)
            return batch, replace_fields(frame, fresh=False)

    def _require_controls(self, batch: BatchRecord, usable: Mapping[SiteKey, ControlSite], *, blend: bool) -> None:
        manifest = self.bundle.manifest
        source = (
            f"this bundle takes the images' scale from them ({manifest.recipe.scaling}), for ?context=source as well"
            if manifest.recipe.scaled_by_batch
            else "or ask for ?context=source, the answer without adaptation"
        )
        if not batch.control_wells:
            raise NoControlsError(
                f"batch {batch.batch_id} has no controls: send the images of at least {manifest.minimum_control_wells} of "
                f"its negative-control wells to /batches/{batch.batch_id}/controls, each site with "
                f"{', '.join(manifest.channels)}; {source}",
                batch_id=batch.batch_id,
                wells_needed=manifest.minimum_control_wells,
            )
        wells, unusable = self.view.control_wells(usable), self.view.unusable_sites(batch, usable)
        fewest = 1 if blend else manifest.minimum_control_wells
        if wells < fewest and unusable:
            raise RecipeChangedError(
                f"{unusable} of the {unusable + len(usable)} control sites of batch "
                f"{batch.batch_id} were prepared for a bundle with another image recipe: send the controls again",
                batch_id=batch.batch_id,
                wells_needed=self.view.wells_needed(usable),
            )
        try:
            require_wells(wells, fewest)
        except TooFewControlsError as error:
            detail = f"{error.detail}; or ask for ?context=blended, on these and the mean of the training plates"
            raise TooFewControlsError(detail, **error.members).about(batch_id=batch.batch_id) from None

    def _classified(self, site: PreparedSite, frame: Frame) -> ClassifiedSite:
        """Classify one site, whatever else is sent."""
        images = self._finished([site.key], [site.image], frame.scale)
        logits, embeddings, seconds, network_seconds = self.engine.classify(images, frame.statistics)
        if not (np.isfinite(logits).all() and np.isfinite(embeddings).all()):
            error = NonFiniteImageError("the network's answer is not finite: an image is out of scale")
            raise error.about(well=site.key.well, site=site.key.site)
        return ClassifiedSite(site.key, site.planes, site.saturation, logits[0], embeddings[0], seconds, network_seconds)

    def _answer(self, well: str, sites: Sequence[ClassifiedSite], adaptation: Adaptation | None) -> tuple[WellAnswer, Float]:
        manifest = self.bundle.manifest
        logits, embeddings = (
            np.stack(both) for both in zip(*((site.logits, site.embedding) for site in sites), strict=True)
        )
        controls = None if adaptation is None else ControlCentre(adaptation.control_centre, len(adaptation.control_wells))
        reference = self.bundle.embedding_reference
        answer = classify_well(well, logits, embeddings, manifest.classes, manifest.temperature, reference, controls)
        return answer, embeddings.mean(axis=0)

    def _current_answers(self, store: BatchStore, now: BatchRecord, adaptation: Adaptation) -> frozenset[str] | None:
        """Wells that were answered on newer statistics than this adaptation's; None when there are none newer."""
        current = self.view.current(now)
        if _names(adaptation) in current:
            return None
        answers = store.answers(now.batch_id)
        return frozenset(item.well for item in answers if (item.bundle_digest, item.statistics_id) in current)

    # --- shared steps ------------------------------------------------------------------------------------------------

    def _keep(
        self,
        store: BatchStore,
        deed: Deed,
        batch: BatchRecord,
        change: Change | None,
        action: str,
        answer: BaseModel,
        told: Mapping[str, object],
    ) -> None:
        """Commit a change with what stands beside it; what changes nothing was kept before, and is made sure of."""
        body = answer.model_dump_json().encode()
        if change is not None:
            digests = {**told, **_statistics_of(answer)}
            store.commit(batch, change, deed.done(action, batch.batch_id, digests, body))
            return
        store.secure()
        self._answered(store, deed, batch, answer, action)

    def _answered(
        self, store: BatchStore, deed: Deed, batch: BatchRecord, answer: BaseModel, action: str = CLASSIFIED
    ) -> None:
        """Let a request that changes nothing be repeated."""
        beside = deed.answered(action, batch.batch_id, answer.model_dump_json().encode())
        if beside is not None:
            store.beside(batch, beside)

    # --- reports -----------------------------------------------------------------------------------------------------

    def _controls_report(
        self,
        batch: BatchRecord,
        usable: Mapping[SiteKey, ControlSite],
        adaptation: Adaptation | None,
        upload: Upload,
        sent: Iterable[PreparedSite],
        watch: Stopwatch,
    ) -> schemas.ControlsReport:
        unusable = self.view.unusable_sites(batch, usable)
        meanwhile = adaptation is None and self.view.control_wells(usable) > 0
        return schemas.ControlsReport.model_validate(
            {
                **provenance(self.bundle, self.engine),
                **context_report(self.bundle.manifest, adaptation),
                "batch_id": batch.batch_id,
                "scale_id": _name_of(None if adaptation is None else adaptation.scale),
                "pixel_size_um": batch.pixel_size_um,
                "notices": (
                    *notices(self.bundle.manifest, adaptation, batch, upload, unusable_sites=unusable),
                    *((BLEND_MEANWHILE,) if meanwhile else ()),
                ),
                "adapted": adaptation is not None,
                "wells_needed": self.view.wells_needed(usable),
                "control_wells": len(batch.control_wells),
                "control_sites": sum(site.role is Role.CONTROL for site in batch.controls.values()),
                "panel_wells": len(batch.panel_wells),
                "unusable_sites": unusable,
                "context": adaptation.context if adaptation else CONTROLS,
                "created_at": adaptation.created_at if adaptation else None,
                "saturation": saturation_report(sent),
                "skipped": skipped_report(upload.skipped),
                "seconds": watch.seconds(),
            }
        )

    def _prediction(
        self,
        batch: BatchRecord,
        frame: Frame,
        pixel_size_um: float | None,
        wells: Sequence[schemas.WellPrediction],
        upload: Upload,
        seen: Iterable[SeenSite],
        watch: Stopwatch,
    ) -> schemas.Prediction:
        unusable = self.view.unusable_sites(batch, self.view.usable(batch)) if frame.adaptation else 0
        prepared = replace_fields(batch, pixel_size_um=pixel_size_um)
        return schemas.Prediction.model_validate(
            {
                **provenance(self.bundle, self.engine),
                **context_report(self.bundle.manifest, frame.adaptation),
                "batch_id": batch.batch_id,
                "scale_id": _name_of(frame.scale),
                "pixel_size_um": pixel_size_um,
                "notices": (
                    *notices(self.bundle.manifest, frame.adaptation, prepared, upload, unusable_sites=unusable),
                    *(() if frame.fresh else (NOT_FRESH,)),
                ),
                "adapted": frame.adaptation is not None,
                "kept": frame.adaptation is not None,
                "context": frame.adaptation.context if frame.adaptation else SOURCE,
                "wells": tuple(wells),
                "saturation": saturation_report(seen),
                "skipped": skipped_report(upload.skipped),
                "seconds": watch.seconds(),
            }
        )


def _superseded(prediction: schemas.Prediction) -> schemas.Prediction:
    return prediction.model_copy(update={"notices": (*prediction.notices, SUPERSEDED)})


def _planes_of(sites: Iterable[SeenSite]) -> dict[str, object]:
    return {"sha256": sorted(digest for site in sites for digest in site.planes.values())}


def _statistics_of(answer: BaseModel) -> dict[str, str]:
    return {"statistics_id": answer.statistics_id or ""} if isinstance(answer, schemas.Measured) else {}


def _names(adaptation: Adaptation) -> tuple[str, str]:
    return adaptation.bundle_digest, adaptation.statistics_id


def _name_of(scale: BatchScale | None) -> str | None:
    return None if scale is None else scale.digest


# --- wells -----------------------------------------------------------------------------------------------------------


def _by_well(
    classified: Iterator[ClassifiedSite | RefusedSite],
) -> Iterator[tuple[str, list[ClassifiedSite], list[RefusedSite]]]:
    """Group sorted sites by well.

    Raises:
        ImageError: every site of a well is refused.
    """
    for well, outcomes in groupby(classified, key=lambda site: site.key.well):
        sites: list[ClassifiedSite] = []
        refused: list[RefusedSite] = []
        for outcome in outcomes:
            if isinstance(outcome, RefusedSite):
                refused.append(outcome)
            else:
                sites.append(outcome)
        if not sites:
            raise refused[0].error
        yield well, sites, refused
