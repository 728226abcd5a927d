"""Drives the service from Python: files in, answers out.

Knows nothing of engines or stores. Sends whole wells, in requests of a bounded size, and reads a file when its turn comes.
"""

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx

from model.errors import AnchorwellError
from model.layout import PlaneKey, is_unused, parse_file_name, parse_layout, plane_key
from service import schemas
from service.digests import digest_header
from service.errors import MEDIA_TYPE, PROBLEM_TYPE

T = TypeVar("T")
REQUEST_BYTES = 256 << 20
_ATTEMPTS = 5
"""How often a request is sent whose connection breaks."""
_RETRY_S = 1
_PATIENCE_S = 60
"""Longest time that is waited between tries, in all, by who is told to come back; to come back tomorrow is told."""
_LONGEST_WAIT_S = 15
_ROLLED_WITHIN_S = 300
_LOOKS = 8
"""So many answers of one bundle in a row mean that replicas have been given it."""
_PARALLEL = 8
_Progress = Callable[[int, int], None]
Context = Literal["controls", "blended", "source"]
"""What a prediction's statistics are of."""


class ProblemError(Exception):
    """The service refused: ``problem`` is the RFC 9457 body, ``slug`` the name of its type."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.problem = dict(problem)
        self.status = int(problem.get("status", 0))
        self.slug = str(problem.get("type", "")).removeprefix(PROBLEM_TYPE)
        super().__init__(f"{problem.get('title', 'refused')}: {problem.get('detail', '')}")


class ServiceUnreachableError(Exception):
    """No answer came from the service."""


class StatisticsChangedError(Exception):
    """The batch's controls were changed between two requests of one prediction."""


class AnchorwellClient:
    """A connection to one service; close it, or use it in a ``with``."""

    def __init__(
        self, base_url: str = "http://127.0.0.1:8000", timeout_s: float = 600.0, api_key: str | None = None
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=base_url, timeout=httpx.Timeout(timeout_s, connect=10.0), headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    # --- calls -------------------------------------------------------------------------------------------------------

    def adapt(
        self,
        batch_id: str,
        files: Iterable[Path],
        layout: str | None = None,
        *,
        channels: Sequence[str] | None = None,
        pixel_size_um: float | None = None,
        replace: bool = False,
        panel: bool = False,
        progress: _Progress | None = None,
    ) -> schemas.ControlsReport:
        """Send control images, or the panel's, in one request, so that they count whole or not at all.

        Raises:
            ProblemError: the service refused them. ServiceUnreachableError: it did not answer. AnchorwellError: no files.
        """
        paths = _some(files)
        sent = _Sent(len(paths), progress)
        form = _form(layout, channels, pixel_size_um)
        path = f"/batches/{_quoted(batch_id)}/controls"
        answer = self._send_files(path, paths, form, _controls_query(replace=replace, panel=panel), sent)
        return schemas.ControlsReport.model_validate_json(answer.content)

    def predict(
        self,
        batch_id: str,
        files: Iterable[Path],
        layout: str | None = None,
        *,
        channels: Sequence[str] | None = None,
        pixel_size_um: float | None = None,
        context: Context = "controls",
        request_bytes: int = REQUEST_BYTES,
        progress: _Progress | None = None,
    ) -> schemas.Prediction:
        """Send treated images, whole wells at a time, and merge the answers: they do not depend on the chunking.

        Raises:
            ProblemError: the service refused a well. StatisticsChangedError: the controls changed on the way.
            ServiceUnreachableError: the service did not answer. AnchorwellError: a file's well is not known.
        """
        places = parse_layout(layout, self.model().channels).files if layout is not None else None
        paths = _some(files)
        sent = _Sent(len(paths), progress)
        form = _form(layout, channels, pixel_size_um)
        query = {"context": context}
        path = f"/batches/{_quoted(batch_id)}/predict"

        def ask(chunk: Sequence[Path]) -> schemas.Prediction:
            return schemas.Prediction.model_validate_json(self._send_files(path, chunk, form, query, sent).content)

        asks = [partial(ask, chunk) for chunk in chunks_of_wells(paths, places, request_bytes)]
        return merged(self._of_one_bundle(asks, [ask() for ask in asks]))

    def stage(
        self,
        batch_id: str,
        files: Iterable[Path],
        layout: str | None = None,
        *,
        channels: Sequence[str] | None = None,
        replace: bool = False,
        progress: _Progress | None = None,
    ) -> schemas.ImageList:
        """Send images ahead, each as a raw body, several at once; those that are there already are not sent again.

        Raises:
            ProblemError: the service refused one. ServiceUnreachableError: it did not answer. AnchorwellError: a file's
                well, site or channel is not known.
        """
        paths = _some(files)
        places = _Places.of(layout, self.model().channels, channels)
        self._sender(batch_id, places, _Sent(len(paths), progress), replace=replace)(paths)
        return self.images(batch_id)

    def predict_while_sending(
        self,
        batch_id: str,
        files: Iterable[Path],
        layout: str | None = None,
        *,
        channels: Sequence[str] | None = None,
        pixel_size_um: float | None = None,
        context: Context = "controls",
        request_bytes: int = REQUEST_BYTES,
        progress: _Progress | None = None,
    ) -> schemas.Prediction:
        """Send treated images ahead, and have the wells that are there classified while the next are sent.

        Raises:
            ProblemError: the service refused a plane or a well. StatisticsChangedError: the controls changed on the way.
            ServiceUnreachableError: the service did not answer. AnchorwellError: a file's well, site or channel is not
                known, or the layout is of another plate or pixel size.
        """
        paths = _some(files)
        places = _Places.of(layout, self.model().channels, channels)
        self._require_plate(batch_id, places.plate)
        size_um = places.agreed_size_um(pixel_size_um)
        send = self._sender(batch_id, places, _Sent(len(paths), progress))
        asks: list[Callable[[], schemas.Prediction]] = []
        asked: list[Future[schemas.Prediction]] = []
        with ThreadPoolExecutor(1) as pool:
            try:
                for chunk in chunks_of_wells(paths, places.files, request_bytes):
                    send(chunk)
                    wells = sorted({well for path in chunk if (well := well_of(path, places.files)) is not None})
                    asks.append(partial(self.predict_staged, batch_id, wells, pixel_size_um=size_um, context=context))
                    asked.append(pool.submit(asks[-1]))
                    for answered in (answer for answer in asked if answer.done()):
                        answered.result()
                return merged(self._of_one_bundle(asks, [answer.result() for answer in asked]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _of_one_bundle(
        self, asks: Sequence[Callable[[], schemas.Prediction]], answers: Sequence[schemas.Prediction]
    ) -> list[schemas.Prediction]:
        """Ask again for what another bundle answered, when replicas have been given the one that is to answer."""
        found, until = list(answers), time.monotonic() + _ROLLED_WITHIN_S
        while len({answer.bundle for answer in found}) > 1 and time.monotonic() < until:
            served = {self.model().bundle}
            for _ in range(_LOOKS):
                time.sleep(_RETRY_S)
                served.add(self.model().bundle)
            if len(served) == 1:
                found = [answer if answer.bundle in served else ask() for answer, ask in zip(found, asks, strict=True)]
        return found

    def _sender(self, batch_id: str, places: "_Places", sent: "_Sent", *, replace: bool = False) -> "_Sender":
        there = {(image.well, image.site, image.channel): image.sha256 for image in self._images_there(batch_id)}
        return _Sender(partial(self._put_plane, batch_id, replace=replace), places, there, sent)

    def _require_plate(self, batch_id: str, plate: str | None) -> None:
        kept = None if plate is None else _where_there(lambda: self.batch(batch_id).plate, None)
        if plate is not None and kept is not None and plate.casefold() != kept.casefold():
            raise AnchorwellError(
                f"the controls of batch {batch_id} are of plate {kept!r}, the layout is of plate {plate!r}: send its files "
                "to that plate's batch"
            )

    def _put_plane(self, batch_id: str, key: PlaneKey, data: bytes, digest: bytes, *, replace: bool) -> None:
        path = f"/batches/{_quoted(batch_id)}/images/{key.well}/{key.site}/{_quoted(key.channel)}"
        headers, params = {"Content-Digest": digest_header(digest)}, {"replace": "true"} if replace else {}
        self._send("PUT", path, lambda: {"content": data, "headers": headers, "params": params})

    def _images_there(self, batch_id: str) -> tuple[schemas.KeptImage, ...]:
        return _where_there(lambda: self.images(batch_id).images, ())

    def adapt_staged(
        self,
        batch_id: str,
        wells: Sequence[str] | None = None,
        *,
        pixel_size_um: float | None = None,
        replace: bool = False,
        panel: bool = False,
    ) -> schemas.ControlsReport:
        """Adapt a batch on controls that were sent ahead: the wells named, or those that its plate map calls controls.

        The panel's wells are always named.
        """
        params = _controls_query(replace=replace, panel=panel)
        answer = self._post_json(batch_id, "controls", _named(wells, pixel_size_um), params)
        return schemas.ControlsReport.model_validate_json(answer.content)

    def predict_staged(
        self,
        batch_id: str,
        wells: Sequence[str] | None = None,
        *,
        pixel_size_um: float | None = None,
        context: Context = "controls",
    ) -> schemas.Prediction:
        """Classify wells that were sent ahead: those named, or all that are no controls."""
        answer = self._post_json(batch_id, "predict", _named(wells, pixel_size_um), {"context": context})
        return schemas.Prediction.model_validate_json(answer.content)

    def send_platemap(self, batch_id: str, text: str) -> schemas.PlateMapReport:
        """Send a plate map (CSV or TSV), in the place of the one before."""
        answer = self._send("PUT", f"/batches/{_quoted(batch_id)}/platemap", lambda: {"content": text.encode()})
        return schemas.PlateMapReport.model_validate_json(answer.content)

    def predictions(self, batch_id: str) -> schemas.KeptPredictions:
        """The latest answer of every well."""
        answer = self._send("GET", f"/batches/{_quoted(batch_id)}/predictions")
        return schemas.KeptPredictions.model_validate_json(answer.content)

    def export(self, batch_id: str, form: Literal["csv", "parquet", "json"] = "csv") -> bytes:
        """The latest answer of every well, as a file."""
        return self._send("GET", f"/batches/{_quoted(batch_id)}/predictions", lambda: {"params": {"format": form}}).content

    def images(self, batch_id: str) -> schemas.ImageList:
        """The planes that are staged, or kept as controls."""
        return schemas.ImageList.model_validate_json(self._send("GET", f"/batches/{_quoted(batch_id)}/images").content)

    def job(self, job_id: str) -> schemas.JobReport:
        """How far a job is, or how it ended."""
        return schemas.JobReport.model_validate_json(self._send("GET", f"/jobs/{_quoted(job_id)}").content)

    def batches(self) -> schemas.BatchList:
        """Every batch that is kept."""
        pages = [self._page("")]
        while pages[-1].following is not None:
            pages.append(self._page(pages[-1].following))
        whole = tuple(batch for page in pages for batch in page.batches)
        return pages[-1].model_copy(update={"batches": whole})

    def _page(self, after: str) -> schemas.BatchList:
        answer = self._send("GET", "/batches", lambda: {"params": {"after": after}})
        return schemas.BatchList.model_validate_json(answer.content)

    def batch(self, batch_id: str) -> schemas.BatchSummary:
        """What is kept of one batch."""
        return schemas.BatchSummary.model_validate_json(self._send("GET", f"/batches/{_quoted(batch_id)}").content)

    def delete(self, batch_id: str) -> None:
        """Forget a batch."""
        self._send("DELETE", f"/batches/{_quoted(batch_id)}")

    def model(self) -> schemas.ModelCard:
        """The served bundle."""
        return schemas.ModelCard.model_validate_json(self._send("GET", "/model").content)

    def ready(self) -> schemas.Ready:
        """The engine, once the service is ready.

        Raises:
            ProblemError: it is not; says why.
        """
        return schemas.Ready.model_validate_json(self._send("GET", "/health/ready", patience_s=0).content)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _send_files(
        self, path: str, paths: Sequence[Path], form: Mapping[str, str], query: Mapping[str, str], sent: "_Sent"
    ) -> httpx.Response:
        def body() -> dict[str, Any]:
            opened = [("images", (file.name, _WhenRead(file, sent), "image/tiff")) for file in paths]
            return {"files": opened, "data": dict(form), "params": dict(query)}

        return self._send("POST", path, body, key=token_hex(16))

    def _post_json(self, batch_id: str, what: str, named: Mapping[str, Any], params: Mapping[str, str]) -> httpx.Response:
        path = f"/batches/{_quoted(batch_id)}/{what}"
        return self._send("POST", path, lambda: {"json": dict(named), "params": dict(params)}, key=token_hex(16))

    def _send(
        self,
        method: str,
        path: str,
        body: Callable[[], dict[str, Any]] = dict,
        patience_s: float = _PATIENCE_S,
        key: str | None = None,
    ) -> httpx.Response:
        """Send a request; again while the service says to come back, or when its connection breaks.

        A post goes under an Idempotency-Key, so that one whose answer was lost takes effect once.
        """
        broken, tries, waited = 0, 0, 0.0
        while True:
            options = body()
            if key is not None:
                options["headers"] = {**options.get("headers", {}), "Idempotency-Key": key}
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                broken += 1
                if broken == _ATTEMPTS or not patience_s or isinstance(error, httpx.ConnectError):
                    raise ServiceUnreachableError(
                        f"no answer from {self._http.base_url}: {str(error) or type(error).__name__}"
                    ) from error
                time.sleep(_RETRY_S)
                continue
            if answer.is_success:
                return answer
            told = answer.headers.get("retry-after", "")
            wait_s = max(int(told), min(_RETRY_S * 2**tries, _LONGEST_WAIT_S)) if told.isdecimal() else patience_s + 1
            if waited + wait_s > patience_s:
                raise problem_of_answer(answer)
            time.sleep(wait_s)
            waited += wait_s
            tries += 1


# --- whole wells -----------------------------------------------------------------------------------------------------


def well_of(path: Path, places: Mapping[str, PlaneKey] | None) -> str | None:
    """Return the well of a file, by the layout or by its name; None for a thumbnail, or a file the layout leaves out.

    Raises:
        AnchorwellError: the name says no well.
    """
    if places is not None:
        return places[path.name].well if path.name in places else None
    try:
        parsed = parse_file_name(path.name)
    except AnchorwellError as error:
        raise error.about(file=path.name) from None
    return None if parsed.thumbnail else parsed.well


def chunks_of_wells(
    paths: Iterable[Path], places: Mapping[str, PlaneKey] | None, request_bytes: int
) -> Iterator[list[Path]]:
    """Pack files to requests of at most ``request_bytes``, whole wells each; a larger well goes alone.

    Files without a well go with the first, for the service to report.
    """
    wells: dict[str, list[Path]] = defaultdict(list)
    without: list[Path] = []
    for path in paths:
        well = well_of(path, places)
        (without if well is None else wells[well]).append(path)
    chunk = without
    size = sum(path.stat().st_size for path in without)
    held = False
    for well in sorted(wells):
        bytes_of_well = sum(path.stat().st_size for path in wells[well])
        if held and size + bytes_of_well > request_bytes:
            yield chunk
            chunk, size = [], 0
        chunk = chunk + wells[well]
        size += bytes_of_well
        held = True
    yield chunk


def merged(answers: Sequence[schemas.Prediction]) -> schemas.Prediction:
    """Merge answers of one batch: wells sorted, seconds added up.

    Raises:
        StatisticsChangedError: they stand on different statistics.
    """
    first = answers[0]
    if len({(answer.statistics_id, answer.bundle) for answer in answers}) > 1:
        what = "bundle" if len({answer.bundle for answer in answers}) > 1 else "statistics"
        raise StatisticsChangedError(f"the {what} of batch {first.batch_id} changed while it was predicted: ask again")
    seconds: dict[str, float] = defaultdict(float)
    for answer in answers:
        for stage, value in answer.seconds.items():
            seconds[stage] += value
    return first.model_copy(
        update={
            "notices": tuple(dict.fromkeys(notice for answer in answers for notice in answer.notices)),
            "wells": tuple(sorted((well for answer in answers for well in answer.wells), key=lambda well: well.well)),
            "saturation": merged_saturation(answers),
            "skipped": tuple(item for answer in answers for item in answer.skipped),
            "seconds": dict(seconds),
        }
    )


def merged_saturation(answers: Iterable[schemas.Prediction]) -> tuple[schemas.Saturation, ...]:
    """Merge the saturation of each channel: planes added up, the worst kept."""
    by_channel: dict[str, list[schemas.Saturation]] = defaultdict(list)
    for answer in answers:
        for item in answer.saturation:
            by_channel[item.channel].append(item)
    return tuple(
        max(items, key=lambda item: item.worst_share).model_copy(update={"planes": sum(item.planes for item in items)})
        for _, items in sorted(by_channel.items())
    )


# --- forms -----------------------------------------------------------------------------------------------------------


class _Sent:
    """Which files have been read to their end; one that is sent again counts once."""

    def __init__(self, total: int, progress: _Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done: set[Path] = set()

    def add(self, path: Path) -> None:
        """Count a file."""
        self._done.add(path)
        if self._progress is not None:
            self._progress(len(self._done), self._total)


class _WhenRead(io.RawIOBase):
    """A file that is opened at its first read and closed at its end: thousands fit in one request."""

    def __init__(self, path: Path, sent: _Sent) -> None:
        self._path = path
        self._sent = sent
        self._size = path.stat().st_size
        self._at = 0
        self._file: io.FileIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            self.close_file()
            self._sent.add(self._path)
            return 0
        if self._file is None:
            self._file = io.FileIO(self._path)
        self._file.seek(self._at)
        count = self._file.readinto(buffer) or 0
        self._at += count
        return count

    def close_file(self) -> None:
        """Let go of the descriptor; a later read opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class _Places:
    """Where files belong: by a layout, else by their names; ``numbered`` names the channels of those that number them."""

    channels: Sequence[str]
    files: Mapping[str, PlaneKey] | None
    numbered: Sequence[str] | None
    plate: str | None = None
    size_um: float | None = None

    @classmethod
    def of(cls, layout: str | None, channels: Sequence[str], numbered: Sequence[str] | None) -> Self:
        """Read a layout, where there is one.

        Raises:
            AnchorwellError: it cannot be read, or gives several pixel sizes.
        """
        if layout is None:
            return cls(channels, None, numbered)
        table = parse_layout(layout, channels)
        return cls(channels, table.files, numbered, table.plate, table.pixel_size_um)

    def agreed_size_um(self, given: float | None) -> float | None:
        """Return the pixel size given, or the layout's.

        Raises:
            AnchorwellError: they differ.
        """
        if given is not None and self.size_um is not None and given != self.size_um:
            raise AnchorwellError(f"the layout says {self.size_um:g} µm per pixel, {given:g} is asked for: give one of them")
        return self.size_um if given is None else given

    def __call__(self, path: Path) -> PlaneKey | None:
        """Return which plane a file is; None for a thumbnail, a channel that is not used, or one the layout leaves out.

        Raises:
            AnchorwellError: its name does not say.
        """
        if self.files is not None:
            return self.files.get(path.name)
        parsed = parse_file_name(path.name)
        if parsed.thumbnail or is_unused(parsed, self.numbered):
            return None
        if isinstance(parsed.channel, int) and self.numbered is None:
            raise AnchorwellError(
                f"{path.name[:200]!r} numbers its channel: give the names of channels in the order of their numbers"
            )
        return plane_key(parsed, self.channels, self.numbered)


@dataclass(frozen=True, eq=False)
class _Sender:
    """Sends planes ahead, several at once, but those that are there already."""

    put: Callable[[PlaneKey, bytes, bytes], None]
    places: _Places
    there: Mapping[tuple[str, int, str], str]
    sent: _Sent

    def __call__(self, paths: Iterable[Path]) -> None:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for _ in pool.map(self._send, paths):
                pass

    def _send(self, path: Path) -> None:
        key = self.places(path)
        if key is not None:
            data = path.read_bytes()
            digest = sha256(data)
            if self.there.get((key.well, key.site, key.channel)) != digest.hexdigest():
                self.put(key, data, digest.digest())
        self.sent.add(path)


def _where_there(ask: Callable[[], T], otherwise: T) -> T:
    """Ask for something of a batch that may not be there yet."""
    try:
        return ask()
    except ProblemError as error:
        if error.status != httpx.codes.NOT_FOUND:
            raise
        return otherwise


def _named(wells: Sequence[str] | None, pixel_size_um: float | None) -> dict[str, Any]:
    named = {"wells": None if wells is None else list(wells), "pixel_size_um": pixel_size_um}
    return {"staged": True, **{name: value for name, value in named.items() if value is not None}}


def _controls_query(*, replace: bool, panel: bool) -> dict[str, str]:
    return {**({"replace": "true"} if replace else {}), **({"role": "panel"} if panel else {})}


def _some(files: Iterable[Path]) -> list[Path]:
    """Sort files to send.

    Raises:
        AnchorwellError: there is none.
    """
    paths = sorted(files)
    if not paths:
        raise AnchorwellError("no image files to send")
    return paths


def _form(layout: str | None, channels: Sequence[str] | None, pixel_size_um: float | None) -> dict[str, str]:
    form = {
        "layout": layout,
        "channels": None if channels is None else ",".join(channels),
        "pixel_size_um": None if pixel_size_um is None else repr(pixel_size_um),
    }
    return {name: value for name, value in form.items() if value is not None}


def _quoted(batch_id: str) -> str:
    return quote(batch_id, safe="")


def problem_of_answer(answer: httpx.Response) -> ProblemError:
    """Read a refusal, problem+json or not."""
    if answer.headers.get("content-type", "").startswith(MEDIA_TYPE):
        return ProblemError(answer.json())
    return ProblemError({"title": f"HTTP {answer.status_code}", "status": answer.status_code, "detail": answer.text[:200]})
