"""Whole screens without a server: an index of plates in, a Parquet file of answers a plate out.

A plate is the unit of work: it is adapted to its own controls and classified by the two stories, over a store that goes with
it, so that it is answered as a service would. What is done already, of the same rows by the same bundle, is not done again;
a plate that cannot be answered is told of in its place, and the others go on.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from model.errors import AnchorwellError, ImageError, LayoutError, TooFewControlsError
from model.images import ImageLimits
from model.layout import Role, SiteKey
from service import exports, schemas
from service.batches import Batches, Stopwatch
from service.blobs import Blobs
from service.decoding import FileSlice
from service.deeds import Deed
from service.errors import BlobMissingError, ReferenceUnreadableError, StoreLostError, StoreUnavailableError, problem_body
from service.index import IndexedPlate, ScreenIndex
from service.kept import Kept
from service.references import FetchedFile, ReferencedFile, References
from service.reports import VERSION
from service.uploads import SentFile, Upload

TENANT = "screen"
ANSWERS, REPORT, ERROR, SUMMARY = "answers.parquet", "report.json", "error.json", "screen.json"
WELLS_AT_ONCE = 48
"""So many are answered together: when an image of one of them cannot be read, the others are answered again."""

_LONGEST = 200
State = Literal["answered", "kept", "refused"]

log = logging.getLogger("anchorwell")


@dataclass(frozen=True)
class Outcome:
    """What became of a plate: answered now, or kept from a run before, or refused, and why.

    ``left_out`` wells have no answer; ``notices`` are to be read before the answers.
    """

    plate: str
    state: State
    wells: int = 0
    left_out: Mapping[str, str] | None = None
    detail: str = ""
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class RayCluster:
    """Where a Ray cluster is, how many actors answer plates on it, and with how many cores and GPUs each.

    ``decoders`` are how many sites the cluster decodes for each of them at once; without, each decodes by itself.
    """

    address: str
    actors: int
    cores: int
    gpus: float
    decoders: int


@dataclass(frozen=True)
class LocalFile:
    """A plane's file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.path)

    @property
    def content(self) -> str:
        """Its path: what lies there is known when it is read."""
        return str(self.path)

    @contextmanager
    def on_disk(self) -> Iterator[FileSlice]:
        """Give the file as it lies."""
        try:
            size = self.path.stat().st_size
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ReferenceUnreadableError(f"{self.name[:200]!r} cannot be read: {reason}") from None
        yield FileSlice(self.path, 0, size, self.name)


@dataclass(frozen=True, eq=False)
class Screener:
    """Answers plates one by one, over a store of their own, and puts the answers where they belong."""

    batches: Batches
    kept: Kept
    out: Blobs
    spool: Path
    max_file_bytes: int
    limits: ImageLimits
    fetched_by_decoder: bool = False

    def answer(self, plate: IndexedPlate) -> Outcome:
        """Answer a plate, or say why not; that stands in its folder, too.

        Raises:
            StoreUnavailableError: nothing can be kept.
        """
        folder = folder_of(plate.name)
        identity = self._identity(plate)  # before its files are read, for one may change meanwhile
        before = self._before(folder, identity)
        if before is not None:
            self.out.delete([f"{folder}/{ERROR}"])
            return _outcome(plate, "kept", before)
        try:
            report, table = self._answered(plate, identity)
        except (StoreUnavailableError, StoreLostError):
            raise
        except Exception as error:  # whatever it is, the other plates go on
            if not isinstance(error, AnchorwellError):
                log.exception("plate %s cannot be answered", plate.name)
            told = {"plate": plate.name, **problem_body(error)}
            self.out.delete([f"{folder}/{REPORT}", f"{folder}/{ANSWERS}"])  # those of other rows, or of another bundle
            self.out.put(f"{folder}/{ERROR}", _json(told))
            return Outcome(plate.name, "refused", detail=str(told["detail"]))
        self.out.delete([f"{folder}/{REPORT}"])
        self.out.put(f"{folder}/{ANSWERS}", table)
        self.out.put(f"{folder}/{REPORT}", _json(report))
        self.out.delete([f"{folder}/{ERROR}"])
        return _outcome(plate, "answered", report)

    def _before(self, folder: str, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the report of a run before that answered the same rows and files, by the same bundle, as it is now."""
        try:
            report = json.loads(self.out.get(f"{folder}/{REPORT}"))
            whole = sha256(self.out.get(f"{folder}/{ANSWERS}")).hexdigest() == report["answers_sha256"]
        except (BlobMissingError, ValueError, KeyError, TypeError):
            return None
        return report if whole and identity.items() <= report.items() else None

    def _identity(self, plate: IndexedPlate) -> dict[str, Any]:
        """What answers depend on."""
        view = self.batches.view
        return {
            "rows": plate.digest,
            "bundle": view.bundle.digest,
            "precision": view.precision,
            "version": VERSION,
            "max_context_sites": view.max_context_sites,
            "limits": asdict(self.limits),
        }

    def _answered(self, plate: IndexedPlate, identity: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Adapt a plate on its controls, and classify the rest.

        Raises:
            PlateError, ContextError, ImageError: it cannot be.
        """
        plate.require_whole()
        deed, batch_id, watch = Deed(TENANT, "screen"), quote(plate.name, safe=""), Stopwatch()
        left_out: dict[str, str] = {}
        store = self.kept.storage.of(TENANT)
        try:
            self.kept.send_platemap(deed, batch_id, plate.platemap)
            controls = self._upload(plate, Role.CONTROL, left_out)
            report = self._without_broken(
                controls, left_out, lambda upload: self.batches.adapt(deed, batch_id, upload, watch)
            )
            if report is None or not report.adapted:
                raise self._too_few(report, left_out)
            answers = [
                self._without_broken(part, left_out, lambda upload: self.batches.classify(deed, batch_id, upload, watch))
                for part in _parts(self._upload(plate, Role.TREATED, left_out))
            ]
            found, columns = self.kept.predictions(TENANT, batch_id)
            table = exports.file_of(exports.PARQUET, found, columns, self.batches.bundle.manifest.classes)
            digest = {"answers_sha256": sha256(table).hexdigest()}
            told = [answer for answer in answers if answer is not None]
            return {**self._report(plate, report, told, left_out, watch), **identity, **digest}, table
        finally:
            batch = store.batch(batch_id)
            if batch is not None:
                store.delete(batch, deed.done("batch.deleted", batch_id, {}))

    def _too_few(self, report: schemas.ControlsReport | None, left_out: Mapping[str, str]) -> TooFewControlsError:
        have = 0 if report is None else report.control_wells
        need = self.batches.bundle.manifest.minimum_control_wells
        why = "".join(f"; {well}: {reason}" for well, reason in list(left_out.items())[:4])
        return TooFewControlsError(f"the plate has {have} control wells that can be used, the bundle needs {need}{why}")

    def _upload(self, plate: IndexedPlate, role: Role, left_out: dict[str, str]) -> Upload:
        """Gather a role's complete wells; those that are not are left out, and told."""
        sites: dict[SiteKey, dict[str, SentFile]] = {}
        for key, address in sorted(plate.planes(self.batches.bundle.manifest.channels, role).items()):
            if address is None:
                left_out.setdefault(key.well, f"site {key.site} has no image of {key.channel}")
            else:
                sites.setdefault(key.site_key, {})[key.channel] = self._file(address)
        complete = {site: files for site, files in sites.items() if site.well not in left_out}
        return Upload(complete, pixel_size_um=plate.pixel_size_um, plate=plate.name)

    def _file(self, address: str) -> SentFile:
        if "://" not in address:
            return LocalFile(Path(address))
        parts = urlsplit(address)
        if parts.scheme != "s3":
            raise LayoutError(f"{address[:200]!r} is neither an s3:// URL nor a path")
        references = References({TENANT: [f"{parts.scheme}://{parts.netloc}/"]}, self.spool, self.max_file_bytes)
        return (FetchedFile if self.fetched_by_decoder else ReferencedFile)(references, TENANT, address)

    def _without_broken(self, upload: Upload, left_out: dict[str, str], ask: Callable[[Upload], Any]) -> Any:
        """Ask for wells; those of which an image cannot be used are left out. None when no well is left."""
        while upload.sites:
            try:
                return ask(upload)
            except ImageError as error:
                well = error.members.get("well")
                if well not in upload.wells:
                    raise
                left_out[str(well)] = error.detail
                upload = replace(upload, sites={key: files for key, files in upload.sites.items() if key.well != well})
        return None

    def _report(
        self,
        plate: IndexedPlate,
        controls: schemas.ControlsReport,
        answers: Sequence[schemas.Prediction],
        left_out: Mapping[str, str],
        watch: Stopwatch,
    ) -> dict[str, Any]:
        told = controls.model_dump(
            mode="json", include=set(schemas.Measured.model_fields) - {"batch_id", "seconds", "skipped"}
        )
        notices = dict.fromkeys((*controls.notices, *(notice for answer in answers for notice in answer.notices)))
        return {
            **told,
            "plate": plate.name,
            "notices": list(notices),
            "wells": [well.well for answer in answers for well in answer.wells],
            "wells_left_out": dict(sorted(left_out.items())),
            "seconds": watch.seconds(),
        }


def _outcome(plate: IndexedPlate, state: State, report: Mapping[str, Any]) -> Outcome:
    told = tuple(report["notices"])
    return Outcome(plate.name, state, len(report["wells"]), report["wells_left_out"], notices=told)


def _parts(upload: Upload) -> Iterator[Upload]:
    wells = sorted(upload.wells)
    for start in range(0, len(wells), WELLS_AT_ONCE):
        some = set(wells[start : start + WELLS_AT_ONCE])
        yield replace(upload, sites={key: files for key, files in upload.sites.items() if key.well in some})


def folder_of(plate: str) -> str:
    """Name a plate's folder as readers of partitioned tables know it; a name that is too long for one ends in its digest."""
    name = quote(plate, safe="")
    cut = f"{name[:_LONGEST]}-{sha256(plate.encode()).hexdigest()[:16]}"
    return f"plate={name if len(name) <= _LONGEST else cut}"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()


# --- many plates ------------------------------------------------------------------------------------------------------


def part_of(plates: Iterable[IndexedPlate], part: int, parts: int) -> Iterator[IndexedPlate]:
    """Every plate whose turn it is: of ``parts`` that share a screen, number ``part``, from 1."""
    return (plate for number, plate in enumerate(plates) if number % parts == part - 1)


def answered(answer: Callable[[IndexedPlate], Outcome], plates: Iterable[IndexedPlate], at_once: int) -> Iterator[Outcome]:
    """Answer plates, some at once, so that cores have something to do while one begins or ends; as they are done."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="plate") as pool:
        running: set[Future[Outcome]] = set()
        try:
            for plate in plates:
                running.add(pool.submit(answer, plate))
                if len(running) > at_once:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many plates came out how."""
    states: Sequence[State] = ("answered", "kept", "refused")
    return {state: sum(outcome.state == state for outcome in outcomes) for state in states}


def summary(index: ScreenIndex, outcomes: Sequence[Outcome]) -> bytes:
    """Tell what became of all plates."""
    refused = {outcome.plate: outcome.detail for outcome in outcomes if outcome.state == "refused"}
    wells = {outcome.plate: dict(outcome.left_out) for outcome in outcomes if outcome.left_out}
    notices = {outcome.plate: list(outcome.notices) for outcome in outcomes if outcome.notices}
    told = {"refused_plates": refused, "wells_left_out": wells, "notices": notices}
    return _json({"index": str(index.path), **counts(outcomes), **told})
