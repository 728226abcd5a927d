"""The committed demo bundles: whole, small, equally sized, and answered by onnxruntime as torch did."""

from model.bundle import Bundle
from service.engine import BundleEngine, replay
from service.runtime import open_runtime
from training.simulate import CHANNELS, CLASSES


def test_both_bundles_are_whole_and_together_at_most_12_mb(demo_bundles):
    files = [file for name in ("cs-arm-bn", "erm") for file in (demo_bundles / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for name, context in (("cs-arm-bn", "controls"), ("erm", "source")):
        manifest = Bundle.load(demo_bundles / name).manifest
        assert (manifest.method, manifest.context) == (name, context)
        assert manifest.channels == CHANNELS
        assert sorted(manifest.classes) == sorted(CLASSES)


def test_both_networks_are_equally_sized_and_equally_trained(demo_bundles):
    ours, erm = (Bundle.load(demo_bundles / name).manifest for name in ("cs-arm-bn", "erm"))
    assert ours.network == erm.network
    assert ours.training == erm.training
    assert ours.recipe == erm.recipe


def test_the_golden_images_replay(demo_bundles):
    for name in ("cs-arm-bn", "erm"):
        bundle = Bundle.load(demo_bundles / name)
        replay(BundleEngine(bundle, open_runtime("cpu", "fp32", 1)), bundle)
