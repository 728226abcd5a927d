"""Watches a directory: a plate that is dropped there with its plate map is adapted and classified, once.

A plate is a folder with images and a plate map. When it has not changed for a while, its images are sent, and the answers
are written to ``anchorwell/`` in it: that they are there is what says that the plate is done, also after a restart. A plate
that was refused is tried again when its folder changes.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from model.errors import AnchorwellError, LayoutError
from model.layout import PlaneKey, Role, parse_layout, read_platemap
from service.client import AnchorwellClient, ProblemError, ServiceUnreachableError, StatisticsChangedError, well_of

RESULTS = "anchorwell"
ERROR = "error.json"
REPORT = "report.json"
LAYOUT = "load_data.csv"
_NOT_THE_PLATES = (401, 403)
"""Refusals of the watcher itself: no plate is to blame."""
_IMAGES = (".tif", ".tiff")
_TABLES = (".csv", ".tsv")


class Form(StrEnum):
    """How answers are written."""

    CSV = "csv"
    PARQUET = "parquet"
    JSON = "json"


@dataclass(frozen=True)
class Outcome:
    """What became of a plate at one look."""

    batch_id: str
    done: bool
    told: str


@dataclass
class Watcher:
    """Looks at a directory, again and again; remembers only what it saw change."""

    client: AnchorwellClient
    directory: Path
    settle_s: float = 30.0
    form: Form = Form.CSV
    channels: Sequence[str] | None = None
    pixel_size_um: float | None = None
    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, tuple[str, float]] = field(default_factory=dict)
    waiting: int = 0
    """Plates that are not done and were not refused, as of the last look."""

    def look(self) -> Iterator[Outcome]:
        """Do what can be done now: gives the plates that are done, and those that are refused.

        Raises:
            ProblemError: the service does not let the watcher in.
        """
        waiting = 0
        for folder in sorted(path for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink()):
            if self._is_done(folder):
                continue
            now = fingerprint(folder)
            if self._was_refused(folder, now):
                continue
            outcome = self._worked_on(folder, now) if self._is_settled(folder, now) else None
            if outcome is None:
                waiting += 1
            else:
                yield outcome
        self.waiting = waiting

    def _worked_on(self, folder: Path, now: str) -> Outcome | None:
        """Adapt and classify a plate; None when it must wait."""
        platemap = find_platemap(folder)
        if platemap is None:
            return None
        try:
            told = self._answered(folder, platemap)
        except ServiceUnreachableError:
            return None
        except (AnchorwellError, ProblemError, StatisticsChangedError) as error:
            if isinstance(error, ProblemError) and error.status in _NOT_THE_PLATES:
                raise
            if isinstance(error, ProblemError) and error.status >= 500:  # noqa: PLR2004 (the service's trouble: later)
                return None
            problem = error.problem if isinstance(error, ProblemError) else {"detail": str(error)}
            write_whole(folder / RESULTS / ERROR, json.dumps({"folder": now, **problem}, indent=2).encode())
            return Outcome(folder.name, done=False, told=str(error))
        (folder / RESULTS / ERROR).unlink(missing_ok=True)
        return Outcome(folder.name, done=True, told=told)

    def _answered(self, folder: Path, platemap: Path) -> str:
        text = platemap.read_text(encoding="utf-8-sig")
        table = folder / LAYOUT
        layout = table.read_text(encoding="utf-8-sig") if table.is_file() else None
        wells = read_platemap(text)
        if not wells.roles:
            raise LayoutError(f"the plate map {platemap.name} does not tell which wells are controls")
        places = None if layout is None else parse_layout(layout, self.client.model().channels).files
        of_role = {role: self._images(folder, wells.wells(role), places) for role in Role}
        batch_id, size = folder.name, self.pixel_size_um
        self.client.send_platemap(batch_id, text)
        report = self.client.adapt(batch_id, of_role[Role.CONTROL], layout, channels=self.channels, pixel_size_um=size)
        if not report.adapted:
            raise LayoutError(f"{report.wells_needed} more control wells are needed")
        prediction = self.client.predict(batch_id, of_role[Role.TREATED], layout, channels=self.channels, pixel_size_um=size)
        content = prediction.model_copy(update={"wells": ()}).model_dump_json(indent=2).encode()
        write_whole(folder / RESULTS / REPORT, content)
        write_whole(self._answers(folder), self.client.export(batch_id, self.form.value))
        return f"{len(prediction.wells)} wells answered on {len(report.context_wells)} control wells"

    def _images(self, folder: Path, wells: frozenset[str], places: Mapping[str, PlaneKey] | None) -> list[Path]:
        return [path for path in images_of(folder) if well_of(path, places) in wells]

    def _answers(self, folder: Path) -> Path:
        return folder / RESULTS / f"predictions.{self.form}"

    def _is_done(self, folder: Path) -> bool:
        return any((folder / RESULTS / f"predictions.{form}").is_file() for form in Form)

    def _was_refused(self, folder: Path, now: str) -> bool:
        error = folder / RESULTS / ERROR
        return error.is_file() and json.loads(error.read_text(encoding="utf-8")).get("folder") == now

    def _is_settled(self, folder: Path, now: str) -> bool:
        """Whether a folder has been as it is for long enough: a microscope may still be writing to it."""
        before, since = self._seen.get(folder, ("", 0.0))
        if before != now:
            self._seen[folder] = (now, self.clock())
            return self.settle_s <= 0
        return self.clock() - since >= self.settle_s


def images_of(folder: Path) -> list[Path]:
    """The images of a plate, sorted, wherever below its folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())


def find_platemap(folder: Path) -> Path | None:
    """The table of a plate whose name says that it is a plate map."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLES and path.is_file())
    return next((path for path in tables if "platemap" in path.stem.lower().replace("_", "").replace("-", "")), None)


def fingerprint(folder: Path) -> str:
    """Name what lies in a folder, but for answers: names, sizes and times."""
    digest = sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and RESULTS not in path.relative_to(folder).parts[:1]:
            found = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
