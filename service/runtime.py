"""What runs a graph: the port that the engine is written against. onnxruntime and OpenVINO stand behind it."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.bundle import Precision
from model.statistics import BatchNormStatistics
from service.errors import StartError
from service.graphs import Graph

Float = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]


class Kept(NamedTuple):
    """How much a CPU keeps of networks that are made for single batches."""

    most_bytes: int = 1 << 30
    batches_at_once: int = 9
    """Of how many sites are asked for in turn."""


KEPT = Kept()


class Session(Protocol):
    """A graph that is ready to run: one that measures, in one pass at a time, the other in as many as its runtime says."""

    def prepare(self, statistics: BatchNormStatistics) -> float | None:
        """Make what runs with these statistics have of their own: the seconds it took, None where that is nothing.

        They are 0 where it is there, or others made it meanwhile.

        Raises:
            BundleError: it cannot be made. MemoryError: there is not enough.
        """
        ...

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run it.

        Raises:
            MemoryError: there is not enough.
        """
        ...


class Runtime(Protocol):
    """Makes sessions of graphs."""

    @property
    def provider(self) -> str:
        """Where graphs run, e.g. ``CPUExecutionProvider``."""
        ...

    @property
    def precision(self) -> Precision:
        """Arithmetic of the layers that classify."""
        ...

    @property
    def passes_at_once(self) -> int:
        """How many passes of a session that classifies run side by side, for most sites a second."""
        ...

    @property
    def pass_sizes(self) -> Sequence[int]:
        """How many sites go into one of them, ascending: of fewer the next size is filled up, which is run at start."""
        ...

    def session(self, graph: Graph, *, measures: bool = False) -> Session:
        """Make one; one that ``measures`` runs on every thread, in single precision, and gives back its buffers each time.

        Raises:
            BundleError: the graph cannot be loaded.
        """
        ...


def open_runtime(device: Device, precision: Precision, threads: int, *, members: int = 1, kept: Kept = KEPT) -> Runtime:
    """Choose what runs a bundle: CUDA where it is there, else the CPU, by onnxruntime or, in bfloat16, by OpenVINO.

    Raises:
        StartError: what was asked for is not to be had here.
    """
    from service.runtime_onnx import GpuRuntime, OnnxRuntime, cuda_works  # noqa: PLC0415 (one library may not be there)

    if device != "cpu" and cuda_works(required=device == "cuda"):
        if precision == "bf16":
            raise StartError("precision bf16 is offered on the CPU, by OpenVINO; on CUDA it is fp32 or fp16")
        return GpuRuntime(precision, threads, members=members)
    if precision == "fp16":
        raise StartError("precision fp16 is offered on CUDA alone, and there is none here: use fp32, or see docs/deploy.md")
    on_cpu = OnnxRuntime(threads, members=members, kept=kept)
    if precision == "fp32":
        return on_cpu
    try:
        from service.runtime_openvino import OpenVinoRuntime  # noqa: PLC0415 (it is an extra)
    except ImportError:
        raise StartError(f"precision {precision} needs OpenVINO: install the extra 'openvino'") from None
    return OpenVinoRuntime(precision, threads, measuring=on_cpu)
