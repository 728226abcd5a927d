"""Takes out of an image's environment what the service never loads, and tells what fills the rest.

Run in the build stage: ``python docker/trim.py /opt/anchorwell``. What is taken out is named here; that what is left still
does its work is tried at once.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NEEDED_CODECS = ("_imcd", "_shared", "_zlib", "_zstd", "_deflate", "libzstd", "libdeflate")
"""Of imagecodecs: what model/images.py takes (uncompressed, LZW, deflate, zstd)."""
UNUSED = (
    "imagecodecs/_*.so",
    "imagecodecs.libs/*",
    "onnx/backend/test",  # another library's tests; of every package see below
    "onnx/reference",
    "onnxruntime/capi/libonnxruntime.so*",  # for programs in C
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "openvino/include",
    "openvino/libs/cache.json",  # of the GPU's kernels
    "openvino/libs/libopenvino_gguf_frontend*",
    "openvino/libs/libopenvino_intel_gpu_plugin*",
    "openvino/libs/libopenvino_intel_npu_plugin*",
    "openvino/libs/libopenvino_paddle_frontend*",
    "openvino/libs/libopenvino_pytorch_frontend*",
    "openvino/libs/libopenvino_tensorflow*",
    "pip",
    "pip-*",
    "pyarrow/_flight*",
    "pyarrow/_s3fs*",
    "pyarrow/include",
    "pyarrow/libarrow_flight*",
    "pyarrow/libarrow_s3*",  # object storage is obstore's
    "setuptools",
    "setuptools-*",
    "**/tests",
)
TRIED = """
import imagecodecs, onnx, service.app, service.arrow, service.cli, service.screen, service.server
for codec in ("lzw", "zlib", "deflate", "zstd"):
    encoded = getattr(imagecodecs, codec + "_encode")(b"anchorwell" * 9)
    assert getattr(imagecodecs, codec + "_decode")(encoded, out=90)[:90] == b"anchorwell" * 9, codec
"""
_MB = 1e6
_TOLD = 20


def unused(packages: Path) -> Iterator[Path]:
    """Give what goes."""
    for pattern in UNUSED:
        for path in packages.glob(pattern):
            if not (path.parent.name.startswith("imagecodecs") and path.name.startswith(NEEDED_CODECS)):
                yield path


def size(path: Path) -> int:
    """Bytes of a file, or of all below a folder."""
    return sum(file.lstat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir())


def main() -> None:
    """Trim an environment."""
    (packages,) = Path(sys.argv[1]).glob("lib/python3*/site-packages")
    before = size(packages)
    for path in list(unused(packages)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    subprocess.run([f"{sys.argv[1]}/bin/python", "-c", TRIED], check=True)  # noqa: S603 (our own)
    after = size(packages)
    print(f"{after / _MB:.0f} MB of {before / _MB:.0f} are left; the largest:")
    for bytes_, name in sorted(((size(path), path.name) for path in packages.iterdir()), reverse=True)[:_TOLD]:
        print(f"{bytes_ / _MB:6.0f} MB  {name}")


if __name__ == "__main__":
    main()
