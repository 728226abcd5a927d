"""Decoding in worker processes: bytes of strangers meet a decoder where it can do no harm.

A worker has a bound on memory and each site one on time; one that is killed or crashes costs the request that sent the
file, and is replaced. Workers give way to the process that answers requests (``nice``), and open no file but those they are
told.
"""

import hashlib
import os
import resource
import signal
import time
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool

from model.errors import AnchorwellError, ImageError, NonFiniteImageError, UndecodableImageError
from model.images import ImageLimits, ImageRecipe, Plane, check_saturation, decode_plane, prepare_site
from model.layout import SiteKey
from service.errors import DecoderKilledError
from service.observe import UNOBSERVED, Observer

_NICE = 5


@dataclass(frozen=True)
class FileSlice:
    """Where a file's bytes lie on this machine."""

    path: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Return the bytes."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True, eq=False)
class DecodedSite:
    """One site as the network takes it, float32 (channels, size, size), with each plane's sha256 and saturated share."""

    planes: Mapping[str, str]
    saturation: Mapping[str, float]
    image: NDArray[np.float32]
    decode_s: float = 0.0
    preprocess_s: float = 0.0


class Decoder(Protocol):
    """Turns a site's files, one per channel, into network input."""

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        """Begin to decode a site; the future raises ImageError with members that name well, site, file and channel."""
        ...


@dataclass(frozen=True)
class SiteDecoder:
    """Decodes sites by one recipe; what a worker process does."""

    recipe: ImageRecipe
    limits: ImageLimits

    def __call__(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> DecodedSite:
        """Decode one site, each plane when the one before is scaled.

        Raises:
            ImageError: one of its subclasses says what is wrong, and with which file.
        """
        planes: dict[str, str] = {}
        saturation: dict[str, float] = {}
        decoding: list[float] = []
        start = time.perf_counter()
        at: dict[str, str | int] = {"well": key.well, "site": key.site}

        def decoded() -> Generator[Plane]:
            for channel in self.recipe.channels:
                file = files[channel]
                at.update({"file": file.name[:200], "channel": channel})
                begun = time.perf_counter()
                data = file.read()
                plane = decode_plane(data, self.limits)
                planes[channel] = hashlib.sha256(data).hexdigest()
                saturation[channel] = check_saturation(plane, self.limits)
                decoding.append(time.perf_counter() - begun)
                yield plane
                del at["file"], at["channel"]

        try:
            with np.errstate(over="ignore", invalid="ignore"), closing(decoded()) as each:
                image = prepare_site(each, self.recipe, pixel_size_um, self.limits)
            if not np.isfinite(image).all():
                raise NonFiniteImageError("the pixels span more than single precision can scale")
        except ImageError as error:
            raise error.about(**at) from None
        decode_s = sum(decoding)
        return DecodedSite(planes, saturation, image, decode_s, time.perf_counter() - start - decode_s)


@dataclass(frozen=True)
class InlineDecoder:
    """A ``Decoder`` in the process that asks, for tests: without bounds on time and memory."""

    decode: SiteDecoder

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        done: Future[DecodedSite] = Future()
        try:
            done.set_result(self.decode(key, files, pixel_size_um))
        except ImageError as error:
            done.set_exception(error)
        return done


class WorkerDecoder:
    """A ``Decoder`` on worker processes."""

    def __init__(
        self,
        decode: SiteDecoder,
        workers: int,
        memory_bytes: int,
        timeout_s: float,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self._decode = decode
        self._observer = observer
        self._timeout_s = timeout_s
        context = get_context("forkserver")
        context.set_forkserver_preload(["service.decoding"])
        self._pool = ProcessPool(workers, initializer=_confine, initargs=(memory_bytes,), context=context)

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        return self._told(key, self._pool.schedule(_run, (self._decode, key, files, pixel_size_um), timeout=self._timeout_s))

    def close(self) -> None:
        """End the workers."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _told(self, key: SiteKey, task: "Future[DecodedSite]") -> "Future[DecodedSite]":
        """Tell a worker's end as what it means for the site."""
        told: Future[DecodedSite] = Future()

        def tell(done: "Future[DecodedSite]") -> None:
            if done.cancelled():
                told.cancel()
                told.set_running_or_notify_cancel()
                return
            error = done.exception()
            if error is None:
                site = done.result()
                self._observer.stage("decode", site.decode_s)
                self._observer.stage("preprocess", site.preprocess_s)
                told.set_result(site)
            else:
                told.set_exception(self._meaning(key, error))

        task.add_done_callback(tell)
        return told

    def _meaning(self, key: SiteKey, error: BaseException) -> BaseException:
        if isinstance(error, FutureTimeoutError):
            return _undecodable(key, f"the site takes longer than {self._timeout_s:g} s to decode")
        if isinstance(error, MemoryError):
            return _undecodable(key, "the site needs more memory to decode than one may take")
        if isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGKILL:
            return DecoderKilledError("the decoder was killed, perhaps for want of memory: send the request again")
        if isinstance(error, ProcessExpired):
            return _undecodable(key, "the decoder crashed on an image of this site")
        return error


def _undecodable(key: SiteKey, detail: str) -> AnchorwellError:
    return UndecodableImageError(detail).about(well=key.well, site=key.site)


def _run(decode: SiteDecoder, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> DecodedSite:
    return decode(key, files, pixel_size_um)


def _confine(memory_bytes: int) -> None:
    """Bound a worker's memory, beyond what it has now, and let others go first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + memory_bytes, has + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decoding_memory_bytes(limits: ImageLimits, recipe: ImageRecipe) -> int:
    """What one worker may take: the largest plane's file and pixels at each step of scaling, and a site's input."""
    return 24 * limits.max_pixels + 8 * len(recipe.channels) * recipe.size**2 + (256 << 20)


def cpu_count(threads: int) -> int:
    """Threads to use: those asked for, or all cores."""
    return threads or os.cpu_count() or 1
