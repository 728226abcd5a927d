"""The network that speed is measured on: the published ResNet-50 on 5 x 256 x 256, weights at random, as a bundle.

And the same network as others run it: its batch normalisation folded into the convolutions by onnxruntime, and that in int8.
"""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime import quantization

from model.bundle import CLASSIFY, INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE, Bundle, Manifest
from model.images import ImageRecipe
from model.network import Ensemble, NetworkSpec, ResNet
from model.predictions import EmbeddingReference
from model.statistics import BatchNormStatistics, summarise_training
from training.export import export_bundle, measure_float64

CHANNELS = ("RNA", "ER", "AGP", "Mito", "DNA")
MEAN = (0.0913, 0.0880, 0.1122, 0.0765, 0.0598)
STD = (0.1152, 0.1075, 0.1067, 0.0796, 0.0944)
SIZE, CLASSES, SEED = 256, 8, 0
SPEC = NetworkSpec(channels=len(CHANNELS), classes=CLASSES, depth=50, width=64, antialiased=True)
RECIPE = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=2, mean=MEAN, std=STD)

Float = NDArray[np.float32]


def network() -> ResNet:
    """The network, the same whenever it is asked for."""
    torch.manual_seed(SEED)
    return ResNet(SPEC).eval()


def images(count: int, seed: int = 0) -> Float:
    """Prepared sites of noise: what is in the pixels costs no time."""
    return np.random.default_rng(seed).normal(size=(count, len(CHANNELS), SIZE, SIZE)).astype(np.float32)


def statistics_of(ensemble: Ensemble, seed: int) -> BatchNormStatistics:
    """Statistics of some sites."""
    mean, variance = measure_float64(ensemble, images(4, seed))
    return BatchNormStatistics(mean.astype(np.float32), variance.astype(np.float32), sites=4, wells=4)


def bundle(folder: Path) -> Bundle:
    """Export the network into a folder, unless it is there as the code would export it."""
    written = b"".join(Path(name).read_bytes() for name in ("model/network.py", "training/export.py", __file__))
    path = folder / f"resnet50-{hashlib.sha256(written).hexdigest()[:12]}"
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        ensemble = Ensemble([network()])
        plates = [statistics_of(ensemble, seed) for seed in range(3)]
        dimensions = 16
        manifest = Manifest(
            name="resnet50", classes=tuple(f"class{number}" for number in range(CLASSES)), recipe=RECIPE, method="cs-arm-bn",
            context="controls", features=ensemble.features, embedding_dim=ensemble.embedding_dim, minimum_control_wells=1,
            max_context_sites=128, network=SPEC.to_json(),
        )  # fmt: skip
        reference = EmbeddingReference(
            projection=np.eye(ensemble.embedding_dim, dimensions, dtype=np.float32),
            class_centres=np.zeros((CLASSES, ensemble.embedding_dim), np.float32),
            control_wells=np.array([1, 64]), control_distances=np.array([1e9, 1e9]), class_distance=1e9,
        )  # fmt: skip
        training = summarise_training(plates[:2], source=plates[0], held_out=plates[2:])
        export_bundle(ensemble, path, manifest, training, reference, images(2))
    return Bundle.load(path)


def folded_session(bundle: Bundle, statistics: BatchNormStatistics, options: Any, providers: list[Any]) -> Any:
    """Make onnxruntime's session of the graph that classifies with statistics as constants, which it folds in."""
    return _session(_with_constants(bundle, statistics).SerializeToString(), bundle, options, providers)


def given_session(bundle: Bundle, options: Any, providers: list[Any]) -> Any:
    """Make onnxruntime's session of the graph that classifies as it lies in the bundle, with statistics as inputs."""
    return _session((bundle.path / CLASSIFY).read_bytes(), bundle, options, providers)


def _session(content: bytes, bundle: Bundle, options: Any, providers: list[Any]) -> Any:
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as ours: it would spin into others' turns
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    return onnxruntime.InferenceSession(content, options, providers=providers)


def _with_constants(bundle: Bundle, statistics: BatchNormStatistics) -> Any:
    model = onnx.ModelProto.FromString((bundle.path / CLASSIFY).read_bytes())
    given = {INPUT_MEAN: statistics.mean, INPUT_VARIANCE: statistics.variance}
    inputs = [item for item in model.graph.input if item.name not in given]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in given.items())
    return model


def int8_session(bundle: Bundle, statistics: BatchNormStatistics, calibration: Float, options: Any) -> Any:
    """Make that session in int8: what onnxruntime's static quantization makes of the folded graph, from some images."""
    with TemporaryDirectory() as folder:
        folded, quantized = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        writing = onnxruntime.SessionOptions()
        writing.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        writing.optimized_model_filepath = str(folded)
        model = _with_constants(bundle, statistics)
        onnx.load_external_data_for_model(model, str(bundle.path))
        onnxruntime.InferenceSession(model.SerializeToString(), writing, providers=["CPUExecutionProvider"])
        quantization.quantize_static(
            str(folded),
            str(quantized),
            _Calibration(calibration),
            per_channel=True,
            reduce_range=True,  # or sums overflow on processors without int8 arithmetic
        )
        return onnxruntime.InferenceSession(str(quantized), options, providers=["CPUExecutionProvider"])


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Gives images one by one."""

    def __init__(self, images: Float) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Float] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT_IMAGES: image[np.newaxis]}
