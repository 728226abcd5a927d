"""A screen on a Ray cluster: actors on its machines that each answer plates. The only module that knows Ray.

Each actor has an engine, and decodes by itself or has others decode: actors on machines without a GPU. A plate whose actor
or machine is lost is answered by another, a site whose decoder is lost is decoded by another; what was written of a plate
stands only when it is whole. Index, bundle and images lie where every machine sees them.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError

from model.errors import AnchorwellError
from model.layout import SiteKey
from service.decoding import DecodedSite, Decoder, FileSlice
from service.errors import ReferenceUnreadableError
from service.index import ScreenIndex
from service.screen import Outcome, RayCluster
from service.settings import Settings


class DecodingActor:
    """Decodes sites for actors that answer plates, in worker processes of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._decoder = _decoder_of(Settings(**settings))

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> DecodedSite:
        """Decode a site.

        Raises:
            ImageError: it cannot be.
        """
        return self._decoder.site(key, files, pixel_size_um).result()


class FarDecoder:
    """A ``Decoder`` on decoding actors, in turn; what none of them is left to do is done in this process."""

    def __init__(self, actors: Sequence[Any], sites_at_once: int, own: Callable[[], Decoder]) -> None:
        self.sites_at_once = sites_at_once
        self._turns = cycle(range(len(actors)))
        self._actors = actors
        self._own = own

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        done: Future[DecodedSite] = Future()
        try:
            done.set_result(self._decoded(key, files, pixel_size_um))
        except (AnchorwellError, ReferenceUnreadableError) as error:
            done.set_exception(error)
        return done

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        return self._own().pages(file)

    def _decoded(self, *site: Any) -> DecodedSite:
        first = next(self._turns)
        for actor in (*self._actors[first:], *self._actors[:first]):
            try:
                found: DecodedSite = ray.get(actor.site.remote(*site))
            except RayActorError:
                continue
            except RayTaskError as error:
                raise error.cause from None
            return found
        return self._own().site(*site).result()


class PlateActor:
    """Answers the plates that it is given, one by one; lives in a process of its own."""

    def __init__(self, index: str, settings: dict[str, Any], out: str, decoders: Sequence[Any], sites_at_once: int) -> None:
        from service.app import screening  # noqa: PLC0415 (the driver needs no engine)

        self._index = ScreenIndex.open(Path(index))
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="anchorwell-screen-")))
        own = Settings(**{**settings, "data": folder / "lab"})
        far = FarDecoder(decoders, sites_at_once, cache(partial(_decoder_of, own))) if decoders else None
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
    decoders = [_decoding_actor(cluster, own) for _ in range(cluster.decoders)]
    given = {
        "index": str(index.path.absolute()),
        "settings": own,
        "out": out,
        "decoders": decoders,
        "sites_at_once": math.ceil(cluster.decoders * cluster.cores / cluster.actors),
    }
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


def _decoding_actor(cluster: RayCluster, settings: dict[str, Any]) -> Any:
    """Begin an actor that decodes, wherever there is room; it is begun anew when it is lost."""
    room = {"num_cpus": cluster.cores, "scheduling_strategy": "SPREAD", "max_restarts": -1}
    return ray.remote(DecodingActor).options(**room, max_concurrency=2 * cluster.cores).remote(settings)


def _decoder_of(settings: Settings) -> Decoder:
    from model.bundle import Bundle  # noqa: PLC0415 (as above)
    from service.app import open_decoder  # noqa: PLC0415 (as above)

    return open_decoder(settings, Bundle.load(settings.bundle))
