"""A batch with few controls: blended with the mean of the training plates when that is asked for, and marked."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from model.images import finish_site
from service.audit import entries
from service.records import Commit
from tests.service.conftest import running, wait_until
from tests.service.plates import BLEND_WELLS, CONTROL_WELLS, GOLDEN_PASSES, FakeEngine, fake_bundle, well_files

BLENDED = {"context": "blended"}
LATER = {"Prefer": "respond-async"}


def sent(client, wells, batch="P1", **options):
    return client.post(f"/batches/{batch}/controls", files=well_files(wells), **options).json()


def predicted(client, wells, batch="P1", **params):
    answer = client.post(f"/batches/{batch}/predict", files=well_files(wells), params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_below_the_minimum_a_blend_is_offered_and_given_only_when_asked_for(client, engine):
    report = sent(client, CONTROL_WELLS[:1])
    assert (report["adapted"], report["wells_needed"], report["statistics_id"]) == (False, 3, None)
    assert "?context=blended" in report["notices"][-1]
    assert client.post("/batches/P1/predict", files=well_files(["E05"])).status_code == 409
    assert engine.passes == GOLDEN_PASSES, "nothing was measured yet"
    prediction = predicted(client, ["E05"], **BLENDED)
    assert (prediction["context"], prediction["adapted"], prediction["kept"]) == ("blended", True, True)
    assert prediction["context_wells"] == ["A01"]
    assert prediction["prior_weight"] == pytest.approx(BLEND_WELLS / (BLEND_WELLS + 1))
    (notice,) = prediction["notices"]
    assert "1 control wells" in notice
    assert "75% of the weight" in notice


@pytest.mark.parametrize("wells", [1, 3, 4])
def test_the_statistics_are_those_of_the_kept_controls_mixed_with_source(wells, client, bundle, store):
    sent(client, CONTROL_WELLS[:wells])
    prediction = predicted(client, ["E05"], **BLENDED)
    kept = store.adaptation("P1", bundle.digest, prediction["statistics_id"]).statistics
    batch, recipe = store.batch("P1"), bundle.manifest.recipe
    images = np.stack([finish_site(store.image(batch, key), recipe, None) for key in batch.controls]).astype(float)
    if wells == 4:
        images = np.delete(images, [5, 7], axis=0)  # the context is full: 6 sites of 4 wells
    source, weight = bundle.training_statistics.source, BLEND_WELLS / (BLEND_WELLS + wells)
    first = (1 - weight) * images.mean((0, 2, 3)) + weight * source.mean
    second = (1 - weight) * (images**2).mean((0, 2, 3)) + weight * (source.variance + source.mean.astype(float) ** 2)
    np.testing.assert_allclose(kept.mean, first, rtol=1e-5)
    np.testing.assert_allclose(kept.variance, second - first**2, rtol=1e-4)
    assert (kept.wells, kept.sites) == (wells, min(2 * wells, 6))


def test_what_is_not_blended_says_so_and_stays_as_it_was(client):
    plain = sent(client, CONTROL_WELLS)
    blend = predicted(client, ["E05"], **BLENDED)
    answer = predicted(client, ["E05"])
    assert answer["statistics_id"] == plain["statistics_id"] != blend["statistics_id"]
    assert (answer["context"], answer["prior_weight"], plain["prior_weight"]) == ("controls", None, None)
    assert plain["notices"] == answer["notices"] == []
    assert answer["wells"][0]["probabilities"] != blend["wells"][0]["probabilities"]
    assert predicted(client, ["E05"], context="source")["prior_weight"] is None


def test_blended_statistics_are_measured_once_and_again_when_the_controls_are_others(client, engine):
    sent(client, CONTROL_WELLS[:1])
    first = predicted(client, ["E05"], **BLENDED)
    passes = engine.passes
    assert predicted(client, ["F05"], **BLENDED)["statistics_id"] == first["statistics_id"]
    assert engine.passes == passes
    sent(client, CONTROL_WELLS[1:2])
    second = predicted(client, ["F05"], **BLENDED)
    assert second["statistics_id"] != first["statistics_id"]
    assert (second["context_wells"], engine.passes) == (["A01", "B01"], passes + 1)


def test_kept_answers_tell_that_they_are_blended_and_are_stale_when_controls_are_added(client):
    sent(client, CONTROL_WELLS[:2])
    predicted(client, ["E05", "F05"], **BLENDED)

    def kept():
        found = client.get("/batches/P1/predictions").json()["wells"]
        return {well["well"]: (well["context"], well["stale"]) for well in found}

    assert kept() == {"E05": ("blended", False), "F05": ("blended", False)}
    sent(client, CONTROL_WELLS[2:])
    assert kept() == {"E05": ("blended", True), "F05": ("blended", True)}
    predicted(client, ["E05"])
    predicted(client, ["F05"], **BLENDED)
    assert kept() == {"E05": ("controls", False), "F05": ("blended", False)}
    table = pq.read_table(io.BytesIO(client.get("/batches/P1/predictions?format=parquet").content))
    assert table.column("context").to_pylist() == ["controls", "blended"]


def test_a_blended_job_is_answered_as_a_blended_request_is(client):
    sent(client, CONTROL_WELLS[:1])
    asked = client.post("/batches/P1/predict", files=well_files(["E05"]), params=BLENDED, headers=LATER).json()
    place = f"/jobs/{asked['job_id']}"
    wait_until(lambda: client.get(place).json()["state"] in ("done", "failed"))
    job = client.get(place).json()
    now = predicted(client, ["E05"], **BLENDED)
    assert job["state"] == "done"
    for name in ("context", "statistics_id", "prior_weight", "wells"):
        assert job["prediction"][name] == now[name], name


@pytest.mark.parametrize(("options", "context"), [({"source": True}, "source"), ({"source": False}, "controls")])
def test_a_job_that_was_asked_for_before_there_were_blends_is_run_as_it_was_meant(options, context, settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        sent(client, CONTROL_WELLS)
        job = client.post("/batches/P1/predict", files=well_files(["E05"]), headers=LATER).json()
        name = f"job-asked/default/{job['job_id']}"
        (data,) = storage.records.read([name])
        asked = json.loads(data)
        asked["what"]["options"] = options
        storage.records.commit(Commit({name: json.dumps(asked).encode()}))
        later = client.app.state.served.later
        later.jobs.run(f"job/default/{job['job_id']}", later.run)
        assert client.get(f"/jobs/{job['job_id']}").json()["prediction"]["context"] == context


def test_blended_answers_survive_a_restart_without_another_pass(settings):
    with running(settings, FakeEngine()) as client:
        sent(client, CONTROL_WELLS[:2])
        before = predicted(client, ["E05"], **BLENDED)
    engine = FakeEngine()
    with running(settings, engine) as client:
        after = predicted(client, ["E05"], **BLENDED)
        assert (after["wells"], after["notices"]) == (before["wells"], before["notices"])
        assert engine.passes == GOLDEN_PASSES


def test_a_blend_stands_in_the_audit_log_as_what_it_is(client, storage):
    sent(client, CONTROL_WELLS[:1])
    prediction = predicted(client, ["E05"], **BLENDED)
    last = list(entries(storage.records))[-1]
    assert (last["action"], last["digests"]["statistics_id"]) == ("batch.classified", prediction["statistics_id"])


def test_an_unadapted_bundles_batch_blends_with_its_running_statistics_and_says_both(settings, storage, tmp_path):
    erm = fake_bundle(tmp_path / "erm", context="source")
    with running(settings.model_copy(update={"bundle": erm.path}), FakeEngine(), storage) as client:
        sent(client, CONTROL_WELLS[:1])
        notices = predicted(client, ["E05"], **BLENDED)["notices"]
    assert ["AdaBN" in notices[0], "75%" in notices[1]] == [True, True]
