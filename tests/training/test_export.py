"""Export: ONNX equals torch, weights are stored once, and a disagreement is refused."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model.bundle import (
    CLASSIFY,
    GOLDEN_WELLS,
    INPUT_IMAGES,
    INPUT_PRIOR_MEAN,
    INPUT_PRIOR_VARIANCE,
    INPUT_PRIOR_WEIGHT,
    MEASURE,
    OUTPUT_MEAN,
    OUTPUT_VARIANCE,
    WEIGHTS,
    Bundle,
    Measured,
    Parity,
)
from model.errors import BundleError, RunError
from model.network import EPS, BatchNorm, Ensemble, FromContext, Given, NetworkSpec, PriorTensors, ResNet
from model.statistics import BatchNormStatistics, Prior
from service.engine import BundleEngine, replay
from service.runtime import open_runtime
from training.blending import FEWEST_WELLS, MOST_WELLS
from training.contexts import control_statistics, mean_moments
from training.export import FromSums, check_parity, export_bundle, make_golden, measure_float64
from training.release import load_run_plates, release
from training.train import Run, load_network


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return release([run.path], tmp_path_factory.mktemp("bundles") / "cs", name="cs", minimum_control_wells=4)[0]


@pytest.mark.parametrize("sites", [1, 3, 17])
@pytest.mark.parametrize("wells", [None, 1, 5])
def test_measured_statistics_are_a_float64_pass_over_the_same_context(
    run: Run, bundle: Bundle, sites: int, wells: int | None
) -> None:
    images = np.random.default_rng(sites).normal(size=(sites, 5, 64, 64)).astype(np.float32) * 3 + 1
    training = bundle.training_statistics
    prior = Prior.none(bundle.manifest.features) if wells is None else training.prior(wells)
    session = onnxruntime.InferenceSession(bundle.path / MEASURE, providers=["CPUExecutionProvider"])
    given = {INPUT_PRIOR_MEAN: prior.mean, INPUT_PRIOR_VARIANCE: prior.variance, INPUT_PRIOR_WEIGHT: prior.weight}
    mean, variance = session.run([OUTPUT_MEAN, OUTPUT_VARIANCE], {INPUT_IMAGES: images, **given})
    expected_mean, expected_variance = measure_float64(load_network(run), images, None if wells is None else prior)
    deviation = np.sqrt(expected_variance + EPS)
    assert (np.abs(mean - expected_mean) / deviation).max() < 1e-4
    assert (np.abs(np.sqrt(variance + EPS) - deviation) / deviation).max() < 1e-4


@pytest.mark.parametrize("far", [0.0, 3.0])
def test_sums_about_a_centre_do_not_cancel(far: float) -> None:
    """A layer whose mean is a thousand deviations from zero, and three from the centre that training plates gave."""
    layer, rng = BatchNorm(2), np.random.default_rng(0)
    x = torch.from_numpy(1000 + rng.normal(size=(8, 2, 16, 16)).astype(np.float32))
    prior = Prior.none(2)
    none = PriorTensors(*(torch.from_numpy(value) for value in (prior.mean, prior.variance, prior.weight)))
    norm = FromSums(none, torch.full((2,), 1000 + far))
    normalised = norm(x, layer).detach()
    mean, variance = norm.statistics()
    exact = x.double()
    np.testing.assert_allclose(mean.detach(), exact.mean(dim=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance.detach(), exact.var(dim=(0, 2, 3), correction=0), rtol=1e-4)
    assert abs(float(normalised.mean())) < 1e-3
    assert float(normalised.std()) == pytest.approx(1, abs=1e-2)


def test_the_bundle_says_what_it_was_trained_on(run: Run, bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.classes == run.classes
    assert manifest.context == "controls"
    assert manifest.training["plates"] == list(run.split.train)
    assert manifest.recipe == run.recipe
    assert 0.1 < manifest.temperature < 10
    assert "/" not in json.dumps(manifest.to_json()["training"])


def test_weights_are_stored_once_and_no_graph_names_this_machine(run: Run, bundle: Bundle) -> None:
    parameters = sum(p.numel() for p in load_network(run).parameters())
    assert (bundle.path / WEIGHTS).stat().st_size <= 4 * parameters
    for name in (CLASSIFY, MEASURE):
        assert str(Path.cwd()).encode() not in (bundle.path / name).read_bytes()
        onnx.checker.check_model(bundle.path / name)


def test_source_statistics_are_the_mean_moments_of_training_controls(run: Run, bundle: Bundle) -> None:
    plates = load_run_plates(run)
    network = load_network(run)
    measured = [control_statistics(network, plates[name], run.recipe) for name in run.split.train]
    expected = mean_moments(measured)
    source = bundle.training_statistics.source
    np.testing.assert_allclose(source.mean, expected.mean, atol=1e-6)
    between = np.var([plate.mean for plate in measured], axis=0)
    within = np.mean([plate.variance for plate in measured], axis=0)
    np.testing.assert_allclose(source.variance, within + between, rtol=1e-3, atol=1e-6)


def test_the_prior_is_worth_the_same_number_of_wells_in_all_of_a_layer(run: Run, bundle: Bundle) -> None:
    found = bundle.training_statistics.blend_wells
    assert found.shape == (bundle.manifest.features,)
    for layer in load_network(run).layers:
        assert len(set(found[layer.place])) == 1
    assert (found >= FEWEST_WELLS).all()
    assert (found <= MOST_WELLS).all()


@pytest.fixture(scope="module")
def pair(run: Run, second_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two runs as one bundle."""
    out = tmp_path_factory.mktemp("bundles") / "pair"
    return release([run.path, second_run.path], out, name="pair", minimum_control_wells=4)[0]


def test_two_runs_are_one_pair_of_graphs_and_each_answers_as_it_would_alone(
    run: Run, second_run: Run, bundle: Bundle, pair: Bundle
) -> None:
    networks = [load_network(run), load_network(second_run)]
    images = np.random.default_rng(3).normal(size=(6, 5, 64, 64)).astype(np.float32) * 2 + 1
    engine = BundleEngine(pair, open_runtime("cpu", "fp32", 1))
    mean, variance, _ = engine.measure(images)
    logits, embeddings, *_ = engine.classify(images, BatchNormStatistics(mean, variance, sites=6, wells=6))
    assert logits.shape == (6, 2, len(run.classes))
    features, dim = bundle.manifest.features, bundle.manifest.embedding_dim
    assert (pair.manifest.members, pair.manifest.features, pair.manifest.embedding_dim) == (2, 2 * features, 2 * dim)
    for number, network in enumerate(networks):
        norm = FromContext()
        with torch.no_grad():
            network(torch.from_numpy(images), norm)
            expected, embedding = network(torch.from_numpy(images), Given(*norm.statistics()))
        own = slice(number * features, (number + 1) * features)
        np.testing.assert_allclose(mean[own], norm.statistics()[0].numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(logits[:, number], expected.numpy(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(embeddings[:, number * dim : (number + 1) * dim], embedding.numpy(), rtol=1e-3, atol=1e-3)


def test_a_pair_is_replayed_and_a_replay_of_one_member_is_not_taken_for_it(pair: Bundle) -> None:
    engine = BundleEngine(pair, open_runtime("cpu", "fp32", 1))
    replay(engine, pair)
    golden = pair.golden
    measured = Measured(golden.bn_mean, golden.bn_var, golden.embedding)
    with pytest.raises(BundleError, match=r"logits of shape \(4, 1, 8\); the golden has \(4, 2, 8\)"):
        Parity.of(golden, measured, measured, golden.logits[:, :1], golden.embedding)
    with pytest.raises(BundleError, match=r"embedding of measuring of shape \(3,"):
        Parity.of(golden, measured._replace(embeddings=golden.embedding[:3]), measured, golden.logits, golden.embedding)


def test_an_ensembles_weights_are_stored_once_and_its_runs_are_told(run: Run, second_run: Run, pair: Bundle) -> None:
    parameters = sum(p.numel() for path in (run, second_run) for p in load_network(path).parameters())
    assert (pair.path / WEIGHTS).stat().st_size <= 4 * parameters
    assert [member["seed"] for member in pair.manifest.training["members"]] == [1, 2]
    assert pair.manifest.training["plates"] == list(run.split.train)


def test_an_ensembles_source_statistics_are_each_members_own(bundle: Bundle, pair: Bundle) -> None:
    features = bundle.manifest.features
    source = pair.training_statistics.source
    np.testing.assert_allclose(source.mean[:features], bundle.training_statistics.source.mean, rtol=1e-4, atol=1e-5)
    assert source.sites == bundle.training_statistics.source.sites


def test_an_erm_bundle_serves_its_running_statistics(erm_run: Run, tmp_path: Path) -> None:
    bundle, _ = release([erm_run.path], tmp_path / "erm", name="erm", minimum_control_wells=4)
    assert bundle.manifest.context == "source"
    running, _ = load_network(erm_run).running_statistics()
    np.testing.assert_allclose(bundle.training_statistics.source.mean, running.numpy())


def test_a_graph_that_disagrees_with_torch_is_refused(run: Run, bundle: Bundle) -> None:
    network, images = Ensemble([load_network(run)]), bundle.golden.images
    (member,) = network.networks
    prior, other = (bundle.training_statistics.prior(wells) for wells in (GOLDEN_WELLS, 2))
    assert check_parity(bundle.path, make_golden(network, images, prior), prior).logits < 1e-4
    with pytest.raises(BundleError, match="disagrees with torch on the golden images: statistics"):
        check_parity(bundle.path, make_golden(network, images, other), prior)
    with torch.no_grad():
        member.classifier.bias += 0.01
    with pytest.raises(BundleError, match=r"logits by 1\.0e-02"):
        check_parity(bundle.path, make_golden(network, images, prior), prior)
    with torch.no_grad():
        member.classifier.bias -= 0.01
        member.bn1.bias += 0.01
    with pytest.raises(BundleError, match="disagrees with torch"):
        check_parity(bundle.path, make_golden(network, images, prior), prior)


def without_graphs(monkeypatch: pytest.MonkeyPatch, fail: Callable[[Path], None]) -> None:
    """Have an export fail where it has written the graphs."""

    def write(_network: Ensemble, path: Path, _example: object, _training: object) -> None:
        (path / CLASSIFY).write_bytes(b"half")
        fail(path)

    monkeypatch.setattr("training.export.write_graphs", write)


def exported(path: Path) -> None:
    nothing: Any = None
    network = Ensemble([ResNet(NetworkSpec(channels=1, classes=2, width=1))])
    export_bundle(network, path, nothing, nothing, nothing, np.zeros((2, 1, 32, 32), np.float32))


def test_an_export_that_was_cut_short_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    without_graphs(monkeypatch, full)
    with pytest.raises(OSError, match="No space left on device"):
        exported(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_an_export_clears_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []

    def look(path: Path) -> None:
        found.append([file.name for file in path.iterdir()])
        assert path.parent == tmp_path
        (tmp_path / path.name / "more").write_bytes(b"killed here")
        raise StoppedError

    without_graphs(monkeypatch, look)
    monkeypatch.setattr("training.export.shutil.rmtree", lambda *_, **__: None)
    for _ in range(2):
        with pytest.raises(StoppedError):
            exported(tmp_path / "bundle")
    assert found == [[CLASSIFY], [CLASSIFY]]
    assert not (tmp_path / "bundle").exists()


class StoppedError(Exception):
    """The export stops here."""


def test_of_two_exports_into_one_directory_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(_path: Path) -> None:
        exported(tmp_path / "bundle")

    without_graphs(monkeypatch, again)
    with pytest.raises(RunError, match="bundle is being written by another process: wait for it, or name another directory"):
        exported(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
