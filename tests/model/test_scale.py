"""A batch's scale: what a gain, an offset and uneven light do to images goes, what differs between wells stays."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ContextError, NoControlsError, NonFiniteImageError
from model.images import ImageRecipe, PreparedImage, finish_site, measure_scale, prepare_site, scale_pixels
from model.scale import BatchScale, common_surfaces, field_surfaces

CHANNELS = ("DNA", "ER")
PX, CROP_PX = 160, 96
RECIPE = ImageRecipe(channels=CHANNELS, size=CROP_PX, shrink=1, scaling="control-scale")
LIT = replace(RECIPE, illumination="controls")
FIXED = replace(RECIPE, scaling="fixed-scale", full_scale=(4_000.0, 4_000.0))


def site(seed, brightness=1.0):
    """Grey levels (channels, PX, PX) of spots on a floor of 300 counts, as much in the corners as in the middle."""
    rng = np.random.default_rng(seed)
    spots = rng.gamma(0.3, 2_000 * brightness, (len(CHANNELS), PX // 2, PX // 2))
    return 300 + np.kron(spots, np.ones((2, 2)))


CONTROLS = [site(seed) for seed in range(12)]


def shade(loss=0.5, tilt=0.2):
    """Relative light over the field, the less the farther from a point off its middle."""
    axis = np.linspace(-1, 1, PX)
    return 1 - loss * ((axis[:, None] - tilt) ** 2 + (axis[None, :] + tilt) ** 2) / 2


def taken(sites, gain=(1.0, 1.0), offset=(0.0, 0.0), light=1.0):
    """Sites as another camera takes them: float32 counts, so that rounding is no part of what is tested."""
    by_channel = np.array(gain)[:, None, None], np.array(offset)[:, None, None]
    return [(planes * light * by_channel[0] + by_channel[1]).astype(np.float32) for planes in sites]


def finished(sites, recipe, treated=()):
    """Sites, and others of their batch, as the network takes them."""
    prepared = [prepare_site(planes, recipe) for planes in (*sites, *treated)]
    scale = measure_scale(prepared[: len(sites)], recipe)
    return np.stack([finish_site(each, recipe, scale) for each in prepared])


def flatness(images):
    """Largest deviation, over thirds of the crop, of the mean over many sites from the whole's."""
    edges = np.array_split(np.arange(CROP_PX), 3)
    thirds = [images[:, :, rows][:, :, :, columns].mean(axis=(0, 2, 3)) for rows in edges for columns in edges]
    return np.abs(np.stack(thirds) / images.mean(axis=(0, 2, 3)) - 1).max()


# --- gain and offset -------------------------------------------------------------------------------------------------

gains = st.tuples(*[st.floats(0.2, 5.0)] * len(CHANNELS))
offsets = st.tuples(*[st.floats(-200, 3_000)] * len(CHANNELS))


@pytest.mark.parametrize("recipe", [RECIPE, LIT])
@settings(deadline=None, max_examples=15)
@given(gain=gains, offset=offsets)
def test_control_scale_undoes_gain_and_offset_of_each_channel(recipe, gain, offset):
    treated = [site(77, brightness=1.5)]
    as_it_was = finished(taken(CONTROLS), recipe, taken(treated))
    found = finished(taken(CONTROLS, gain, offset), recipe, taken(treated, gain, offset))
    np.testing.assert_allclose(found, as_it_was, atol=1e-4 * as_it_was.max())


def test_control_scale_of_whole_counts_is_the_same_within_their_rounding():
    gain, offset = (0.5, 2.0), (100.0, 400.0)
    counts = [np.rint(planes).astype(np.uint16) for planes in taken(CONTROLS)]
    others = [np.rint(planes).astype(np.uint16) for planes in taken(counts, gain, offset)]
    high = np.median([np.percentile(planes, 99.9, axis=(1, 2)) for planes in counts], axis=0) - 300
    step = 1 / (high * gain)
    assert (np.abs(finished(others, RECIPE) - finished(counts, RECIPE)).max(axis=(0, 2, 3)) < 2 * step).all()


def test_fixed_scale_keeps_gain_and_offset():
    as_it_was = finished(taken(CONTROLS), FIXED)
    np.testing.assert_array_equal(as_it_was[0], taken(CONTROLS)[0][:, 32:128, 32:128] / np.float32(4_000))
    found = finished(taken(CONTROLS, gain=(2.0, 2.0), offset=(400.0, 0.0)), FIXED)
    np.testing.assert_allclose(found[:, 0], 2 * as_it_was[:, 0] + 0.1, rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], 2 * as_it_was[:, 1], rtol=1e-5)


def test_control_scale_keeps_what_differs_between_wells():
    dim, bright = finished(taken(CONTROLS), RECIPE, taken([site(5), site(5, brightness=3.0)]))[-2:]
    np.testing.assert_allclose(bright, 3 * dim, atol=1e-3 * bright.max())
    assert np.percentile(finished(taken(CONTROLS), RECIPE), 99.9) == pytest.approx(1, abs=0.1)


def test_a_site_full_of_debris_does_not_set_the_scale():
    spoiled = [*CONTROLS[:-1], site(11, brightness=50.0)]
    clean, found = (measure_scale([prepare_site(p, RECIPE) for p in taken(sites)], RECIPE) for sites in (CONTROLS, spoiled))
    np.testing.assert_allclose(found.span, clean.span, rtol=0.05)


@pytest.mark.parametrize("recipe", [RECIPE, LIT, replace(FIXED, illumination="controls")])
def test_the_order_of_the_controls_does_not_matter(recipe):
    prepared = [prepare_site(planes, recipe) for planes in taken(CONTROLS, light=shade())]
    shuffled = [prepared[place] for place in np.random.default_rng(1).permutation(len(prepared))]
    assert measure_scale(prepared, recipe) == measure_scale(shuffled, recipe)


# --- illumination ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_illumination_from_controls_flattens_the_field_whatever_the_cameras_offset(offset):
    """To within what the cells of sixty sites leave: as flat as the same sites are under even light."""
    sites = [site(seed) for seed in range(120)]
    even, shaded = (taken(sites, offset=(offset, offset), light=light) for light in (1.0, shade()))
    for plain in (RECIPE, FIXED):
        lit = replace(plain, illumination="controls")
        least = flatness(finished(even[:60], plain, even[60:])[60:])
        before, after = (flatness(finished(shaded[:60], recipe, shaded[60:])[60:]) for recipe in (plain, lit))
        assert before > 5 * least
        assert after < 1.2 * least


def test_fixed_scale_with_illumination_keeps_the_mean_intensity():
    controls = taken([site(seed) for seed in range(60)], light=shade())
    plain, lit = (finished(controls, recipe) for recipe in (FIXED, replace(FIXED, illumination="controls")))
    np.testing.assert_allclose(lit.mean(axis=(0, 2, 3)), plain.mean(axis=(0, 2, 3)), rtol=0.02)
    assert not np.allclose(lit, plain, rtol=0.02)


def test_few_controls_correct_little_rather_than_wrongly():
    """Of even light nothing is to be corrected: what is, is the cells of a few sites."""
    fields = [np.stack([field_surfaces(plane, CROP_PX) for plane in planes]) for planes in taken(CONTROLS[:4])]
    found, bare = (each[:, 1, 1:] / each[:, 1, :1] for each in (common_surfaces(fields), np.mean(fields, axis=0)))
    assert np.abs(found).mean() < 0.5 * np.abs(bare).mean()
    assert (common_surfaces(fields[:1])[..., 1:] == 0).all()


def test_surfaces_are_the_least_squares_fit_to_the_blocks():
    plane = taken(CONTROLS, light=shade())[0][0][:, :150]
    found = field_surfaces(plane, CROP_PX)
    square = plane[5:155][3:147, 3:147].astype(np.float64)  # the largest centred square of 16 whole blocks
    blocks = [square[y : y + 9, x : x + 9] for y in range(0, 144, 9) for x in range(0, 144, 9)]
    at = (np.arange(16) * 9 + 4.5 - 72) / (CROP_PX / 2)
    y, x = (axis.ravel() for axis in np.meshgrid(at, at, indexing="ij"))
    terms = np.stack([np.ones(256), y, x, y**2 - 1 / 3, y * x, x**2 - 1 / 3], axis=1)
    floor = np.array([np.sort(block.ravel())[8] for block in blocks])
    light = np.array([block.mean() for block in blocks]) - floor
    expected = [np.linalg.lstsq(terms, values, rcond=None)[0] for values in (floor, light)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_window_is_scaled_as_it_is_in_the_whole_field():
    prepared = [prepare_site(planes, LIT) for planes in taken(CONTROLS, light=shade())]
    scale = measure_scale(prepared, LIT)
    whole = np.stack(taken(CONTROLS[:3], light=shade()))
    field = scale_pixels(whole, LIT, scale, corner=(-32, -32))
    np.testing.assert_array_equal(scale_pixels(whole[..., 7:80, 90:], LIT, scale, corner=(-25, 58)), field[..., 7:80, 90:])
    np.testing.assert_array_equal(finish_site(prepared[0], LIT, scale), field[0, :, 32:128, 32:128])


def test_light_is_never_extrapolated_to_darkness():
    steep = BatchScale(low=((0.0,) * 6,), span=((100.0, 0.0, 90.0, 0.0, 0.0, 0.0),))
    values = steep(np.full((1, 20, 60), 50, np.float32), 20, corner=(0, -20))
    assert values.max() == pytest.approx(5.0)  # a tenth of the mean at least
    assert values[0, 0, 30] == pytest.approx(50 / (100 + 90 * 0.05))


# --- what gives no scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [RECIPE, LIT])
def test_controls_that_show_nothing_give_no_scale_and_name_the_channel(recipe):
    with pytest.raises(NoControlsError, match="takes its scale from them"):
        measure_scale([], recipe)
    blank = np.full((PX, PX), 7, np.float32)
    blank[80, 80] = 9  # not quite
    prepared = [prepare_site([planes[0], blank], recipe) for planes in taken(CONTROLS[:2])]
    with pytest.raises(ContextError, match="channel ER of the control images is all but blank"):
        measure_scale(prepared, recipe)


def test_a_recipe_that_needs_a_scale_scales_nothing_without_it():
    with pytest.raises(ValueError, match="control-scale with illumination none needs the batch's scale"):
        finish_site(prepare_site(taken(CONTROLS)[0], RECIPE), RECIPE, None)
    paper = replace(RECIPE, scaling="percentile-8bit")
    assert measure_scale([prepare_site(taken(CONTROLS)[0], paper)], paper) is None
    assert measure_scale([prepare_site(taken(CONTROLS)[0], FIXED)], FIXED) is None


def test_pixels_out_of_single_precisions_scale_are_refused():
    tiny = replace(FIXED, full_scale=(1e-30, 1e-30))
    with pytest.raises(NonFiniteImageError):
        finish_site(PreparedImage(np.full((2, 4, 4), 1e20, np.float32)), tiny, None)


def test_a_scale_survives_json_exactly_and_its_digest_names_its_numbers():
    scale = measure_scale([prepare_site(planes, LIT) for planes in taken(CONTROLS)], LIT)
    assert BatchScale.from_json(scale.to_json()) == scale
    assert BatchScale.from_json(scale.to_json()).digest == scale.digest
    assert measure_scale([prepare_site(planes, LIT) for planes in taken(CONTROLS[:-1])], LIT).digest != scale.digest
