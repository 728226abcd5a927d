"""Worker processes: what they give, and what a file can do to them."""

import os
import signal
import time

import numpy as np
import pytest

from model.errors import NotATiffError, UndecodableImageError
from model.images import ImageLimits, ImageRecipe
from model.layout import SiteKey
from service import decoding
from service.decoding import FileSlice, InlineDecoder, SiteDecoder, WorkerDecoder
from service.errors import DecoderKilledError, ReferenceUnreadableError
from tests.service.plates import plane, tiff

RECIPE = ImageRecipe(channels=("DNA", "ER"), size=16, shrink=1)
KEY = SiteKey("A01", 1)
DECODE = SiteDecoder(RECIPE, ImageLimits())


class Misbehaving(SiteDecoder):
    """Does what a hostile file might make a decoder do, as the file's name says."""

    def __call__(self, key, files, pixel_size_um):
        behave = {
            "hang": lambda: time.sleep(60),
            "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "hungry": lambda: np.ones(1 << 40, np.uint8),
            "pid": lambda: (_ for _ in ()).throw(NotATiffError(str(os.getpid()))),
        }
        behave.get(files["DNA"].name, lambda: None)()
        return super().__call__(key, files, pixel_size_um)


@pytest.fixture
def files(tmp_path):
    data = b"".join(parts := [tiff(plane(channel)) for channel in RECIPE.channels])
    path = tmp_path / "spool"
    path.write_bytes(data)
    first = len(parts[0])
    return {
        "DNA": FileSlice(path, 0, first, "A01_1_DNA.tif"),
        "ER": FileSlice(path, first, len(data) - first, "A01_1_ER.tif"),
    }


@pytest.fixture
def workers():
    decoder = WorkerDecoder(Misbehaving(RECIPE, ImageLimits()), workers=1, memory_bytes=1 << 30, timeout_s=2)
    yield decoder
    decoder.close()


def named(files, name):
    return {**files, "DNA": FileSlice(files["DNA"].path, files["DNA"].offset, files["DNA"].size, name)}


def test_a_worker_gives_what_the_same_process_would(files, workers):
    far, near = (decoder.site(KEY, files, None).result(60) for decoder in (workers, InlineDecoder(DECODE)))
    assert far.image.pixels.tobytes() == near.image.pixels.tobytes()
    assert (far.planes, far.saturation) == (near.planes, near.saturation)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("hang", UndecodableImageError, "longer than 2 s"),
        ("crash", UndecodableImageError, "crashed"),
        ("hungry", UndecodableImageError, "memory"),
        ("killed", DecoderKilledError, "killed"),
    ],
)
def test_a_file_that_ends_its_worker_costs_its_request_alone(name, error, words, files, workers):
    with pytest.raises(error, match=words) as raised:
        workers.site(KEY, named(files, name), None).result(60)
    if error is UndecodableImageError:
        assert raised.value.members == {"well": "A01", "site": 1}
    assert workers.site(KEY, files, None).result(60).image.pixels.shape == (2, 16, 16)


def test_a_faulty_file_is_named_from_the_worker(files, workers):
    files["ER"] = FileSlice(files["ER"].path, 3, 100, "A01_1_ER.tif")
    with pytest.raises(NotATiffError, match=r"well A01 site 1 file A01_1_ER\.tif channel ER") as raised:
        workers.site(KEY, files, None).result(60)
    assert raised.value.members == {"well": "A01", "site": 1, "file": "A01_1_ER.tif", "channel": "ER"}


def test_workers_give_way_to_the_service(files, workers):
    with pytest.raises(NotATiffError) as raised:
        workers.site(KEY, named(files, "pid"), None).result(60)
    worker = int(raised.value.detail)
    assert os.getpriority(os.PRIO_PROCESS, worker) > os.getpriority(os.PRIO_PROCESS, 0)


def test_a_worker_may_take_what_the_largest_plane_needs():
    assert decoding.decoding_memory_bytes(ImageLimits(max_pixels=64_000_000), RECIPE) > 24 * 64_000_000


def test_a_file_that_went_meanwhile_is_told_as_gone_and_one_that_cannot_be_read_as_that(files, workers, tmp_path):
    files["ER"].path.unlink()
    with pytest.raises(FileNotFoundError):
        workers.site(KEY, files, None).result()
    folder = FileSlice(tmp_path, 0, 1, "A01_1_DNA.tif")
    with pytest.raises(ReferenceUnreadableError, match="cannot be read") as raised:
        workers.site(KEY, {**files, "DNA": folder}, None).result()
    assert raised.value.members["well"] == "A01"
