"""TIFF bytes to network input: strangers' bytes, real microscopes' bytes, and the arithmetic."""

import io
import re
import struct
import weakref
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from model import images
from model.errors import (
    BlankImageError,
    ImageError,
    ImageTooLargeError,
    ImageTooSmallError,
    MixedSizesError,
    NonFiniteImageError,
    NotATiffError,
    PixelSizeError,
    SaturatedImageError,
    TruncatedImageError,
    UnsupportedImageError,
)
from model.images import (
    ImageLimits,
    ImageRecipe,
    centre_crop,
    check_saturation,
    decode_plane,
    finish_site,
    prepare_site,
    saturated_share,
)
from model.layout import parse_file_name

RAMP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)


def finished(planes, recipe, pixel_size_um=None):
    """Network input of a site by a recipe that needs no batch."""
    return finish_site(prepare_site(planes, recipe, pixel_size_um), recipe, None)


def tiff(plane, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, plane, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_kind_that_is_taken_decodes_to_its_pixels(dtype, compression, byteorder):
    plane = (RAMP % 251).astype(dtype)
    decoded = decode_plane(tiff(plane, compression=compression, byteorder=byteorder))
    assert decoded.dtype == np.dtype(dtype)
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, plane)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NotATiffError),
        (b"BM" + b"\0" * 100, NotATiffError),
        (b"II*\0", TruncatedImageError),
        (tiff(RAMP)[:-100], TruncatedImageError),
        (tiff(RAMP, compression="zlib")[:-100], TruncatedImageError),
        (tiff(np.zeros((3, 24, 32), np.uint16)), UnsupportedImageError),
        (tiff(np.zeros((24, 32, 3), np.uint8), photometric="rgb"), UnsupportedImageError),
        (tiff(RAMP.astype(np.int32)), UnsupportedImageError),
        (tiff(RAMP.astype(np.float64)), UnsupportedImageError),
        (tiff((RAMP % 256).astype(np.uint8), compression="packbits"), UnsupportedImageError),
        (tiff(np.where(RAMP == 5, np.inf, RAMP).astype(np.float32)), NonFiniteImageError),
        (tiff(np.full((24, 32), 7, np.uint16)), BlankImageError),
    ],
)
def test_what_is_wrong_with_a_file_has_its_own_error(data, error):
    with pytest.raises(error):
        decode_plane(data)


def test_more_pixels_than_allowed_are_refused_by_the_header():
    with pytest.raises(ImageTooLargeError, match="24 x 32"):
        decode_plane(tiff(RAMP), ImageLimits(max_pixels=100))


def test_a_bomb_is_refused_before_it_goes_off():
    with pytest.raises(ImageTooLargeError, match="bytes of file declare"):
        decode_plane(tiff(np.zeros((6_000, 6_000), np.uint16), compression="zstd", rowsperstrip=6_000))


def test_an_ome_tiff_never_reads_another_file(tmp_path):
    tifffile.imwrite(tmp_path / "secret.tif", RAMP)
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="32" SizeY="24" SizeC="1" SizeZ="1" SizeT="1">'
        f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="{tmp_path}/secret.tif">urn:uuid:1</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    own = RAMP[::-1].copy()
    np.testing.assert_array_equal(decode_plane(tiff(own, description=description.encode())), own)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(tiff(RAMP)) - 1), st.integers(0, 255), st.booleans())
def test_damaged_bytes_give_pixels_or_an_image_error(at, value, cut):
    data = bytearray(tiff(RAMP, compression="zlib"))
    at %= len(data)
    data[at] = value
    try:
        decoded = decode_plane(bytes(data[:at] if cut else data))
    except ImageError:
        return
    assert decoded.ndim == 2


NOISE = np.random.default_rng(1).integers(1, 60_000, 256).astype("<u2").tobytes()
PACKED = zlib.compress(NOISE)


def raw_tiff(*tags, blob=NOISE, following=0, width=16, height=16, compression=1, photometric=1):
    """A little-endian TIFF of given tags (code, type, count, value); a callable value is told where the blob lies."""
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, compression),
        (262, 3, 1, photometric), (277, 3, 1, 1), *tags,
    ]  # fmt: skip
    end = 8 + 2 + 12 * len(entries) + 4
    packed = [struct.pack("<HHII", *entry[:3], entry[3](end) if callable(entry[3]) else entry[3]) for entry in entries]
    return b"".join([b"II*\0\x08\0\0\0", struct.pack("<H", len(entries)), *packed, struct.pack("<I", following), blob])


def here(end):
    return end


STRIP = ((273, 4, 1, here), (279, 4, 1, len(NOISE)))
PACKED_STRIP = ((273, 4, 1, here), (279, 4, 1, len(PACKED)))


def tile(width, blob=PACKED):
    return ((322, 4, 1, width), (323, 4, 1, width), (324, 4, 1, here), (325, 4, 1, len(blob)))


def two_strips(offsets, counts, blob):
    """Two strips of eight rows; offsets are relative to the blob, None is 0."""

    def table(end):
        return end + len(blob)

    end = 8 + 2 + 12 * 9 + 4
    places = [0 if offset is None else end + offset for offset in offsets]
    tags = ((278, 4, 1, 8), (273, 4, 2, table), (279, 4, 2, lambda end: table(end) + 8))
    return {"tags": tags, "blob": blob + struct.pack("<4I", *places, *counts)}


def test_a_file_built_by_hand_decodes():
    assert decode_plane(raw_tiff(*STRIP)).tobytes() == NOISE
    assert decode_plane(raw_tiff(*PACKED_STRIP, blob=PACKED, compression=8)).tobytes() == NOISE
    strips = two_strips((0, 256), (256, 256), NOISE)
    assert decode_plane(raw_tiff(*strips["tags"], blob=strips["blob"])).tobytes() == NOISE


@pytest.mark.parametrize(
    ("offsets", "counts", "blob", "compression"),
    [
        ((0, 0), (len(PACKED), 0), PACKED, 8),
        ((0, None), (len(PACKED), len(PACKED)), PACKED, 8),
        ((0, 256), (512, 10), NOISE, 1),
        ((0, 256), (10, 512), NOISE, 1),
    ],
)
def test_a_strip_that_is_missing_or_short_is_never_read_as_black(offsets, counts, blob, compression):
    strips = two_strips(offsets, counts, blob)
    with pytest.raises(TruncatedImageError):
        decode_plane(raw_tiff(*strips["tags"], blob=strips["blob"], compression=compression))


@pytest.mark.parametrize(
    "data",
    [
        raw_tiff((278, 4, 1, 8), *PACKED_STRIP, blob=PACKED, compression=8),
        raw_tiff(*tile(16), blob=PACKED, compression=8, width=32, height=32),
        raw_tiff((279, 4, 1, 512)),
    ],
)
def test_fewer_strips_or_tiles_than_the_image_needs_are_refused(data):
    with pytest.raises(TruncatedImageError):
        decode_plane(data)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (raw_tiff(*STRIP, *[(270, 2, 500, here)] * 3), UnsupportedImageError),
        (raw_tiff(*STRIP, (305, 2, 100, here), (305, 2, 100, here)), UnsupportedImageError),
        (raw_tiff(*STRIP, *((60_000 + code, 2, 500, here) for code in range(9))), TruncatedImageError),
        (raw_tiff(*STRIP, (305, 2, 2**31, here)), TruncatedImageError),
        (raw_tiff(*STRIP, *((60_000 + code, 3, 1, 1) for code in range(300))), UnsupportedImageError),
        (raw_tiff(*STRIP, following=8), UnsupportedImageError),
        (raw_tiff(*STRIP, (33629, 5, 3, here)), UnsupportedImageError),
        (raw_tiff(*STRIP, photometric=0), UnsupportedImageError),
        (raw_tiff(*STRIP, photometric=3), UnsupportedImageError),
        (raw_tiff(*STRIP)[:60], TruncatedImageError),
        (raw_tiff(*tile(60_000), blob=PACKED, compression=8), ImageTooLargeError),
        (raw_tiff(*tile(4_096), blob=PACKED, compression=8), ImageTooLargeError),
        (raw_tiff(*tile(1), blob=PACKED, compression=8, width=300, height=300), ImageTooLargeError),
        (raw_tiff(*tile(0), blob=PACKED, compression=8), TruncatedImageError),
    ],
)
def test_a_directory_that_asks_for_more_than_one_plane_is_refused_by_the_header(data, error):
    with pytest.raises(error):
        decode_plane(data)


@pytest.mark.parametrize("options", [{"imagej": True}, {"metadata": {"axes": "ZYX"}}])
def test_a_stack_in_one_page_is_refused(options):
    data = tiff(np.stack([RAMP, RAMP]), **options)
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        second = read.pages[0].tags
        at = read.pages[0].offset + 2 + 12 * len(second)
    alone = data[:at] + bytes(4) + data[at + 4 :]
    with pytest.raises(UnsupportedImageError, match="stack of 2 planes"):
        decode_plane(alone)
    assert decode_plane(tiff(RAMP[None], **options)).shape == RAMP.shape


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"tile": (16, 16)}, {"rowsperstrip": 5}, {"description": "mine"}])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_every_layout_of_a_plane_decodes(options, byteorder, compression):
    data = tiff(RAMP, byteorder=byteorder, compression=compression, **options)
    np.testing.assert_array_equal(decode_plane(data), RAMP)


@pytest.mark.parametrize("pixel_size_um", [0.04, 21.0, 8.0])
def test_a_pixel_size_far_from_the_networks_is_refused(pixel_size_um):
    recipe = ImageRecipe(channels=("DNA",), size=12, shrink=1, pixel_size_um=1.0)
    with pytest.raises(PixelSizeError, match=rf"{pixel_size_um:g} µm .* 1 µm"):
        prepare_site([RAMP], recipe, pixel_size_um, ImageLimits(max_pixels=40_000))


@pytest.mark.parametrize("scaling", ["percentile-8bit", "fixed-scale", "control-scale"])
def test_a_plane_of_which_shrinking_leaves_nothing_is_blank(scaling):
    plane = np.full((48, 48), 100, np.uint16)
    plane[1, 1] = 4_000
    recipe = ImageRecipe(channels=("DNA",), size=16, shrink=2, scaling=scaling, full_scale=(1.0,))
    with pytest.raises(BlankImageError, match="100"):
        prepare_site([plane], recipe)


def test_a_hot_pixel_alone_is_nothing_to_scale():
    plane = np.full((200, 200), 100, np.uint16)
    plane[100, 100] = 4_000
    with pytest.raises(BlankImageError):
        prepare_site([plane], ImageRecipe(channels=("DNA",), size=16, shrink=1))


def test_a_plane_is_let_go_before_the_next_is_asked_for():
    alive = []

    def plane():
        assert not any(reference() is not None for reference in alive)
        made = RAMP.copy()
        alive.append(weakref.ref(made))
        return made

    prepare_site((plane() for _ in range(3)), ImageRecipe(channels=("DNA", "ER", "RNA"), size=12, shrink=2))


def test_real_files_of_every_vendor_decode(shared_data):
    paths = sorted([*shared_data.rglob("*.tif"), *shared_data.rglob("*.tiff")])[::4]
    decoded = 0
    for path in paths:
        try:
            decode_plane(path.read_bytes())
        except BlankImageError:
            continue
        decoded += 1
    assert decoded > len(paths) / 2


def test_saturation_is_a_share_and_has_a_limit():
    plane = np.zeros((10, 10), np.uint8)
    plane[:3] = 255
    assert saturated_share(plane) == pytest.approx(0.3)
    assert saturated_share(plane.astype(np.float32)) == 0
    with pytest.raises(SaturatedImageError, match="30%"):
        check_saturation(plane)
    assert check_saturation(plane, ImageLimits(max_saturated_share=0.5)) == pytest.approx(0.3)


def test_percentile_scaling_maps_a_plane_to_256_steps():
    recipe = ImageRecipe(channels=("DNA",), size=24, shrink=1, percentile=100)
    site = finished([RAMP], recipe)
    expected = np.floor(RAMP / RAMP.max() * 255) / 255
    np.testing.assert_allclose(site[0], expected[:, 4:28], atol=1 / 255)
    assert (site.shape, site.dtype, site.flags.c_contiguous) == ((1, 24, 24), np.float32, True)


def test_percentile_scaling_is_the_published_arithmetic_to_the_bit():
    rng = np.random.default_rng(4)
    planes = rng.gamma(2, 900, (2, 60, 48)).astype(np.uint16)
    recipe = ImageRecipe(channels=("DNA", "ER"), size=20, mean=(0.1, 0.2), std=(0.3, 0.4))
    halved = planes[:, ::2, ::2].astype(np.float32)
    high = np.stack([np.percentile(plane, 99.99) for plane in halved])[:, None, None]
    low = halved.min(axis=(1, 2), keepdims=True)
    steps = np.floor(np.clip((halved - low) / (high - low), 0, 1) * 255)[:, 5:25, 2:22] / np.float32(255)
    expected = (steps - np.array([[[0.1]], [[0.2]]], np.float32)) / np.array([[[0.3]], [[0.4]]], np.float32)
    np.testing.assert_array_equal(finished(planes, recipe), expected)


def test_percentile_scaling_ignores_gain_and_fixed_scaling_keeps_it():
    kept = ImageRecipe(channels=("DNA",), size=24, shrink=1, scaling="fixed-scale", full_scale=(1_000.0,))
    lost = ImageRecipe(channels=("DNA",), size=24, shrink=1)
    np.testing.assert_allclose(finished([RAMP * 2], lost), finished([RAMP], lost), atol=1 / 255)
    np.testing.assert_allclose(finished([RAMP * 2], kept), 2 * finished([RAMP], kept), rtol=1e-6)


def test_shrinking_takes_every_nth_pixel_and_a_known_pixel_size_resamples():
    recipe = ImageRecipe(channels=("DNA",), size=12, shrink=2, pixel_size_um=1.0, scaling="fixed-scale", full_scale=(1.0,))
    np.testing.assert_array_equal(finished([RAMP], recipe)[0], RAMP[::2, ::2][:, 2:14])
    resampled = finished([RAMP], recipe, pixel_size_um=0.5)[0]
    assert resampled.shape == (12, 12)
    assert abs(float(resampled.mean()) - RAMP[:, 4:28].mean()) < 1


def test_channels_are_shifted_and_divided_by_their_own_mean_and_std():
    recipe = ImageRecipe(
        channels=("DNA", "ER"),
        size=24,
        shrink=1,
        scaling="fixed-scale",
        full_scale=(1.0, 1.0),
        mean=(1.0, 2.0),
        std=(2.0, 4.0),
    )
    site = finished([RAMP, RAMP], recipe)
    np.testing.assert_allclose(site, np.stack([(RAMP - 1.0) / 2, (RAMP - 2.0) / 4])[:, :, 4:28], rtol=1e-6)


def test_planes_that_do_not_fit_are_refused():
    recipe = ImageRecipe(channels=("DNA", "ER"), size=24, shrink=1)
    with pytest.raises(MixedSizesError, match="24 x 32, 48 x 32"):
        prepare_site([RAMP, np.vstack([RAMP, RAMP])], recipe)
    with pytest.raises(ImageTooSmallError, match="needs 64 x 64"):
        prepare_site([RAMP, RAMP], ImageRecipe(channels=("DNA", "ER"), size=64, shrink=1))


def test_the_crop_is_about_the_centre():
    assert centre_crop(RAMP[None].astype(np.float32), 2).tolist() == [
        [[11 * 32 + 15, 11 * 32 + 16], [12 * 32 + 15, 12 * 32 + 16]]
    ]


def test_a_recipe_without_its_numbers_is_refused():
    with pytest.raises(ValueError, match="full_scale"):
        ImageRecipe(channels=("DNA",), size=8, scaling="fixed-scale")
    with pytest.raises(ValueError, match="scaling 'percentile' is not known; expected one of percentile-8bit"):
        ImageRecipe(channels=("DNA",), size=8, scaling="percentile")
    with pytest.raises(ValueError, match="percentile-8bit scales each image by itself"):
        ImageRecipe(channels=("DNA",), size=8, illumination="controls")
    with pytest.raises(ValueError, match="control_percentiles 99 and 1"):
        ImageRecipe(channels=("DNA",), size=8, scaling="control-scale", control_percentiles=(99, 1))
    with pytest.raises(ValueError, match="mean"):
        ImageRecipe(channels=("DNA", "ER"), size=8, mean=(0.1,))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"size": 0}, "size is 0; it is a number of pixels, 1 or more"),
        ({"shrink": -1}, "shrink is -1; it is a number of pixels, 1 or more"),
        ({"pixel_size_um": 0.0}, "pixel_size_um 0 is not positive and finite"),
        ({"pixel_size_um": float("inf")}, "pixel_size_um inf is not positive and finite"),
        ({"scaling": "fixed-scale", "full_scale": (255.0, 0.0)}, "full_scale 255, 0 is not positive and finite"),
        ({"scaling": "fixed-scale", "full_scale": (255.0, float("nan"))}, "full_scale 255, nan is not positive and finite"),
        ({"std": (0.1, -0.1)}, "std 0.1, -0.1 is not positive and finite"),
        ({"percentile": 0.0}, "percentile 0 is not above 0 and at most 100"),
        ({"percentile": 101.0}, "percentile 101 is not above 0 and at most 100"),
    ],
)
def test_a_recipe_of_numbers_that_prepare_nothing_is_refused(numbers, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        ImageRecipe(**{"channels": ("DNA", "ER"), "size": 8, **numbers})


def test_real_phenix_planes_decode_with_their_saturation(shared_data):
    shares = {}
    for path in sorted((shared_data / "cell_painting_phenix_fields").rglob("*.tiff")):
        data = path.read_bytes()
        with tifffile.TiffFile(io.BytesIO(data)) as read:
            compression = read.pages[0].compression.name
        plane = decode_plane(data)
        assert (plane.shape, plane.dtype) == ((1080, 1080), np.uint16)
        shares[path.parent.name, parse_file_name(path.name).channel] = (compression, check_saturation(plane))
    assert len(shares) == 9
    assert {compression for compression, _ in shares.values()} == {"LZW", "NONE"}
    assert shares["pediatric_BR00143976", 4][0] == "NONE"
    assert shares["pediatric_BR00143976", 4][1] > 0
    assert shares["jump_BR00117006", 5][1] > 0


def test_all_zero_cv8000_planes_are_refused_as_blank(shared_data):
    planes = sorted((shared_data / "vendor_layouts" / "cv8000").glob("*_T0001F*.tif"))
    assert planes
    for path in planes[:6]:
        well = parse_file_name(path.name).well
        with pytest.raises(BlankImageError) as refused:
            decode_plane(path.read_bytes())
        assert well in refused.value.about(well=well, file=path.name).detail


@pytest.mark.parametrize("share", [0.0, 1.0, 50.0, 99.0, 99.9, 99.99, 99.9999, 100.0])
@pytest.mark.parametrize("kind", ["gamma", "ties", "flat but one", "sorted", "floats"])
def test_the_percentile_is_numpys_to_the_bit(share: float, kind: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 2), (3, 5), (16, 16), (64, 61), (270, 270), (303, 301)):
        plane = {
            "gamma": rng.gamma(2, 300, (height, width)).astype(np.uint16),
            "ties": rng.integers(0, 4, (height, width)),
            "flat but one": np.arange(height * width).reshape(height, width) // (height * width - 1),
            "sorted": np.arange(height * width).reshape(height, width),
            "floats": rng.normal(size=(height, width)),
        }[kind].astype(np.float32)
        assert images._percentile(plane, share).tobytes() == np.float32(np.percentile(plane, share)).tobytes()
