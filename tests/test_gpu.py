"""The same answers on CUDA as on the CPU, where there is a GPU."""

import onnxruntime
import pytest

from benchmarks.gpu_check import CUDA, compare
from model.bundle import Bundle


def test_cuda_answers_as_the_cpu_does(tiny_bundle_path):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("no GPU, or an onnxruntime without CUDA: the comparison with the CPU is not made")
    assert all(bar.holds for bar in compare(Bundle.load(tiny_bundle_path), 16))
