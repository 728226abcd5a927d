"""The two stories, through the front door."""

import gc
import threading

import numpy as np
import pytest

from model.images import ImageRecipe
from service.settings import Settings
from service.storage import open_storage
from tests.service.conftest import emptied, running
from tests.service.plates import (
    CHANNELS,
    CLASSES,
    CONTROL_WELLS,
    GOLDEN_PASSES,
    FakeEngine,
    fake_bundle,
    image,
    plane,
    tiff,
    well_files,
)


def adapted(client, batch="P1", wells=CONTROL_WELLS):
    answer = client.post(f"/batches/{batch}/controls", files=well_files(wells))
    assert answer.status_code == 201, answer.text
    return answer.json()


def predicted(client, wells, batch="P1", sites=(1, 2), **options):
    answer = client.post(f"/batches/{batch}/predict", files=well_files(wells, sites), **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_well(prediction):
    return {well["well"]: well for well in prediction["wells"]}


def test_controls_adapt_a_batch_and_the_report_says_on_what(client, bundle):
    report = adapted(client)
    assert report["adapted"] is True
    assert report["wells_needed"] == 0
    assert report["context_wells"] == list(CONTROL_WELLS)
    assert (report["context_sites"], len(report["left_out"])) == (6, 2)
    assert "full" in report["left_out"][0]["reason"]
    assert report["bundle"] == bundle.digest
    assert (report["provider"], report["precision"]) == ("CPUExecutionProvider", "fp32")
    assert report["context"] == report["trained_context"] == "controls"
    assert report["distance"] > 0
    assert 0 <= report["percentile"] <= 100
    assert {"receive", "prepare", "measure", "total"} <= set(report["seconds"])


def test_a_well_is_answered_with_all_that_the_interface_promises(client):
    statistics_id = adapted(client)["statistics_id"]
    prediction = predicted(client, ["F05", "E05"])
    assert prediction["statistics_id"] == statistics_id
    assert prediction["adapted"] is True
    assert [well["well"] for well in prediction["wells"]] == ["E05", "F05"]
    answer = prediction["wells"][0]
    assert set(answer["probabilities"]) == set(CLASSES)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["probability"] == answer["probabilities"][answer["label"]]
    assert (answer["sites"], answer["refused"], answer["control"]) == (2, [], False)
    assert answer["distance_to_controls"] > 0
    assert answer["resembles_controls"] in (True, False)
    assert {"receive", "images", "classify", "total"} <= set(prediction["seconds"])
    assert 0 < prediction["seconds"]["images"] <= prediction["seconds"]["total"]


def test_an_answer_tells_what_making_its_batchs_own_network_took_where_it_has_one(client, engine):
    adapted(client)
    assert "network" not in predicted(client, ["E05"])["seconds"]
    classify, took = engine.classify, [0.25, 0.0, 0.0, 0.0]
    engine.classify = lambda *given: classify(*given)._replace(network_seconds=took.pop(0))
    assert [predicted(client, ["E05"])["seconds"]["network"] for _ in range(2)] == [0.25, 0]


def test_a_wells_answer_does_not_depend_on_company_order_or_chunking(client):
    adapted(client)
    wells = ["E05", "F05", "G05", "H05"]
    together = by_well(predicted(client, wells))
    assert by_well(predicted(client, wells[::-1])) == together
    for well in wells:
        assert predicted(client, [well])["wells"] == [together[well]]


def test_source_answers_need_no_batch_and_are_marked(client, store):
    prediction = predicted(client, ["E05"], batch="never-adapted", params={"context": "source"})
    assert prediction["adapted"] is False
    assert prediction["context"] == "source"
    assert prediction["statistics_id"] is None
    assert prediction["wells"][0]["distance_to_controls"] is None
    assert store.batch_ids() == []


def test_controls_may_come_in_several_requests_and_all_count(client, engine):
    first = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS[:3])).json()
    assert (first["adapted"], first["wells_needed"], first["statistics_id"]) == (False, 1, None)
    assert engine.passes == GOLDEN_PASSES
    assert adapted(client, wells=CONTROL_WELLS[3:])["context_wells"] == list(CONTROL_WELLS)


def test_the_order_of_uploads_does_not_matter(client):
    for well in reversed(CONTROL_WELLS):
        last = client.post("/batches/P2/controls", files=well_files([well])).json()
    assert last["statistics_id"] == adapted(client, "P1")["statistics_id"]
    answers = [by_well(predicted(client, ["E05"], batch=batch)) for batch in ("P1", "P2")]
    assert answers[0] == answers[1]


def test_sending_the_same_controls_again_changes_nothing(client, engine, store):
    first = adapted(client)
    revision, passes = store.batch("P1").revision, engine.passes
    assert adapted(client)["statistics_id"] == first["statistics_id"]
    assert (store.batch("P1").revision, engine.passes) == (revision, passes)


def test_other_images_replace_kept_ones_only_when_asked_to(client, store):
    first = adapted(client)
    other = well_files(["A01"], salt="another exposure")
    refused = client.post("/batches/P1/controls", files=other)
    assert refused.status_code == 409
    assert refused.json()["well"] == "A01"
    replaced = client.post("/batches/P1/controls?replace=true", files=other).json()
    assert replaced["statistics_id"] != first["statistics_id"]
    kept = store.adaptation("P1", first["bundle"], first["statistics_id"])
    assert kept.statistics_id == first["statistics_id"], "superseded statistics stay readable"


def test_batches_are_listed_page_by_page_with_what_they_take(client, storage):
    for name in ("P3", "P1", "P2", "P10"):
        client.request("PUT", f"/batches/{name}/platemap", content=b"well,role\nA01,control\n")
    adapted(client)
    whole = client.get("/batches").json()
    assert [batch["batch_id"] for batch in whole["batches"]] == ["P1", "P10", "P2", "P3"]
    assert (whole["following"], whole["kept_bytes"], whole["max_bytes"]) == (
        None,
        sum(len(storage.blobs.get(name)) for name in storage.blobs.names("batches/")),
        None,
    )
    first = client.get("/batches?limit=2").json()
    assert ([batch["batch_id"] for batch in first["batches"]], first["following"]) == (["P1", "P10"], "P10")
    rest = client.get("/batches", params={"limit": 3, "after": first["following"]}).json()
    assert ([batch["batch_id"] for batch in rest["batches"]], rest["following"]) == (["P2", "P3"], None)


def test_a_control_well_that_is_predicted_is_marked_and_stays_a_control(client):
    adapted(client)
    assert by_well(predicted(client, ["A01", "E05"]))["A01"]["control"] is True
    assert client.get("/batches/P1").json()["treated_wells"] == ["E05"]
    adapted(client)


def test_two_simultaneous_uploads_both_count(client, engine):
    both_measure = threading.Barrier(2, timeout=30)
    measure = engine.measure

    def meet(*given):
        if len(meeting) < 2:
            meeting.append(1)
            both_measure.wait()
        return measure(*given)

    meeting = []
    engine.measure = meet
    halves = [("A01", "B01", "C01", "D01"), ("E01", "F01", "G01", "H01")]
    threads = [threading.Thread(target=adapted, args=(client, "P1", half)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.measure = measure
    assert client.get("/batches/P1").json()["control_wells"] == sorted([*halves[0], *halves[1]])
    alone = adapted(client, "P2", [*halves[0], *halves[1]])
    assert client.get("/batches/P1").json()["statistics_id"] == alone["statistics_id"]


def test_batches_are_listed_told_and_forgotten(client):
    assert client.get("/batches").json()["batches"] == []
    report = adapted(client)
    (kept,) = client.get("/batches").json()["batches"]
    assert kept == client.get("/batches/P1").json()
    assert kept["control_wells"] == list(CONTROL_WELLS)
    assert (kept["adapted"], kept["statistics_id"]) == (True, report["statistics_id"])
    assert client.delete("/batches/P1").status_code == 204
    assert client.get("/batches/P1").status_code == 404


def test_the_model_card_says_what_is_served(client, bundle):
    card = client.get("/model").json()
    assert card["classes"] == list(CLASSES)
    assert card["channels"] == list(CHANNELS)
    assert card["bundle"] == bundle.digest
    assert card["recipe"]["size"] == bundle.manifest.recipe.size
    assert card["members"] == 1


def test_health_names_provider_and_precision(client):
    assert client.get("/health/live").json() == {"live": True}
    ready = client.get("/health/ready").json()
    assert ready["ready"] is True
    assert (ready["provider"], ready["precision"]) == ("CPUExecutionProvider", "fp32")


def test_openapi_describes_every_field_of_an_answer(client):
    told = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("WellPrediction", "Prediction", "ControlsReport"):
        bare = [field for field, value in told[name]["properties"].items() if "description" not in value]
        assert set(bare) <= {"well", "wells", "batch_id", "created_at"}, bare


def test_live_answers_a_head_request(client):
    assert client.request("HEAD", "/health/live").status_code == 200


def test_a_plate_further_than_any_held_out_one_is_noticed(settings, storage):
    with running(settings, FakeEngine(), storage) as client:
        near = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS)).json()
    dim = [image(f"{w}_1_{c}.tif", tiff(plane((w, c), brightness=0.62))) for w in CONTROL_WELLS for c in CHANNELS]
    with running(settings, FakeEngine(), storage) as client:
        far = client.post("/batches/P2/controls", files=dim).json()
    assert (near["percentile"] < 100) == (near["notices"] == [])
    assert far["percentile"] == 100
    assert any("further from the training plates" in n or "unlike those of the training" in n for n in far["notices"])


def test_a_pixel_size_that_the_table_contradicts_is_noticed(client):
    header = "file,well,site,channel,Metadata_ImageResolutionX"
    rows = [f"{w}_{s}_{c}.tif,{w},{s},{c},6e-7" for w in CONTROL_WELLS for s in (1, 2) for c in CHANNELS]
    form = {"layout": "\n".join([header, *rows]), "pixel_size_um": "0.65"}
    report = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), data=form).json()
    assert report["pixel_size_um"] == 0.65
    assert report["notices"] == ["pixel_size_um 0.65 was taken; the table says 0.6"]


def test_openapi_describes_the_upload(client):
    form = client.get("/openapi.json").json()["paths"]["/batches/{batch_id}/predict"]["post"]["requestBody"]
    assert "images" in form["content"]["multipart/form-data"]["schema"]["properties"]


def test_a_layout_part_places_files_whatever_their_names(client):
    names, files, rows = {}, [], ["file,well,site,channel"]
    for number, (_, (name, data, _)) in enumerate(well_files(CONTROL_WELLS)):
        well, site, channel = name.removesuffix(".tif").split("_")
        names[name] = f"{number}.tif"
        rows.append(f"{number}.tif,{well},{site},{channel}")
        files.append(image(f"{number}.tif", data))
    layout = "\n".join(rows)
    as_text = client.post("/batches/P1/controls", files=files, data={"layout": layout}).json()
    as_file = client.post("/batches/P2/controls", files=[*files, ("layout", ("layout.csv", layout, "text/csv"))]).json()
    assert as_text["statistics_id"] == as_file["statistics_id"] == adapted(client, "P3")["statistics_id"]


def test_numbered_channels_are_named_by_the_request_and_thumbnails_skipped(client):
    def named(well, number, thumb=""):
        return image(f"Mix_{well}_s1_w{number}{thumb}.tif", tiff(plane((well, number))))

    files = [named(well, number) for well in CONTROL_WELLS for number in (1, 2, 3, 4)] + [named("A01", 1, "_thumb")]
    report = client.post("/batches/P1/controls", files=files, data={"channels": "RNA,-,DNA,ER"}).json()
    assert report["adapted"] is True
    reasons = {item["reason"] for item in report["skipped"]}
    assert reasons == {"a thumbnail", "channel 2 is named unused by the request"}
    assert len(report["skipped"]) == 5


def test_numbers_taken_in_the_bundles_order_and_a_batch_of_another_name_are_noticed(client):
    numbered = [
        image(f"Mix_{well}_s1_w{number}.tif", tiff(plane((well, number)))) for well in CONTROL_WELLS for number in (1, 2, 3)
    ]
    assert "1 DNA, 2 ER, 3 RNA" in client.post("/batches/P1/controls", files=numbered).json()["notices"][0]
    named = client.post("/batches/P2/controls", files=numbered, data={"channels": ",".join(CHANNELS)}).json()
    assert named["notices"] == []
    rows = [f"{w}_{s}_{c}.tif,{w},{s},{c},BR1" for w in CONTROL_WELLS for s in (1, 2) for c in CHANNELS]
    layout = "\n".join(["file,well,site,channel,Metadata_Plate", *rows])
    for batch, noticed in (("BR1", 0), ("br1-rescan", 0), ("BR10", 1)):
        answer = client.post(f"/batches/{batch}/controls", files=well_files(CONTROL_WELLS), data={"layout": layout}).json()
        assert len(answer["notices"]) == noticed, answer["notices"]
    assert "BR1" in answer["notices"][0]
    assert client.get("/batches/BR10").json()["plate"] == "BR1"


def test_channel_zero_has_no_name_even_when_the_last_is_unused(client):
    files = [image("r01c01f01p01-ch0sk1fk1fl1.tiff", tiff(plane("x")))]
    answer = client.post("/batches/P1/controls", files=files, data={"channels": "DNA,ER,RNA,-"})
    assert answer.json()["type"].endswith("unknown-channel")


def test_what_is_left_out_is_told_as_of_now(client):
    adapted(client)
    more = client.post("/batches/P1/controls", files=well_files(["A01"], sites=(3, 4))).json()
    assert [(item["well"], item["site"]) for item in more["left_out"]] == [("A01", 3), ("A01", 4), ("C01", 2), ("D01", 2)]
    assert predicted(client, ["E05"])["left_out"] == more["left_out"]


def test_an_answer_says_when_kept_controls_are_of_another_recipe(settings, storage, tmp_path):
    frugal = settings.model_copy(update={"keep_control_images": False})
    with running(frugal, FakeEngine(), storage) as client:
        adapted(client)
    other = fake_bundle(tmp_path / "other", recipe=ImageRecipe(channels=CHANNELS, size=8, shrink=2))
    with running(settings.model_copy(update={"bundle": other.path}), FakeEngine(), storage) as later:
        new = ["E01", "F01", "G01", "H01"]
        assert adapted(later, wells=new)["unusable_sites"] == 8
        prediction = predicted(later, ["E05"])
        assert prediction["context_wells"] == new
        assert any("8 kept control sites" in notice for notice in prediction["notices"])


def test_a_blank_site_after_shrinking_is_left_out_too(client):
    adapted(client)
    hot = np.full((200, 200), 100, np.uint16)
    hot[100, 100] = 4_000
    files = well_files(["E05"], sites=(1,))
    files += [image(f"E05_2_{channel}.tif", tiff(hot + number)) for number, channel in enumerate(CHANNELS)]
    answer = client.post("/batches/P1/predict", files=files).json()["wells"][0]
    assert [(item["site"], item["problem"]) for item in answer["refused"]] == [(2, "blank-image")]


def test_saturation_is_reported_per_channel(client):
    bright = plane("bright")
    bright[:2] = 65_535
    files = [item for item in well_files(CONTROL_WELLS) if item[1][0] != "B01_2_ER.tif"]
    report = client.post("/batches/P1/controls", files=[*files, image("B01_2_ER.tif", tiff(bright))]).json()
    (item,) = report["saturation"]
    assert item == {"channel": "ER", "planes": 1, "worst_share": 0.125, "worst_well": "B01", "worst_site": 2}


def test_a_blank_site_is_left_out_of_a_wells_answer_when_others_remain(client):
    adapted(client)
    files = well_files(["E05"], sites=(1,)) + well_files(["E05"], sites=(2,))[:-1]
    blank = image("E05_2_RNA.tif", tiff(np.zeros((16, 16), np.uint16)))
    answer = client.post("/batches/P1/predict", files=[*files, blank]).json()["wells"][0]
    assert answer["sites"] == 1
    assert [(item["site"], item["problem"]) for item in answer["refused"]] == [(2, "blank-image")]
    alone = predicted(client, ["E05"], sites=(1,))["wells"][0]
    assert answer["probabilities"] == alone["probabilities"]


def test_more_than_a_thousand_files_are_taken(client):
    wells = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNO" for column in range(1, 25)]
    files = well_files(wells, sites=(1,))
    assert len(files) == 1_080
    assert client.post("/batches/P1/controls", files=files).json()["control_sites"] == 360


def test_a_plate_unlike_training_is_out_of_range_in_every_answer(settings, storage, tmp_path):
    recipe = ImageRecipe(channels=CHANNELS, size=16, shrink=1, scaling="fixed-scale", full_scale=(1.0, 1.0, 1.0))
    far = fake_bundle(tmp_path / "far", recipe=recipe)
    with running(settings.model_copy(update={"bundle": far.path}), FakeEngine(), storage) as client:
        report = adapted(client)
        assert report["out_of_range"] is True
        assert report["percentile"] == 100
        prediction = predicted(client, ["E05"])
        assert prediction["out_of_range"] is prediction["wells"][0]["out_of_range"] is True
        assert any("unlike" in notice for notice in prediction["notices"])


@pytest.mark.parametrize(("context", "word"), [("union", "'union'"), ("source", "AdaBN")])
def test_a_bundle_of_another_context_is_served_with_controls_and_says_so(context, word, settings, storage, tmp_path):
    other = fake_bundle(tmp_path / "other", context=context)
    with running(settings.model_copy(update={"bundle": other.path}), FakeEngine(), storage) as client:
        report = adapted(client)
        assert (report["context"], report["trained_context"]) == ("controls", context)
        assert word in report["notices"][0]
        assert word in predicted(client, ["E05"])["notices"][0]


def test_every_members_probabilities_are_averaged_in_an_answer(client, settings, storage, tmp_path):
    adapted(client)
    alone = by_well(predicted(client, ["E05"], sites=(1,)))["E05"]["probabilities"]
    several = fake_bundle(tmp_path / "several", members=3, training={"seed": 1, "members": [{"file": "a"}, {"file": "b"}]})
    with running(settings.model_copy(update={"bundle": several.path}), FakeEngine(3), storage) as later:
        card = later.get("/model").json()
        assert (card["members"], card["training"]["members"][1]) == (3, {"file": "b"})
        told = by_well(predicted(later, ["E05"], sites=(1,)))["E05"]["probabilities"]
    first = np.array(list(alone.values()))
    powers = [first**member / (first**member).sum() for member in (1, 2, 3)]
    np.testing.assert_allclose(list(told.values()), np.mean(powers, axis=0), rtol=1e-5)


def test_an_engine_of_fewer_members_than_the_bundles_is_not_ready(settings, storage, tmp_path):
    several = fake_bundle(tmp_path / "several", members=2)
    with running(settings.model_copy(update={"bundle": several.path}), FakeEngine(1), storage) as client:
        assert "shape (4, 1, 3)" in client.get("/health/ready").json()["detail"]


def test_a_new_bundle_of_the_same_recipe_measures_kept_controls_again_by_itself(client, settings, storage, tmp_path):
    first = adapted(client)
    newer = fake_bundle(tmp_path / "newer", name="newer")
    engine = FakeEngine()
    with running(settings.model_copy(update={"bundle": newer.path}), engine, storage) as later:
        assert later.get("/batches/P1").json()["adapted"] is False
        prediction = predicted(later, ["E05"])
        assert prediction["bundle"] == newer.digest
        assert prediction["statistics_id"] != first["statistics_id"]
        passes = engine.passes
        predicted(later, ["E05"])
        assert engine.passes == passes, "measured once, then kept"


def test_answers_survive_a_restart_bit_for_bit(settings):
    with running(settings, FakeEngine()) as client:
        adapted(client)
        before = predicted(client, ["E05", "F05"])["wells"]
    engine = FakeEngine()
    with running(settings, engine) as client:
        assert predicted(client, ["E05", "F05"])["wells"] == before
        assert engine.passes == GOLDEN_PASSES
        assert client.get("/batches/P1").json()["treated_wells"] == ["E05", "F05"]


def test_redis_and_sqlite_give_the_same_answers(client, settings, redis_url):
    sqlite_report = adapted(client, "same")
    sqlite_wells = predicted(client, ["E05"], batch="same")["wells"]
    remote = open_storage(settings.data.parent / "remote", emptied(redis_url))
    with running(settings, FakeEngine(), remote) as other:
        assert adapted(other, "same")["statistics_id"] == sqlite_report["statistics_id"]
        assert predicted(other, ["E05"], batch="same")["wells"] == sqlite_wells
    remote.close()


def test_the_pixel_size_is_the_batchs_own(storage, tmp_path):
    recipe = ImageRecipe(channels=CHANNELS, size=16, shrink=1, pixel_size_um=1.0)
    sized = fake_bundle(tmp_path / "sized", recipe=recipe)
    with running(Settings(bundle=sized.path, data=tmp_path / "sized-data", threads=1), FakeEngine(), storage) as client:
        files = well_files(CONTROL_WELLS, size=32)
        report = client.post("/batches/P1/controls", files=files, data={"pixel_size_um": "0.5"}).json()
        assert report["pixel_size_um"] == 0.5
        answer = client.post("/batches/P1/predict", files=well_files(["E05"], size=32))
        assert answer.json()["pixel_size_um"] == 0.5, "a request that names none means the batch's"


def test_a_load_data_table_brings_its_pixel_size_and_its_absence_is_noticed(storage, tmp_path):
    recipe = ImageRecipe(channels=CHANNELS, size=16, shrink=1, pixel_size_um=1.0)
    bundle = fake_bundle(tmp_path / "resampling", recipe=recipe)
    files = well_files(CONTROL_WELLS, size=40)
    columns = [f"FileName_Orig{channel}" for channel in CHANNELS]
    rows = [
        ",".join([well, str(site), "5e-07", *(f"{well}_{site}_{channel}.tif" for channel in CHANNELS)])
        for well in CONTROL_WELLS
        for site in (1, 2)
    ]
    layout = "\n".join([",".join(["Metadata_Well", "Metadata_Site", "Metadata_ImageResolutionX", *columns]), *rows])
    settings = Settings(bundle=bundle.path, data=tmp_path / "resampling-data", device="cpu")
    with running(settings, FakeEngine(), storage) as client:
        told = client.post("/batches/P1/controls", files=files, data={"layout": layout}).json()
        untold = client.post("/batches/P2/controls", files=files).json()
    assert told["pixel_size_um"] == 0.5
    assert told["notices"] == []
    assert untold["pixel_size_um"] is None
    assert "pixel size is not known" in untold["notices"][0]


def test_garbage_is_looked_for_again_once_requests_are_let_in(settings, storage):
    gc.disable()  # as the command line does while it imports
    try:
        with running(settings, FakeEngine(), storage):
            assert gc.isenabled()
    finally:
        gc.enable()
