"""The real engine on a real exported bundle."""

import asyncio
import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.testing import assert_allclose
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from model.bundle import CLASSIFY, GOLDEN, MANIFEST, MEASURE, WEIGHTS, Bundle, file_sha256
from model.errors import BundleError
from model.statistics import BatchNormStatistics, Prior, blended
from service.app import compose
from service.engine import BundleEngine, Classified, _Asked, open_engine, replay
from service.errors import BusyError, MemoryShortError, StartError
from service.graphs import Graph
from service.runtime import Kept, open_runtime
from service.runtime_onnx import CPU, GpuRuntime, OnnxRuntime, OnnxSession
from service.runtime_openvino import OpenVinoRuntime
from service.settings import Settings
from tests.service.plates import FakeEngine, tiff

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bundles" / "cs-arm-bn"


@pytest.fixture(scope="module")
def tiny(tiny_bundle_path):
    return Bundle.load(tiny_bundle_path)


RUNTIMES = {
    "onnxruntime": lambda: OnnxRuntime(1),
    "onnxruntime on two threads": lambda: OnnxRuntime(2),
    "onnxruntime, statistics as inputs": lambda: OnnxRuntime(2, kept=Kept(most_bytes=0)),
    "a gpu's, on a cpu": lambda: GpuRuntime("fp32", 1, device="cpu"),
    "openvino": lambda: openvino_runtime(1),
    "openvino on two threads": lambda: openvino_runtime(2),
}


def openvino_runtime(threads):
    """As for bf16, in fp32: few processors have bf16."""
    return OpenVinoRuntime("fp32", threads, measuring=OnnxRuntime(threads))


@pytest.fixture(scope="module", params=RUNTIMES)
def engine(request, tiny):
    return BundleEngine(tiny, RUNTIMES[request.param]())


def plain_engine(bundle):
    return BundleEngine(bundle, open_runtime("cpu", "fp32", 1))


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 64, 64)).astype(np.float32)


def test_the_engine_agrees_with_the_golden_images(engine, tiny):
    replay(engine, tiny)


def test_the_engine_says_what_it_runs_on(engine):
    assert engine.provider in ("CPUExecutionProvider", "OpenVINO")
    assert engine.precision == "fp32"


@pytest.mark.parametrize("source", ["tiny", "example"], ids=["small enough to be read", "onnxruntime would map the file"])
def test_weights_are_found_whatever_the_folders_name_and_kept_whatever_becomes_of_them(source, tiny, tmp_path, monkeypatch):
    tiny = tiny if source == "tiny" else Bundle.load(EXAMPLE)
    served = tmp_path / "a bundle, für Platten"
    shutil.copytree(tiny.path, served)
    monkeypatch.chdir(tmp_path)
    engines = [BundleEngine(Bundle.load(Path(served.name)), make()) for make in RUNTIMES.values()]
    monkeypatch.chdir("/")
    for engine in engines:
        engine.require_loaded()
    (served / WEIGHTS).write_bytes(bytes((served / WEIGHTS).stat().st_size))
    for engine in engines:
        replay(engine, tiny)


def test_runtimes_agree(tiny):
    engines = [BundleEngine(tiny, RUNTIMES[name]()) for name in ("onnxruntime", "openvino")]
    for one, other in zip(*(engine.measure(images(12)) for engine in engines), strict=True):
        assert_allclose(other, one, rtol=1e-4, atol=1e-4)


def test_the_pass_that_measures_gives_the_embeddings_that_classifying_gives(engine, tiny):
    context, training = images(12), tiny.training_statistics
    for prior in (None, training.prior(2)):
        mean, variance, embeddings = engine.measure(context, prior)
        classified = engine.classify(context, BatchNormStatistics(mean, variance, sites=12, wells=6))
        assert_allclose(embeddings, classified.embeddings, atol=1e-4)


def test_statistics_and_answers_are_the_same_bits_every_time(engine, tiny):
    context, well = images(24), images(9, seed=1)
    first_mean, first_variance, _ = engine.measure(context)
    statistics = BatchNormStatistics(first_mean, first_variance, sites=24, wells=6)
    assert first_mean.shape == first_variance.shape == (tiny.manifest.features,)
    logits, embeddings, *_ = engine.classify(well, statistics)
    assert (logits.shape, embeddings.shape) == ((9, 1, 3), (9, tiny.manifest.embedding_dim))
    for shift in range(3):
        moved = np.frombuffer(b"\0" * 4 * shift + context.tobytes(), np.float32, offset=4 * shift).reshape(context.shape)
        mean, variance, _ = engine.measure(moved)
        assert mean.tobytes() == first_mean.tobytes()
        assert variance.tobytes() == first_variance.tobytes()
        engine.classify(images(5 + shift, seed=2), statistics)
        assert engine.classify(well.copy(), statistics)[0].tobytes() == logits.tobytes()


def statistics_of(seed):
    rng = np.random.default_rng(seed)

    def of(tiny):
        features = tiny.manifest.features
        mean, variance = rng.normal(size=features), rng.uniform(0.5, 2, features)
        return BatchNormStatistics(mean.astype(np.float32), variance.astype(np.float32), sites=6, wells=6)

    return of


def test_a_context_far_from_training_is_measured_about_its_own_means(tiny, monkeypatch, caplog):
    engine = plain_engine(tiny)
    training = tiny.training_statistics
    expected = {wells: engine.measure(images(8), wells and training.prior(wells)) for wells in (None, 2)}
    assert "measured again" not in caplog.text
    monkeypatch.setattr("service.engine.FAR", 1e-9)
    with caplog.at_level("INFO", logger="anchorwell"):
        for wells, plain in expected.items():
            for one, other in zip(plain, engine.measure(images(8), wells and training.prior(wells)), strict=True):
                assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("measured again") == 2


def test_a_far_context_is_not_measured_with_weights_that_are_not_those_that_were_loaded(tiny, tmp_path, monkeypatch):
    served = tmp_path / "served"
    shutil.copytree(tiny.path, served)
    (tmp_path / "current").symlink_to(served)
    engine = plain_engine(Bundle.load(tmp_path / "current"))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path)
    expected = engine.measure(images(8))
    monkeypatch.setattr("service.engine.FAR", 1e-9)
    assert_allclose(engine.measure(images(8)).mean, expected.mean, rtol=1e-4, atol=1e-5)
    content = bytearray((served / WEIGHTS).read_bytes())
    content[:4] = b"else"
    (served / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.bin is no longer what was there"):
        engine.measure(images(8))


class Coarse:
    """A runtime of less precision: what classifies is off by a hundredth."""

    provider, precision, passes_at_once, pass_sizes = "CPUExecutionProvider", "bf16", 1, (1,)

    def __init__(self):
        self.real = OnnxRuntime(1)

    def session(self, graph, *, measures=False):
        real = self.real.session(graph, measures=measures)

        class Session:
            def prepare(self, statistics):
                return real.prepare(statistics)

            def run(self, outputs, given):
                return [value if measures else value * np.float32(1.01) for value in real.run(outputs, given)]

        return Session()


def test_controls_are_embedded_in_the_precision_that_wells_are(tiny):
    engine, exact, context = BundleEngine(tiny, Coarse()), BundleEngine(tiny, OnnxRuntime(1)), images(40)
    found, expected = engine.measure(context), exact.measure(context)
    assert (found.mean.tobytes(), found.variance.tobytes()) == (expected.mean.tobytes(), expected.variance.tobytes())
    assert_allclose(found.embeddings, expected.embeddings * 1.01, rtol=1e-4, atol=1e-4)


def test_a_prior_is_blended_inside_the_pass_and_one_without_weight_changes_no_bit(engine, tiny):
    context, training = images(8), tiny.training_statistics
    plain = engine.measure(context)
    for found, expected in zip(engine.measure(context, Prior.none(tiny.manifest.features)), plain, strict=True):
        assert found.tobytes() == expected.tobytes()
    few, many = (engine.measure(context, training.prior(wells)) for wells in (1, 1_000_000))
    assert_allclose(many[0], plain[0], atol=1e-3)
    assert np.abs(few[0] - plain[0]).max() > 0.01
    after = blended(*plain[:2], *vars(training.prior(1)).values())
    first, deeper = slice(0, 4), slice(4, None)
    assert_allclose(few[0][first], after[0][first], atol=1e-5)
    assert np.abs(few[0][deeper] - after[0][deeper]).max() > 1e-3, "later layers see inputs normalised by the blend"


def test_a_replay_that_does_not_blend_says_so(bundle):
    engine = FakeEngine()
    measure = engine.measure
    engine.measure = lambda given, _prior=None: measure(given)
    with pytest.raises(BundleError, match="disagrees with torch on the golden images: statistics"):
        replay(engine, bundle)


def test_cuda_is_refused_where_there_is_none():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(StartError, match="no CUDA"):
        open_runtime("cuda", "fp32", 1)
    assert open_runtime("auto", "fp32", 1).provider == "CPUExecutionProvider"


def test_where_openvino_is_not_installed_bf16_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "service.runtime_openvino", None)
    assert open_runtime("cpu", "fp32", 1).provider == "CPUExecutionProvider"
    with pytest.raises(StartError, match="install the extra 'openvino'"):
        open_runtime("cpu", "bf16", 1)


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch):
    monkeypatch.setattr("openvino.Core.get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(StartError, match="no bfloat16"):
        open_runtime("cpu", "bf16", 1)


def test_bf16_answers_nearly_as_fp32_does(tiny):
    try:
        runtime = open_runtime("cpu", "bf16", 1)
    except StartError:
        pytest.skip("this processor has no bfloat16")
    half = BundleEngine(tiny, runtime)
    assert half.precision == "bf16"
    replay(half, tiny)
    exact, statistics = plain_engine(tiny), statistics_of(1)(tiny)
    for found, expected in zip(half.measure(images(12))[:2], exact.measure(images(12))[:2], strict=True):
        assert found.tobytes() == expected.tobytes(), "statistics are measured in fp32"
    found, expected = (engine.classify(images(9), statistics).logits for engine in (half, exact))
    assert 1e-4 < np.abs(found - expected).max() < 0.2 * expected.std()


class Gpu:
    """A runtime of large passes, as a GPU's, whose sessions have the memory for so many sites; ``busy`` holds them up."""

    provider, precision, passes_at_once = "CPUExecutionProvider", "fp32", 1

    def __init__(self, memory=100, pass_sizes=(1, 2, 4, 8)):
        self.memory, self.pass_sizes, self.asked = memory, pass_sizes, []
        self.busy = threading.Lock()
        self.real = OnnxRuntime(1)

    def session(self, graph, *, measures=False):
        runtime, real = self, self.real.session(graph, measures=measures)

        class Session:
            def prepare(self, statistics):
                return real.prepare(statistics)

            def run(self, outputs, given):
                runtime.asked.append(len(given["images"]))
                with runtime.busy:
                    if runtime.asked[-1] > runtime.memory:
                        raise MemoryError
                    return real.run(outputs, given)

        return Session()


class Spied:
    """A session of onnxruntime that counts how often it is run; with ``memory`` off there is none for it."""

    def __init__(self, session):
        self.session, self.runs, self.memory = session, 0, True

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run_with_iobinding(self, *given):
        self.runs += 1
        if not self.memory:
            raise RuntimeError("CUDA failure 2: out of memory")
        self.session.run_with_iobinding(*given)


def test_sessions_have_weights_of_their_own(tiny, monkeypatch):
    """Onnxruntime's values lie where numpy's do, which is free again when a session was made."""
    handed, graph = [], Graph.read(tiny.path / CLASSIFY)
    make = onnxruntime.InferenceSession

    def made(*given, **also):
        session = make(*given, **also)
        for value in handed:
            value._numpy_obj[...] = 7
        handed.clear()
        return session

    value = onnxruntime.OrtValue.ortvalue_from_numpy
    expected = OnnxRuntime(1).session(graph).run(["logits"], given_to_classify(0, tiny))[0]
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "InferenceSession", made)
        patched.setattr(
            onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array: handed.append(value(array.copy())) or handed[-1]
        )
        for runtime in (OnnxRuntime(1), OnnxRuntime(1, kept=Kept(0)), GpuRuntime("fp32", 1, device="cpu")):
            found = runtime.session(graph).run(["logits"], given_to_classify(0, tiny))[0]
            assert_allclose(found, expected, atol=1e-4)


class Making(OnnxRuntime):
    """A runtime with room for the networks of two batches; counts what it makes, and fails when told."""

    def __init__(self, each):
        super().__init__(1, kept=Kept(2 * each, batches_at_once=2))
        self.made, self.memory, self.waits = 0, True, threading.Event()
        self.waits.set()

    def _made(self, graph, threads=1):
        if "fold" in self.__dict__:
            self.made += 1
            self.waits.wait(10)
            if not self.memory:
                raise MemoryError
        return super()._made(graph, threads)


def bytes_of_a_network(graph):
    """Convolutions that statistics are folded into, what classifies behind them, and what onnxruntime has beside weights."""
    folded = graph.folded()
    head = folded.classify.loaded(*folded.given).constants
    return folded.bytes_given + sum(weight.nbytes for weight in head.values()) + (2 << 20)


@pytest.fixture
def making(tiny, monkeypatch):
    monkeypatch.setattr("service.runtime_onnx.OWN_NETWORKS", 2)
    graph = Graph.read(tiny.path / CLASSIFY)
    runtime = Making(bytes_of_a_network(graph))
    session = runtime.session(graph)
    runtime.fold = session
    return runtime, session


def test_a_batchs_network_is_made_once_and_those_of_the_last_batches_are_kept(making, tiny):
    runtime, session = making
    asked = [given_to_classify(seed, tiny) for seed in range(3)]
    shared = OnnxRuntime(1, kept=Kept(0)).session(Graph.read(tiny.path / CLASSIFY))
    assert isinstance(shared, OnnxSession)
    first = {}
    for number, made in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4), (2, 5)):
        (logits,) = session.run(["logits"], {name: value.copy() for name, value in asked[number].items()})
        assert_allclose(logits, shared.run(["logits"], asked[number])[0], atol=1e-4)
        assert first.setdefault(number, logits).tobytes() == logits.tobytes(), "made anew, it gives the same bits"
        assert runtime.made == made
    changed = {**asked[2], "bn_var": asked[2]["bn_var"] * np.float32(1.001)}
    assert (session.run(["logits"], changed)[0] != first[2]).any()


def test_who_asks_while_a_batchs_network_is_made_waits_for_it_and_others_do_not(making, tiny):
    runtime, session = making
    one, other = given_to_classify(0, tiny), given_to_classify(1, tiny)
    session.run(["logits"], other)
    runtime.waits.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(session.run, ["logits"], one) for _ in range(4)]
        wait_until(lambda: runtime.made == 2)
        session.run(["logits"], other)
        assert not any(future.done() for future in waiting)
        runtime.waits.set()
        assert len({future.result()[0].tobytes() for future in waiting}) == 1
    assert runtime.made == 2


def test_what_a_cpu_keeps_is_given_up_where_there_is_no_memory_left(making, tiny):
    runtime, session = making
    one, other = given_to_classify(0, tiny), given_to_classify(1, tiny)
    expected = session.run(["logits"], one)[0]
    runtime.memory = False
    with pytest.raises(MemoryError):
        session.run(["logits"], other)
    runtime.memory = True
    assert session.run(["logits"], one)[0].tobytes() == expected.tobytes()
    session.run(["logits"], other)
    assert runtime.made == 4


@pytest.mark.parametrize(
    ("room", "at_once", "one_each", "told"),
    [
        (9, 9, True, None),
        (9, 10, True, "keeps networks of 9 batches, and 10 may be worked on at once"),
        (8.999, 3, False, "batches share a network"),
        (0, 3, False, "batches share a network"),
    ],
)
def test_batches_share_a_network_where_their_own_do_not_fit(room, at_once, one_each, told, tiny, tmp_path, caplog):
    each = bytes_of_a_network(Graph.read(tiny.path / CLASSIFY))
    settings = Settings(
        bundle=tiny.path,
        data=tmp_path,
        classify_bytes=int(room * each),
        max_concurrent_requests=at_once - 1,
        workers=1,
        threads=1,
        device="cpu",
    )
    with caplog.at_level("INFO", logger="anchorwell"):
        engine = open_engine(settings).engine.result()
        engine.require_loaded()
    statistics = statistics_of(1)(tiny)
    first, again = (engine.classify(images(2), statistics).network_seconds for _ in range(2))
    assert (first > 0, again) == (True, 0) if one_each else (first, again) == (None, None)
    assert (told is None and "CLASSIFY_BYTES" not in caplog.text) or (told in caplog.text)


def say_anew(folder, name):
    """Have a bundle's manifest say of a file what it is now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = file_sha256(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_an_engines_proof_is_of_the_golden_images(tiny, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny.path, wrong)
    with np.load(wrong / GOLDEN) as golden:
        arrays = dict(golden)
    np.savez_compressed(wrong / GOLDEN, **{**arrays, "logits": arrays["logits"] + 1})
    say_anew(wrong, GOLDEN)
    settings = Settings(bundle=wrong, data=tmp_path / "data", threads=1, device="cpu")
    opening = open_engine(settings)
    assert isinstance(opening.engine.result(), BundleEngine)
    with pytest.raises(BundleError, match=r"disagrees with torch on the golden images: .*logits by 1\.0e"):
        opening.proof.result()
    composition = compose(settings, engine=opening)
    try:
        asyncio.run(composition.begin())
        assert "logits by 1.0e" in composition.served.readiness.reason
    finally:
        composition.end()


def test_an_engine_classifies_while_what_measures_is_loaded(tiny):
    loaded = threading.Event()

    class Slow(OnnxRuntime):
        def session(self, graph, *, measures=False):
            assert not measures or loaded.wait(30)
            return super().session(graph, measures=measures)

    engine = BundleEngine(tiny, Slow(1))
    with ThreadPoolExecutor(2) as pool:
        measured, required = pool.submit(engine.measure, images(4)), pool.submit(engine.require_loaded)
        assert np.isfinite(engine.classify(images(4), statistics_of(1)(tiny)).logits).all()
        assert not measured.done()
        assert not required.done()
        loaded.set()
        assert np.isfinite(measured.result(30).mean).all()
        assert required.result(30) is None


def test_a_graph_may_take_longer_to_load_than_anybody_waits_for_passes(tiny, monkeypatch):
    class Slow(OnnxRuntime):
        def session(self, graph, *, measures=False):
            time.sleep(0.0 if measures else 0.5)
            return super().session(graph, measures=measures)

    monkeypatch.setattr("service.engine.QUEUE_TIMEOUT_S", 0.4)
    replay(BundleEngine(tiny, Slow(1)), tiny)


def test_golden_images_that_cannot_be_read_are_the_replays_to_tell(tiny, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(tiny.path, other)
    np.savez_compressed(other / GOLDEN, images=tiny.golden.images)
    say_anew(other, GOLDEN)
    engine = BundleEngine(Bundle.load(other), OnnxRuntime(1))
    engine.require_loaded()
    assert "a first pass could not be run" in caplog.text
    with pytest.raises(KeyError):
        replay(engine, engine.bundle)


def test_a_network_for_which_there_was_no_memory_is_made_by_the_pass(tiny):
    statistics, refused = statistics_of(1)(tiny), []

    class Short(OnnxRuntime):
        def session(self, graph, *, measures=False):
            session = super().session(graph, measures=measures)
            really = session.prepare

            def prepare(asked):
                if asked is statistics and not refused:
                    refused.append(asked)
                    raise MemoryError
                return really(asked)

            session.prepare = prepare
            return session

    engine = BundleEngine(tiny, Short(1))
    found, again = (engine.classify(images(2), statistics) for _ in range(2))
    assert refused
    assert found.logits.tobytes() == again.logits.tobytes()
    assert (found.network_seconds > 0, again.network_seconds) == (True, 0)


def test_a_service_that_is_ready_starts_its_decoders_before_anybody_asks(tiny, tmp_path):
    before = {*active_children()}
    composition = compose(Settings(bundle=tiny.path, data=tmp_path, threads=2, device="cpu"))
    try:
        assert {*active_children()} == before
        asyncio.run(composition.begin())
        assert len({*active_children()} - before) == 2
    finally:
        composition.end()
    assert {*active_children()} == before


@pytest.mark.parametrize("name", [MEASURE, CLASSIFY])
def test_a_service_does_not_begin_with_a_graph_that_cannot_be_run(name, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny.path, broken)
    model = onnx.load(broken / name, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Nonsense"
    (broken / name).write_bytes(model.SerializeToString())
    say_anew(broken, name)
    with pytest.raises(BundleError, match=f"{name} cannot be loaded"):
        compose(Settings(bundle=broken, data=tmp_path / "data", threads=1, device="cpu"))


def test_a_session_is_not_made_anew_by_onnxruntime_itself(tiny):
    """As its Python class would when a pass fails on a device, of weights whose memory is free by then."""
    graph, failed = Graph.read(tiny.path / CLASSIFY), []
    session = OnnxRuntime(1, kept=Kept(0)).session(graph)

    class Failing:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def run(self, *_):
            failed.append(True)
            raise EPFail("the device is lost")

    session._session._sess = Failing(session._session._sess)
    with pytest.raises(EPFail):
        session.run(["logits"], given_to_classify(0, tiny))
    assert len(failed) == 1


@pytest.fixture
def folding(tiny):
    session = GpuRuntime("fp32", 1, device="cpu", kept=2).session(Graph.read(tiny.path / CLASSIFY))
    session._fold, session._classify = Spied(session._fold), Spied(session._classify)
    return session


def given_to_classify(seed, tiny):
    statistics = statistics_of(seed)(tiny)
    return {"images": images(2), "bn_mean": statistics.mean, "bn_var": statistics.variance}


def test_a_gpu_folds_a_batchs_statistics_once_and_keeps_those_of_the_last_batches(folding, tiny):
    asked = [given_to_classify(seed, tiny) for seed in range(3)]
    expected = [plain_engine(tiny).classify(images(2), statistics_of(seed)(tiny)).logits for seed in range(3)]
    for number, folds in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        copied = {name: value.copy() for name, value in asked[number].items()}
        (logits,) = folding.run(["logits"], copied)
        assert_allclose(logits, expected[number], atol=1e-4)
        assert folding._fold.runs == folds
    changed = {**asked[1], "bn_var": asked[1]["bn_var"] * np.float32(1.001)}
    assert (folding.run(["logits"], changed)[0] != expected[1]).any()
    assert folding._fold.runs == 5


def test_what_a_gpu_keeps_is_given_up_where_there_is_no_memory_left(folding, tiny):
    given = given_to_classify(0, tiny)
    folding.run(["logits"], given)
    folding._classify.memory = False
    with pytest.raises(MemoryError, match="out of memory"):
        folding.run(["logits"], given)
    assert not folding._latest._kept
    folding._classify.memory = True
    folding.run(["logits"], given)
    assert folding._fold.runs == 2


def test_fp16_answers_nearly_as_fp32_does(tiny):
    half = BundleEngine(tiny, GpuRuntime("fp16", 1, device="cpu"))
    assert (half.precision, half.provider) == ("fp16", CPU)
    replay(half, tiny)
    exact, statistics = plain_engine(tiny), statistics_of(1)(tiny)
    for found, expected in zip(half.measure(images(12))[:2], exact.measure(images(12))[:2], strict=True):
        assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = (engine.classify(images(9), statistics).logits for engine in (half, exact))
    assert 1e-5 < np.abs(found - expected).max() < 0.02 * expected.std()


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(StartError, match="fp16 is offered on CUDA alone"):
        open_runtime("cpu", "fp16", 1)


def test_sites_gather_while_a_gpu_is_busy_with_those_of_the_same_statistics(tiny):
    gpu, expected = Gpu(), plain_engine(tiny)
    engine, (one, other) = BundleEngine(tiny, gpu), (statistics_of(seed)(tiny) for seed in (1, 2))
    engine.require_loaded()
    gpu.asked.clear()
    asked = [(images(1, seed), other if seed == 3 else one) for seed in range(12)]
    with ThreadPoolExecutor(len(asked)) as pool:
        with gpu.busy:
            found = [pool.submit(engine.classify, *asked[0])]
            wait_until(lambda: gpu.asked)
            for number, item in enumerate(asked[1:], start=1):
                found.append(pool.submit(engine.classify, *item))
                wait_until(lambda number=number: len(engine._passes._waiting) == number)
        for (image, statistics), answer in zip(asked, found, strict=True):
            assert_allclose(answer.result().logits, expected.classify(image, statistics).logits, atol=1e-4)
    assert gpu.asked == [1, 8, 1, 2], "the first at once; eight of one batch; one of another; the rest"


def test_a_gpus_passes_are_of_few_sizes_which_were_run_before_the_first_request(tiny):
    gpu, statistics, expected = Gpu(), statistics_of(1)(tiny), plain_engine(tiny)
    engine = BundleEngine(tiny, gpu)
    engine.require_loaded()
    assert gpu.asked == [8, 4, 2, 1]
    for sites in (1, 3, 5, 8, 11):
        found = engine.classify(images(sites), statistics)
        assert found.logits.shape[0] == found.embeddings.shape[0] == sites
        assert_allclose(found.logits, expected.classify(images(sites), statistics).logits, atol=1e-4)
        assert set(gpu.asked) == {1, 2, 4, 8}


def wait_until(reached):
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("used", [OnnxRuntime(3), OnnxRuntime(3, kept=Kept(0)), openvino_runtime(3)])
def test_each_core_classifies_by_itself(used, tiny):
    assert (used.passes_at_once, used.pass_sizes) == (3, (1,))
    engine, statistics, given = BundleEngine(tiny, used), statistics_of(1)(tiny), images(7)
    together = engine.classify(given, statistics)
    for place in range(7):
        alone = engine.classify(given[place : place + 1], statistics)
        assert alone.logits.tobytes() == together.logits[place : place + 1].tobytes()
        assert alone.embeddings.tobytes() == together.embeddings[place : place + 1].tobytes()


def test_sites_for_which_there_is_no_memory_are_classified_in_halves_once(tiny, caplog):
    statistics, expected = statistics_of(1)(tiny), plain_engine(tiny)
    gpu = Gpu(memory=5)
    engine = BundleEngine(tiny, gpu)
    engine.require_loaded()
    gpu.asked.clear()
    caplog.clear()
    with gpu.busy:
        blocked = engine._passes.put(_Asked(images(1)[0], statistics))
        wait_until(lambda: gpu.asked)
        eight = [engine._passes.put(_Asked(image, statistics)) for image in images(8)]
    blocked.result()
    found = [future.result().logits for future in eight]
    assert gpu.asked == [1, 8, 4, 4]
    assert "not the memory to classify 8 sites at once" in caplog.text
    assert_allclose(found, expected.classify(images(8), statistics).logits, atol=1e-4)
    gpu.memory = 0
    with pytest.raises(MemoryShortError, match="classify 1 sites"):
        engine.classify(images(1), statistics)
    gpu.memory = 5
    with pytest.raises(MemoryShortError, match="measure 6 sites in one pass"):
        engine.measure(images(6))
    engine.measure(images(5))


def test_who_waits_too_long_for_passes_is_told_to_come_back_and_is_not_waited_for(tiny, monkeypatch):
    monkeypatch.setattr("service.engine.QUEUE_TIMEOUT_S", 0.05)
    gpu, statistics = Gpu(pass_sizes=(1, 3)), statistics_of(1)(tiny)
    engine = BundleEngine(tiny, gpu)
    engine.require_loaded()
    gpu.asked.clear()
    with gpu.busy:
        for _ in range(2):
            with pytest.raises(BusyError, match=r"passes took longer than 0\.05 s"):
                engine.classify(images(3), statistics)
        with engine._measuring, pytest.raises(BusyError, match=r"passes took longer"):
            engine.measure(images(1))
    monkeypatch.undo()
    assert engine.classify(images(1), statistics).logits.shape == (1, 1, 3)
    assert sum(gpu.asked) <= 1 + 3 + 1, "what nobody waits for is not classified"
    engine.measure(images(1))


def _scaled(measured, factors):
    return measured._replace(mean=measured.mean * factors[0], variance=measured.variance * factors[1])


@pytest.mark.parametrize("wrong", ["mean", "variance", "logits", "nan", "nan variance"])
def test_a_replay_that_disagrees_says_in_what(wrong, bundle):
    engine = FakeEngine()
    measure, classify = engine.measure, engine.classify
    if wrong == "logits":
        engine.classify = lambda *given: Classified(*(part + 0.01 for part in classify(*given)[:2]))
    else:
        factors = {"mean": (1.01, 1), "variance": (1, 1.01), "nan": (np.nan, 1), "nan variance": (1, np.nan)}[wrong]
        engine.measure = lambda *given: _scaled(measure(*given), factors)
    words = dict.fromkeys(("mean", "variance"), r"statistics by [1-9]")
    words |= {"logits": r"logits by 1\.0e-02", "nan": "statistics by nan"}
    with pytest.raises(BundleError, match=words[wrong.removesuffix(" variance")]):
        replay(engine, bundle)


def test_a_graph_that_cannot_be_loaded_is_named(bundle):
    with pytest.raises(BundleError, match=MEASURE):
        plain_engine(bundle)


def answered(runtime, graph, tiny):
    """As at start, where golden images are what the first network of a batch's own is made for."""
    return runtime.session(graph).run(["logits"], given_to_classify(0, tiny))


RUNTIMES_OF_A_GPU = [GpuRuntime(precision, 1, device="cpu") for precision in ("fp32", "fp16")]


@pytest.mark.parametrize("runtime", [OnnxRuntime(1), OnnxRuntime(1, kept=Kept(0)), openvino_runtime(1), *RUNTIMES_OF_A_GPU])
def test_a_graph_that_a_runtime_cannot_run_is_named(runtime, tiny):
    graph = Graph.read(tiny.path / CLASSIFY)
    model = onnx.ModelProto.FromString(graph.content)
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(BundleError, match=r"classify\.onnx cannot be loaded"):
        answered(runtime, replace(graph, content=model.SerializeToString()), tiny)


def test_helpers_write_what_the_decoder_reads():
    assert tiff(np.eye(8, dtype=np.uint8))[:3] == b"II*"
