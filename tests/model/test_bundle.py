"""The bundle's directory: what is read back, and what is refused."""

import json

import numpy as np
import pytest

from model.bundle import (
    CLASSIFY,
    FILES,
    GOLDEN,
    MANIFEST,
    TRAINING_STATISTICS,
    Bundle,
    Golden,
    Manifest,
    file_sha256,
    finish_bundle,
    recipe_digest,
)
from model.errors import BundleError
from model.images import ImageRecipe
from model.predictions import EmbeddingReference
from model.statistics import BatchNormStatistics, summarise_training

RECIPE = ImageRecipe(channels=("DNA", "ER"), size=8, mean=(0.1, 0.2), std=(0.3, 0.4))
MANIFEST_VALUES = {
    "name": "b", "classes": ("x", "y"), "recipe": RECIPE, "method": "cs-arm-bn", "context": "controls", "features": 3,
    "embedding_dim": 2, "minimum_control_wells": 4, "max_context_sites": 8,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in FILES[:3]:
        (folder / name).write_bytes(name.encode())
    plates = [BatchNormStatistics(np.full(3, v, np.float32), np.ones(3, np.float32), sites=2, wells=2) for v in (0, 1)]
    golden = Golden(*(np.full((2, 2), v, np.float32) for v in range(7)))
    reference = EmbeddingReference(
        np.eye(2, dtype=np.float32), np.zeros((2, 2), np.float32), np.array([4]), np.array([1.5]), class_distance=2.5
    )
    described = summarise_training(plates, plates[0], plates, np.array([1, 2, 3], np.float32))
    finish_bundle(folder, Manifest(**MANIFEST_VALUES), described, reference, golden)
    return folder


def test_a_bundle_reads_back_as_it_was_written(path):
    bundle = Bundle.load(path)
    assert bundle.manifest.recipe == RECIPE
    assert bundle.manifest.classes == ("x", "y")
    assert bundle.manifest.channels == ("DNA", "ER")
    assert set(bundle.manifest.files) == set(FILES)
    assert bundle.training_statistics.source.sites == 2
    assert bundle.training_statistics.blend_wells.tolist() == [1, 2, 3]
    assert (bundle.embedding_reference.control_distance(4), bundle.embedding_reference.class_distance) == (1.5, 2.5)
    assert bundle.golden.logits[0, 0] == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_centres", np.zeros((2, 5), np.float32)),
        ("projection", np.eye(3, dtype=np.float32)),
        ("control_distances", np.array([1.5, 2.5])),
        ("mean_centre", np.zeros(4, np.float32)),
    ],
)
def test_training_statistics_of_other_sizes_are_named(path, name, value):
    with np.load(path / TRAINING_STATISTICS) as stored:
        arrays = dict(stored)
    np.savez_compressed(path / TRAINING_STATISTICS, **{**arrays, name: value})
    content = json.loads((path / MANIFEST).read_text())
    content["files"][TRAINING_STATISTICS] = file_sha256(path / TRAINING_STATISTICS)
    (path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"{name} has shape"):
        _ = Bundle.load(path).training_statistics


def test_the_digest_names_the_content_and_not_the_place_or_the_layout(path, tmp_path):
    digest = Bundle.load(path).digest
    moved = path.rename(tmp_path / "moved")
    content = json.loads((moved / MANIFEST).read_text())
    (moved / MANIFEST).write_text(json.dumps(content))
    assert Bundle.load(moved).digest == digest
    content["temperature"] = 2.0
    (moved / MANIFEST).write_text(json.dumps(content))
    assert Bundle.load(moved).digest != digest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_file_that_is_not_the_manifests_is_named(name, how, path):
    if how == "changed":
        (path / name).write_bytes((path / name).read_bytes() + b"0")
    else:
        (path / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1}, "format 1"),
        ({"extra": 1}, "unknown fields: extra"),
        ({"context": "treated"}, "not served"),
        ({"recipe": {"size": 8}}, "malformed"),
        ({"classes": None}, "malformed"),
        ({"files": {}}, f"no sha256 for {CLASSIFY}"),
    ],
)
def test_a_manifest_that_cannot_be_served_says_why(change, words, path):
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**content, **change}))
    with pytest.raises(BundleError, match=words):
        Bundle.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_manifest_that_is_none_is_refused(text, path):
    (path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="manifest"):
        Bundle.load(path)


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.load(tmp_path)
    assert GOLDEN in FILES


def test_recipes_are_named_by_what_they_do():
    same = ImageRecipe(channels=("DNA", "ER"), size=8, mean=(0.1, 0.2), std=(0.3, 0.4))
    assert recipe_digest(same) == recipe_digest(RECIPE)
    assert recipe_digest(ImageRecipe(channels=("ER", "DNA"), size=8)) != recipe_digest(ImageRecipe(("DNA", "ER"), size=8))
