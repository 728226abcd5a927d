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
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from pebble import ProcessExpired, ProcessPool

from model.errors import ImageError, NonFiniteImageError, UndecodableImageError
from model.images import ImageLimits, ImageRecipe, Plane, PreparedImage, check_saturation, decode_plane, prepare_site
from model.layout import SiteKey
from model.memory import keep_freed_memory
from model.ome import channel_pages
from service.errors import DecoderKilledError, ReferenceUnreadableError
from service.observe import UNOBSERVED, Observer
from service.priority import give_way

R = TypeVar("R")


@dataclass(frozen=True)
class FileSlice:
    """Where a file's bytes lie on this machine; ``page`` of a file of several channels."""

    path: Path
    offset: int
    size: int
    name: str
    page: int | None = None

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            FileNotFoundError: it is gone. ReferenceUnreadableError: a disk, or one that is not this machine's, does not give
                them.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), self.size, self.offset)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ReferenceUnreadableError(f"{self.name[:200]!r} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, eq=False)
class DecodedSite:
    """One prepared site, with each plane's sha256 and saturated share."""

    planes: Mapping[str, str]
    saturation: Mapping[str, float]
    image: PreparedImage
    decode_s: float = 0.0
    preprocess_s: float = 0.0


class Decoder(Protocol):
    """Turns a site's files, one per channel, into a prepared site."""

    @property
    def sites_at_once(self) -> int:
        """How many sites it works on side by side."""
        ...

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        """Begin to decode a site; the future raises ImageError with members that name well, site, file and channel."""
        ...

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        """Begin to read which page of an OME-TIFF is which channel; the future raises ImageError."""
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
                plane = decode_plane(data, self.limits, file.page)
                planes[channel] = content_of(hashlib.sha256(data).hexdigest(), file.page)
                saturation[channel] = check_saturation(plane, self.limits)
                decoding.append(time.perf_counter() - begun)
                yield plane
                del at["file"], at["channel"]

        try:
            with np.errstate(over="ignore", invalid="ignore"), closing(decoded()) as each:
                image = prepare_site(each, self.recipe, pixel_size_um, self.limits)
            if not np.isfinite(image.pixels).all():
                raise NonFiniteImageError("the pixels span more than single precision can scale")
        except (ImageError, ReferenceUnreadableError) as error:
            raise error.about(**at) from None
        decode_s = sum(decoding)
        return DecodedSite(planes, saturation, image, decode_s, time.perf_counter() - start - decode_s)


def content_of(sha256: str, page: int | None) -> str:
    """Name a plane: by its file's sha256, and its page of a file of several channels."""
    return sha256 if page is None else f"{sha256}#{page}"


@dataclass(frozen=True)
class InlineDecoder:
    """A ``Decoder`` in the process that asks, for tests: without bounds on time and memory."""

    decode: SiteDecoder
    sites_at_once: int = 2

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        done: Future[DecodedSite] = Future()
        try:
            done.set_result(self.decode(key, files, pixel_size_um))
        except (ImageError, ReferenceUnreadableError) as error:
            done.set_exception(error)
        return done

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        done: Future[Mapping[str, int]] = Future()
        try:
            done.set_result(_pages(file))
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
        self.sites_at_once = workers
        self._decode = decode
        self._observer = observer
        self._timeout_s = timeout_s
        context = get_context("forkserver")
        context.set_forkserver_preload(["service.decoding"])
        self._pool = ProcessPool(workers, initializer=_confine, initargs=(memory_bytes,), context=context)

    def site(self, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> "Future[DecodedSite]":
        arguments = (self._decode, key, files, pixel_size_um)
        task: Future[DecodedSite] = self._pool.schedule(_run, arguments, timeout=self._timeout_s)
        asking = copy_context()  # its end is told on a thread of the pool's, which knows of no request
        return self._told({"well": key.well, "site": key.site}, task, lambda site: asking.run(self._count, site))

    def pages(self, file: FileSlice) -> "Future[Mapping[str, int]]":
        task: Future[Mapping[str, int]] = self._pool.schedule(_pages, (file,), timeout=self._timeout_s)
        return self._told({"file": file.name[:200]}, task, lambda _: None)

    def _count(self, site: DecodedSite) -> None:
        self._observer.stage("decode", site.decode_s)
        self._observer.stage("preprocess", site.preprocess_s)

    def begin(self) -> None:
        """Start the workers, or the first image waits for them; one that does not start is the first image's to tell."""
        self._pool.schedule(int)

    def close(self) -> None:
        """End the workers."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _told(self, at: Mapping[str, str | int], task: "Future[R]", count: Callable[[R], None]) -> "Future[R]":
        """Tell a worker's end as what it means for the images that it was at."""
        told: Future[R] = Future()

        def tell(done: "Future[R]") -> None:
            if done.cancelled():
                told.cancel()
                told.set_running_or_notify_cancel()
                return
            error = done.exception()
            if error is None:
                count(done.result())
                told.set_result(done.result())
            else:
                told.set_exception(self._meaning(at, error))

        task.add_done_callback(tell)
        return told

    def _meaning(self, at: Mapping[str, str | int], error: BaseException) -> BaseException:
        if isinstance(error, FutureTimeoutError):
            return UndecodableImageError(f"it takes longer than {self._timeout_s:g} s to decode").about(**at)
        if isinstance(error, MemoryError):
            return UndecodableImageError("it needs more memory to decode than one may take").about(**at)
        if isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGKILL:
            return DecoderKilledError("the decoder was killed, perhaps for want of memory: send the request again")
        if isinstance(error, ProcessExpired):
            return UndecodableImageError("an image of it crashed the decoder").about(**at)
        return error


def _run(decode: SiteDecoder, key: SiteKey, files: Mapping[str, FileSlice], pixel_size_um: float | None) -> DecodedSite:
    return decode(key, files, pixel_size_um)


def _pages(file: FileSlice) -> Mapping[str, int]:
    try:
        return channel_pages(file.read())
    except ImageError as error:
        raise error.about(file=file.name[:200]) from None


def _confine(memory_bytes: int) -> None:
    """Bound a worker's memory, beyond what it has now, and let others go first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    give_way()
    keep_freed_memory()
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + memory_bytes, has + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decoding_memory_bytes(limits: ImageLimits, recipe: ImageRecipe) -> int:
    """What one worker may take: the largest plane's file and pixels at each step of scaling, and a site's input."""
    return 24 * limits.max_pixels + 8 * len(recipe.channels) * recipe.size**2 + (512 << 20)
