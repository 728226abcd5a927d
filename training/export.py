"""A trained network, or several as one ensemble → a bundle, refused unless ONNX agrees with torch.

One pair of graphs holds every member. Both share ``weights.bin``: an initialiser with the same bytes is stored once.
Statistics are compared with a float64 torch pass, logits with a float32 one.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from model.bundle import (
    CENTRE,
    CLASSIFY,
    GOLDEN_WELLS,
    INPUTS,
    MEASURE,
    OUTPUTS,
    WEIGHTS,
    Bundle,
    Golden,
    Manifest,
    Measured,
    Parity,
    Tolerance,
    finish_bundle,
)
from model.errors import RunError
from model.network import EPS, BatchNorm, Ensemble, FromContext, Given, Network, PriorTensors
from model.predictions import EmbeddingReference
from model.statistics import Prior, TrainingStatistics, blended
from training.methods import prior_tensors

_OPSET = 20
_INLINE_BYTES = 1024


class Classify(nn.Module):
    """images (sites, channels, height, width), bn_mean, bn_var (features,) → logits, embedding."""

    def __init__(self, network: Ensemble) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, bn_mean: Tensor, bn_var: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images with the statistics given."""
        logits, embedding = self.network(images, Given(bn_mean, bn_var))
        return logits, embedding


class FromSums:
    """What ``FromContext`` measures of all rows, from each row's mean and mean square: each layer's input is read twice.

    They are taken about a ``centre`` (features,) near the means that will be found, so that nothing cancels; it goes into
    the convolution before. ``FromContext`` is the definition, and has gradients.
    """

    def __init__(self, prior: PriorTensors, centre: Tensor) -> None:
        self.prior = prior
        self.centre = centre
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def __call__(self, x: Tensor, layer: BatchNorm) -> Tensor:
        at, prior = layer.place, self.prior
        x = x + -self.centre[at][:, None, None]
        mean = x.mean(dim=(2, 3)).mean(dim=0)
        square = (torch.linalg.vector_norm(x, dim=(2, 3)).square() / (x.shape[2] * x.shape[3])).mean(dim=0)
        variance = (square - mean.square()).clamp(min=0)
        mean, variance = blended(mean + self.centre[at], variance, prior.mean[at], prior.variance[at], prior.weight[at])
        self.means.append(mean)
        self.variances.append(variance)
        return F.batch_norm(x, mean - self.centre[at], variance, layer.weight, layer.bias, training=False, eps=EPS)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all layers, (features,) each."""
        return torch.cat(self.means), torch.cat(self.variances)


class Measure(nn.Module):
    """images (sites, channels, height, width), prior_mean, prior_var, prior_weight → bn_mean, bn_var (features,), embedding.

    One pass over all images, whose embeddings it gives, (sites, dim): they are normalised by what it measures. A prior of no
    weight leaves what is measured as it is. ``centre`` (features,) is about what will be measured.
    """

    def __init__(self, network: Ensemble) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: Tensor, prior_mean: Tensor, prior_var: Tensor, prior_weight: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Measure the statistics of the whole input, blended with the prior."""
        norm = FromSums(PriorTensors(prior_mean, prior_var, prior_weight), centre)
        _, embedding = self.network(images, norm)
        return *norm.statistics(), embedding


def export_bundle(
    network: Ensemble,
    path: Path,
    manifest: Manifest,
    training_statistics: TrainingStatistics,
    embedding_reference: EmbeddingReference,
    golden_images: NDArray[np.float32],
) -> tuple[Bundle, Parity]:
    """Write a bundle directory and check it against torch.

    Args:
        network: the trained members; their running statistics are not used.
        path: a directory that is not there or empty; it is written beside its place and moved there when it is whole.
        manifest: complete but for ``files``.
        training_statistics: what the training plates look like.
        embedding_reference: how embeddings vary.
        golden_images: prepared control sites (sites, channels, size, size) that the service replays.

    Raises:
        BundleError: ONNX and torch disagree by more than the tolerances.
        RunError: another process writes it.
    """
    network = network.eval().cpu()
    with _folder_beside(path) as folder:
        write_graphs(network, folder, golden_images[:2], training_statistics)
        prior = training_statistics.prior(GOLDEN_WELLS)
        golden = make_golden(network, golden_images, prior)
        parity = check_parity(folder, golden, prior)
        bundle = finish_bundle(folder, manifest, training_statistics, embedding_reference, golden)
        folder.rename(path.resolve())
    return replace(bundle, path=path), parity


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Make an empty folder beside a place, held against other processes; what is left of it in the end, or was, goes.

    Raises:
        RunError: another process holds it.
    """
    folder = path.resolve().with_name(f".{path.resolve().name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"{path} is being written by another process: wait for it, or name another directory") from None
    try:
        for left in folder.iterdir():
            left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def write_graphs(network: Ensemble, path: Path, example: NDArray[np.float32], training: TrainingStatistics) -> None:
    """Export both graphs with a dynamic number of sites and one shared weights file; means are taken about training's."""
    images = torch.from_numpy(example)
    sites = torch.export.Dim("sites", min=1)
    statistics = torch.zeros(network.features), torch.ones(network.features)
    classify = _to_onnx(
        Classify(network),
        (images, *statistics),
        inputs=INPUTS[CLASSIFY],
        outputs=OUTPUTS[CLASSIFY],
        dynamic=({0: sites}, None, None),
    )
    measure = _to_onnx(
        Measure(network),
        (images, *statistics, torch.zeros(network.features), torch.zeros(network.features)),
        inputs=(*INPUTS[MEASURE], CENTRE),
        outputs=OUTPUTS[MEASURE],
        dynamic=({0: sites}, None, None, None, None),
    )
    _make_constant(measure, CENTRE, training.source.mean)
    share_weights({CLASSIFY: classify, MEASURE: measure}, path)


def _to_onnx(
    module: nn.Module, arguments: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str], dynamic: Any
) -> onnx.ModelProto:
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns of its own internals
            program = torch.onnx.export(
                module.eval(), arguments, dynamo=True, opset_version=_OPSET, verbose=False,
                input_names=list(inputs), output_names=list(outputs), dynamic_shapes=dynamic,
            )  # fmt: skip
    finally:
        exporter.setLevel(level)
    assert program is not None
    return program.model_proto


def _make_constant(model: onnx.ModelProto, name: str, value: NDArray[np.float32]) -> None:
    """Turn an input into a constant, which the exporter would have computed with and left out."""
    inputs = [item for item in model.graph.input if item.name != name]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))


def share_weights(models: dict[str, onnx.ModelProto], path: Path) -> None:
    """Write graphs whose larger initialisers lie in one external file, equal bytes once."""
    offsets: dict[str, int] = {}
    with (path / WEIGHTS).open("wb") as weights:
        for proto in models.values():
            for tensor in proto.graph.initializer:
                _move_out(tensor, weights, offsets)
    for name, proto in models.items():
        for node in proto.graph.node:
            del node.metadata_props[:]  # the exporter's stack traces name this machine's folders
        (path / name).write_bytes(proto.SerializeToString(deterministic=True))


def _move_out(tensor: onnx.TensorProto, weights: Any, offsets: dict[str, int]) -> None:
    data = onnx.numpy_helper.to_array(tensor).tobytes()
    if len(data) < _INLINE_BYTES:
        return
    digest = hashlib.sha256(data).hexdigest()
    if digest not in offsets:
        offsets[digest] = weights.tell()
        weights.write(data)
    for field in ("raw_data", "float_data", "int64_data", "int32_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(offsets[digest])), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)


def make_golden(network: Ensemble, images: NDArray[np.float32], prior: Prior) -> Golden:
    """Statistics of the images as one context, plain and blended (float64), and their outputs under the plain (float32)."""
    mean, variance = measure_float64(network, images)
    blended_mean, blended_variance = measure_float64(network, images, prior)
    with torch.no_grad():
        statistics = torch.from_numpy(mean).float(), torch.from_numpy(variance).float()
        logits, embedding = network(torch.from_numpy(images), Given(*statistics))
    return Golden(
        images=images,
        bn_mean=mean.astype(np.float32),
        bn_var=variance.astype(np.float32),
        blended_mean=blended_mean.astype(np.float32),
        blended_var=blended_variance.astype(np.float32),
        logits=logits.numpy(),
        embedding=embedding.numpy(),
    )


def measure_float64(
    network: Network, images: NDArray[np.float32], prior: Prior | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and biased variance, (features,) each, from one float64 pass over the whole context; blended with a prior."""
    twin = deepcopy(network).double()
    norm = FromContext(prior=None if prior is None else prior_tensors(twin, prior))
    with torch.no_grad():
        twin(torch.from_numpy(images).double(), norm)
    mean, variance = norm.statistics()
    return mean.numpy(), variance.numpy()


def check_parity(path: Path, golden: Golden, prior: Prior) -> Parity:
    """Run both graphs on the golden images, plain and blended with the prior that the golden ones were.

    Raises:
        BundleError: they differ from torch by more than the tolerances.
    """
    measure = onnxruntime.InferenceSession(path / MEASURE, providers=["CPUExecutionProvider"])
    classify = onnxruntime.InferenceSession(path / CLASSIFY, providers=["CPUExecutionProvider"])

    def measured(prior: Prior) -> Measured:
        given = (golden.images, prior.mean, prior.variance, prior.weight)
        return Measured(*measure.run(OUTPUTS[MEASURE], dict(zip(INPUTS[MEASURE], given, strict=True))))

    statistics = (golden.images, golden.bn_mean, golden.bn_var)
    outputs = classify.run(OUTPUTS[CLASSIFY], dict(zip(INPUTS[CLASSIFY], statistics, strict=True)))
    parity = Parity.of(golden, measured(Prior.none(golden.bn_mean.size)), measured(prior), *outputs)
    parity.require("ONNX", Tolerance.of(golden, "fp32"))
    return parity
