"""OpenVINO, for bf16 on the CPU, which onnxruntime has not; fp32, to try it without. The only module that knows it.

Statistics are measured by onnxruntime, in fp32.
"""

from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from model.bundle import Precision
from model.errors import BundleError
from model.statistics import BatchNormStatistics
from service.errors import StartError
from service.graphs import Graph, as_products
from service.runtime import Runtime, Session

Float = NDArray[np.float32]
_DEVICE = "CPU"
_HINTS: Mapping[Precision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRuntime:
    """A ``Runtime`` whose threads classify with OpenVINO, each by itself, and measure with another runtime."""

    provider = "OpenVINO"
    pass_sizes = (1,)

    def __init__(self, precision: Precision, threads: int, measuring: Runtime) -> None:
        self._core = openvino.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
            raise StartError("precision bf16 was asked for, but this processor has no bfloat16 arithmetic: use fp32")
        self._precision = precision
        self._threads = threads
        self._measuring = measuring

    @property
    def precision(self) -> Precision:
        """Arithmetic of the layers that classify."""
        return self._precision

    @property
    def passes_at_once(self) -> int:
        """One on each thread."""
        return self._threads

    def session(self, graph: Graph, *, measures: bool = False) -> Session:
        """Make a session."""
        if measures:
            return self._measuring.session(graph, measures=True)
        try:
            network = self._network(graph.with_scale_and_shift(as_products))
            return OpenVinoSession(self._core.compile_model(network, _DEVICE, self._options()), self._threads)
        except RuntimeError as error:
            raise BundleError(f"{graph.name} cannot be loaded: {str(error)[:300]}") from None

    def _network(self, graph: Graph) -> Any:
        """Read a graph, with its weights as constants."""
        content, weights = graph.with_weights_as_inputs()
        network = self._core.read_model(content)
        for parameter in network.get_parameters():
            if parameter.friendly_name in weights:
                constant = openvino.op.Constant(weights[parameter.friendly_name], shared_memory=False)
                parameter.output(0).replace(constant.output(0))
                network.remove_parameter(parameter)
        network.validate_nodes_and_infer_types()
        return network

    def _options(self) -> dict[str, Any]:
        return {
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": self._threads,
            "ENABLE_CPU_PINNING": False,  # decoders run on the same cores
            # By default it would choose bfloat16 where the processor has it.
            "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
        }


class OpenVinoSession:
    """A ``Session`` of OpenVINO that runs several passes at once."""

    def __init__(self, compiled: Any, at_once: int) -> None:
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(at_once):
            self._idle.put(compiled.create_infer_request())

    def prepare(self, _: BatchNormStatistics) -> None:
        """Nothing: statistics are inputs."""

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph."""
        request = self._idle.get()
        try:
            return _run(request, outputs, given)
        finally:
            self._idle.put(request)


def _run(request: Any, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
    try:
        found = request.infer(dict(given), share_inputs=True)
        return [found[name] for name in outputs]
    except RuntimeError as error:
        if "alloc" in str(error).lower():
            raise MemoryError(str(error)[:200]) from None
        raise
