"""What graphs become computes what they did."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.precision import RoundedHalves
from model.bundle import CLASSIFY, MEASURE, WEIGHTS, Bundle
from model.errors import BundleError
from model.statistics import BatchNormStatistics
from service.engine import BundleEngine
from service.graphs import Graph, Weights, as_convolution, as_products, identity
from service.runtime_onnx import OnnxRuntime


@pytest.fixture(scope="module")
def tiny(tiny_bundle_path):
    return Bundle.load(tiny_bundle_path)


def session(content, tiny):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tiny.path))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def nodes(content):
    return onnx.ModelProto.FromString(content).graph.node


def kinds(content):
    return [node.op_type for node in nodes(content)]


@pytest.fixture(scope="module")
def given(tiny):
    rng = np.random.default_rng(0)
    features = tiny.manifest.features
    mean, variance = rng.normal(size=features).astype(np.float32), rng.uniform(0.5, 2, features).astype(np.float32)
    images = rng.normal(size=(5, 3, 64, 64)).astype(np.float32)
    return images, BatchNormStatistics(mean, variance, sites=5, wells=5)


CONVOLUTIONS = {as_convolution: 1, as_products: 2}
FORMS = pytest.mark.parametrize("form", CONVOLUTIONS)


@FORMS
def test_a_scale_and_a_shift_are_what_batch_normalisation_is(tiny, given, form):
    images, statistics = given
    feeds = {"images": images, "bn_mean": statistics.mean, "bn_var": statistics.variance}
    plain, changed = (tiny.path / CLASSIFY).read_bytes(), Graph.read(tiny.path / CLASSIFY).with_scale_and_shift(form).content
    layers = kinds(plain).count("BatchNormalization")
    assert layers > 10
    assert "BatchNormalization" not in kinds(changed)
    assert kinds(changed).count("Conv") == kinds(plain).count("Conv") + CONVOLUTIONS[form] * layers
    expected, found = (session(content, tiny).run(None, feeds) for content in (plain, changed))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


@FORMS
def test_what_a_node_adds_to_the_variance_is_kept(tiny, given, tmp_path, form):
    images, statistics = given
    model = onnx.ModelProto.FromString((tiny.path / CLASSIFY).read_bytes())
    for node in model.graph.node:
        for item in node.attribute:
            if item.name == "epsilon":
                item.f = 0.5
    (tmp_path / CLASSIFY).write_bytes(model.SerializeToString())
    feeds = {"images": images, "bn_mean": statistics.mean, "bn_var": statistics.variance}
    contents = (tmp_path / CLASSIFY).read_bytes(), Graph.read(tmp_path / CLASSIFY).with_scale_and_shift(form).content
    expected, found = (session(content, tiny).run(["logits"], feeds)[0] for content in contents)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = session((tiny.path / CLASSIFY).read_bytes(), tiny).run(["logits"], feeds)[0]
    assert np.abs(found - other).max() > 1e-3


def run_folded(folded, feeds, tiny):
    fold, classify = (session(graph.content, tiny) for graph in (folded.fold, folded.classify))
    names = [output.name for output in fold.get_outputs()]
    made = dict(zip(names, fold.run(names, {name: feeds[name] for name in ("bn_mean", "bn_var")}), strict=True))
    return classify.run(None, {"images": feeds["images"], **made}), made


def test_statistics_are_folded_into_the_convolutions_before_them(tiny, given):
    images, statistics = given
    feeds = {"images": images, "bn_mean": statistics.mean, "bn_var": statistics.variance}
    plain, folded = (tiny.path / CLASSIFY).read_bytes(), Graph.read(tiny.path / CLASSIFY).folded()
    assert "BatchNormalization" not in kinds(folded.classify.content)
    assert kinds(folded.classify.content).count("Conv") == kinds(plain).count("Conv")
    assert "Conv" not in kinds(folded.fold.content)
    found, _ = run_folded(folded, feeds, tiny)
    for one, other in zip(session(plain, tiny).run(None, feeds), found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


def test_in_half_precision_layers_are_folded_in_single_and_rounded_but_for_those_that_take_images(tiny, given):
    images, statistics = given
    feeds = {"images": images, "bn_mean": statistics.mean, "bn_var": statistics.variance}
    graph = Graph.read(tiny.path / CLASSIFY)
    exact, weights = run_folded(graph.folded(), feeds, tiny)
    rounded, halves = run_folded(graph.folded(half=True), feeds, tiny)
    assert list(halves) == list(weights)
    (first,) = (node for node in nodes(graph.folded(half=True).classify.content) if "images" in node.input)
    for name, weight in weights.items():
        expected = weight if name in first.input else weight.astype(np.float16)
        assert halves[name].dtype == expected.dtype
        np.testing.assert_array_equal(halves[name], expected)
    assert rounded[0].dtype == np.float32
    assert np.abs(rounded[0] - rounded[0].astype(np.float16)).max() > 0, "logits are not rounded"
    for one, other in zip(exact, rounded, strict=True):
        assert 1e-5 < np.abs(other - one).max() < 0.02 * np.abs(one).max()


@pytest.mark.parametrize("offset", [0, 10, 300])
def test_halves_hold_what_a_plate_far_from_training_is_once_it_is_normalised(tiny, given, offset):
    images, shifted = given[0], given[0] + np.float32(offset)
    engine = BundleEngine(tiny, OnnxRuntime(1))
    mean, variance, _ = engine.measure(shifted)
    feeds = {"images": shifted, "bn_mean": mean, "bn_var": variance}
    exact = engine.classify(shifted, BatchNormStatistics(mean, variance, sites=len(images), wells=1))
    found = RoundedHalves(Graph.read(tiny.path / CLASSIFY)).run(["logits", "embedding"], feeds)
    for one, other in zip(exact[:2], found, strict=True):
        assert 1e-5 < np.abs(other - one).max() < 0.03 * np.abs(one).max()


def test_in_half_precision_a_site_that_halves_may_not_hold_has_no_answer_and_others_have(tiny, given):
    images, statistics = given
    feeds = {"images": images.copy(), "bn_mean": statistics.mean, "bn_var": statistics.variance}
    half = Graph.read(tiny.path / CLASSIFY).folded(half=True)
    expected, _ = run_folded(half, feeds, tiny)
    for place, factor in ((1, 1e4), (3, 1e30)):
        feeds["images"][place] *= np.float32(factor)
    found, _ = run_folded(half, feeds, tiny)
    for one, other in zip(expected, found, strict=True):
        assert np.isnan(other[[1, 3]]).all()
        np.testing.assert_allclose(other[[0, 2, 4]], one[[0, 2, 4]], atol=1e-5)


def test_a_network_that_does_not_begin_with_convolutions_is_not_run_in_half_precision(tiny):
    graph = Graph.read(tiny.path / CLASSIFY)
    model = onnx.ModelProto.FromString(graph.content)
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["images"], ["turned"]))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["turned" if name == "images" else name for name in node.input]
    turned = replace(graph, content=model.SerializeToString())
    turned.folded()
    with pytest.raises(BundleError, match=r"classify\.onnx cannot be loaded: .*cannot be run in fp16"):
        turned.folded(half=True)


def small(bias, *, used_twice):
    """A convolution with a bias of its own and batch normalisation after it, or where the convolution is used twice."""
    make, rng = onnx.helper, np.random.default_rng(1)

    def value(name, *shape):
        return make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    made = [
        make.make_node("Conv", ["images", "w", "b"], ["x"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make.make_node("BatchNormalization", ["x", "gain", "offset", "bn_mean", "bn_var"], ["y"], epsilon=0.25),
        make.make_node("Add", ["y", "x"] if used_twice else ["y", "y"], ["logits"]),
        make.make_node("Relu", ["logits"], ["embedding"]),
    ]
    tensors = {"w": rng.normal(size=(4, 3, 3, 3)), "b": bias, "gain": rng.normal(size=4), "offset": rng.normal(size=4)}
    initializers = [onnx.numpy_helper.from_array(tensor.astype(np.float32), name) for name, tensor in tensors.items()]
    taken = [value("images", "sites", 3, 8, 8), value("bn_mean", 4), value("bn_var", 4)]
    given = [value(name, "sites", 4, 4, 4) for name in ("logits", "embedding")]
    graph = make.make_graph(made, "small", taken, given, initializers)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10).SerializeToString()


@pytest.mark.parametrize("used_twice", [False, True])
def test_a_convolutions_own_bias_is_folded_and_one_that_is_needed_as_it_is_stays(tiny, tmp_path, used_twice):
    rng = np.random.default_rng(0)
    content = small(rng.normal(size=4), used_twice=used_twice)
    feeds = {
        "images": rng.normal(size=(2, 3, 8, 8)).astype(np.float32),
        "bn_mean": rng.normal(size=4).astype(np.float32),
        "bn_var": rng.uniform(0.5, 2, 4).astype(np.float32),
    }
    folded = Graph(CLASSIFY, Weights(tmp_path), content).folded()
    assert kinds(folded.classify.content).count("Conv") == 1 + used_twice
    found, _ = run_folded(folded, feeds, tiny)
    for one, other in zip(session(content, tiny).run(None, feeds), found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


@FORMS
def test_a_graph_that_measures_does_so_as_before(tiny, given, form):
    images, _ = given
    none = np.zeros(tiny.manifest.features, np.float32)
    feeds = {"images": images, "prior_mean": none, "prior_var": none + 1, "prior_weight": none}
    contents = (tiny.path / MEASURE).read_bytes(), Graph.read(tiny.path / MEASURE).with_scale_and_shift(form).content
    for one, other in zip(*(session(content, tiny).run(None, feeds) for content in contents), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_a_file_that_is_no_graph_is_named(tmp_path):
    (tmp_path / CLASSIFY).write_bytes(b"classify.onnx")
    with pytest.raises(BundleError, match=r"classify\.onnx cannot be loaded"):
        Graph.read(tmp_path / CLASSIFY)


def test_a_graph_that_measures_about_other_means_finds_the_same(tiny, given):
    images, _ = given
    graph = Graph.read(tiny.path / MEASURE)
    np.testing.assert_array_equal(graph.centre, tiny.training_statistics.source.mean)
    none = np.zeros(tiny.manifest.features, np.float32)
    feeds = {"images": images, "prior_mean": none, "prior_var": none + 1, "prior_weight": none}
    moved = graph.with_centre(graph.centre + 1)
    np.testing.assert_array_equal(moved.centre, graph.centre + 1)
    for one, other in zip(*(session(item.content, tiny).run(None, feeds) for item in (graph, moved)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    with pytest.raises(BundleError, match="no constant centre"):
        _ = Graph.read(tiny.path / CLASSIFY).centre


def test_a_graph_without_batch_normalisation_stays_as_it_is(tiny):
    once = Graph.read(tiny.path / CLASSIFY).with_scale_and_shift(as_convolution)
    assert once.with_scale_and_shift(as_convolution) == once


def test_a_graph_that_is_given_its_weights_needs_no_other_file(tiny, given):
    images, statistics = given
    feeds = {"images": images, "bn_mean": statistics.mean, "bn_var": statistics.variance}
    expected = session((tiny.path / CLASSIFY).read_bytes(), tiny).run(None, feeds)
    content, weights = Graph.read(tiny.path / CLASSIFY).with_weights_as_inputs()
    model = onnx.ModelProto.FromString(content)
    inputs = [item for item in model.graph.input if item.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items())
    whole = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for one, other in zip(expected, whole.run(None, feeds), strict=True):
        np.testing.assert_array_equal(other, one)


def test_weights_are_of_the_bundles_file_and_all_of_them(tiny, tmp_path):
    for name in (CLASSIFY, WEIGHTS):
        (tmp_path / name).write_bytes((tiny.path / name).read_bytes())
    graph = Graph.read(tmp_path / CLASSIFY)
    loaded = graph.loaded()
    model = onnx.ModelProto.FromString(graph.content)
    outside = [tensor for tensor in model.graph.initializer if onnx.external_data_helper.uses_external_data(tensor)]
    assert len(outside) == len(loaded.constants) > 10
    for tensor in outside:
        expected = onnx.numpy_helper.to_array(tensor, base_dir=str(tmp_path))
        np.testing.assert_array_equal(loaded.constants[tensor.name], expected)
    for item in outside[0].external_data:
        if item.key == "location":
            item.value = "/etc/hostname"
    with pytest.raises(BundleError, match=r"in /etc/hostname; expected float32 in weights\.bin"):
        replace(graph, content=model.SerializeToString()).loaded()
    whole = (tiny.path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"weights\.bin ends before what classify\.onnx takes from it"):
        Graph.read(tmp_path / CLASSIFY).loaded()


def test_weights_are_read_once_by_graphs_that_are_loaded_side_by_side(tiny, tmp_path):
    shutil.copytree(tiny.path, tmp_path, dirs_exist_ok=True)
    weights = Weights(tmp_path)
    measure, classify = (Graph.read(tmp_path / name, weights) for name in (MEASURE, CLASSIFY))
    loaded = [measure.loaded(), classify.loaded(), classify.folded().fold.loaded()]
    ends = [next(iter(each.constants.values())).base for each in loaded]
    assert ends[0] is ends[1] is ends[2]
    name, before = next((name, value.copy()) for name, value in loaded[1].constants.items())
    content = np.fromfile(tmp_path / WEIGHTS, np.float32) + 1
    content.tofile(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(classify.loaded().constants[name], before)
    del loaded, ends
    np.testing.assert_array_equal(classify.loaded().constants[name], before + 1)


def test_what_a_pass_holds_for_each_site_is_followed_through_the_graph(tmp_path):
    make, number = onnx.helper, onnx.TensorProto.FLOAT

    def value(name, *shape):
        return make.make_tensor_value_info(name, number, shape)

    nodes = [
        make.make_node("Relu", ["images"], ["a"]),
        make.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        make.make_node("Relu", ["b"], ["c"]),
        make.make_node("Add", ["b", "c"], ["logits"]),
    ]
    images = value("images", "sites", 3, 8, 8)
    graph = make.make_graph(nodes, "small", [images], [value("logits", "sites", 3, 4, 4)])
    content = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)]).SerializeToString()
    assert Graph("small", Weights(tmp_path), content).bytes_a_site() == 4 * 3 * (64 + 64), "a while images are still there"


@pytest.mark.parametrize("rank", ["known", "computed"])
def test_shapes_that_a_graph_computes_are_followed_too(rank, tmp_path):
    make, number = onnx.helper, onnx.TensorProto.FLOAT
    whole = [make.make_node("Shape", ["images"], ["shape"])]
    part = [
        make.make_node("Shape", ["images"], ["all"]),
        make.make_node("Shape", ["all"], ["rank"]),
        make.make_node("Constant", [], ["first"], value_ints=[0]),
        make.make_node("Slice", ["all", "first", "rank"], ["shape"]),
    ]
    nodes = [
        *(whole if rank == "known" else part),
        make.make_node("Reshape", ["images", "shape"], ["a"]),
        make.make_node("Concat", ["a", "a", "a"], ["b"], axis=1),
        make.make_node("GlobalAveragePool", ["b"], ["logits"]),
    ]
    images, logits = ("images", number, ["sites", 3, 8, 8]), ("logits", number, None)
    graph = make.make_graph(nodes, "small", *([make.make_tensor_value_info(*value)] for value in (images, logits)))
    content = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)]).SerializeToString()
    assert Graph("small", Weights(tmp_path), content).bytes_a_site() == 4 * 64 * (3 + 9), "a and b"


def test_a_bundles_pass_is_as_large_whichever_way_it_is_followed(tiny, demo_bundles, monkeypatch):
    for folder in (tiny.path, demo_bundles / "cs-arm-bn"):
        graph = Graph.read(folder / MEASURE)
        found = graph.bytes_a_site()
        for known in (True, False):
            monkeypatch.setattr("service.graphs._is_known", lambda _, known=known: known)
            assert graph.bytes_a_site() == found
        monkeypatch.undo()


def test_a_graph_of_another_network_says_what_it_takes(tiny, tmp_path):
    (tmp_path / CLASSIFY).write_bytes((tiny.path / MEASURE).read_bytes())
    with pytest.raises(BundleError, match=r"classify\.onnx takes images, prior_mean.*expected images, bn_mean, bn_var"):
        Graph.read(tmp_path / CLASSIFY)


def test_a_device_is_tried_by_a_graph_that_gives_back_what_it_takes():
    tried = onnxruntime.InferenceSession(identity(), providers=["CPUExecutionProvider"])
    (found,) = tried.run(None, {"taken": np.array([3.0], np.float32)})
    assert found == 3
