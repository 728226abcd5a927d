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
from ray.exceptions import RayError, RayTaskError

from model.bundle import Bundle
from model.layout import SiteKey
from service.decoding import DecodedSite, Decoder, FileSlice, SiteDecoder
from service.index import ScreenIndex
from service.screen import Outcome, RayCluster
from service.settings import Settings

log = logging.getLogger("anchorwell")

_PATIENCE_S = 20.0
"""Longest time in which the cluster has to have decoded some site, while some are asked for."""
_ALONE_S = 60.0


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
    process decodes by itself for a while. So it does with what the cluster did not come to an end with: what is wrong with
    an image, only a decoder whose bounds are known may say.
    """

    def __init__(self, decode: SiteDecoder, sites_at_once: int, timeout_s: float, own: Decoder) -> None:
        self.sites_at_once = sites_at_once
        self.far = 0
        """Sites that the cluster decoded."""
        self._decode = decode
        self._timeout_s = timeout_s
        self._own = own
        self._alone_until = self._heard = 0.0

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        if time.monotonic() < self._alone_until:
            return self._own.site(key, files, pixel_size_um)
        done: Future[DecodedSite] = Future()
        task = _decoded.remote(self._decode, self._timeout_s, key, files, pixel_size_um)
        try:
            if not self._ended(task):
                return self._own.site(key, files, pixel_size_um)
            done.set_result(ray.get(task))
            self.far += 1
        except RayTaskError as error:
            done.set_exception(error.cause)
        except RayError as error:
            log.warning(
                "the cluster did not decode well %s site %s (%s): done here", key.well, key.site, type(error).__name__
            )
            return self._own.site(key, files, pixel_size_um)
        return done

    def _ended(self, task: Any) -> bool:
        """Wait for a task, as long as the cluster decodes something."""
        begun = time.monotonic()
        while not ray.wait([task], timeout=1.0)[0]:
            if time.monotonic() - max(begun, self._heard) > _PATIENCE_S:
                ray.cancel(task, force=True)
                if time.monotonic() > self._alone_until:
                    log.warning("no core of the cluster decodes: this actor does by itself for %g s", _ALONE_S)
                self._alone_until = time.monotonic() + _ALONE_S
                return False
        self._heard = time.monotonic()
        return True

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        return self._own.pages(file)


class PlateActor:
    """Answers the plates that it is given, one by one; lives in a process of its own."""

    def __init__(self, index: str, settings: dict[str, Any], out: str, decoded_at_once: int) -> None:
        from service.app import screening  # noqa: PLC0415 (the driver needs no engine)

        self._index = ScreenIndex.open(Path(index))
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="anchorwell-screen-")))
        own = Settings(**{**settings, "data": folder / "lab"})
        self._far = _far_decoder(own, decoded_at_once) if decoded_at_once else None
        self._screener = self._open.enter_context(screening(own, out, self._far))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer the plate that a row names."""
        before = self._decoded_far()
        outcome = self._screener.answer(self._index.plate(row["plate"]))
        return {"outcome": json.dumps(asdict(outcome)), "far": self._decoded_far() - before}

    def _decoded_far(self) -> int:
        return 0 if self._far is None else self._far.far


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
    far = 0
    try:
        for row in answers.iter_rows():
            far += row["far"]
            yield Outcome(**json.loads(row["outcome"]))
        if cluster.decoders:
            log.info("%d sites were decoded by other cores of the cluster", far)
    finally:
        ray.shutdown()


def _far_decoder(settings: Settings, at_once: int) -> FarDecoder:
    from service.app import open_decoder  # noqa: PLC0415 (as above)

    bundle = Bundle.load(settings.bundle)
    decode = SiteDecoder(bundle.manifest.recipe, settings.image_limits)
    return FarDecoder(decode, at_once, settings.decode_timeout_s, open_decoder(settings, bundle))
