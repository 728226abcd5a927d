"""A panel: treated wells that enter a plate's statistics beside its controls, and stay treated wells."""

import numpy as np
import pytest

from model.images import ImageRecipe, finish_site
from service.audit import entries
from service.digests import content_digest
from service.storage import open_storage, rebuild_records
from tests.service.conftest import emptied, running, wait_until
from tests.service.plates import CHANNELS, CONTROL_WELLS, FakeEngine, fake_bundle, well_files

PANEL = ("E05", "F05")
AS_PANEL = {"role": "panel"}


@pytest.fixture(scope="module")
def panel_bundle(tmp_path_factory):
    return fake_bundle(tmp_path_factory.mktemp("panel") / "bundle", context="panel", max_context_sites=20)


@pytest.fixture
def panel_settings(settings, panel_bundle):
    return settings.model_copy(update={"bundle": panel_bundle.path})


@pytest.fixture
def client(panel_settings, engine, storage):
    with running(panel_settings, engine, storage) as running_client:
        yield running_client


def sent(client, wells, batch="P1", sites=(1, 2), **params):
    answer = client.post(f"/batches/{batch}/controls", files=well_files(wells, sites), params=params)
    assert answer.status_code == 201, answer.text
    return answer.json()


def predicted(client, wells, batch="P1", **params):
    answer = client.post(f"/batches/{batch}/predict", files=well_files(wells), params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_panels_images_enter_the_statistics_beside_the_controls(client, store, panel_bundle):
    without = sent(client, CONTROL_WELLS)
    report = sent(client, PANEL, **AS_PANEL)
    assert (report["adapted"], report["context"], report["trained_context"]) == (True, "panel", "panel")
    assert (report["context_wells"], report["context_panel"]) == (list(CONTROL_WELLS), list(PANEL))
    assert (report["control_wells"], report["control_sites"], report["panel_wells"]) == (4, 8, 2)
    assert report["context_sites"] == 12
    assert report["statistics_id"] != without["statistics_id"]
    assert report["notices"] == []
    kept = store.adaptation("P1", panel_bundle.digest, report["statistics_id"])
    batch, recipe = store.batch("P1"), panel_bundle.manifest.recipe
    images = np.stack([finish_site(store.image(batch, key), recipe, None) for key in batch.controls])
    np.testing.assert_allclose(kept.statistics.mean, images.mean((0, 2, 3)), rtol=1e-5)
    controls = images[[key.well in CONTROL_WELLS for key in batch.controls]]
    scores = (controls.mean((2, 3)) - kept.statistics.mean) / np.sqrt(kept.statistics.variance + 1e-5)
    np.testing.assert_allclose(kept.control_centre, scores.mean(0), rtol=1e-4, atol=1e-5)
    assert kept.statistics.wells == 6


def test_without_its_panel_such_a_bundle_is_served_with_controls_and_says_so(client):
    report = sent(client, CONTROL_WELLS)
    assert (report["adapted"], report["context"], report["context_panel"]) == (True, "controls", [])
    for notices in (report["notices"], predicted(client, ["G05"])["notices"]):
        assert "'panel' and is served with control statistics" in notices[0]
        assert "role=panel" in notices[0]


def test_a_panel_is_no_control_and_counts_as_none(client):
    report = sent(client, PANEL, **AS_PANEL)
    assert (report["adapted"], report["wells_needed"], report["control_wells"]) == (False, 4, 0)
    assert report["notices"] == [], "there is nothing to blend yet"
    for params in ({}, {"context": "blended"}):
        answer = client.post("/batches/P1/predict", files=well_files(["G05"]), params=params)
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (409, "controls-required")
    assert sent(client, CONTROL_WELLS[:3])["wells_needed"] == 1
    assert sent(client, CONTROL_WELLS[3:])["context_panel"] == list(PANEL)


def test_wells_of_the_panel_are_answered_as_the_treated_wells_that_they_are(client):
    sent(client, CONTROL_WELLS)
    sent(client, PANEL, **AS_PANEL)
    answers = {well["well"]: well for well in predicted(client, ["A01", "E05", "G05"])["wells"]}
    assert [answers[well]["control"] for well in ("A01", "E05", "G05")] == [True, False, False]
    batch = client.get("/batches/P1").json()
    assert (batch["control_wells"], batch["panel_wells"]) == (list(CONTROL_WELLS), list(PANEL))
    assert batch["treated_wells"] == ["E05", "G05"]
    states = {(item["well"], item["state"]) for item in client.get("/batches/P1/images").json()["images"]}
    assert states == {(well, "control") for well in CONTROL_WELLS} | {(well, "panel") for well in PANEL}
    assert sent(client, PANEL, **AS_PANEL)["context"] == "panel", "the same again is no conflict"


def test_answers_before_the_panel_was_recorded_are_stale(client):
    sent(client, CONTROL_WELLS)
    predicted(client, ["G05"])
    sent(client, PANEL, **AS_PANEL)
    (kept,) = client.get("/batches/P1/predictions").json()["wells"]
    assert (kept["context"], kept["stale"]) == ("controls", True)
    predicted(client, ["G05"])
    (kept,) = client.get("/batches/P1/predictions").json()["wells"]
    assert (kept["context"], kept["stale"]) == ("panel", False)


def test_the_roles_of_wells_are_part_of_the_statistics_name(client):
    sent(client, [*CONTROL_WELLS, "E05"], batch="P1")
    one = sent(client, ["F05"], batch="P1", **AS_PANEL)
    sent(client, [*CONTROL_WELLS, "F05"], batch="P2")
    other = sent(client, ["E05"], batch="P2", **AS_PANEL)
    assert one["context_sites"] == other["context_sites"] == 12
    assert one["statistics_id"] != other["statistics_id"], "the images are the same, where the controls lie is not"


def test_a_blend_is_of_the_controls_alone(client):
    sent(client, CONTROL_WELLS[:1])
    sent(client, PANEL, **AS_PANEL)
    answer = predicted(client, ["G05"], context="blended")
    assert (answer["context"], answer["context_wells"], answer["context_panel"]) == ("blended", ["A01"], [])
    assert "a blend is of controls alone" in answer["notices"][0]


def test_a_bundle_that_measures_no_panel_leaves_a_recorded_one_alone(client, settings, storage):
    sent(client, CONTROL_WELLS)
    sent(client, PANEL, **AS_PANEL)
    with running(settings, FakeEngine(), storage) as other:
        answer = predicted(other, ["G05"])
        assert (answer["context"], answer["context_panel"], answer["notices"]) == ("controls", [], [])
        assert other.get("/batches/P1").json()["unusable_sites"] == 0
        alone = sent(other, CONTROL_WELLS, batch="P2")
        assert alone["statistics_id"] == answer["statistics_id"]


def test_a_panel_that_was_sent_ahead_is_recorded_by_its_wells_now_or_later(client):
    for _, (name, data, _) in well_files([*CONTROL_WELLS, *PANEL, "G05"], (1,)):
        well, site, channel = name.removesuffix(".tif").split("_")
        headers = {"Content-Digest": content_digest(data)}
        client.request("PUT", f"/batches/P1/images/{well}/{site}/{channel}", content=data, headers=headers)
    client.post("/batches/P1/controls", json={"staged": True, "wells": list(CONTROL_WELLS)})
    asked = client.post(
        "/batches/P1/controls",
        json={"staged": True, "wells": list(PANEL)},
        params=AS_PANEL,
        headers={"Prefer": "respond-async"},
    ).json()
    place = f"/jobs/{asked['job_id']}"
    wait_until(lambda: client.get(place).json()["state"] in ("done", "failed"))
    job = client.get(place).json()
    assert (job["state"], job["controls"]["context_panel"]) == ("done", list(PANEL))
    answered = client.post("/batches/P1/predict", json={"staged": True}).json()
    assert [well["well"] for well in answered["wells"]] == [*PANEL, "G05"]


def test_the_panel_is_kept_as_controls_are(client, store, storage, panel_settings):
    before = sent(client, CONTROL_WELLS)
    report = sent(client, PANEL, **AS_PANEL)
    entry = list(entries(storage.records))[-1]
    assert (entry["action"], entry["digests"]["role"]) == ("batch.adapted", "panel")
    assert len(entry["digests"]["sha256"]) == 12
    assert store.usage.kept_bytes() == sum(len(storage.blobs.get(name)) for name in storage.blobs.names("batches/"))
    with running(panel_settings, FakeEngine(), storage) as again:
        answer = predicted(again, ["G05"])
        assert answer["statistics_id"] == report["statistics_id"] != before["statistics_id"]
        assert again.delete("/batches/P1").status_code == 204
    assert storage.blobs.names("batches/") == []
    assert store.usage.kept_bytes() == 0


def test_a_panel_prepared_for_another_recipe_is_prepared_anew_and_stays_a_panel(client, panel_settings, storage, tmp_path):
    sent(client, CONTROL_WELLS)
    sent(client, PANEL, **AS_PANEL)
    recipe = ImageRecipe(channels=CHANNELS, size=8, shrink=2)
    newer = fake_bundle(tmp_path / "newer", context="panel", recipe=recipe, max_context_sites=20)
    with running(panel_settings.model_copy(update={"bundle": newer.path}), FakeEngine(), storage) as later:
        assert predicted(later, ["G05"])["context_panel"] == list(PANEL)
        batch = later.get("/batches/P1").json()
        assert (batch["panel_wells"], batch["unusable_sites"]) == (list(PANEL), 0)


def test_a_panel_outlives_a_flush_of_redis(panel_settings, redis_url, tmp_path):
    lab = open_storage(tmp_path / "lab", emptied(redis_url))
    with running(panel_settings, FakeEngine(), lab) as client:
        sent(client, CONTROL_WELLS)
        report = sent(client, PANEL, **AS_PANEL)
        emptied(redis_url)
        rebuild_records(tmp_path / "lab", redis_url, None)
        batch = client.get("/batches/P1").json()
        assert (batch["panel_wells"], batch["statistics_id"]) == (list(PANEL), report["statistics_id"])
        assert predicted(client, ["G05"])["statistics_id"] == report["statistics_id"]
    lab.close()
