"""Watches a directory: a plate that is dropped there with its plate map is adapted and classified, once.

A plate is a folder with images and a plate map. When it has not changed for a while, its images are sent, and the answers
are written to ``anchorwell/`` in it: that they are there is what says that the plate is done, also after a restart. A plate
that was refused is tried again when its folder changes; so is one of whose wells some have no images yet.
"""

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.errors import AnchorwellError, LayoutError
from model.layout import Role, parse_layout, read_platemap, well_position
from service.client import AnchorwellClient, ProblemError, ServiceUnreachableError, StatisticsChangedError, well_of

RESULTS = "anchorwell"
ERROR = "error.json"
REPORT = "report.json"
LAYOUT = "load_data.csv"
UNSETTLED = "its files are still changing"
NO_PLATEMAP = "no table in it has 'platemap' in its name"
_LATER = (429, 500, 502, 503, 504)
"""The service's trouble, or a limit of the key: the plate waits."""
_NOT_THE_PLATES = (401, 403)
"""Refusals of the watcher itself: no plate is to blame."""
_CHANGING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What reading a folder meets while files of it are moved or removed."""
_WITHOUT_IMAGES = "wells_without_images"
_NAMED = 12
"""Wells that a line names; the files name all."""
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
    partial: bool = False
    """Whether wells of the plate map that have no images are left out; else the plate waits for them."""
    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, tuple[str, float]] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    """Plates that are neither done nor refused, as of the last look, and what each waits for."""
    refused: list[str] = field(default_factory=list)
    """Plates that are refused as they are, as of the last look."""

    def look(self) -> Iterator[Outcome]:
        """Do what can be done now: gives the plates that are done, and those that are refused.

        Raises:
            ProblemError: the service does not let the watcher in.
        """
        waiting: dict[str, str] = {}
        refused: list[str] = []
        for folder in sorted(path for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink()):
            if self._is_done(folder):
                continue
            try:
                now = fingerprint(folder)
                if self._was_refused(folder, now):
                    refused.append(folder.name)
                    continue
                outcome = self._worked_on(folder, now) if self._is_settled(folder, now) else UNSETTLED
            except OSError as error:
                if error.errno not in _CHANGING:
                    raise
                outcome = UNSETTLED
            if isinstance(outcome, str):
                waiting[folder.name] = outcome
            else:
                refused += [] if outcome.done else [folder.name]
                yield outcome
        self.waiting, self.refused = waiting, refused

    @property
    def has_work(self) -> bool:
        """Whether anything that is there may still become an answer by itself: a plate map comes from outside."""
        return any(reason != NO_PLATEMAP for reason in self.waiting.values())

    def _worked_on(self, folder: Path, now: str) -> Outcome | str:
        """Adapt and classify a plate; or say what it waits for."""
        platemap = find_platemap(folder)
        if platemap is None:
            return NO_PLATEMAP
        try:
            told = self._answered(folder, platemap)
        except ServiceUnreachableError as error:
            return str(error)
        except (AnchorwellError, ProblemError, StatisticsChangedError) as error:
            if isinstance(error, ProblemError) and error.status in _NOT_THE_PLATES:
                raise
            if isinstance(error, ProblemError) and error.status in _LATER:
                return str(error)
            write_whole(folder / RESULTS / ERROR, json.dumps({"folder": now, **_problem(error)}, indent=2).encode())
            return Outcome(folder.name, done=False, told=str(error))
        (folder / RESULTS / ERROR).unlink(missing_ok=True)
        return Outcome(folder.name, done=True, told=told)

    def _answered(self, folder: Path, platemap: Path) -> str:
        text, table = read_text(platemap), folder / LAYOUT
        layout = read_text(table) if table.is_file() else None
        wells = read_platemap(text)
        if not wells.roles:
            raise LayoutError(f"the plate map {platemap.name} does not tell which wells are controls")
        places = None if layout is None else parse_layout(layout, self.client.model().channels).files
        well_of_image = {path: well_of(path, places) for path in images_of(folder)}
        without = sorted(wells.roles.keys() - well_of_image.values(), key=well_position)
        if without and not self.partial:
            raise _incomplete(without, len(wells.roles))
        of_role = {role: [path for path, well in well_of_image.items() if well in wells.wells(role)] for role in Role}
        batch_id, size = folder.name, self.pixel_size_um
        self.client.send_platemap(batch_id, text)
        report = self.client.adapt(batch_id, of_role[Role.CONTROL], layout, channels=self.channels, pixel_size_um=size)
        if not report.adapted:
            raise LayoutError(f"{report.wells_needed} more control wells are needed")
        prediction = self.client.predict(batch_id, of_role[Role.TREATED], layout, channels=self.channels, pixel_size_um=size)
        told = {**prediction.model_copy(update={"wells": ()}).model_dump(mode="json"), _WITHOUT_IMAGES: without}
        write_whole(folder / RESULTS / REPORT, json.dumps(told, indent=2, ensure_ascii=False).encode())
        write_whole(self._answers(folder), self.client.export(batch_id, self.form.value))
        left_out = f"; left out without images: {_some_of(without)}" if without else ""
        return f"{len(prediction.wells)} wells answered on {len(report.context_wells)} control wells{left_out}"

    def _answers(self, folder: Path) -> Path:
        return folder / RESULTS / f"predictions.{self.form}"

    def _is_done(self, folder: Path) -> bool:
        return any((folder / RESULTS / f"predictions.{form}").is_file() for form in Form)

    def _was_refused(self, folder: Path, now: str) -> bool:
        """Whether a folder was refused as it is; one that was only not whole is none to refuse where parts are taken."""
        error = folder / RESULTS / ERROR
        if not error.is_file():
            return False
        found = json.loads(error.read_text(encoding="utf-8"))
        return found.get("folder") == now and not (self.partial and found.get(_WITHOUT_IMAGES))

    def _is_settled(self, folder: Path, now: str) -> bool:
        """Whether a folder has been as it is for long enough: a microscope may still be writing to it."""
        before, since = self._seen.get(folder, ("", 0.0))
        if before != now:
            self._seen[folder] = (now, self.clock())
            return self.settle_s <= 0
        return self.clock() - since >= self.settle_s


def _problem(error: AnchorwellError | ProblemError | StatisticsChangedError) -> Mapping[str, Any]:
    if isinstance(error, ProblemError):
        return error.problem
    return {"detail": str(error), **(error.members if isinstance(error, AnchorwellError) else {})}


def _incomplete(without: Sequence[str], wells: int) -> LayoutError:
    return LayoutError(
        f"{len(without)} of the {wells} wells of the plate map have no images: {_some_of(without)}. "
        "The plate is tried again when its folder changes; if no more images come, leave these wells out of the plate map, "
        "or watch with --partial",
        **{_WITHOUT_IMAGES: list(without)},
    )


def _some_of(wells: Sequence[str]) -> str:
    more = f" and {len(wells) - _NAMED} more" if len(wells) > _NAMED else ""
    return ", ".join(wells[:_NAMED]) + more


def read_text(path: Path) -> str:
    """Read a table.

    Raises:
        LayoutError: it is not UTF-8. OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LayoutError(f"{path.name} is not UTF-8 text: save it as UTF-8 (in Excel: CSV UTF-8)", file=path.name) from None


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
