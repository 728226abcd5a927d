"""OpenVINO, on the CPU: faster there than onnxruntime, in fp32 and in bf16. The only module that knows it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from model.bundle import Precision
from model.errors import BundleError
from service.errors import StartError
from service.graphs import Graph, as_products

Float = NDArray[np.float32]
_DEVICE = "CPU"
_HINTS: Mapping[Precision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRuntime:
    """A ``Runtime`` of OpenVINO on one stream."""

    provider = "OpenVINO"

    def __init__(self, precision: Precision, threads: int) -> None:
        self._core = openvino.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
            raise StartError("precision bf16 was asked for, but this processor has no bfloat16 arithmetic: use fp32")
        self._precision = precision
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # decoders run on the same cores
        }

    @property
    def precision(self) -> Precision:
        """Arithmetic of the graphs' layers."""
        return self._precision

    def session(self, graph: Graph, *, measures: bool = False) -> "OpenVinoSession":
        """Make a session."""
        try:
            network = self._core.read_model(graph.with_scale_and_shift(as_products).with_weights())
            # By default it would choose bfloat16 where the processor has it.
            hint = {"INFERENCE_PRECISION_HINT": _HINTS["fp32" if measures else self._precision]}
            return OpenVinoSession(self._core.compile_model(network, _DEVICE, self._options | hint), measures=measures)
        except RuntimeError as error:
            raise BundleError(f"{graph.name} cannot be loaded: {str(error)[:300]}") from None


class OpenVinoSession:
    """A ``Session`` of OpenVINO."""

    def __init__(self, compiled: Any, *, measures: bool) -> None:
        self._compiled = compiled
        self._request = None if measures else compiled.create_infer_request()

    def run(self, outputs: Sequence[str], given: Mapping[str, Float]) -> list[Float]:
        """Run the graph."""
        request = self._request or self._compiled.create_infer_request()  # which holds what it was given last
        try:
            found = request.infer(dict(given), share_inputs=True)
            return [found[name] for name in outputs]
        except RuntimeError as error:
            if "alloc" in str(error).lower():
                raise MemoryError(str(error)[:200]) from None
            raise
        finally:
            if self._request is None:
                del request
                self._compiled.release_memory()
