"""The exported directory: all that passes from training to the service.

``manifest.json`` says what the weights were trained for and carries the sha256 of every other file; the bundle's digest
is the sha256 of the manifest's canonical JSON, so it names weights, graphs, recipe, classes and calibration at once.

One pair of graphs holds all members (several networks whose probabilities are averaged; a single one is one member):
``classify.onnx`` gives logits (sites, members, classes); statistics and embeddings are the members', one after the other.
``measure.onnx`` gives a context's statistics, and its sites' embeddings under them: they fall out of the same pass.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.errors import BundleError
from model.images import ImageRecipe
from model.predictions import EmbeddingReference
from model.statistics import BN_EPSILON, BatchNormStatistics, TrainingStatistics, json_sha256

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
CLASSIFY = "classify.onnx"
MEASURE = "measure.onnx"
WEIGHTS = "weights.bin"
TRAINING_STATISTICS = "training_statistics.npz"
GOLDEN = "golden.npz"
FILES = (CLASSIFY, MEASURE, WEIGHTS, TRAINING_STATISTICS, GOLDEN)

INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE = "images", "bn_mean", "bn_var"
INPUT_PRIOR_MEAN, INPUT_PRIOR_VARIANCE, INPUT_PRIOR_WEIGHT = "prior_mean", "prior_var", "prior_weight"
OUTPUT_LOGITS, OUTPUT_EMBEDDING = "logits", "embedding"
OUTPUT_MEAN, OUTPUT_VARIANCE = "bn_mean", "bn_var"
INPUTS = {
    CLASSIFY: (INPUT_IMAGES, INPUT_MEAN, INPUT_VARIANCE),
    MEASURE: (INPUT_IMAGES, INPUT_PRIOR_MEAN, INPUT_PRIOR_VARIANCE, INPUT_PRIOR_WEIGHT),
}
OUTPUTS = {
    CLASSIFY: (OUTPUT_LOGITS, OUTPUT_EMBEDDING),
    MEASURE: (OUTPUT_MEAN, OUTPUT_VARIANCE, OUTPUT_EMBEDDING),
}
CENTRE = "centre"
"""The constant of the graph that measures, about which it takes means."""

Precision = Literal["fp32", "fp16", "bf16"]
"""Arithmetic of the layers that classify; statistics are always measured in single precision."""

_HASHED_AT_ONCE = 1 << 24
_MAY_BE_OFF = {"fp16": 0.1, "bf16": 0.5}
GOLDEN_WELLS = 1
"""Control wells that the golden images count as when they are blended."""

SERVED_CONTEXTS = ("controls", "union", "panel", "source")


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    ``context`` is the one its networks were meta-trained for (``source`` for ERM ones); ``members`` how many there are;
    ``features`` the length of their statistics and ``embedding_dim`` that of an embedding, over all members;
    ``minimum_control_wells`` the fewest that adapt a batch; ``max_context_sites`` the most sites that are measured in one
    pass; ``network`` (each member's) and ``training`` are provenance.
    """

    name: str
    classes: tuple[str, ...]
    recipe: ImageRecipe
    method: str
    context: str
    features: int
    embedding_dim: int
    minimum_control_wells: int
    max_context_sites: int
    members: int = 1
    temperature: float = 1.0
    network: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in the order of the network's input."""
        return self.recipe.channels

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Read what ``to_json`` wrote.

        Raises:
            BundleError: another format, or a field missing, unknown or malformed.
        """
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            found = value.get("format_version") if isinstance(value, dict) else None
            raise BundleError(f"the manifest is of format {found}; this version reads {FORMAT_VERSION}: export it again")
        unknown = set(value) - {item.name for item in fields(cls)}
        if unknown:
            raise BundleError(f"the manifest has unknown fields: {', '.join(sorted(unknown))}")
        try:
            manifest = cls(**{**value, "classes": tuple(value["classes"]), "recipe": recipe_from_json(value["recipe"])})
        except (TypeError, KeyError, ValueError) as error:
            raise BundleError(f"the manifest is malformed: {error}") from None
        if manifest.context not in SERVED_CONTEXTS:
            raise BundleError(f"context {manifest.context!r} is not served; expected one of {', '.join(SERVED_CONTEXTS)}")
        return manifest


@dataclass(frozen=True, eq=False)
class Golden:
    """Images (sites, channels, size, size) with the statistics and logits torch gives on them, replayed at start-up.

    ``bn_mean`` and ``bn_var`` are (features,), ``logits`` (sites, members, classes), ``embedding`` (sites, dim).
    ``blended_mean`` and ``blended_var`` are the statistics blended as those of ``GOLDEN_WELLS`` control wells.
    """

    images: NDArray[np.float32]
    bn_mean: NDArray[np.float32]
    bn_var: NDArray[np.float32]
    blended_mean: NDArray[np.float32]
    blended_var: NDArray[np.float32]
    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


Array = NDArray[np.float32]
Moments = tuple[Array, Array]
"""Mean and variance, (features,) each."""


def _difference(found: Moments, expected: Moments) -> float:
    """Largest difference of any feature's mean or standard deviation, in standard deviations; NaN when one is no number."""
    deviation = np.sqrt(expected[1] + BN_EPSILON)
    shift = np.abs(found[0] - expected[0]) / deviation
    stretch = np.abs(np.sqrt(found[1] + BN_EPSILON) - deviation) / deviation
    return float(np.maximum(shift, stretch).max())


class Measured(NamedTuple):
    """What one pass over a context gives: mean and biased variance, (features,) each, and embeddings (sites, dim)."""

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    embeddings: NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """How far from torch's float32 is right: statistics in standard deviations, logits and embeddings as they are."""

    statistics_sd: float
    logits: float
    embeddings: float

    @classmethod
    def of(cls, golden: Golden, precision: Precision) -> "Tolerance":
        """What layers in a precision may be off; in reduced ones so much that only gross errors show.

        Of the logits' standard deviation and the largest embedding, trained networks were off by up to 0.15 and 0.09 in
        bfloat16, by up to 0.02 and 0.01 in fp16.
        """
        if precision == "fp32":
            return cls(1e-4, 1e-3, 1e-3)
        share = _MAY_BE_OFF[precision]
        return cls(1e-4, share * float(golden.logits.std()), share * float(np.abs(golden.embedding).max()))


@dataclass(frozen=True)
class Parity:
    """Largest differences from torch on the golden images: statistics in standard deviations, outputs as they are.

    Embeddings are those of the pass that measures, and of classifying.
    """

    statistics_sd: float
    logits: float
    embeddings: float

    @classmethod
    def of(cls, golden: Golden, plain: Measured, blend: Measured, logits: Array, embeddings: Array) -> "Parity":
        """Compare what was measured, plain and blended, and what was classified with the golden ones.

        Raises:
            BundleError: outputs have another shape: of another number of members or classes.
        """
        found = {"logits": logits, "embedding": embeddings, "embedding of measuring": plain.embeddings}
        expected = {"logits": golden.logits, "embedding": golden.embedding, "embedding of measuring": golden.embedding}
        for name, value in found.items():
            if value.shape != expected[name].shape:
                raise BundleError(f"the graph gives {name} of shape {value.shape}; the golden has {expected[name].shape}")
        off = {name: float(np.abs(value - expected[name]).max()) for name, value in found.items()}
        differences = [
            _difference(plain[:2], (golden.bn_mean, golden.bn_var)),
            _difference(blend[:2], (golden.blended_mean, golden.blended_var)),
        ]
        of_embeddings = float(np.max([off["embedding"], off["embedding of measuring"]]))
        return cls(float(np.max(differences)), off["logits"], of_embeddings)

    def require(self, where: str, most: Tolerance) -> None:
        """Check the tolerances that a bundle promises.

        Raises:
            BundleError: a difference exceeds its tolerance, or is no number.
        """
        within = (
            self.statistics_sd <= most.statistics_sd
            and self.logits <= most.logits
            and self.embeddings <= most.embeddings  # NaN is not within either
        )
        if not within:
            raise BundleError(
                f"{where} disagrees with torch on the golden images: statistics by {self.statistics_sd:.1e} standard "
                f"deviations (at most {most.statistics_sd:.0e}), logits by {self.logits:.1e} (at most {most.logits:.0e}), "
                f"embeddings by {self.embeddings:.1e} (at most {most.embeddings:.0e})"
            )


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle directory; large arrays are read on first use."""

    path: Path
    manifest: Manifest
    digest: str

    ARRAYS: ClassVar[tuple[str, ...]] = (
        "source_mean", "source_variance", "source_sites", "source_wells",
        "mean_centre", "mean_spread", "log_variance_centre", "log_variance_spread", "held_out_distances", "blend_wells",
        "projection", "class_centres", "control_wells", "control_distances", "class_distance",
    )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "Bundle":
        """Read a bundle and check every file against the manifest.

        Raises:
            BundleError: a file is missing, changed, or of another format.
        """
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(f"{path} holds no {MANIFEST}: it is not a bundle")
        try:
            content = json.loads(manifest_path.read_bytes())
        except ValueError as error:
            raise BundleError(f"{manifest_path} is not valid JSON: {error}") from None
        manifest = Manifest.from_json(content)
        for name in FILES:
            _check_file(path / name, manifest.files.get(name))
        return cls(path=path, manifest=manifest, digest=manifest_digest(manifest))

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        with np.load(self.path / TRAINING_STATISTICS, allow_pickle=False) as stored:
            missing = set(self.ARRAYS) - set(stored.files)
            if missing:
                raise BundleError(f"{TRAINING_STATISTICS} lacks {', '.join(sorted(missing))}")
            arrays = {name: stored[name] for name in self.ARRAYS}
        _check_shapes(arrays, self.manifest)
        return arrays

    @cached_property
    def training_statistics(self) -> TrainingStatistics:
        """What the training plates' control statistics look like."""
        arrays = self._arrays
        source = BatchNormStatistics(
            mean=arrays["source_mean"],
            variance=arrays["source_variance"],
            sites=int(arrays["source_sites"]),
            wells=int(arrays["source_wells"]),
        )
        own = {item.name: arrays[item.name] for item in fields(TrainingStatistics) if item.name != "source"}
        return TrainingStatistics(source=source, **own)

    @cached_property
    def embedding_reference(self) -> EmbeddingReference:
        """How embeddings of wells vary."""
        arrays = self._arrays
        return EmbeddingReference(
            projection=arrays["projection"],
            class_centres=arrays["class_centres"],
            control_wells=arrays["control_wells"],
            control_distances=arrays["control_distances"],
            class_distance=float(arrays["class_distance"]),
        )

    @cached_property
    def golden(self) -> Golden:
        """The images to replay."""
        with np.load(self.path / GOLDEN, allow_pickle=False) as stored:
            return Golden(**{item.name: stored[item.name] for item in fields(Golden)})


def manifest_digest(manifest: Manifest) -> str:
    """Name a bundle: sha256 of its manifest's canonical JSON."""
    return json_sha256(manifest.to_json())


def finish_bundle(
    path: Path,
    manifest: Manifest,
    training_statistics: TrainingStatistics,
    embedding_reference: EmbeddingReference,
    golden: Golden,
) -> Bundle:
    """Complete a directory that already holds the graphs and weights: arrays, checksums, manifest; then load it.

    Raises:
        BundleError: a graph or the weights are missing.
    """
    source = training_statistics.source
    summary = {name: value for name, value in vars(training_statistics).items() if name in Bundle.ARRAYS}
    np.savez_compressed(
        path / TRAINING_STATISTICS,
        source_mean=source.mean,
        source_variance=source.variance,
        source_sites=source.sites,
        source_wells=source.wells,
        **summary,
        **{item.name: getattr(embedding_reference, item.name) for item in fields(EmbeddingReference)},
    )
    np.savez_compressed(path / GOLDEN, **vars(golden))
    digests = {name: file_sha256(path / name) for name in FILES if (path / name).is_file()}
    complete = Manifest(**{**vars(manifest), "files": digests})
    (path / MANIFEST).write_text(json.dumps(complete.to_json(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Bundle.load(path)


def recipe_json(recipe: ImageRecipe) -> dict[str, Any]:
    """Return a recipe as plain JSON values."""
    return _plain(asdict(recipe))


def recipe_digest(recipe: ImageRecipe) -> str:
    """Name a recipe: sha256 of its canonical JSON. Network input kept under it is good for every bundle that has it."""
    return json_sha256(recipe_json(recipe))


def recipe_from_json(value: Mapping[str, Any]) -> ImageRecipe:
    """Read what ``recipe_json`` made."""
    arguments: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    return ImageRecipe(**arguments)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


_PER_FEATURE = (
    "source_mean", "source_variance", "blend_wells",
    "mean_centre", "mean_spread", "log_variance_centre", "log_variance_spread",
)  # fmt: skip


def _check_shapes(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> None:
    """Check that what answers are made with has the sizes that the manifest says."""
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(_PER_FEATURE, (manifest.features,))
    expected["class_centres"] = (len(manifest.classes), manifest.embedding_dim)
    expected["projection"] = (manifest.embedding_dim, arrays["projection"].shape[-1])
    expected["control_distances"] = arrays["control_wells"].shape
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise BundleError(f"{TRAINING_STATISTICS}: {name} has shape {arrays[name].shape}; the manifest needs {shape}")


def _check_file(path: Path, expected: str | None) -> None:
    if expected is None or not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise BundleError(f"the manifest has no sha256 for {path.name}")
    if not path.is_file():
        raise BundleError(f"{path} is missing")
    found = file_sha256(path)
    if found != expected:
        raise BundleError(f"{path} was changed: its sha256 is {found[:12]}…, the manifest says {expected[:12]}…")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal; read in large pieces, for between two another thread may take its time."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
