"""Published checkpoints become bundles that answer as the network they are of, and anything else is refused.

The network here is written from the published description alone, in plain torch, and shares no code with the project's.
"""

import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.bundle import Bundle
from model.errors import CheckpointError, LayoutError, RunError
from model.images import ImageRecipe
from model.network import Ensemble, FromContext
from model.predictions import site_probabilities
from model.statistics import BatchNormStatistics
from service.engine import BundleEngine, replay
from service.runtime import open_runtime
from training.calibrate import calibrate_unseen
from training.checkpoints import CHANNELS, MEAN, STD, import_checkpoints, read_networks
from training.contexts import given
from training.dataset import PlateSites
from training.methods import classify, make_method

pytestmark = pytest.mark.timeout(900)  # two ResNet-50s take torch's exporter a minute, and more on a busy machine

CLASSES = ("alpha", "beta")
WIDTH, SIZE = 4, 256
RECIPE = ImageRecipe(channels=CHANNELS, size=SIZE, mean=MEAN, std=STD)


class PublishedBlock(nn.Module):
    """A bottleneck: the pool follows the second convolution's activation; the shortcut is pool, convolution, BN."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        self.downsample = None
        if stride == 2 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.pool(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(self.pool(x))))


class PublishedFeatures(nn.Module):
    """Stem, four stages of 3, 4, 6 and 3 blocks, a 7 x 7 average pool of stride 1 and the mean of what is left."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(7, stride=1)
        inputs = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            made = []
            for number in range(blocks):
                made.append(PublishedBlock(inputs, width * 2**stage, 2 if stage > 0 and number == 0 else 1))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        assert x.shape[2:] == (8, 8)
        return self.avgpool(x).mean((2, 3))


class PublishedNetwork(nn.Module):
    """``featurizer`` and ``classifier``, with weights, scales and shifts at random."""

    def __init__(self, seed: int, classes: int = len(CLASSES), width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.featurizer = PublishedFeatures(len(CHANNELS), width)
        self.classifier = nn.Linear(32 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        nn.init.normal_(self.classifier.weight, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.featurizer(x))

    @torch.no_grad()
    def answers(self, images: np.ndarray) -> np.ndarray:
        """Logits with BN in train mode over these images as one context."""
        return self.train()(torch.from_numpy(images)).numpy()


def plate(name: str, batch: str, seed: int, labels: tuple[int, ...] = (0, 0, 1, 1)) -> PlateSites:
    """Five control wells and a treated well a label, one site each."""
    rng = np.random.default_rng(seed)
    rows = 5 + len(labels)
    brightness = rng.uniform(20, 60, (rows, len(CHANNELS), 1, 1))
    images = np.clip(rng.gamma(2.0, brightness, (rows, len(CHANNELS), SIZE, SIZE)), 0, 255).astype(np.uint8)
    numbers = np.array([-1] * 5 + list(labels), np.int64)
    return PlateSites(
        plate=name, lab="L", batch=batch, wells=np.array([f"A{row + 1:02d}" for row in range(rows)]),
        names=np.array(["", *CLASSES])[numbers + 1], labels=numbers, controls=numbers < 0, images=images,
        intensities=np.zeros((rows, len(CHANNELS), 2), np.float32), recipe=RECIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plates() -> list[PlateSites]:
    return [plate(f"P{number}", f"B{number}", seed=number) for number in range(3)]


def saved(folder: Path, *networks: PublishedNetwork, wrapped: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for number, network in enumerate(networks):
        state = network.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, folder / f"fold_{number}.pt")
    return folder


def imported(folder: Path, plates: list[PlateSites], out: Path, context: str = "controls") -> Bundle:
    """Import with whatever is published as it is."""
    method = make_method("erm") if context == "source" else make_method("cs-arm-bn", context)
    bundle, _ = import_checkpoints(
        folder, plates, out, name="published", classes=CLASSES, recipe=RECIPE, method=method, minimum_control_wells=4
    )
    return bundle


@pytest.fixture(scope="module")
def folds() -> list[PublishedNetwork]:
    return [PublishedNetwork(seed=1), PublishedNetwork(seed=2)]


@pytest.fixture(scope="module")
def pair(folds: list[PublishedNetwork], plates: list[PlateSites], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("published")
    return imported(saved(root / "folds", *folds), plates, root / "pair")


def served(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    """What the service's engine answers with statistics measured on the same images."""
    engine = BundleEngine(bundle, open_runtime("cpu", "fp32", 1))
    replay(engine, bundle)
    mean, variance, _ = engine.measure(images)
    return engine.classify(images, BatchNormStatistics(mean, variance, sites=len(images), wells=len(images)))[0]


def test_every_member_answers_as_the_published_network_does_in_train_mode(
    folds: list[PublishedNetwork], pair: Bundle, plates: list[PlateSites]
) -> None:
    images = plates[1].served(np.arange(6), RECIPE)
    found = served(pair, images)
    assert found.shape == (6, 2, len(CLASSES))
    expected = np.stack([fold.answers(images) for fold in folds], axis=1)
    assert np.ptp(expected, axis=0).min() > 0.01, "answers that are all alike would show nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    averaged = np.mean([torch.softmax(torch.from_numpy(fold), 1).numpy() for fold in expected.transpose(1, 0, 2)], axis=0)
    np.testing.assert_allclose(site_probabilities(found), averaged, atol=1e-3)


@torch.no_grad()
def test_a_wrapped_checkpoint_of_another_width_is_read_as_well(plates: list[PlateSites], tmp_path: Path) -> None:
    published = PublishedNetwork(seed=3, width=2)
    networks = read_networks(saved(tmp_path / "one", published, wrapped=True), classes=2, channels=5)
    (network,) = networks.values()
    images = plates[0].served(np.arange(5), RECIPE)
    found, _ = network(torch.from_numpy(images), FromContext())
    np.testing.assert_allclose(found.numpy(), published.answers(images), rtol=0, atol=1e-3)
    assert network.spec.width == 2


def test_the_bundle_says_what_was_imported_and_calibrated_on(pair: Bundle) -> None:
    manifest = pair.manifest
    assert (manifest.members, manifest.context, manifest.classes) == (2, "controls", CLASSES)
    assert manifest.network["pooling"] == "mean-of-7x7"
    assert manifest.recipe == RECIPE
    assert [member["file"] for member in manifest.training["members"]] == ["fold_0.pt", "fold_1.pt"]
    assert manifest.training["calibration_plates"] == ["P0", "P1", "P2"]
    assert len(pair.training_statistics.held_out_distances) == 3
    assert np.isfinite(pair.embedding_reference.class_centres).all()
    assert pair.embedding_reference.class_distance > 0


def test_distances_are_of_plates_held_against_the_others(pair: Bundle) -> None:
    described = pair.training_statistics
    assert described.held_out_distances.min() > described.distance(described.source)


def test_a_conventional_network_is_served_with_its_own_running_statistics(plates: list[PlateSites], tmp_path: Path) -> None:
    published = PublishedNetwork(seed=4)
    with pytest.raises(CheckpointError, match=r"fold_0.pt has no running statistics"):
        imported(saved(tmp_path / "untrained", published), plates, tmp_path / "bundle", "source")
    published.answers(plates[0].served(np.arange(9), RECIPE))
    (network,) = read_networks(saved(tmp_path / "trained", published), classes=2, channels=5).values()
    ensemble = Ensemble([network])
    source = calibrate_unseen(ensemble, make_method("erm"), RECIPE, plates, CLASSES).training_statistics.source
    images = plates[2].served(np.arange(4), RECIPE)
    found, _ = classify(ensemble, images, given(ensemble, source))
    with torch.no_grad():
        expected = published.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(folds: list[PublishedNetwork], tmp_path: Path) -> Path:
    return saved(tmp_path / "folds", *folds)


def changed(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the second fold; None takes one out."""
    state = torch.load(folder / "fold_1.pt", weights_only=True)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(state, folder / "fold_1.pt")


def read(folder: Path) -> None:
    read_networks(folder, classes=len(CLASSES), channels=len(CHANNELS))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"featurizer__layer3__5__conv2__weight": None}, r"fold_1.pt lacks featurizer.layer3.5.conv2.weight"),
        ({"featurizer__layer2__0__downsample__1__running_var": None}, r"lacks featurizer.layer2.0.downsample.1.running_var"),
        ({"featurizer__fc__weight": torch.zeros(2)}, r"fold_1.pt has the unexpected featurizer.fc.weight"),
        ({"featurizer__conv1__bias": torch.zeros(4)}, r"unexpected featurizer.conv1.bias"),
        (
            {"featurizer__layer1__0__conv3__weight": torch.zeros(16, 4, 3, 3)},
            r"fold_1.pt: featurizer.layer1.0.conv3.weight has shape \(16, 4, 3, 3\); expected is \(16, 4, 1, 1\)",
        ),
        ({"classifier__bias": torch.zeros(2, dtype=torch.int64)}, "classifier.bias is of type torch.int64"),
        ({"classifier__bias": torch.tensor([0.0, torch.nan])}, "classifier.bias has values that are not finite"),
        (
            {"classifier__bias": torch.tensor([0.0, 1e300], dtype=torch.float64)},
            "classifier.bias has values that are not finite in float32",
        ),
        ({"featurizer__bn1__running_var": -torch.ones(4)}, "featurizer.bn1.running_var has a negative variance"),
        ({"classifier__bias": torch.zeros(2).to_sparse()}, "classifier.bias is no plain tensor"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused_by_file_and_key(
    changes: dict[str, torch.Tensor | None], told: str, folder: Path
) -> None:
    changed(folder, **changes)
    with pytest.raises(CheckpointError, match=told) as refused:
        read(folder)
    assert refused.value.members["file"] == "fold_1.pt"


def test_counters_of_minibatches_may_be_left_out(folder: Path) -> None:
    state = torch.load(folder / "fold_0.pt", weights_only=True)
    torch.save(OrderedDict((key, value) for key, value in state.items() if "num_batches" not in key), folder / "fold_0.pt")
    read(folder)


def test_classes_of_a_wrong_number_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fold_0.pt: classifier.\w+ has shape \(2.*expected is \(3.*3 classes"):
        read_networks(folder, classes=3, channels=len(CHANNELS))
    with pytest.raises(CheckpointError, match=r"featurizer.conv1.weight has shape \(4, 5, 7, 7\).*3 channels"):
        read_networks(folder, classes=2, channels=3)


def test_a_fold_of_another_width_is_no_member(folder: Path) -> None:
    saved(folder / "wide", PublishedNetwork(seed=1, width=8))
    (folder / "wide" / "fold_0.pt").rename(folder / "fold_2.pt")
    with pytest.raises(CheckpointError, match=r"fold_2.pt: .* a first stage 4 wide"):
        read(folder)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "torch", "among tensors"])
def test_a_pickle_that_would_run_something_is_refused_and_does_not(how: str, tmp_path: Path) -> None:
    folder, marker = tmp_path / "folds", tmp_path / "was run"
    folder.mkdir()
    content = {"classifier.bias": torch.zeros(2), "x": Hostile(marker)} if how == "among tensors" else Hostile(marker)
    if how == "pickle":
        (folder / "fold.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / "fold.pth")
    with pytest.raises(CheckpointError, match=r"fold.pth is no checkpoint of tensors alone"):
        read(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(2)], "holds a list, no state dict"),
        ({"a": 1.0}, "a is no plain tensor"),
        ({3: torch.zeros(1)}, "3 is no"),
    ],
)
def test_a_file_of_other_things_is_refused(content: object, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "fold.ckpt")
    with pytest.raises(CheckpointError, match=told):
        read(tmp_path)


def test_a_truncated_file_and_a_folder_without_files_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "fold_0.pt").read_bytes()
    (folder / "fold_0.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"fold_0.pt is no checkpoint"):
        read(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("weights are elsewhere")
    for nothing in (empty, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint: none of its files ends in .pt, .pth, .ckpt"):
            read(nothing)


def test_too_few_calibration_plates_are_refused(folder: Path, plates: list[PlateSites], tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="2 plates; calibration needs 3 or more"):
        imported(folder, plates[:2], tmp_path / "out")
    unlabelled = [*plates[:2], plate("P9", "B9", seed=9, labels=(0,))]
    bare = [replace(one, labels=np.where(one.labels == 1, -1, one.labels)) for one in unlabelled[1:]]
    with pytest.raises(LayoutError, match="class beta needs labelled wells in two of the batches B0, B1, B9"):
        imported(folder, [unlabelled[0], *bare], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_too_small_for_the_pooling_are_refused(folder: Path, plates: list[PlateSites], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="images of 192 pixels; the published network's pooling needs 224"):
        import_checkpoints(
            folder, plates, tmp_path / "out", name="no", classes=CLASSES, recipe=replace(RECIPE, size=192),
            method=make_method("cs-arm-bn"), minimum_control_wells=4,
        )  # fmt: skip


def test_fields_smaller_than_the_network_asks_for_are_refused(
    folder: Path, plates: list[PlateSites], tmp_path: Path
) -> None:
    smaller = replace(plates[1], images=plates[1].images[..., :200])
    with pytest.raises(RunError, match="plate P1 was fetched with 256 x 200 pixels; the network asks for 256"):
        imported(folder, [plates[0], smaller, plates[2]], tmp_path / "out")


def test_two_outputs_of_one_name_are_refused(folder: Path, plates: list[PlateSites], tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="the classes name alpha more than once: name every output of the network once"):
        import_checkpoints(
            folder, plates, tmp_path / "out", name="no", classes=("alpha", "alpha"), recipe=RECIPE,
            method=make_method("cs-arm-bn"), minimum_control_wells=4,
        )  # fmt: skip


def test_the_command_tells_what_is_wrong_in_a_line(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--classes", "a,b", "--calibration", str(tmp_path / "plates"), "--out", str(tmp_path)]
    (tmp_path / "something").touch()
    code = "from training.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "import-checkpoint", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "is not empty" in done.stderr
    assert "Traceback" not in done.stderr
