"""Bundles whose image recipe takes its scale from the batch's controls: what is kept, named, answered and refused."""

import numpy as np
import pytest

from model.images import ImageRecipe
from model.scale import BatchScale
from service.settings import Settings
from service.storage import open_storage
from tests.service.conftest import emptied, running
from tests.service.plates import CHANNELS, CONTROL_WELLS, SIZE, FakeEngine, fake_bundle, image, plane, tiff, well_files
from tests.service.test_meanwhile import slug
from tests.service.test_routes import adapted, by_well, predicted

BY_CONTROLS = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=1, scaling="control-scale")
LIT = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=1, scaling="control-scale", illumination="controls")
FIXED = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=1, scaling="fixed-scale", full_scale=(60_000.0,) * 3)
SOURCE = {"context": "source"}
FIELD = SIZE + 8


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("scaled")
    return {
        "control-scale": fake_bundle(root / "scaled", recipe=BY_CONTROLS),
        "lit": fake_bundle(root / "lit", recipe=LIT),
        "fixed-scale": fake_bundle(root / "fixed", recipe=FIXED),
    }


@pytest.fixture
def settings(bundles, tmp_path):
    return Settings(bundle=bundles["control-scale"].path, data=tmp_path / "data", device="cpu", threads=1)


def of(settings, bundle):
    return settings.model_copy(update={"bundle": bundle.path})


def taken(wells, gain=1.0, offset=0.0, sites=(1, 2)):
    """Wells as another camera takes them; float32, so that rounding is no part of what is tested."""
    return [
        image(
            f"{well}_{site}_{channel}.tif",
            tiff((plane((well, site, channel), FIELD) / 4 * gain + offset).astype(np.float32)),
        )
        for well in wells
        for site in sites
        for channel in CHANNELS
    ]


def answered(client, batch, **camera):
    """A batch's answer on statistics of its own, and on the source's."""
    assert client.post(f"/batches/{batch}/controls", files=taken(CONTROL_WELLS, **camera)).status_code == 201
    found = [
        client.post(f"/batches/{batch}/predict", files=taken(["E05"], **camera), params=params) for params in ({}, SOURCE)
    ]
    assert [answer.status_code for answer in found] == [200, 200]
    return [answer.json() for answer in found]


# --- what a scale does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["control-scale", "lit", "fixed-scale"])
def test_a_plate_taken_with_another_gain_and_offset_is_answered_the_same_by_control_scale(recipe, bundles, settings):
    with running(of(settings, bundles[recipe]), FakeEngine()) as client:
        one, other = answered(client, "P1"), answered(client, "P2", gain=2.5, offset=900.0)
    assert one[0]["scale_id"] != other[0]["scale_id"] or recipe == "fixed-scale"
    for mine, others, adapted_answer in zip(one, other, (True, False), strict=True):
        assert (mine["adapted"], mine["scale_id"]) == (adapted_answer, one[0]["scale_id"])
        probabilities = [np.array(list(answer["wells"][0]["probabilities"].values())) for answer in (mine, others)]
        same = np.allclose(*probabilities, atol=1e-3)
        # statistics of the batch's own undo an affine change by themselves, as far as this engine goes
        assert same == (recipe != "fixed-scale" or adapted_answer)


def test_statistics_are_named_by_the_scale_that_was_used(client, bundle, settings, storage, store):
    report = adapted(client)
    assert set(report["scale_id"]) <= set("0123456789abcdef")
    kept = store.adaptation("P1", report["bundle"], report["statistics_id"])
    assert (kept.scale.digest, kept.unscaled_id != kept.statistics_id) == (report["scale_id"], True)
    assert client.get("/batches/P1").json()["statistics_id"] == report["statistics_id"]
    assert client.get("/batches").json()["batches"][0]["adapted"] is True
    with running(of(settings, bundle), FakeEngine(), storage) as other:
        assert adapted(other, "P2")["scale_id"] is None


def test_new_controls_set_the_scale_anew_and_older_answers_are_stale(client):
    first = adapted(client)
    predicted(client, ["E05"])
    second = adapted(client, wells=["G01"])
    assert second["scale_id"] != first["scale_id"]
    assert by_well(client.get("/batches/P1/predictions").json())["E05"]["stale"] is True
    assert predicted(client, ["E05"])["scale_id"] == second["scale_id"]
    assert by_well(client.get("/batches/P1/predictions").json())["E05"]["stale"] is False


@pytest.mark.parametrize("recipe", ["control-scale", "lit"])
def test_controls_in_several_requests_in_any_order_are_one_batch(recipe, bundles, settings):
    with running(of(settings, bundles[recipe]), FakeEngine()) as client:
        adapted(client, "P1")
        for well in reversed(CONTROL_WELLS):
            last = adapted(client, "P2", wells=[well])
        whole = client.get("/batches/P1").json()
        assert (last["statistics_id"], last["adapted"]) == (whole["statistics_id"], True)
        assert by_well(predicted(client, ["E05"], batch="P2")) == by_well(predicted(client, ["E05"], batch="P1"))


def test_a_wells_answer_does_not_depend_on_who_else_is_sent(client):
    adapted(client)
    together = by_well(predicted(client, ["E05", "F05", "A02"]))
    assert by_well(predicted(client, ["E05"]))["E05"] == together["E05"]


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", ["sqlite", "redis"])
@pytest.mark.parametrize("recipe", ["control-scale", "lit"])
def test_the_scale_survives_a_restart_bit_for_bit(recipe, records, bundles, settings, tmp_path, request):
    url = emptied(request.getfixturevalue("redis_url")) if records == "redis" else None
    served, engine = of(settings, bundles[recipe]), FakeEngine()
    before = {}
    for again in (False, True):
        opened = open_storage(tmp_path / "lab", url)
        with running(served, engine if again else FakeEngine(), opened) as client:
            if not again:
                adapted(client)
            found = predicted(client, ["E05", "F05"])
            told = found["wells"], found["scale_id"], predicted(client, ["E05"], params=SOURCE)["wells"]
            before.setdefault("told", told)
            assert told == before["told"]
        opened.close()
    assert engine.passes == 2  # the golden replay's


def test_a_bundle_with_a_scale_takes_over_controls_that_another_prepared(bundle, settings, storage):
    with running(of(settings, bundle), FakeEngine(), storage) as client:
        first = adapted(client)
        before = predicted(client, ["E05"])
    with running(settings, FakeEngine(), storage) as client:
        later = predicted(client, ["E05"])
        assert (first["scale_id"], later["adapted"]) == (None, True)
        assert later["scale_id"] == adapted(client, "P2")["scale_id"]
    with running(of(settings, bundle), FakeEngine(), storage) as client:
        assert predicted(client, ["E05"])["wells"] == before["wells"]
        assert client.get("/batches/P1").json()["statistics_id"] == first["statistics_id"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, SOURCE])
def test_without_controls_there_is_no_scale_and_no_answer(params, client):
    refused = client.post("/batches/P1/predict", files=well_files(["E05"]), params=params)
    assert (refused.status_code, slug(refused)) == (409, "controls-required")
    assert "takes the images' scale from them (control-scale), for ?context=source as well" in refused.json()["detail"]


def test_a_few_controls_give_a_scale_to_answers_that_need_no_more(client):
    adapted(client, wells=CONTROL_WELLS[:2])
    refused = client.post("/batches/P1/predict", files=well_files(["E05"]))
    assert (refused.status_code, slug(refused), refused.json()["wells_needed"]) == (409, "too-few-controls", 2)
    blended, source = (predicted(client, ["E05"], params={"context": context}) for context in ("blended", "source"))
    assert (blended["adapted"], source["adapted"]) == (True, False)
    assert blended["scale_id"] == source["scale_id"] is not None
    assert by_well(client.get("/batches/P1/predictions").json())["E05"]["stale"] is False
    assert adapted(client, wells=CONTROL_WELLS[2:])["scale_id"] != blended["scale_id"]
    assert by_well(client.get("/batches/P1/predictions").json())["E05"]["stale"] is True


def test_a_panels_treated_wells_are_scaled_by_the_controls_and_set_no_scale(settings, tmp_path):
    panel = fake_bundle(tmp_path / "panel", recipe=BY_CONTROLS, context="panel", max_context_sites=30)
    engine = FakeEngine()
    with running(of(settings, panel), engine) as client:
        alone = adapted(client)
        report = client.post("/batches/P1/controls", files=taken(["H11"], gain=3.0), params={"role": "panel"}).json()
        assert report["context"] == "panel"
        assert report["scale_id"] == alone["scale_id"]
        assert report["statistics_id"] != alone["statistics_id"]


def test_controls_that_show_nothing_to_scale_by_are_refused_and_not_kept(client):
    blank = np.full((SIZE, SIZE), 100, np.uint16)
    blank[1, 1] = 4_000
    files = [
        image(f"{well}_{site}_{channel}.tif", tiff(blank + number) if channel == "ER" else data)
        for number, (well, site, channel, data) in enumerate(
            (*name.removesuffix(".tif").split("_"), data) for _, (name, data, _) in well_files(CONTROL_WELLS)
        )
    ]
    refused = client.post("/batches/P1/controls", files=files)
    assert (refused.status_code, slug(refused), refused.json()["channel"]) == (422, "unusable-controls", "ER")
    assert client.get("/batches").json()["batches"] == []


def test_pixels_out_of_single_precisions_scale_name_their_well(settings, tmp_path):
    tiny = ImageRecipe(channels=CHANNELS, size=SIZE, shrink=1, scaling="fixed-scale", full_scale=(1e-30,) * 3)
    with running(of(settings, fake_bundle(tmp_path / "tiny", recipe=tiny)), FakeEngine()) as client:
        for route, wells in (("controls", CONTROL_WELLS), ("predict?context=source", ["E05"])):
            refused = client.post(f"/batches/P1/{route}", files=taken(wells, gain=1e20))
            assert (refused.status_code, slug(refused)) == (422, "non-finite-image")
            assert (refused.json()["well"], refused.json()["site"]) == (wells[0], 1)


def test_the_model_says_how_images_are_scaled(client):
    recipe = client.get("/model").json()["recipe"]
    assert (recipe["scaling"], recipe["illumination"], recipe["control_percentiles"]) == ("control-scale", "none", [1, 99.9])
    assert BatchScale(((0.0,),), ((1.0,),)).digest != BatchScale(((0.0,),), ((1.5,),)).digest
