"""What a lab would serve by itself: FastAPI, tifffile, and onnxruntime on the network with one plate's statistics folded in.

A yardstick, and frozen as ``plain_pytorch`` is, whose preparing it repeats: a well in each request, a multipart form;
nothing is checked, and nothing is kept.

Run: ``python -m benchmarks.fastapi_only BUNDLE STATISTICS.npz PORT --threads 2``; the table has ``mean`` and ``variance``.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tifffile
import uvicorn
from fastapi import FastAPI, UploadFile

from benchmarks import network
from benchmarks.network import Float
from model.bundle import INPUT_IMAGES, OUTPUT_LOGITS, Bundle
from model.statistics import BatchNormStatistics

CENTRE = 256


def prepared(planes: list[UploadFile]) -> Float:
    """Prepare a site: (channels, 256, 256)."""
    pixels = []
    for file in planes:
        plane = tifffile.imread(io.BytesIO(file.file.read()))[::2, ::2].astype(np.float32)
        low, high = plane.min(), np.percentile(plane, 99.99)
        pixels.append((np.clip((plane - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    site: Float = np.stack(pixels).astype(np.float32) / np.float32(255)
    site = (site - np.array(network.MEAN, np.float32)[:, None, None]) / np.array(network.STD, np.float32)[:, None, None]
    top, left = (site.shape[1] - CENTRE) // 2, (site.shape[2] - CENTRE) // 2
    return site[:, top : top + CENTRE, left : left + CENTRE]


def app_of(session: Any) -> FastAPI:
    """Serve a session: the planes of a well's sites, in order, are the files of a form."""
    app = FastAPI()

    @app.post("/predict")
    def predict(images: list[UploadFile]) -> list[list[float]]:
        channels = len(network.CHANNELS)
        sites = [prepared(images[start : start + channels]) for start in range(0, len(images), channels)]
        logits = session.run([OUTPUT_LOGITS], {INPUT_IMAGES: np.stack(sites)})[0]
        return [[float(value) for value in site] for site in logits[:, 0]]

    return app


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("statistics", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    measured = np.load(arguments.statistics)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    statistics = BatchNormStatistics(measured["mean"], measured["variance"], sites=1, wells=1)
    session = network.folded_session(Bundle.load(arguments.bundle), statistics, options, ["CPUExecutionProvider"])
    uvicorn.run(app_of(session), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
