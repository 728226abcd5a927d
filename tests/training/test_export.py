"""Export: ONNX equals torch, weights are stored once, and a disagreement is refused."""

import json
from pathlib import Path

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
)
from model.errors import BundleError
from model.network import EPS
from model.statistics import Prior
from training.blending import FEWEST_WELLS, MOST_WELLS
from training.contexts import control_statistics, mean_moments
from training.export import check_parity, make_golden, measure_float64
from training.release import load_run_plates, release, served_context
from training.train import Run, load_network


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return release(run.path, tmp_path_factory.mktemp("bundles") / "cs", name="cs", minimum_control_wells=4)[0]


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


def test_an_erm_bundle_serves_its_running_statistics(erm_run: Run, tmp_path: Path) -> None:
    bundle, _ = release(erm_run.path, tmp_path / "erm", name="erm", minimum_control_wells=4)
    assert bundle.manifest.context == "source"
    running, _ = load_network(erm_run).running_statistics()
    np.testing.assert_allclose(bundle.training_statistics.source.mean, running.numpy())


def test_a_graph_that_disagrees_with_torch_is_refused(run: Run, bundle: Bundle) -> None:
    network, images = load_network(run), bundle.golden.images
    prior, other = (bundle.training_statistics.prior(wells) for wells in (GOLDEN_WELLS, 2))
    assert check_parity(bundle.path, make_golden(network, images, prior), prior).logits < 1e-4
    with pytest.raises(BundleError, match="disagrees with torch on the golden images: statistics"):
        check_parity(bundle.path, make_golden(network, images, other), prior)
    with torch.no_grad():
        network.classifier.bias += 0.01
    with pytest.raises(BundleError, match=r"logits by 1\.0e-02"):
        check_parity(bundle.path, make_golden(network, images, prior), prior)
    with torch.no_grad():
        network.classifier.bias -= 0.01
        network.bn1.bias += 0.01
    with pytest.raises(BundleError, match="disagrees with torch"):
        check_parity(bundle.path, make_golden(network, images, prior), prior)


def test_baselines_are_not_served() -> None:
    from training.methods import make_method

    for name in ("instancenorm", "arm-bn", "erm-zscore"):
        with pytest.raises(ValueError, match="the service serves erm and cs-arm-bn"):
            served_context(make_method(name))
