"""Images sent ahead, plate maps, kept answers, repeated requests; over HTTP."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile

from service.digests import content_digest
from service.exports import CSV, PARQUET
from tests.service.conftest import running
from tests.service.plates import CHANNELS, CLASSES, CONTROL_WELLS, FakeEngine, fake_bundle, image, plane, tiff, well_files
from tests.service.test_routes import adapted, by_well, predicted

PLATEMAP = (
    "Well,role,compound,dose_um\n"
    + "".join(f"{well},DMSO,DMSO,\n" for well in CONTROL_WELLS)
    + 'E05,trt,"BRD-1, salt",3\nF05,trt,BRD-2,10\n'
)


def put_plane(client, batch, well, site, channel, *, salt="", replace=False):
    """Send one plane ahead."""
    data = tiff(plane((salt, well, site, channel)))
    params, headers = {"replace": "true"} if replace else {}, {"Content-Digest": content_digest(data)}
    answer = client.request(
        "PUT", f"/batches/{batch}/images/{well}/{site}/{channel}", content=data, headers=headers, params=params
    )
    assert answer.status_code in (200, 201), answer.text


def staged(client, wells, sites=(1, 2), batch="P1"):
    """Send planes ahead, one raw body each."""
    answers = []
    for _, (name, data, _) in well_files(wells, sites):
        well, site, channel = name.removesuffix(".tif").split("_")
        path = f"/batches/{batch}/images/{well}/{site}/{channel}"
        answers.append(client.request("PUT", path, content=data, headers={"Content-Digest": content_digest(data)}))
    return answers


def post_staged(client, path, batch="P1", **body):
    return client.post(f"/batches/{batch}/{path}", json={"staged": True, **body})


def send_platemap(client, text=PLATEMAP, batch="P1"):
    answer = client.request("PUT", f"/batches/{batch}/platemap", content=text.encode())
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_plate_sent_plane_by_plane_gets_the_answers_of_one_sent_as_a_form(client):
    assert {answer.status_code for answer in staged(client, [*CONTROL_WELLS, "E05", "F05"])} == {201}
    report = post_staged(client, "controls", wells=list(CONTROL_WELLS)).json()
    assert report["statistics_id"] == adapted(client, "P2")["statistics_id"]
    answer = post_staged(client, "predict").json()
    assert [well["well"] for well in answer["wells"]] == ["E05", "F05"], "all that are staged and are no controls"
    assert answer["wells"] == predicted(client, ["E05", "F05"], batch="P2")["wells"]


def test_a_plane_sent_again_changes_nothing(client, store):
    staged(client, ["E05"])
    before = store.staged("P1")
    assert {answer.status_code for answer in staged(client, ["E05"])} == {200}
    assert store.staged("P1") == before


def test_a_batch_begins_with_its_first_plane_and_tells_what_need_not_be_sent_again(client):
    (first, *_) = staged(client, ["E05"])
    assert client.get("/batches/P1").json()["wells_needed"] == 4
    images = client.get("/batches/P1/images").json()["images"]
    assert len(images) == 2 * len(CHANNELS)
    assert first.json() in images
    adapted(client)
    states = [item["state"] for item in client.get("/batches/P1/images").json()["images"]]
    assert (states.count("control"), states.count("staged")) == (2 * len(CHANNELS) * len(CONTROL_WELLS), 2 * len(CHANNELS))


def test_a_plate_map_tells_which_staged_wells_are_controls(client):
    staged(client, [*CONTROL_WELLS, "E05", "F05"])
    told = send_platemap(client)
    assert told["control_wells"] == list(CONTROL_WELLS)
    assert told["treated_wells"] == ["E05", "F05"]
    assert client.get("/batches/P1/platemap").json() == told
    assert post_staged(client, "controls").json()["context_wells"] == list(CONTROL_WELLS)
    assert [well["well"] for well in post_staged(client, "predict").json()["wells"]] == ["E05", "F05"]


def test_kept_answers_are_the_latest_of_every_well(client):
    adapted(client)
    first = predicted(client, ["E05", "F05"])
    predicted(client, ["E05"], sites=(1,))
    kept = by_well(client.get("/batches/P1/predictions").json())
    assert first["kept"] is True
    assert (kept["E05"]["sites"], kept["F05"]["sites"]) == (1, 2)
    assert kept["F05"]["probabilities"] == by_well(first)["F05"]["probabilities"]
    assert kept["F05"]["statistics_id"] == first["statistics_id"]
    assert kept["F05"]["stale"] is False
    assert len(kept["F05"]["embedding"]) == 3


def test_answers_on_superseded_statistics_or_by_another_bundle_are_stale(client, settings, storage, tmp_path):
    adapted(client)
    predicted(client, ["E05"])
    adapted(client, wells=["G01"])
    predicted(client, ["F05"])
    kept = by_well(client.get("/batches/P1/predictions").json())
    assert (kept["E05"]["stale"], kept["F05"]["stale"]) == (True, False)
    newer = fake_bundle(tmp_path / "newer", name="newer")
    with running(settings.model_copy(update={"bundle": newer.path}), FakeEngine(), storage) as later:
        assert {well["stale"] for well in later.get("/batches/P1/predictions").json()["wells"]} == {True}


def test_unadapted_answers_are_not_kept_and_say_so(client):
    adapted(client)
    assert predicted(client, ["E05"], params={"context": "source"})["kept"] is False
    assert client.get("/batches/P1/predictions").json()["wells"] == []


@pytest.mark.parametrize("how", ["accept", "format"])
def test_answers_are_exported_as_csv_and_parquet_with_the_plate_maps_columns(how, client):
    adapted(client)
    predicted(client, ["E05", "F05", "G05"])
    send_platemap(client)

    def export(form, media_type):
        asked = {"headers": {"Accept": media_type}} if how == "accept" else {"params": {"format": form}}
        answer = client.get("/batches/P1/predictions", **asked)
        assert answer.headers["content-type"].startswith(media_type)
        return answer.content

    text = pd.read_csv(io.BytesIO(export("csv", CSV)), dtype={"Metadata_dose_um": str})
    table = pq.read_table(io.BytesIO(export("parquet", PARQUET))).to_pandas()
    told = by_well(client.get("/batches/P1/predictions").json())
    for frame in (text, table):
        assert list(frame["Metadata_Well"]) == ["E05", "F05", "G05"]
        assert set(frame["Metadata_Plate"]) == {"P1"}
        assert list(frame["Metadata_compound"])[:2] == ["BRD-1, salt", "BRD-2"]
        assert pd.isna(frame["Metadata_compound"][2]), "the plate map does not name it"
        assert list(frame["Metadata_dose_um"])[:2] == ["3", "10"]
        for at, well in enumerate(("E05", "F05", "G05")):
            for name in CLASSES:
                assert frame[f"p_{name}"][at] == told[well]["probabilities"][name]
            found = [frame[f"Embedding_{number:04d}"][at] for number in range(3)]
            np.testing.assert_allclose(found, told[well]["embedding"], rtol=1e-6)
    assert list(text.columns) == list(table.columns)


def test_a_request_repeated_under_its_key_gets_the_first_answer_and_takes_effect_once(client, storage):
    headers = {"Idempotency-Key": "controls of P1"}
    first = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=headers)
    again = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS)[::-1], headers=headers)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    headers = {"Idempotency-Key": "answers of P1"}
    answers = [client.post("/batches/P1/predict", files=well_files(["E05"]), headers=headers) for _ in range(2)]
    assert answers[0].content == answers[1].content
    entries = [json.loads(data) for _, data in storage.records.scan("audit/entry/")]
    assert [entry["action"] for entry in entries] == ["batch.adapted", "batch.classified"]


def test_a_refused_request_may_be_mended_under_its_key(client):
    headers = {"Idempotency-Key": "k"}
    assert client.post("/batches/P1/predict", files=well_files(["E05"]), headers=headers).status_code == 409
    adapted(client)
    assert client.post("/batches/P1/predict", files=well_files(["E05"]), headers=headers).status_code == 200


def test_a_request_that_changes_nothing_may_be_repeated_too(client):
    adapted(client)
    headers = {"Idempotency-Key": "k"}
    answers = [client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=headers) for _ in range(2)]
    assert answers[0].content == answers[1].content
    source = {"Idempotency-Key": "s"}
    asked = {"files": well_files(["E05"]), "headers": source, "params": {"context": "source"}}
    answers = [client.post("/batches/never/predict", **asked) for _ in range(2)]
    assert answers[0].content == answers[1].content


def test_every_answer_carries_its_requests_id(client):
    assert client.get("/batches", headers={"X-Request-ID": "lims-7"}).headers["x-request-id"] == "lims-7"
    drawn = client.get("/batches", headers={"X-Request-ID": "bad id\u00e9".encode("latin-1")}).headers["x-request-id"]
    assert len(drawn) == 16


def test_a_wrong_plane_sent_ahead_costs_only_the_request_that_asks_for_it(client):
    staged(client, CONTROL_WELLS)
    bad = b"not a TIFF"
    path = "/batches/P1/images/E05/1/DNA"
    client.request("PUT", path, content=bad, headers={"Content-Digest": content_digest(bad)})
    for channel in CHANNELS[1:]:
        data = tiff(plane(channel))
        path = f"/batches/P1/images/E05/1/{channel}"
        client.request("PUT", path, content=data, headers={"Content-Digest": content_digest(data)})
    assert post_staged(client, "controls", wells=list(CONTROL_WELLS)).status_code == 201
    answer = post_staged(client, "predict", wells=["E05"])
    assert answer.json()["type"].endswith("not-a-tiff")
    assert answer.json()["well"] == "E05"


def ome_files(wells, names=CHANNELS, sites=(1, 2), suffix=".ome.tif"):
    """Every site as one OME-TIFF, with the pixels that ``well_files`` has."""
    files = []
    for well in wells:
        for site in sites:
            buffer = io.BytesIO()
            stack = np.stack([plane(("", well, site, channel)) for channel in CHANNELS])
            metadata = {"axes": "CYX", "Channel": {"Name": list(names)}}
            tifffile.imwrite(buffer, stack, ome=True, photometric="minisblack", metadata=metadata)
            files.append(image(f"{well}_{site}{suffix}", buffer.getvalue()))
    return files


@pytest.mark.parametrize("data", [{}, {"channels": "DNA,ER,RNA"}])
def test_ome_tiffs_with_named_channels_get_the_answers_of_single_planes(data, client):
    names = CHANNELS if not data else ("Hoechst", "ConA", "Syto")
    report = client.post("/batches/P1/controls", files=ome_files(CONTROL_WELLS, names), data=data)
    assert report.status_code == 201, report.text
    answer = client.post("/batches/P1/predict", files=ome_files(["E05"], names, suffix=".TIFF"), data=data).json()
    adapted(client, "P2")
    single = predicted(client, ["E05"], batch="P2")["wells"]
    assert answer["wells"] == single


def test_an_ome_tiff_without_a_channel_of_the_bundle_is_refused_with_its_place(client):
    answer = client.post("/batches/P1/controls", files=ome_files(["A01"], ("DNA", "ER", "Mito"))).json()
    assert answer["type"].endswith("missing-channel")
    assert (answer["well"], answer["channel"]) == ("A01", "RNA")
    files = [image("A01_1.tif", tiff(plane("x")))]
    answer = client.post("/batches/P1/controls", files=files).json()
    assert answer["type"].endswith("unsupported-image")
    assert "A01_1.tif" in answer["detail"]
