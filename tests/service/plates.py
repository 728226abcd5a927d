"""Small plates, a bundle without a network, and an engine that can be checked in the head."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from model.bundle import CLASSIFY, GOLDEN_WELLS, MEASURE, WEIGHTS, Bundle, Golden, Manifest, Measured, finish_bundle
from model.images import ImageRecipe
from model.predictions import EmbeddingReference
from model.statistics import BN_EPSILON, BatchNormStatistics, Prior, blended, summarise_training
from service.engine import Classified

CHANNELS = ("DNA", "ER", "RNA")
CLASSES = ("alpha", "beta", "gamma")
MINIMUM_WELLS = 4
BLEND_WELLS = 3
"""What the prior counts as: of a batch with one control well, three quarters."""
GOLDEN_PASSES = 2
"""Passes of the golden replay, plain and blended."""
CONTROL_WELLS = ("A01", "B01", "C01", "D01")
SIZE = 16

File = tuple[str, tuple[str, bytes, str]]


class FakeEngine:
    """Statistics are each channel's mean and variance, blended; logits and embedding a site's mean, standardised by them.

    A second member's logits are twice the first's, a third's three times.
    """

    provider = "CPUExecutionProvider"
    precision = "fp32"
    sites_at_once = 2

    def __init__(self, members: int = 1) -> None:
        self.passes = 0
        self.members = members

    def measure(self, images, prior=None):
        self.passes += 1
        wide, used = images.astype(np.float64), prior or Prior.none(images.shape[1])
        measured = wide.mean(axis=(0, 2, 3)), wide.var(axis=(0, 2, 3))
        mean, variance = blended(*measured, used.mean, used.variance, used.weight)
        scores = (wide.mean(axis=(2, 3)) - mean) / np.sqrt(variance + BN_EPSILON)
        return Measured(mean.astype(np.float32), variance.astype(np.float32), scores.astype(np.float32))

    def classify(self, images, statistics):
        means = images.astype(np.float64).mean(axis=(2, 3))
        scores = (means - statistics.mean) / np.sqrt(statistics.variance + BN_EPSILON)
        logits = np.stack([scores * (1 + member) for member in range(self.members)], axis=1)
        return Classified(logits.astype(np.float32), scores.astype(np.float32))


def fake_bundle(path: Path, **changes) -> Bundle:
    """A bundle whose graphs are never loaded; ``changes`` are fields of its manifest."""
    path.mkdir(parents=True)
    for name in (CLASSIFY, MEASURE, WEIGHTS):
        (path / name).write_bytes(name.encode())
    recipe = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=1)
    manifest = {
        "name": "fake",
        "classes": CLASSES,
        "recipe": recipe,
        "method": "cs-arm-bn",
        "context": "controls",
        "features": 3,
        "embedding_dim": 3,
        "minimum_control_wells": MINIMUM_WELLS,
        "max_context_sites": 6,
        **changes,
    }
    plates = [
        BatchNormStatistics(np.full(3, 0.4 + step, np.float32), np.full(3, 0.06 + step, np.float32), sites=8, wells=4)
        for step in (0.0, 0.05, 0.1, 0.15)
    ]
    images = np.random.default_rng(1).random((4, 3, SIZE, SIZE), np.float32)
    engine = FakeEngine(changes.get("members", 1))
    described = summarise_training(plates[:2], plates[0], plates[2:], np.full(3, BLEND_WELLS, np.float32))
    mean, variance, embedding = engine.measure(images)
    blend = engine.measure(images, described.prior(GOLDEN_WELLS))[:2]
    logits, *_ = engine.classify(images, BatchNormStatistics(mean, variance, sites=4, wells=4))
    return finish_bundle(
        path,
        Manifest(**manifest),
        described,
        EmbeddingReference(
            np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.array([4]), np.array([0.5]), class_distance=50.0
        ),
        Golden(images, mean, variance, *blend, logits, embedding),
    )


def tiff(plane, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.asarray(plane), photometric="minisblack", **options)
    return buffer.getvalue()


def ome_tiff(names: Sequence[str], planes, **options) -> bytes:
    """Several channels in one file that names them."""
    buffer = io.BytesIO()
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}}
    tifffile.imwrite(buffer, np.stack(planes), ome=True, photometric="minisblack", metadata=metadata, **options)
    return buffer.getvalue()


def plane(seed: object, size: int = SIZE, brightness: float = 0.5):
    rng = np.random.default_rng(np.frombuffer(repr(seed).encode(), np.uint8))
    return (rng.beta(2 * brightness, 2 * (1 - brightness), (size, size)) * 60_000).astype(np.uint16)


def image(name: str, data: bytes) -> File:
    return ("images", (name, data, "image/tiff"))


def well_files(
    wells: Sequence[str], sites: Sequence[int] = (1, 2), size: int = SIZE, channels: Sequence[str] = CHANNELS, salt: str = ""
) -> list[File]:
    """Every plane of some wells, named ``<well>_<site>_<channel>.tif``; the same wells always have the same pixels."""
    return [
        image(f"{well}_{site}_{channel}.tif", tiff(plane((salt, well, site, channel), size)))
        for well in wells
        for site in sites
        for channel in channels
    ]


def with_file(files: Sequence[File], name: str, data: bytes) -> list[File]:
    """The files with one's bytes replaced, or added."""
    return [item for item in files if item[1][0] != name] + [image(name, data)]
