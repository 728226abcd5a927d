"""What the graphs of a bundle become before a runtime is given them. Knows no runtime, and no images.

A bundle says ``BatchNormalization``, with statistics that are not known until a batch is. Runtimes fold that into the
convolutions where statistics are constants; where they are not, as here, they are slow at it: onnxruntime takes one thread.
"""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from model.bundle import CENTRE, CLASSIFY, INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, INPUTS, OUTPUTS, WEIGHTS
from model.errors import BundleError

Float = NDArray[np.float32]
_EPSILON = 1e-5
"""What ONNX adds to a variance unless a node says otherwise."""
_WEIGHTS = "given_weights"
_IMAGE_DIMENSIONS, _FLOAT_BYTES = 4, 4
_MOST_IN_HALF = 1_000.0
"""Largest feature after the first convolutions, normalised, with which what follows stays within halves (65,504)."""
_SINGLE = ("ReduceMean", "GlobalAveragePool", "Gemm")
"""With what follows the last features, which costs nothing, single precision begins again."""
Affine = Callable[[str, str, str, int], Iterator[Any]]
"""Makes the nodes that scale and shift ``x`` by ``NAME_scales`` (features, 1, 1, 1) and ``NAME_shift`` (features,)."""


class Weights:
    """The file of weights that the graphs of a folder share; while one holds what it read, another is given the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: Callable[[], NDArray[np.uint8] | None] = lambda: None

    def read(self) -> NDArray[np.uint8]:
        """Read the whole file as one piece of memory."""
        with self._lock:
            content = self._held()
            if content is None:
                content = np.fromfile(self.folder / WEIGHTS, np.uint8)
                self._held = weakref.ref(content)
            return content


@dataclass(frozen=True)
class Graph:
    """One of a bundle's graphs as it was read once, without the weights, which the bundle's graphs share."""

    name: str
    weights: Weights
    content: bytes

    @classmethod
    def read(cls, path: Path, weights: Weights | None = None) -> Self:
        """Read a graph, of weights that lie beside it.

        Raises:
            BundleError: the file is none, or of another network.
        """
        graph = cls(path.name, weights or Weights(path.parent), path.read_bytes())
        model = graph._model().graph
        for what, found, expected in (("takes", model.input, INPUTS), ("gives", model.output, OUTPUTS)):
            names, needed = {item.name for item in found}, expected[path.name]
            if names != set(needed):
                raise BundleError(f"{path.name} {what} {', '.join(sorted(names))}; expected {', '.join(needed)}")
        return graph

    def with_centre(self, centre: Float) -> Self:
        """The graph that measures, taking its means about others, (features,)."""
        model = self._model()
        others = [tensor for tensor in model.graph.initializer if tensor.name != CENTRE]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*others, onnx.numpy_helper.from_array(centre, CENTRE)])
        return self._with(model)

    def with_scale_and_shift(self, apply: Affine) -> Self:
        """The graph with batch normalisations as a scale and a shift of each feature, in the form that a runtime is fast at.

        It takes the activation that follows into them, and runs them on every thread.
        """
        model = self._model()
        graph = model.graph
        features = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 1}
        nodes = [
            new
            for number, node in enumerate(graph.node)
            for new in _scale_and_shift(node, f"given_{number}", features, apply)
        ]
        if len(nodes) > len(graph.node):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), _WEIGHTS))
        del graph.node[:]
        graph.node.extend(nodes)
        return self._with(model)

    def folded(self, *, half: bool = False) -> "Folded":
        """The graph that classifies as two: what depends on a batch's statistics alone, and what depends on images.

        In half precision all layers between the first convolutions and the last features compute in it; what folds rounds
        when it is done. A site whose features leave the range of that gets answers that are no numbers.

        Raises:
            BundleError: the graph is not of that kind.
        """
        try:
            return self._folded(half=half)
        except (ValueError, AssertionError, onnx.shape_inference.InferenceError) as error:
            raise BundleError(f"{self.name} cannot be loaded: {str(error)[:200]}") from None

    def _folded(self, *, half: bool) -> "Folded":
        model = self._model()
        floats = _floats(model)
        for node in model.graph.node:
            if node.op_type == "CastLike" and node.input[1] in floats:  # what folds needs no image, to be like it
                node.CopyFrom(_node("Cast", [node.input[0]], node.output[0], to=onnx.TensorProto.FLOAT))
        folding = _Folding(model.graph)
        changed = self._with(model).with_scale_and_shift(folding)._model()  # noqa: SLF001 (our own)
        changed.graph.value_info.extend(folding.given)
        names = [item.name for item in folding.given]
        parts = onnx.utils.Extractor(changed)
        fold = parts.extract_model([INPUT_MEAN, INPUT_VARIANCE], names)
        classify = parts.extract_model([INPUT_IMAGES, *names], list(OUTPUTS[CLASSIFY]))
        if half:
            _give_in_half(fold, _compute_in_half(classify))
        return Folded(self._with(fold), self._with(classify))

    def with_weights_as_inputs(self) -> tuple[bytes, dict[str, Float]]:
        """The graph with its weights as further inputs, and them: for a runtime that cannot be told where they lie."""
        model = self._model()
        weights = self._taken_out(model.graph)
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, weight.shape)
            for name, weight in weights.items()
        )
        return model.SerializeToString(), weights

    def loaded(self, *inputs: str) -> "Loaded":
        """The graph with its weights in memory; some inputs are to be handed over with them, as constants.

        A runtime that is told the file may map it, and compute with whatever is written there later.
        """
        model = self._model()
        graph = model.graph
        weights = self._taken_out(graph)
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        shapes |= {item.name: _extents(item) for item in graph.input if item.name in inputs}
        kept = [item for item in graph.input if item.name not in inputs]
        del graph.input[:]
        graph.input.extend(kept)
        graph.initializer.extend(_elsewhere(name, shape) for name, shape in shapes.items())
        return Loaded(self.name, model.SerializeToString(), weights)

    def _taken_out(self, graph: Any) -> dict[str, Float]:
        """Take those weights out of a graph that lie in their file."""
        outside = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
        inside = [tensor for tensor in graph.initializer if tensor.name not in outside]
        places = {name: self._place(tensor) for name, tensor in outside.items()}
        content = self.weights.read() if places else np.empty(0, np.uint8)
        if content.size < max((end for _, end in places.values()), default=0):
            raise BundleError(f"{WEIGHTS} ends before what {self.name} takes from it")
        weights = {
            name: content[start:end].view(np.float32).reshape(tuple(outside[name].dims))
            for name, (start, end) in places.items()
        }
        del graph.initializer[:]
        graph.initializer.extend(inside)
        return weights

    def _place(self, tensor: Any) -> tuple[int, int]:
        """Where a weight's bytes begin and end in the file."""
        place = onnx.external_data_helper.ExternalDataInfo(tensor)
        if place.location != WEIGHTS or tensor.data_type != onnx.TensorProto.FLOAT:
            raise BundleError(f"{self.name} has {tensor.name} in {place.location}; expected float32 in {WEIGHTS}")
        start = place.offset or 0
        return start, start + _FLOAT_BYTES * math.prod(tensor.dims)

    @property
    def centre(self) -> Float:
        """What the graph that measures takes its means about, (features,).

        Raises:
            BundleError: it is another graph.
        """
        for tensor in self._model().graph.initializer:
            if tensor.name == CENTRE:
                found: Float = onnx.numpy_helper.to_array(tensor, base_dir=str(self.weights.folder))
                return found
        raise BundleError(f"{self.name} has no constant {CENTRE}")

    def bytes_a_site(self) -> int:
        """Bytes that a pass holds at once for each site: the most that is still needed at any node.

        Raises:
            BundleError: the graph cannot be followed.
        """
        try:
            sizes = _bytes_of_one_site(self._model())
        except onnx.shape_inference.InferenceError as error:
            raise BundleError(f"{self.name} cannot be followed: {str(error)[:200]}") from None
        nodes = self._model().graph.node
        last = {name: place for place, node in enumerate(nodes) for name in node.input}
        held, most = sizes.get(INPUT_IMAGES, 0), 0
        for place, node in enumerate(nodes):
            held += sum(sizes.get(name, 0) for name in node.output)
            most = max(most, held)
            held -= sum(sizes.get(name, 0) for name in {*node.input} if last[name] == place)
        return most

    def _with(self, model: Any) -> Self:
        return replace(self, content=model.SerializeToString())

    def _model(self) -> Any:
        try:
            return onnx.ModelProto.FromString(self.content)
        except DecodeError as error:
            raise BundleError(f"{self.name} cannot be loaded: {error}") from None


def _bytes_of_one_site(model: Any) -> dict[str, int]:
    """Size of every image-like value of the graph (sites, …, height, width), for one site."""
    for item in model.graph.input:
        if item.name == INPUT_IMAGES:
            item.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # written for any number of sites
    extents = _followed(model, values=False)
    if not all(_is_known(extents.get(name)) for node in model.graph.node for name in node.output if name):
        extents = _followed(model, values=True)
    return {name: _FLOAT_BYTES * math.prod(each) for name, each in extents.items() if len(each) == _IMAGE_DIMENSIONS}


def _followed(model: Any, *, values: bool) -> dict[str, list[int]]:
    """Shape of whatever has one; to follow values that shapes are computed from, too, can take ten times as long."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=values).graph
    items = (*graph.input, *graph.value_info, *graph.output)
    return {item.name: _extents(item) for item in items if item.type.tensor_type.HasField("shape")}


def _is_known(extents: list[int] | None) -> bool:
    """Whether it is known of something that it is not image-like, or how large it is."""
    return extents is not None and (len(extents) != _IMAGE_DIMENSIONS or all(extents))


def _extents(item: Any) -> list[int]:
    """Shape of an input, output or value; 0 for what is not known."""
    return [dimension.dim_value for dimension in item.type.tensor_type.shape.dim]


def _elsewhere(name: str, shape: list[int]) -> Any:
    """A constant of which the graph says only that it is given."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape, raw_data=b"")
    onnx.external_data_helper.set_external_data(tensor, location="given", offset=0, length=_FLOAT_BYTES * math.prod(shape))
    tensor.ClearField("raw_data")
    return tensor


@dataclass(frozen=True)
class Loaded:
    """A graph that needs no file, and the constants that are handed over with it."""

    name: str
    content: bytes
    constants: Mapping[str, Float]


@dataclass(frozen=True)
class Folded:
    """A graph that makes convolutions of a batch's statistics, and one that takes images and what that gives, by name."""

    fold: Graph
    classify: Graph

    @property
    def given(self) -> dict[str, list[int]]:
        """Shapes of what the one gives to the other."""
        return {item.name: _extents(item) for item in self.fold._model().graph.output}  # noqa: SLF001 (our own)

    @property
    def bytes_given(self) -> int:
        """Size of that, in single precision."""
        return sum(_FLOAT_BYTES * math.prod(shape) for shape in self.given.values())


class _Folding:
    """An ``Affine`` that goes into the convolution before it, where there is one; ``given`` comes from statistics."""

    def __init__(self, graph: Any) -> None:
        self.given: list[Any] = []
        self._shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self._made = {node.output[0]: node for node in graph.node}
        self._uses: Mapping[str, int] = Counter(name for node in graph.node for name in node.input)

    def __call__(self, x: str, name: str, output: str, features: int) -> Iterator[Any]:
        before = self._made.get(x)
        weights, shift = f"{name}_scales", f"{name}_shift"
        if before is None or before.op_type != "Conv" or before.input[1] not in self._shapes or self._uses[x] > 1:
            self._give(weights, [features, 1, 1, 1])
            self._give(shift, [features])
            yield from as_convolution(x, name, output, features)
            return
        yield _node("Mul", [before.input[1], weights], f"{name}_weights")
        if any(before.input[2:]):  # it has a bias
            yield _node("Mul", [before.input[2], f"{name}_scale"], f"{name}_scaled_bias")
            yield _node("Add", [f"{name}_scaled_bias", shift], f"{name}_bias")
            shift = f"{name}_bias"
        self._give(f"{name}_weights", self._shapes[before.input[1]])
        self._give(shift, [features])
        folded = _node("Conv", [before.input[0], f"{name}_weights", shift], output)
        folded.attribute.extend(before.attribute)
        yield folded

    def _give(self, name: str, shape: list[int]) -> None:
        self.given.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _give_in_half(model: Any, names: frozenset[str]) -> None:
    """Let a graph give some outputs in half precision."""
    graph = model.graph
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [f"{name}_exact" if name in names else name for name in values]
    for item in graph.output:
        if item.name in names:
            item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
            graph.node.append(_node("Cast", [f"{item.name}_exact"], item.name, to=onnx.TensorProto.FLOAT16))


def _compute_in_half(model: Any) -> frozenset[str]:
    """Let a graph compute in half precision between the first convolutions and the last features; gives its inputs in that.

    Images may lie anywhere; what the first convolutions give is normalised. Where it is out of all range, what is computed
    from it would be, too, and need not show it.
    """
    graph, floats = model.graph, _floats(model)
    first = [node for node in graph.node if INPUT_IMAGES in node.input]
    if not all(node.op_type == "Conv" for node in first):
        raise ValueError("images go into something else than convolutions: it cannot be run in fp16")
    given = frozenset(item.name for item in graph.input).difference(*(node.input for node in first))
    for item in graph.input:
        if item.name in given:
            item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    outputs = {item.name: len(item.type.tensor_type.shape.dim) for item in graph.output}
    half = set(given)
    nodes = [new for node in graph.node for new in _halved(node, half, floats)]
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [f"{name}_within" if name in outputs else name for name in names]
    nodes += _out_of_range([node.output[0] for node in first])
    for name, dimensions in outputs.items():
        nodes += _spoilt(name, dimensions, half=name in half)
    del graph.value_info[:]
    del graph.node[:]
    graph.node.extend(nodes)
    return given


def _halved(node: Any, half: set[str], floats: set[str]) -> Iterator[Any]:
    """Give a node with the casts that it needs before it; what it gives in half precision is ``half``, too."""
    if node.op_type in _SINGLE:
        yield from _cast(node, half, "single", onnx.TensorProto.FLOAT)
    elif half.intersection(node.input):
        yield from _cast(node, floats - half, "half", onnx.TensorProto.FLOAT16)
        half.update(floats.intersection(node.output))
    yield node


def _cast(node: Any, names: set[str], suffix: str, to: int) -> Iterator[Any]:
    for place, name in enumerate(node.input):
        if name in names:
            node.input[place] = f"{node.output[0]}_{place}_{suffix}"
            yield _node("Cast", [name], node.input[place], to=to)


def _out_of_range(features: list[str]) -> Iterator[Any]:
    """Give ``out_of_range``, (sites, 1, 1, 1): zero, or NaN where features are so large that halves may not hold them."""
    yield _node("Constant", [], "range_axes", value=onnx.numpy_helper.from_array(np.array([1, 2, 3], np.int64)))
    yield _node("Constant", [], "range_limit", value_float=_MOST_IN_HALF)
    yield _node("Constant", [], "range_none", value_float=0.0)
    yield _node("Constant", [], "range_nan", value_float=math.nan)
    for number, name in enumerate(features):
        yield _node("Abs", [name], f"range_sizes_{number}")
        yield _node("ReduceMax", [f"range_sizes_{number}", "range_axes"], f"range_largest_{number}", keepdims=1)
    yield _node("Max", [f"range_largest_{number}" for number in range(len(features))], "range_largest")
    yield _node("LessOrEqual", ["range_largest", "range_limit"], "range_holds")
    yield _node("Where", ["range_holds", "range_none", "range_nan"], "out_of_range")


def _spoilt(output: str, dimensions: int, *, half: bool) -> Iterator[Any]:
    """Add ``out_of_range`` to what becomes an output of so many dimensions, in single precision."""
    within = f"{output}_within"
    if half:
        yield _node("Cast", [within], f"{within}_single", to=onnx.TensorProto.FLOAT)
        within = f"{within}_single"
    shape = onnx.numpy_helper.from_array(np.array([-1, *[1] * (dimensions - 1)], np.int64))
    yield _node("Constant", [], f"{output}_range_shape", value=shape)
    yield _node("Reshape", ["out_of_range", f"{output}_range_shape"], f"{output}_out_of_range")
    yield _node("Add", [within, f"{output}_out_of_range"], output)


def _floats(model: Any) -> set[str]:
    """Names of what is in single precision."""
    graph, single = onnx.shape_inference.infer_shapes(model).graph, onnx.TensorProto.FLOAT
    values = {item.name for item in (*graph.input, *graph.value_info) if item.type.tensor_type.elem_type == single}
    return values | {tensor.name for tensor in graph.initializer if tensor.data_type == single}


def _scale_and_shift(node: Any, name: str, features: dict[str, int], apply: Affine) -> Iterator[Any]:
    if node.op_type != "BatchNormalization" or node.input[1] not in features:
        yield node
        return
    x, weight, bias, mean, variance = node.input
    epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), _EPSILON)
    yield _node("Constant", [], f"{name}_epsilon", value_float=epsilon)
    yield _node("Add", [variance, f"{name}_epsilon"], f"{name}_variance")
    yield _node("Sqrt", [f"{name}_variance"], f"{name}_deviation")
    yield _node("Div", [weight, f"{name}_deviation"], f"{name}_scale")
    yield _node("Mul", [mean, f"{name}_scale"], f"{name}_offset")
    yield _node("Sub", [bias, f"{name}_offset"], f"{name}_shift")
    yield _node("Reshape", [f"{name}_scale", _WEIGHTS], f"{name}_scales")
    yield from apply(x, name, node.output[0], features[weight])


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs, [output], **attributes)


def as_convolution(x: str, name: str, output: str, features: int) -> Iterator[Any]:
    """A 1 x 1 convolution of each feature by itself, with the shift as its bias: one pass in onnxruntime."""
    yield _node("Conv", [x, f"{name}_scales", f"{name}_shift"], output, group=features, kernel_shape=[1, 1])


def as_products(x: str, name: str, output: str, features: int) -> Iterator[Any]:
    """A product and a sum: one pass in OpenVINO, with the sum and the activation that follow, which a bias is not.

    It lays out a pass as most of what goes in is laid out. So scale and shift come from convolutions, too, of a one; else
    every layer's output would be laid out anew, and back.
    """
    one = onnx.numpy_helper.from_array(np.ones((1, features, 1, 1), np.float32))
    yield _node("Constant", [], f"{name}_one", value=one)
    yield _node("Reshape", [f"{name}_shift", _WEIGHTS], f"{name}_shifts")
    for what in ("scale", "shift"):
        given = [f"{name}_one", f"{name}_{what}s"]
        yield _node("Conv", given, f"{name}_{what}_laid_out", group=features, kernel_shape=[1, 1])
    yield _node("Mul", [x, f"{name}_scale_laid_out"], f"{name}_scaled")
    yield _node("Add", [f"{name}_scaled", f"{name}_shift_laid_out"], output)


def identity() -> bytes:
    """A graph that gives back the one number it takes: whether a device runs graphs at all."""
    make = onnx.helper
    number = (onnx.TensorProto.FLOAT, [1])
    graph = make.make_graph(
        [make.make_node("Identity", ["taken"], ["given"])],
        "identity",
        [make.make_tensor_value_info("taken", *number)],
        [make.make_tensor_value_info("given", *number)],
    )
    content: bytes = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10).SerializeToString()
    return content
