"""The real engine on a real exported bundle."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from model.bundle import MEASURE, WEIGHTS, Bundle
from model.errors import BundleError
from model.statistics import BatchNormStatistics, Prior, blended
from service.engine import WORTH_FOLDING, FoldedSessions, OnnxEngine, replay
from service.errors import StartError
from tests.service.plates import FakeEngine, tiff


@pytest.fixture(scope="module")
def tiny(tiny_bundle_path):
    return Bundle.load(tiny_bundle_path)


@pytest.fixture(scope="module", params=[1, 2])
def engine(request, tiny):
    return OnnxEngine(tiny, "cpu", request.param)


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 64, 64)).astype(np.float32)


def test_the_engine_agrees_with_the_golden_images(engine, tiny):
    replay(engine, tiny)


def test_the_engine_reports_the_provider_it_really_got(engine):
    assert (engine.provider, engine.precision) == ("CPUExecutionProvider", "fp32")


def test_statistics_and_answers_are_the_same_bits_every_time(engine, tiny):
    context, well = images(24), images(9, seed=1)
    first_mean, first_variance = engine.measure(context)
    statistics = BatchNormStatistics(first_mean, first_variance, sites=24, wells=6)
    assert first_mean.shape == first_variance.shape == (tiny.manifest.features,)
    logits, embeddings, _ = engine.classify(well, statistics)
    assert (logits.shape, embeddings.shape) == ((9, 1, 3), (9, tiny.manifest.embedding_dim))
    for shift in range(3):
        moved = np.frombuffer(b"\0" * 4 * shift + context.tobytes(), np.float32, offset=4 * shift).reshape(context.shape)
        mean, variance = engine.measure(moved)
        assert mean.tobytes() == first_mean.tobytes()
        assert variance.tobytes() == first_variance.tobytes()
        engine.classify(images(5 + shift, seed=2), statistics)
        assert engine.classify(well.copy(), statistics)[0].tobytes() == logits.tobytes()


def folding(tiny, sessions):
    """An engine with room for so many batches' sessions."""
    return OnnxEngine(tiny, "cpu", 1, folded_bytes=sessions * (11 << 20))


def statistics_of(seed):
    rng = np.random.default_rng(seed)

    def of(tiny):
        features = tiny.manifest.features
        mean, variance = rng.normal(size=features), rng.uniform(0.5, 2, features)
        return BatchNormStatistics(mean.astype(np.float32), variance.astype(np.float32), sites=6, wells=6)

    return of


def waited(engine, statistics, left=WORTH_FOLDING):
    """Classify until the session of the statistics answers."""
    for _ in range(500):
        found = engine.classify(images(2), statistics, left)
        if found.graph == "folded":
            return found
        time.sleep(0.01)
    raise AssertionError("no session was made")


def test_many_wells_of_a_batch_are_classified_by_a_session_of_its_own_that_agrees(tiny):
    engine, statistics = folding(tiny, 2), statistics_of(1)(tiny)
    shared = engine.classify(images(2), statistics, WORTH_FOLDING - 1)
    assert shared.graph == "shared"
    assert engine.classify(images(2), statistics, WORTH_FOLDING).graph == "shared", "while it is made"
    folded = waited(engine, statistics)
    np.testing.assert_allclose(folded.logits, shared.logits, atol=1e-4)
    np.testing.assert_allclose(folded.embeddings, shared.embeddings, atol=1e-4)
    assert engine.classify(images(2), statistics).graph == "folded", "once it is there, for few wells too"
    assert engine.classify(images(2), statistics_of(2)(tiny)).graph == "shared", "of other statistics"


def test_sessions_are_no_more_than_their_memory(tiny):
    engine, (first, second, third) = folding(tiny, 2), (statistics_of(seed)(tiny) for seed in range(3))
    for statistics in (first, second, first, third):
        waited(engine, statistics)
    assert engine.classify(images(2), first).graph == "folded", "used since"
    assert engine.classify(images(2), second).graph == "shared", "the longest unused went"
    none = OnnxEngine(tiny, "cpu", 1)
    for _ in range(3):
        assert none.classify(images(2), first, 10_000).graph == "shared"


def test_no_session_is_made_of_weights_that_are_not_those_that_were_loaded(tiny, tmp_path, caplog):
    served = tmp_path / "served"
    shutil.copytree(tiny.path, served)
    (tmp_path / "current").symlink_to(served)
    engine = folding(Bundle.load(tmp_path / "current"), 1)
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path)
    statistics = statistics_of(1)(tiny)
    np.testing.assert_allclose(waited(engine, statistics).logits, engine_logits(tiny, statistics), atol=1e-4)
    content = bytearray((served / WEIGHTS).read_bytes())
    content[:4] = b"else"
    (served / WEIGHTS).write_bytes(content)
    for _ in range(30):
        assert engine.classify(images(2), statistics_of(2)(tiny), WORTH_FOLDING).graph == "shared"
        time.sleep(0.01)
    assert "weights.bin is no longer what was there" in caplog.text


def engine_logits(tiny, statistics):
    return OnnxEngine(tiny, "cpu", 1).classify(images(2), statistics).logits


def test_sessions_asked_for_by_many_at_once_fail_no_request():
    asked, release = [], threading.Event()

    def make(statistics):
        asked.append(statistics)
        release.wait(5)
        return statistics

    kept = FoldedSessions(make, 1)
    given = [BatchNormStatistics(np.full(2, n, np.float32), np.ones(2, np.float32), 1, 1) for n in range(4)]

    def ask(number):
        for turn in range(300):
            found = kept.get(given[(number + turn) % 4], make=True)
            assert found is None or found is given[(number + turn) % 4]

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, number) for number in range(4)]
        release.set()
        for one in waiting:
            one.result()
    assert asked


def test_a_context_far_from_training_is_measured_about_its_own_means(tiny, monkeypatch, caplog):
    engine = OnnxEngine(tiny, "cpu", 1)
    training = tiny.training_statistics
    expected = {wells: engine.measure(images(8), wells and training.prior(wells)) for wells in (None, 2)}
    assert "once more" not in caplog.text
    monkeypatch.setattr("service.engine.FAR", 1e-9)
    with caplog.at_level("INFO", logger="anchorwell"):
        for wells, plain in expected.items():
            for one, other in zip(plain, engine.measure(images(8), wells and training.prior(wells)), strict=True):
                np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("measured once more") == 2


def test_where_no_session_can_be_made_the_shared_graph_answers_and_the_log_tells(tiny, monkeypatch, caplog):
    engine, statistics = folding(tiny, 1), statistics_of(1)(tiny)
    asked = []

    def fails(*given):
        asked.append(given)
        raise RuntimeError("no memory")

    monkeypatch.setattr("service.graphs.Graph.with_constants", fails)
    for _ in range(20):
        assert engine.classify(images(2), statistics, WORTH_FOLDING).graph == "shared"
        time.sleep(0.01)
    assert len(asked) == 1
    assert "no session could be made" in caplog.text


def test_a_prior_is_blended_inside_the_pass_and_one_without_weight_changes_no_bit(engine, tiny):
    context, training = images(8), tiny.training_statistics
    plain = engine.measure(context)
    for found, expected in zip(engine.measure(context, Prior.none(tiny.manifest.features)), plain, strict=True):
        assert found.tobytes() == expected.tobytes()
    few, many = (engine.measure(context, training.prior(wells)) for wells in (1, 1_000_000))
    np.testing.assert_allclose(many[0], plain[0], atol=1e-3)
    assert np.abs(few[0] - plain[0]).max() > 0.01
    after = blended(*plain, *vars(training.prior(1)).values())
    first, deeper = slice(0, 4), slice(4, None)
    np.testing.assert_allclose(few[0][first], after[0][first], atol=1e-5)
    assert np.abs(few[0][deeper] - after[0][deeper]).max() > 1e-3, "later layers see inputs normalised by the blend"


def test_a_replay_that_does_not_blend_says_so(bundle):
    engine = FakeEngine()
    measure = engine.measure
    engine.measure = lambda given, _prior=None: measure(given)
    with pytest.raises(BundleError, match="disagrees with torch on the golden images: statistics"):
        replay(engine, bundle)


def test_cuda_is_refused_where_there_is_none(tiny):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(StartError, match="no CUDA"):
        OnnxEngine(tiny, "cuda")
    assert OnnxEngine(tiny, "auto").provider == "CPUExecutionProvider"


@pytest.mark.parametrize("wrong", ["mean", "variance", "logits", "nan", "nan variance"])
def test_a_replay_that_disagrees_says_in_what(wrong, bundle):
    engine = FakeEngine()
    measure, classify = engine.measure, engine.classify
    if wrong == "logits":
        engine.classify = lambda *given: tuple(part + 0.01 for part in classify(*given)[:2])
    else:
        factors = {"mean": (1.01, 1), "variance": (1, 1.01), "nan": (np.nan, 1), "nan variance": (1, np.nan)}[wrong]
        engine.measure = lambda *given: tuple(part * factor for part, factor in zip(measure(*given), factors, strict=True))
    words = dict.fromkeys(("mean", "variance"), r"statistics by [1-9]")
    words |= {"logits": r"logits by 1\.0e-02", "nan": "statistics by nan"}
    with pytest.raises(BundleError, match=words[wrong.removesuffix(" variance")]):
        replay(engine, bundle)


def test_a_graph_that_cannot_be_loaded_is_named(bundle):
    with pytest.raises(BundleError, match=MEASURE):
        OnnxEngine(bundle, "cpu")


def test_helpers_write_what_the_decoder_reads():
    assert tiff(np.eye(8, dtype=np.uint8))[:3] == b"II*"
