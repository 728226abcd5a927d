"""What the graphs of a bundle become before onnxruntime is given them. Knows no runtime, and no images.

A bundle says ``BatchNormalization``, with statistics that are not known until a batch is. onnxruntime folds that into the
convolutions where the statistics are constants; where they are not, it normalises on one thread, in a pass of its own.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from model.bundle import INPUT_MEAN, INPUT_VARIANCE
from model.errors import BundleError
from model.statistics import BatchNormStatistics

_EPSILON = 1e-5
"""What ONNX adds to a variance unless a node says otherwise."""


def with_constants(path: Path, statistics: BatchNormStatistics) -> bytes:
    """The graph that classifies, with statistics as constants in place of its inputs for them.

    Raises:
        BundleError: the file is no graph.
    """
    model = _model(path)
    given = {INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
    inputs = [item for item in model.graph.input if item.name not in given]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in given.items())
    return _serialised(model)


def with_scale_and_shift(path: Path) -> bytes:
    """A graph whose batch normalisations are 1 x 1 convolutions of each feature by itself: a scale and a shift.

    onnxruntime takes the activation that follows into them, and runs them on every thread.

    Raises:
        BundleError: the file is no graph.
    """
    model = _model(path)
    graph = model.graph
    features = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 1}
    nodes = [new for number, node in enumerate(graph.node) for new in _scale_and_shift(node, f"given_{number}", features)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "given_shape"))
    return _serialised(model)


def _scale_and_shift(node: Any, name: str, features: dict[str, int]) -> Iterator[Any]:
    if node.op_type != "BatchNormalization" or node.input[1] not in features:
        yield node
        return
    x, weight, bias, mean, variance = node.input
    epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), _EPSILON)
    make = onnx.helper.make_node
    yield make("Constant", [], [f"{name}_epsilon"], value_float=epsilon)
    yield make("Add", [variance, f"{name}_epsilon"], [f"{name}_variance"])
    yield make("Sqrt", [f"{name}_variance"], [f"{name}_deviation"])
    yield make("Div", [weight, f"{name}_deviation"], [f"{name}_scale"])
    yield make("Mul", [mean, f"{name}_scale"], [f"{name}_offset"])
    yield make("Sub", [bias, f"{name}_offset"], [f"{name}_shift"])
    yield make("Reshape", [f"{name}_scale", "given_shape"], [f"{name}_weights"])
    given = [x, f"{name}_weights", f"{name}_shift"]
    yield make("Conv", given, list(node.output), group=features[weight], kernel_shape=[1, 1])


def _model(path: Path) -> Any:
    try:
        return onnx.ModelProto.FromString(_content(path))
    except DecodeError as error:
        raise BundleError(f"{path.name} cannot be loaded: {error}") from None


@cache
def _content(path: Path) -> bytes:
    """A graph's file, without its weights; the same for every batch."""
    return path.read_bytes()


def _serialised(model: Any) -> bytes:
    content: bytes = model.SerializeToString()
    return content
