"""onnxruntime, on CUDA without TF32 or on the CPU. The only module that knows it."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.bundle import Precision
from model.errors import BundleError
from service.errors import StartError
from service.graphs import Graph, as_convolution, identity

Float = NDArray[np.float32]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_SITES = (1, 2, 4, 8, 16, 32)
"""Sites of a GPU's passes: for each other number cuDNN would look for the fastest convolutions, while a request waits.

To be chosen anew where one is at hand, by ``benchmarks.bench --parts engine``.
"""
_NO_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class OnnxRuntime:
    """A ``Runtime`` of onnxruntime: a GPU classifies many sites in one pass, each core of a CPU one."""

    precision: Precision = "fp32"

    def __init__(
        self,
        device: Literal["cpu", "cuda"],
        threads: int,
        *,
        members: int = 1,
        gpu_sites: Sequence[int] = GPU_SITES,
    ) -> None:
        onnxruntime.disable_telemetry_events()
        _share_buffers()
        self._providers: list[Any] = [CPU] if device == "cpu" else _cuda()
        self._threads = threads
        self._members = members
        self._gpu_sites = gpu_sites

    @property
    def provider(self) -> str:
        """Where graphs run."""
        return CPU if self._providers == [CPU] else CUDA

    @property
    def passes_at_once(self) -> int:
        """One on each thread, or on the GPU."""
        return self._threads if self.provider == CPU else 1

    @property
    def pass_sizes(self) -> Sequence[int]:
        """One, or a GPU's minibatches."""
        return (1,) if self.provider == CPU else self._gpu_sites

    def session(self, graph: Graph, *, measures: bool = False) -> "OnnxSession":
        """Make a session."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads if measures else 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoders and the loop want the cores
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights are no buffers
        # Of several members, buffers would be held from one's pass for the next.
        options.enable_mem_reuse = self._members == 1
        used = graph.with_scale_and_shift(as_convolution) if self.provider == CPU else graph
        try:
            return OnnxSession(
                onnxruntime.InferenceSession(used.content, options, providers=self._providers), measures=measures
            )
        except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, without a common base)
            raise BundleError(f"{graph.name} cannot be loaded: {str(error)[:300]}") from None


class OnnxSession:
    """A ``Session`` of onnxruntime."""

    def __init__(self, session: Any, *, measures: bool) -> None:
        self._session = session
        self._options = onnxruntime.RunOptions()
        if measures:
            device = "cpu:0" if session.get_providers() == [CPU] else "cpu:0;gpu:0"
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", device)

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph."""
        try:
            found: list[Float] = self._session.run(list(outputs), dict(given), self._options)
        except Exception as error:
            if any(words in str(error).lower() for words in _NO_MEMORY):
                raise MemoryError(str(error)[:200]) from None
            raise
        return found


def cuda_works(*, required: bool) -> bool:
    """Tell whether graphs run on CUDA here, by running one.

    Raises:
        StartError: it is required, and they do not.
    """
    if CUDA not in onnxruntime.get_available_providers():
        if required:
            raise StartError("device cuda was asked for, but this onnxruntime has no CUDA: install the extra 'gpu'")
        return False
    found = onnxruntime.InferenceSession(identity(), providers=_cuda()).get_providers()[0]
    if required and found != CUDA:
        raise StartError(f"device cuda was asked for, but onnxruntime runs graphs on {found}")
    return bool(found == CUDA)


def _cuda() -> list[Any]:
    onnxruntime.preload_dlls()
    return [(CUDA, {"use_tf32": "0"}), CPU]


@cache
def _share_buffers() -> None:
    """Let all sessions of this process have their buffers from one place."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    unbounded, as_requested, default = 0, 1, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(unbounded, as_requested, default, default))
