"""Checkpoints that others publish for this method → a served bundle.

A folder holds one file a fold: a state dict, or ``{"state_dict": …}`` beside whatever else a training kept, of an
anti-aliased ResNet-50 with the published 7 x 7 final pooling, under the keys ``featurizer.conv1.weight``,
``featurizer.bn1.*``, ``featurizer.layer{1..4}.{block}.conv{1,2,3}.weight``, ``….bn{1,2,3}.*``, ``….downsample.0.weight``
(convolution), ``….downsample.1.*`` (BN) and ``classifier.{weight,bias}``. Nothing in a file is run: it holds tensors alone.

A served bundle says how far a plate lies from what the network knows, which wells resemble its controls or nothing at all,
and probabilities that mean something. A bare checkpoint knows none of it, and numbers made up in its place would look like
answers. So **calibration plates are required**: labelled plates with controls that none of the folds was trained on, three
or more. From them come the statistics' centre and spread, the embedding reference, the temperature and the golden images;
thresholds are cross-fitted. That the plates were not trained on cannot be seen from a checkpoint: who imports has to know.

``source`` statistics follow the project's one rule (``training.contexts``). For a network that is served with ``controls``
or ``union`` they are the mean moments of the calibration plates' controls, not its running statistics: those are of the last
few minibatches of a meta-training, that is of a few plates, and at torch's momentum of 0.1 hardly an average. A network that
was trained conventionally (``source``) is served with the running statistics that it was trained for.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.bundle import Bundle, Parity, file_sha256
from model.errors import CheckpointError, LayoutError
from model.images import ImageRecipe
from model.network import STAGES, Ensemble, NetworkSpec, ResNet
from training.calibrate import calibrate_unseen
from training.dataset import PlateSites
from training.methods import Method
from training.release import calibrated_bundle
from training.train import require_size

SUFFIXES = (".pt", ".pth", ".ckpt")
CHANNELS = ("RNA", "ER", "AGP", "Mito", "DNA")
MEAN = (0.0913, 0.0880, 0.1122, 0.0765, 0.0598)
STD = (0.1152, 0.1075, 0.1067, 0.0796, 0.0944)
SIZE, SHRINK = 256, 2
"""The published images: every second pixel, the centre 256 x 256 of them, scaled by percentile, these means and stds."""
LEAST_SIZE = 224
"""Pixels that give the 7 x 7 map which the published pooling needs."""

_DEPTH: Literal[50] = 50
_WIDTH = 64
_TRACKED = "num_batches_tracked"
_NAMED = 3


def import_checkpoints(
    folder: Path,
    plates: Sequence[PlateSites],
    out: Path,
    *,
    name: str,
    classes: Sequence[str],
    recipe: ImageRecipe,
    method: Method,
    minimum_control_wells: int,
) -> tuple[Bundle, Parity]:
    """Turn a folder of published checkpoints into a bundle whose members are its files, by name.

    Args:
        folder: one file a fold; see the module.
        plates: calibration plates that no fold was trained on, prepared as ``recipe`` says, their labels in the order of
            ``classes``.
        out: the bundle's directory.
        name: the bundle's name.
        classes: names of the checkpoints' outputs, in their order.
        recipe: how the checkpoints' images were prepared, mean and std included.
        method: with which context the checkpoints were trained, and are served.
        minimum_control_wells: the fewest that adapt a batch.

    Raises:
        CheckpointError: a file is no such checkpoint; names the file and the key.
        LayoutError: the plates are too few to calibrate on, or two outputs have one name. RunError: their fields are smaller
            than the network's input.
        BundleError: ONNX and torch disagree.
    """
    if recipe.size < LEAST_SIZE:
        raise CheckpointError(f"images of {recipe.size} pixels; the published network's pooling needs {LEAST_SIZE} or more")
    repeated = sorted({label for label in classes if classes.count(label) > 1})
    if repeated:
        raise LayoutError(f"the classes name {', '.join(repeated)} more than once: name every output of the network once")
    require_size(plates, recipe.size)
    networks = read_networks(folder, classes=len(classes), channels=len(recipe.channels))
    if method.context == "source":
        _require_running_statistics(networks)
    network = Ensemble(list(networks.values()))
    calibration = calibrate_unseen(network, method, recipe, plates, classes)
    training = {
        "anchorwell": version("anchorwell"),
        "members": [{"file": file, "sha256": file_sha256(folder / file)} for file in networks],
        "calibration_labs": sorted({plate.lab for plate in plates}),
        "calibration_batches": sorted({plate.batch for plate in plates}),
        "calibration_plates": [plate.plate for plate in plates],
        "calibration_sites": sum(len(plate.wells) for plate in plates),
    }
    return calibrated_bundle(
        network, out, calibration, plates[0], name=name, classes=classes, recipe=recipe, method=method,
        minimum_control_wells=minimum_control_wells, training=training,
    )  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------------------


def read_networks(folder: Path, *, classes: int, channels: int) -> dict[str, ResNet]:
    """Read every checkpoint of a folder: networks by file name, sorted; all as wide as the first.

    Raises:
        CheckpointError: there is none, or one is not as it should be.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise CheckpointError(f"{folder} holds no checkpoint: none of its files ends in {', '.join(SUFFIXES)}")
    networks: dict[str, ResNet] = {}
    width = 0
    for path in files:
        state = read_state(path)
        width = width or _width(state)
        spec = NetworkSpec(channels, classes, _DEPTH, width, antialiased=True, pooling="mean-of-7x7")
        networks[path.name] = network_of(state, spec, path.name)
    return networks


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name, running nothing of it.

    Raises:
        CheckpointError: it is no such file, or holds anything but tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (unpickling a stranger's bytes raises whatever it likes)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path.name} is no checkpoint of tensors alone, and nothing else is read: {reason}", file=path.name
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(content).__name__}, no state dict", file=path.name)
    for key, value in content.items():
        if not isinstance(key, str) or not _plain(value):
            raise CheckpointError(
                f"{path.name}: {key!s:.100} is no plain tensor in memory; a state dict holds nothing else",
                file=path.name, key=f"{key!s:.100}",
            )  # fmt: skip
    return dict(content)


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _width(state: Mapping[str, Tensor]) -> int:
    stem = state.get("featurizer.conv1.weight")
    return int(stem.shape[0]) if stem is not None and stem.ndim and stem.shape[0] else _WIDTH


# --- keys ------------------------------------------------------------------------------------------------------------


def published_key(name: str) -> str:
    """Return the published name of a tensor of ``model.network.ResNet``."""
    if name.startswith("classifier."):
        return name
    if not name.startswith("blocks."):
        return f"featurizer.{name}"
    _, number, rest = name.split(".", 2)
    stage, block = 0, int(number)
    while block >= STAGES[_DEPTH][stage]:
        block -= STAGES[_DEPTH][stage]
        stage += 1
    rest = rest.replace("shortcut.conv.", "downsample.0.").replace("shortcut.bn.", "downsample.1.")
    return f"featurizer.layer{stage + 1}.{block}.{rest}"


def network_of(state: Mapping[str, Tensor], spec: NetworkSpec, file: str) -> ResNet:
    """Make a network of a published state dict.

    Raises:
        CheckpointError: a key is missing or unexpected, or its tensor is of a wrong shape or type, or not finite.
    """
    with torch.device("meta"):  # no memory before the shapes are known to be those that the file really has
        network = ResNet(spec)
    shapes = {published_key(name): (name, tensor.shape) for name, tensor in network.state_dict().items()}
    _require_keys(state, shapes, file)
    weights: dict[str, Tensor] = {}
    for key, (name, shape) in shapes.items():
        _require_tensor(state[key], shape, file, key, spec)
        weights[name] = state[key].detach().float()
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _require_keys(state: Mapping[str, Tensor], expected: Mapping[str, Any], file: str) -> None:
    counters = {key.replace("running_mean", _TRACKED) for key in expected if key.endswith("running_mean")}
    for told, keys in (("lacks", set(expected) - set(state)), ("has the unexpected", set(state) - set(expected) - counters)):
        if keys:
            named = sorted(keys)[:_NAMED]
            more = f" and {len(keys) - len(named)} more" if len(keys) > len(named) else ""
            raise CheckpointError(
                f"{file} {told} {', '.join(key[:100] for key in named)}{more}: it is no checkpoint of the published layout",
                file=file, key=named[0][:100],
            )  # fmt: skip


def _require_tensor(tensor: Tensor, shape: torch.Size, file: str, key: str, spec: NetworkSpec) -> None:
    problem = ""
    if tensor.shape != shape:
        made = f"{spec.classes} classes, {spec.channels} channels, a first stage {spec.width} wide"
        problem = f"has shape {tuple(tensor.shape)}; expected is {tuple(shape)} (for {made})"
    elif not tensor.is_floating_point():
        problem = f"is of type {tensor.dtype}; expected are floating-point numbers"
    elif not tensor.float().isfinite().all():  # as it is served: a float64 may be larger than any float32
        problem = "has values that are not finite in float32"
    elif key.endswith("running_var") and (tensor < 0).any():
        problem = "has a negative variance"
    if problem:
        raise CheckpointError(f"{file}: {key} {problem}", file=file, key=key)


def _require_running_statistics(networks: Mapping[str, ResNet]) -> None:
    for file, network in networks.items():
        mean, variance = network.running_statistics()
        if not mean.any() and bool((variance == 1).all()):
            raise CheckpointError(
                f"{file} has no running statistics (all means are 0, all variances 1): it was not trained to be served with "
                f"the context source; ask for controls or union",
                file=file,
            )
