"""What is kept of batches beside the two stories: looked at, sent ahead, described by a plate map, forgotten.

Knows nothing of HTTP, onnxruntime or a database.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeVar

from cachetools import LRUCache

from model.bundle import Bundle, recipe_digest, recipe_json
from model.context import Context, choose_context, wells_needed
from model.layout import PlaneKey, PlateMap, Role, SiteKey
from model.statistics import Prior, statistics_id, with_scale
from service import schemas
from service.deeds import Deed
from service.errors import BatchBusyError, PlateMapNotFoundError, StagedConflictError
from service.reports import BLENDED, CONTROLS, PANEL, kept_predictions, platemap_report
from service.rules import existing, not_found, refuse_platemap
from service.storage import Storage
from service.store import (
    BatchRecord,
    BatchStore,
    Change,
    ControlSite,
    RevisionConflictError,
    StagedPlane,
    new_blob,
    platemap_bytes,
    shard_of,
    sites_of,
)

DELETED = "batch.deleted"
MAPPED = "platemap.sent"
STAGED = "plane.staged"
COMMIT_ATTEMPTS = 20
CHOSEN_KEPT = 64
"""Batches' controls of which it is known what is measured of them."""
PAGE = 1000
"""Most batches in one listing."""

T = TypeVar("T")


def retold(store: BatchStore, batch_id: str, story: Callable[[BatchRecord], T]) -> T:
    """Tell a story of the batch as it is now, and again whenever another request changed it meanwhile.

    Raises:
        BatchBusyError: it kept changing.
    """
    for _ in range(COMMIT_ATTEMPTS):
        try:
            return story(store.batch(batch_id) or BatchRecord(batch_id))
        except RevisionConflictError:
            continue
    raise BatchBusyError(f"batch {batch_id} kept changing under this request; nothing was kept: send it again")


@dataclass(frozen=True, eq=False)
class Wanted:
    """Statistics that a batch is to have: by which rule, of which sites (``panel`` wells among them), and their name.

    The ``statistics_id`` adds their scale to the name, for a recipe that has one: None until that is measured.
    """

    rule: str
    context: Context
    panel: frozenset[str]
    name: str
    statistics_id: str | None
    prior: Prior | None = None


class _OfControls:
    """What was chosen of the controls that were asked about last: a batch has the same mapping until others are sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chosen: LRUCache[tuple[int, Hashable], tuple[Mapping[SiteKey, ControlSite], Wanted]] = LRUCache(CHOSEN_KEPT)

    def found(self, controls: Mapping[SiteKey, ControlSite], way: Hashable, choose: Callable[[], Wanted]) -> Wanted:
        """Give what was chosen of this very mapping, or choose: to name hundreds of planes takes milliseconds."""
        key = (id(controls), way)  # no other's while the mapping is kept here
        with self._lock:
            kept = self._chosen.get(key)
        if kept is None:
            kept = (controls, choose())
            with self._lock:
                self._chosen[key] = kept
        return kept[1]


@dataclass(frozen=True)
class BundleView:
    """How the served bundle, at the engine's precision, sees what is kept of a batch."""

    bundle: Bundle
    precision: str
    max_context_sites: int
    """How many sites are measured in one pass."""

    @cached_property
    def _chosen(self) -> _OfControls:
        return _OfControls()

    @cached_property
    def recipe_digest(self) -> str:
        """Name of the served bundle's recipe."""
        return recipe_digest(self.bundle.manifest.recipe)

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return recipe_json(self.bundle.manifest.recipe)

    @property
    def measures_panel(self) -> bool:
        """Whether the bundle's network was trained with a panel beside the controls."""
        return self.bundle.manifest.context == PANEL

    def usable(self, batch: BatchRecord) -> dict[SiteKey, ControlSite]:
        """Return the sites to measure that are prepared as the served bundle wants them, or can be, from their files."""
        recipe, channels = self.recipe_digest, set(self.bundle.manifest.channels)
        return {
            key: site
            for key, site in self._measurable(batch).items()
            if site.recipe_digest == recipe or channels <= site.files.keys()
        }

    def unusable_sites(self, batch: BatchRecord, usable: Sized) -> int:
        """Return how many of the sites to measure are not usable."""
        return len(self._measurable(batch)) - len(usable)

    def _measurable(self, batch: BatchRecord) -> Mapping[SiteKey, ControlSite]:
        return batch.controls if self.measures_panel else sites_of(batch.controls, Role.CONTROL)

    def wells_needed(self, usable: Mapping[SiteKey, ControlSite]) -> int:
        """Return how many control wells are missing."""
        return wells_needed(self.control_wells(usable), self.bundle.manifest.minimum_control_wells)

    def control_wells(self, usable: Mapping[SiteKey, ControlSite]) -> int:
        """Return how many control wells there are."""
        return len({site.well for site in sites_of(usable, Role.CONTROL)})

    def wanted(self, batch: BatchRecord, usable: Mapping[SiteKey, ControlSite], *, blend: bool = False) -> Wanted:
        """Choose the context and name its statistics; a blend is of controls alone, as its prior is.

        Raises:
            NoControlsError: there is no site to measure.
        """
        way = (batch.pixel_size_um, blend)
        chosen = self._chosen.found(batch.controls, way, lambda: self._choose(batch, usable, blend=blend))
        prior = self.bundle.training_statistics.prior(len(chosen.context.wells)) if blend else None
        return replace(chosen, statistics_id=self._named(batch, chosen.name), prior=prior)

    def _choose(self, batch: BatchRecord, usable: Mapping[SiteKey, ControlSite], *, blend: bool) -> Wanted:
        sites = sites_of(usable, Role.CONTROL) if blend else usable
        context = choose_context(sites, self.max_context_sites)
        panel = frozenset(site.well for site in context.used if sites[site].role is Role.PANEL)
        name = statistics_id(
            bundle_digest=self.bundle.digest,
            recipe=self._recipe,
            pixel_size_um=batch.pixel_size_um,
            context=PANEL if panel else CONTROLS,
            precision=self.precision,
            planes=[
                (PlaneKey(site.well, site.site, channel), sites[site].planes[channel])
                for site in context.used
                for channel in self.bundle.manifest.channels
            ],
            panel=panel,
            blend_wells=len(context.wells) if blend else None,
        )
        rule = BLENDED if blend else PANEL if panel else CONTROLS
        return Wanted(rule, context, panel, name, statistics_id=None)

    def _named(self, batch: BatchRecord, name: str) -> str | None:
        """Return the id of statistics by their name without a scale; None when their scale is not measured yet."""
        if not self.bundle.manifest.recipe.scaled_by_batch:
            return name
        scale = batch.scales.get(name)
        return None if scale is None else with_scale(name, scale)

    def current(self, batch: BatchRecord) -> frozenset[tuple[str, str]]:
        """Return the bundle and statistics that a well of this batch could be answered with, blended ones too.

        Those whose scale is not measured yet are not among them.
        """
        usable = self.usable(batch)
        plain = [] if self.wells_needed(usable) else [self.wanted(batch, usable)]
        blend = [self.wanted(batch, usable, blend=True)] if sites_of(usable, Role.CONTROL) else []
        ids = (wanted.statistics_id for wanted in (*plain, *blend))
        return frozenset((self.bundle.digest, name) for name in ids if name is not None)

    def summary(self, batch: BatchRecord) -> schemas.BatchSummary:
        """Tell what is kept of a batch."""
        usable = self.usable(batch)
        needed = self.wells_needed(usable)
        current = None if needed else self.wanted(batch, usable).statistics_id
        adapted = (self.bundle.digest, current) in batch.adaptations
        assert batch.changed_at is not None
        return schemas.BatchSummary(
            batch_id=batch.batch_id,
            adapted=adapted,
            statistics_id=current if adapted else None,
            wells_needed=needed,
            control_wells=tuple(sorted(batch.control_wells)),
            control_sites=len(sites_of(batch.controls, Role.CONTROL)),
            panel_wells=tuple(sorted(batch.panel_wells)),
            unusable_sites=self.unusable_sites(batch, usable),
            treated_wells=tuple(sorted(batch.treated)),
            pixel_size_um=batch.pixel_size_um,
            plate=batch.plate,
            changed_at=batch.changed_at,
        )


@dataclass(frozen=True)
class Kept:
    """What is kept of every tenant's batches."""

    view: BundleView
    storage: Storage
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    # --- looked at ---------------------------------------------------------------------------------------------------

    def summaries(self, tenant: str, after: str = "", limit: int = PAGE) -> schemas.BatchList:
        """Batches behind a name, as many as are asked for."""
        store = self.storage.of(tenant)
        found = store.page(after, limit)
        return schemas.BatchList(
            batches=tuple(self.view.summary(batch) for batch in found),
            following=found[-1].batch_id if len(found) == limit else None,
            kept_bytes=store.usage.kept_bytes(),
            max_bytes=store.usage.max_bytes,
        )

    def summary(self, tenant: str, batch_id: str) -> schemas.BatchSummary:
        """What is kept of a batch.

        Raises:
            BatchNotFoundError: nothing.
        """
        return self.view.summary(existing(self.storage.of(tenant), batch_id))

    def predictions(self, tenant: str, batch_id: str) -> tuple[schemas.KeptPredictions, tuple[str, ...]]:
        """The latest answer of every well, and the plate map's columns; answers on superseded statistics are stale.

        Raises:
            BatchNotFoundError: nothing is kept under that id.
        """
        store = self.storage.of(tenant)
        batch = existing(store, batch_id)
        platemap = store.platemap(batch_id)
        found = kept_predictions(batch, platemap, store.answers(batch_id), self.view.current(batch))
        return found, () if platemap is None else platemap.columns

    def images(self, tenant: str, batch_id: str) -> schemas.ImageList:
        """Every plane that is staged, and every plane of a kept control or of the panel.

        Raises:
            BatchNotFoundError: nothing is kept under that id.
        """
        store = self.storage.of(tenant)
        batch = existing(store, batch_id)
        controls = tuple(
            schemas.KeptImage(
                well=key.well,
                site=key.site,
                channel=channel,
                sha256=digest,
                state="panel" if site.role is Role.PANEL else "control",
            )
            for key, site in batch.controls.items()
            for channel, digest in site.planes.items()
        )
        staged = tuple(
            schemas.KeptImage(**plane.key._asdict(), sha256=plane.sha256, state="staged") for plane in store.staged(batch_id)
        )
        return schemas.ImageList(batch_id=batch_id, images=(*controls, *staged))

    # --- sent ahead --------------------------------------------------------------------------------------------------

    def stage(
        self, deed: Deed, batch_id: str, key: PlaneKey, data: bytes, digest: str, *, replace: bool
    ) -> tuple[bool, schemas.KeptImage]:
        """Keep one plane until its well is asked for; the same again changes nothing. Whether it is new.

        Raises:
            StagedConflictError: another one is kept there. QuotaExceededError: there is no room for it.
        """
        store = self.storage.of(deed.tenant)
        answer = schemas.KeptImage(**key._asdict(), sha256=digest, state="staged")
        plane = StagedPlane(key, digest, len(data), new_blob(data, shard_of(batch_id), digest), self.now().isoformat())

        def story(batch: BatchRecord) -> tuple[bool, schemas.KeptImage]:
            was = store.staged_plane(batch_id, key)
            if was is not None and was.sha256 == digest:
                store.secure()
                return False, answer
            if was is not None and not replace:
                raise staged_conflict(batch_id, was, digest)
            also = deed.done(
                STAGED, batch_id, {"well": key.well, "site": key.site, "channel": key.channel, "sha256": digest}
            )
            store.stage(batch, plane, data, self.now(), also, instead_of=was)
            return True, answer

        return retold(store, batch_id, story)

    # --- plate maps --------------------------------------------------------------------------------------------------

    def send_platemap(self, deed: Deed, batch_id: str, sent: PlateMap) -> schemas.PlateMapReport:
        """Keep a plate map in the place of the one before.

        Raises:
            TreatedAsControlError, ControlAsPanelError: it calls a kept control treated, or a well of the panel a control.
        """
        store = self.storage.of(deed.tenant)
        report = platemap_report(batch_id, sent)

        def story(batch: BatchRecord) -> schemas.PlateMapReport:
            refuse_platemap(batch, sent)
            if store.platemap(batch_id) == sent:
                store.secure()
                return report
            also = deed.done(MAPPED, batch_id, {"sha256": sha256(platemap_bytes(sent)).hexdigest()})
            store.commit(batch, Change(self.now(), platemap=sent), also)
            return report

        return retold(store, batch_id, story)

    def platemap(self, tenant: str, batch_id: str) -> schemas.PlateMapReport:
        """The plate map as it is kept.

        Raises:
            BatchNotFoundError, PlateMapNotFoundError: there is none.
        """
        store = self.storage.of(tenant)
        existing(store, batch_id)
        kept = store.platemap(batch_id)
        if kept is None:
            raise PlateMapNotFoundError(
                f"batch {batch_id} has no plate map: PUT /batches/{batch_id}/platemap", batch_id=batch_id
            )
        return platemap_report(batch_id, kept)

    # --- forgotten ---------------------------------------------------------------------------------------------------

    def delete(self, deed: Deed, batch_id: str) -> None:
        """Forget a batch.

        Raises:
            BatchNotFoundError: nothing is kept under that id.
        """
        store = self.storage.of(deed.tenant)

        def story(batch: BatchRecord) -> None:
            if batch.revision is None:
                store.secure()  # a deletion that was not told of is safe before it is told to be done
                raise not_found(batch_id)
            store.delete(batch, deed.done(DELETED, batch_id, {}))

        retold(store, batch_id, story)


def staged_conflict(batch_id: str, kept: StagedPlane, sent: str) -> StagedConflictError:
    """Say that another image was sent ahead for a plane."""
    return StagedConflictError(
        f"batch {batch_id} keeps another image for well {kept.key.well} site {kept.key.site} channel {kept.key.channel}: "
        f"its sha256 is {kept.sha256[:12]}…, the one sent has {sent[:12]}…; ?replace=true puts the new one in its place",
        batch_id=batch_id,
        well=kept.key.well,
        site=kept.key.site,
        channel=kept.key.channel,
    )
