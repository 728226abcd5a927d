"""onnxruntime, on CUDA without TF32 or on the CPU. The only module that knows it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.bundle import INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, Precision
from model.errors import BundleError
from service.errors import StartError
from service.graphs import Graph, as_convolution, identity

Float = NDArray[np.float32]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_SITES = (1, 2, 4, 8, 16, 32)
"""Sites of a GPU's passes: for each other number cuDNN would look for the fastest convolutions, while a request waits.

To be chosen anew where one is at hand, by ``benchmarks.bench --parts engine``.
"""
FOLDED_KEPT = 4
"""Batches whose convolutions a GPU keeps: as much memory as the weights, each; they are made anew in less than a pass."""
_NO_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class OnnxRuntime:
    """A ``Runtime`` of a CPU: each core classifies one site, with a batch's statistics as inputs."""

    provider = CPU
    precision: Precision = "fp32"
    pass_sizes = (1,)

    def __init__(self, threads: int, *, members: int = 1) -> None:
        _prepare()
        self._threads = threads
        self._members = members

    @property
    def passes_at_once(self) -> int:
        """One on each thread."""
        return self._threads

    def session(self, graph: Graph, *, measures: bool = False) -> "OnnxSession":
        """Make a session."""
        threads, used = self._threads if measures else 1, graph.with_scale_and_shift(as_convolution)
        return OnnxSession(_session(used, threads, self._members, [CPU]), measures=measures)


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
            return OnnxSession(_session(graph, self._threads, self._members, self._providers), measures=True)
        folded = graph.folded(half=self.precision == "fp16")
        fold = _session(folded.fold, self._threads, self._members, self._providers)
        classifying = self._providers if self.precision == "fp32" else self._halves
        classify = _session(folded.classify, self._threads, self._members, classifying)
        return FoldingSession(fold, classify, device=self._device, kept=self._kept)


class OnnxSession:
    """A ``Session`` of one graph."""

    def __init__(self, session: Any, *, measures: bool) -> None:
        self._session = session
        self._options = onnxruntime.RunOptions()
        if measures:
            device = "cpu:0" if session.get_providers() == [CPU] else "cpu:0;gpu:0"
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", device)

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph."""
        with _memory_errors():
            found: list[Float] = self._session.run(list(outputs), dict(given), self._options)
        return found


class FoldingSession:
    """A ``Session`` of a graph that classifies, and of one that makes its convolutions of a batch's statistics.

    Those stay on the device, of the batches that were classified last. Runs one pass at a time.
    """

    def __init__(self, fold: Any, classify: Any, *, device: str, kept: int) -> None:
        self._fold, self._classify = fold, classify
        self._device, self._most = device, kept
        self._kept: list[tuple[Float, Float, dict[str, Any]]] = []
        self._options = onnxruntime.RunOptions()
        if device == "cuda":  # what batches that are kept no more have left
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph, on convolutions that are there or are made first."""
        try:
            with _memory_errors():
                return self._run(outputs, given)
        except MemoryError:
            self._kept.clear()
            raise

    def _run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        binding = self._classify.io_binding()
        binding.bind_cpu_input(INPUT_IMAGES, given[INPUT_IMAGES])
        for name, value in self._folded(given[INPUT_MEAN], given[INPUT_VARIANCE]).items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        self._classify.run_with_iobinding(binding)
        found: list[Float] = binding.copy_outputs_to_cpu()
        return found

    def _folded(self, mean: Float, variance: Float) -> dict[str, Any]:
        """Weights and biases of these statistics by name, on the device."""
        found = next((one for one in self._kept if np.array_equal(one[0], mean) and np.array_equal(one[1], variance)), None)
        if found is None:
            del self._kept[max(0, self._most - 1) :]  # the room is there before it is needed
            found = (mean.copy(), variance.copy(), self._made(mean, variance))
        self._kept = [found, *(one for one in self._kept if one is not found)][: self._most]
        return found[2]

    def _made(self, mean: Float, variance: Float) -> dict[str, Any]:
        binding = self._fold.io_binding()
        binding.bind_cpu_input(INPUT_MEAN, mean)
        binding.bind_cpu_input(INPUT_VARIANCE, variance)
        names = [output.name for output in self._fold.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device)
        self._fold.run_with_iobinding(binding, self._options)
        return dict(zip(names, binding.get_outputs(), strict=True))


def _session(graph: Graph, threads: int, members: int, providers: list[Any]) -> Any:
    """Make onnxruntime's session of a graph.

    Raises:
        BundleError: the graph cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoders and the loop want the cores
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights are no buffers
    # Of several members, buffers would be held from one's pass for the next.
    options.enable_mem_reuse = members == 1
    try:
        return onnxruntime.InferenceSession(graph.content, options, providers=providers)
    except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, without a common base)
        raise BundleError(f"{graph.name} cannot be loaded: {str(error)[:300]}") from None


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
