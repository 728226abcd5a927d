"""A screen on a Ray cluster: actors on its machines that each answer plates. The only module that knows Ray.

Each actor has an engine, and decodes by itself or has the cluster decode, on machines without a GPU. A plate whose actor
or machine is lost is answered by another, a site whose decoder is lost is decoded by another; what was written of a plate
stands only when it is whole. Index, bundle and images lie where every machine sees them.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.data
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from model.bundle import Bundle
from model.errors import UndecodableImageError
from model.layout import SiteKey
from service.decoding import DecodedSite, Decoder, FileSlice, InlineDecoder, SiteDecoder
from service.index import ScreenIndex
from service.screen import Outcome, RayCluster
from service.settings import Settings

_PATIENCE_S = 20.0
"""Longest time in which a core of the cluster has to have decoded a site."""
_ALONE_S = 300.0


@ray.remote(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")
def _decoded(
    decode: SiteDecoder, timeout_s: float, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None
) -> DecodedSite:
    """Decode a site wherever there is a core to spare; a process that hangs with it ends."""
    watchdog = threading.Timer(timeout_s, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        return decode(key, files, pixel_size_um)
    finally:
        watchdog.cancel()


class FarDecoder:
    """A ``Decoder`` that gives sites to the cluster, one a task; those of a machine that is lost are given again.

    Where the cluster has no core to spare, perhaps since a machine was lost, nothing would ever be decoded: then this
    process decodes by itself for a while.
    """

    def __init__(self, decode: SiteDecoder, sites_at_once: int, timeout_s: float, own: Decoder) -> None:
        self.sites_at_once = sites_at_once
        self._decode = decode
        self._timeout_s = timeout_s
        self._own = own
        self._alone_until = 0.0

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        if time.monotonic() < self._alone_until:
            return self._own.site(key, files, pixel_size_um)
        task = _decoded.remote(self._decode, self._timeout_s, key, files, pixel_size_um)
        ready, _ = ray.wait([task], timeout=_PATIENCE_S)
        if not ready:
            self._alone_until = time.monotonic() + _ALONE_S
            ray.cancel(task, force=True)
            return self._own.site(key, files, pixel_size_um)
        return self._told(key, task)

    def _told(self, key: SiteKey, task: Any) -> "Future[DecodedSite]":
        """Tell a task's end as what it means for the images that it was at."""
        done: Future[DecodedSite] = Future()
        try:
            done.set_result(ray.get(task))
        except RayTaskError as error:
            done.set_exception(error.cause)
        except (WorkerCrashedError, OutOfMemoryError):
            why = f"an image of it crashed the decoder, or takes longer than {self._timeout_s:g} s to decode"
            done.set_exception(UndecodableImageError(why).about(well=key.well, site=key.site))
        return done

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        return InlineDecoder(self._decode).pages(file)


class PlateActor:
    """Answers the plates that it is given, one by one; lives in a process of its own."""

    def __init__(self, index: str, settings: dict[str, Any], out: str, decoded_at_once: int) -> None:
        from service.app import screening  # noqa: PLC0415 (the driver needs no engine)

        self._index = ScreenIndex.open(Path(index))
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="anchorwell-screen-")))
        own = Settings(**{**settings, "data": folder / "lab"})
        far = _far_decoder(own, decoded_at_once) if decoded_at_once else None
        self._screener = self._open.enter_context(screening(own, out, far))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer the plate that a row names."""
        outcome = self._screener.answer(self._index.plate(row["plate"]))
        return {"outcome": json.dumps(asdict(outcome))}


def answered_on(
    cluster: RayCluster, index: ScreenIndex, plates: Sequence[str], settings: Settings, out: str
) -> Iterator[Outcome]:
    """Answer plates on a cluster, as they are done.

    Raises:
        ConnectionError: no cluster answers at the address.
    """
    if not plates:
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data itself does
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"plate": name} for name in plates], override_num_blocks=len(plates))
    own = settings.model_copy(update={"threads": settings.threads or cluster.cores}).model_dump(
        mode="json", exclude={"data"}
    )
    given = {"index": str(index.path.absolute()), "settings": own, "out": out, "decoded_at_once": cluster.decoders}
    answers = rows.map(
        PlateActor,  # type: ignore[arg-type]
        fn_constructor_kwargs=given,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cluster.actors),
        num_cpus=cluster.cores,
        num_gpus=cluster.gpus,
    )
    try:
        for row in answers.iter_rows():
            yield Outcome(**json.loads(row["outcome"]))
    finally:
        ray.shutdown()


def _far_decoder(settings: Settings, at_once: int) -> FarDecoder:
    from service.app import open_decoder  # noqa: PLC0415 (as above)

    bundle = Bundle.load(settings.bundle)
    decode = SiteDecoder(bundle.manifest.recipe, settings.image_limits)
    return FarDecoder(decode, at_once, settings.decode_timeout_s, open_decoder(settings, bundle))
