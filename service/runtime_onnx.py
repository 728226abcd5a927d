"""onnxruntime, on CUDA without TF32 or on the CPU. The only module that knows it."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.bundle import INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, Precision
from model.errors import BundleError
from model.memory import give_back_freed_memory
from model.statistics import BatchNormStatistics
from service.errors import StartError
from service.graphs import Graph, Loaded, as_convolution, identity
from service.runtime import KEPT, Kept

Float = NDArray[np.float32]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_SITES = (1, 2, 4, 8, 16, 32)
"""Sites of a GPU's passes: for each other number cuDNN would look for the fastest convolutions, while a request waits.

To be chosen anew where one is at hand, by ``benchmarks.bench --parts engine``.
"""
FOLDED_KEPT = 4
"""Batches whose convolutions a GPU keeps: as much memory as the weights, each; they are made anew in less than a pass."""
OWN_NETWORKS = 9
"""Batches have networks of their own where so many fit: of fewer, each site's would be made anew when more are worked on."""
_BESIDE_WEIGHTS = 2 << 20
"""What a network takes in memory beside its weights."""
_NO_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")

log = logging.getLogger("anchorwell")


class OnnxRuntime:
    """A ``Runtime`` of a CPU: each core classifies one site, on a network with its batch's statistics in the convolutions.

    Each batch's is made when it is first asked for, and kept while there is memory for it. Where there is none for a few,
    all are classified on one network with statistics as inputs: which of the two depends on the bundle and on the memory
    that is set alone, so that an answer's bits do not depend on what else is asked for.
    """

    provider = CPU
    precision: Precision = "fp32"
    pass_sizes = (1,)

    def __init__(self, threads: int, *, members: int = 1, kept: Kept = KEPT) -> None:
        _prepare()
        self._threads, self._members, self._kept = threads, members, kept

    @property
    def passes_at_once(self) -> int:
        """One on each thread."""
        return self._threads

    def session(self, graph: Graph, *, measures: bool = False) -> "OnnxSession | BatchSessions":
        """Make a session."""
        if measures:
            return OnnxSession(self._made(_with_statistics(graph), self._threads), measures=True)
        folded = graph.folded()
        classify = folded.classify.loaded(*folded.given)
        each = _BESIDE_WEIGHTS + folded.bytes_given + sum(value.nbytes for value in classify.constants.values())
        fit = self._kept.most_bytes // each
        if fit >= OWN_NETWORKS:
            if fit < self._kept.batches_at_once:
                log.warning(
                    "ANCHORWELL_CLASSIFY_BYTES keeps networks of %d batches, and %d may be worked on at once, when they are "
                    "made again and again: set %d", fit, self._kept.batches_at_once, self._kept.batches_at_once * each,
                )  # fmt: skip
            return BatchSessions(self._made(folded.fold.loaded()), classify, self._made, kept=fit)
        log.info(
            "batches share a network that takes their statistics, a little slower than one each: %d of those would take %d "
            "bytes, and ANCHORWELL_CLASSIFY_BYTES is %d", OWN_NETWORKS, OWN_NETWORKS * each, self._kept.most_bytes,
        )  # fmt: skip
        return OnnxSession(self._made(_with_statistics(graph)), measures=False)

    def _made(self, graph: Loaded, threads: int = 1) -> Any:
        return _session(graph, threads, self._members, [CPU])


class GpuRuntime:
    """A ``Runtime`` of a GPU: many sites in one pass, with convolutions that a batch's statistics were folded into once."""

    passes_at_once = 1

    def __init__(
        self,
        precision: Precision,
        threads: int,
        *,
        members: int = 1,
        pass_sizes: Sequence[int] = GPU_SITES,
        kept: int = FOLDED_KEPT,
        device: Literal["cuda", "cpu"] = "cuda",
    ) -> None:
        """Make a runtime; a CPU can stand in for the GPU, slowly, to try it: it computes halves in single precision."""
        _prepare()
        self.precision = precision
        self.pass_sizes = pass_sizes
        self._threads, self._members, self._kept, self._device = threads, members, kept, device
        self._providers = _cuda() if device == "cuda" else [CPU]
        # Told not to use TF32, CUDA's provider keeps halves from the same units; what is left in fp32 has none of it anyway.
        self._halves = _cuda(use_tf32="1") if device == "cuda" else [CPU]

    @property
    def provider(self) -> str:
        """Where graphs run."""
        return CUDA if self._device == "cuda" else CPU

    def session(self, graph: Graph, *, measures: bool = False) -> "OnnxSession | FoldingSession":
        """Make a session."""
        if measures:
            return OnnxSession(_session(graph.loaded(), self._threads, self._members, self._providers), measures=True)
        folded = graph.folded(half=self.precision == "fp16")
        fold = _session(folded.fold.loaded(), self._threads, self._members, self._providers)
        classifying = self._providers if self.precision == "fp32" else self._halves
        classify = _session(folded.classify.loaded(), self._threads, self._members, classifying)
        return FoldingSession(fold, classify, device=self._device, kept=self._kept)


class OnnxSession:
    """A ``Session`` of one graph."""

    def __init__(self, session: Any, *, measures: bool) -> None:
        self._session = session
        devices = "cpu:0" if session.get_providers() == [CPU] else "cpu:0;gpu:0"
        self._options = _gives_back(devices if measures else "")

    def prepare(self, _: BatchNormStatistics) -> None:
        """Nothing: statistics are inputs."""

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph."""
        with _memory_errors():
            found: list[Float] = self._session.run(list(outputs), dict(given), self._options)
        return found


class BatchSessions:
    """A ``Session`` that makes one for each batch's statistics, and keeps those of the batches that were classified last."""

    def __init__(self, fold: Any, classify: Loaded, make: Callable[[Loaded], Any], *, kept: int) -> None:
        kept_whole = {name: value.copy() for name, value in classify.constants.items()}  # not what they were read with
        self._fold, self._classify, self._make = fold, replace(classify, constants=kept_whole), make
        self._latest = _Latest(self._made, kept)
        self._options = _gives_back("cpu:0")

    def prepare(self, statistics: BatchNormStatistics) -> float:
        """Make the network of the batch, where it is not there."""
        with self._latest.given_up_without_memory(), _memory_errors():
            return self._latest.of(statistics.mean, statistics.variance).seconds

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph on the network of the batch, which is there or is made first."""
        with self._latest.given_up_without_memory(), _memory_errors():
            session = self._latest.of(given[INPUT_MEAN], given[INPUT_VARIANCE]).made
            found: list[Float] = session.run(list(outputs), {INPUT_IMAGES: given[INPUT_IMAGES]})
        return found

    def _made(self, mean: Float, variance: Float) -> Any:
        names = [output.name for output in self._fold.get_outputs()]
        statistics = {INPUT_MEAN: mean, INPUT_VARIANCE: variance}
        folded = dict(zip(names, self._fold.run(names, statistics, self._options), strict=True))
        return self._make(replace(self._classify, constants={**self._classify.constants, **folded}))


class FoldingSession:
    """A ``Session`` of a graph that classifies, and of one that makes its convolutions of a batch's statistics.

    Those stay on the device, of the batches that were classified last. Runs one pass at a time.
    """

    def __init__(self, fold: Any, classify: Any, *, device: str, kept: int) -> None:
        self._fold, self._classify, self._device = fold, classify, device
        self._latest = _Latest(self._made, kept)
        self._options = _gives_back("gpu:0" if device == "cuda" else "")  # what batches that are kept no more have left

    def prepare(self, statistics: BatchNormStatistics) -> float:
        """Make the convolutions of the batch, where they are not there."""
        with self._latest.given_up_without_memory(), _memory_errors():
            return self._latest.of(statistics.mean, statistics.variance).seconds

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph, on convolutions that are there or are made first."""
        with self._latest.given_up_without_memory(), _memory_errors():
            binding = self._classify.io_binding()
            binding.bind_cpu_input(INPUT_IMAGES, given[INPUT_IMAGES])
            for name, value in self._latest.of(given[INPUT_MEAN], given[INPUT_VARIANCE]).made.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            self._classify.run_with_iobinding(binding)
            found: list[Float] = binding.copy_outputs_to_cpu()
        return found

    def _made(self, mean: Float, variance: Float) -> dict[str, Any]:
        """Weights and biases of these statistics by name, on the device."""
        binding = self._fold.io_binding()
        binding.bind_cpu_input(INPUT_MEAN, mean)
        binding.bind_cpu_input(INPUT_VARIANCE, variance)
        names = [output.name for output in self._fold.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device)
        self._fold.run_with_iobinding(binding, self._options)
        return dict(zip(names, binding.get_outputs(), strict=True))


class _Found(NamedTuple):
    """What is made of a batch's statistics, and how long it was in the making, 0 where it was there or another made it."""

    made: Any
    seconds: float


class _Latest:
    """What is made of batches' statistics, of those asked for last. Each is made once, by who asks first; others wait."""

    def __init__(self, make: Callable[[Float, Float], Any], most: int) -> None:
        self._make, self._most = make, most
        self._lock = threading.Lock()
        self._kept: dict[tuple[bytes, bytes], Future[Any]] = {}

    def of(self, mean: Float, variance: Float) -> _Found:
        """Find what is made of these, or make it: the room is there before it is needed."""
        statistics = (mean.tobytes(), variance.tobytes())
        with self._lock:
            found = self._kept.pop(statistics, None)
            made: Future[Any] = found or Future()
            while self._kept and len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            if self._most:
                self._kept[statistics] = made
        took = 0.0
        if found is None:
            begun = time.perf_counter()
            try:
                made.set_result(self._make(mean, variance))
            except BaseException as error:  # noqa: BLE001 (whoever waits is told)
                self._forget(statistics)
                made.set_exception(error)
            took = time.perf_counter() - begun
        try:
            return _Found(made.result(), took)
        finally:
            del made  # or an error would hold what it was made with, by way of this frame

    def _forget(self, *all_or_one: tuple[bytes, bytes]) -> None:
        with self._lock:
            for statistics in all_or_one or list(self._kept):
                self._kept.pop(statistics, None)

    @contextmanager
    def given_up_without_memory(self) -> Iterator[None]:
        """Give up what is kept when there is no memory left for a pass."""
        try:
            yield
        except MemoryError:
            self._forget()
            raise


def _gives_back(devices: str) -> Any:
    """Options of runs that give back what buffers they leave unused on these devices."""
    options = onnxruntime.RunOptions()
    if devices:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", devices)
    return options


def _with_statistics(graph: Graph) -> Loaded:
    return graph.with_scale_and_shift(as_convolution).loaded()


def _session(graph: Loaded, threads: int, members: int, providers: list[Any]) -> Any:
    """Make onnxruntime's session of a graph.

    Raises:
        BundleError: the graph cannot be loaded. MemoryError: there is not enough.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoders and the loop want the cores
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights are no buffers
    # Of several members, buffers would be held from one's pass for the next.
    options.enable_mem_reuse = members == 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in graph.constants.values()]
    options.add_external_initializers(list(graph.constants), values)
    try:
        with _memory_errors():
            # Without its fallback: it would make the session anew, of values whose memory is free by then.
            return onnxruntime.InferenceSession(graph.content, options, providers=providers, enable_fallback=0)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, without a common base)
        raise BundleError(f"{graph.name} cannot be loaded: {str(error)[:300]}") from None
    finally:
        give_back_freed_memory()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise ``MemoryError`` where onnxruntime says in words that there is not enough."""
    try:
        yield
    except Exception as error:
        if any(words in str(error).lower() for words in _NO_MEMORY):
            raise MemoryError(str(error)[:200]) from None
        raise


def cuda_works(*, required: bool) -> bool:
    """Tell whether graphs run on CUDA here, by running one.

    Raises:
        StartError: it is required, and they do not.
    """
    if CUDA not in onnxruntime.get_available_providers():
        if required:
            raise StartError(
                "device cuda was asked for, but this onnxruntime has no CUDA: install the extra 'gpu' in an environment of "
                "its own, without the extras 'cpu' and 'openvino'"
            )
        return False
    found = onnxruntime.InferenceSession(identity(), providers=_cuda()).get_providers()[0]
    if required and found != CUDA:
        raise StartError(
            f"device cuda was asked for, but onnxruntime runs graphs on {found}: is there a GPU (nvidia-smi), and are "
            "CUDA's libraries there, which the extra 'gpu' installs? What is missing onnxruntime says above"
        )
    return bool(found == CUDA)


def _cuda(use_tf32: str = "0") -> list[Any]:
    """Name CUDA's provider. No library of NVIDIA's computes fp32 in TF32: onnxruntime does, in places, all the same."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    onnxruntime.preload_dlls()
    return [(CUDA, {"use_tf32": use_tf32, "arena_extend_strategy": "kSameAsRequested"}), CPU]


@cache
def _prepare() -> None:
    """Let onnxruntime tell its makers nothing, and all sessions of this process have their buffers from one place."""
    onnxruntime.disable_telemetry_events()
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    unbounded, as_requested, default = 0, 1, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(unbounded, as_requested, default, default))
