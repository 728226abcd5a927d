"""Every refusal: its slug, its shape, its words, and that it changes nothing."""

import io
import json
import re
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
import tifffile
from starlette.exceptions import HTTPException

from model.bundle import Measured
from model.errors import UndecodableImageError
from model.images import ImageRecipe
from model.layout import well_name
from service.access import Keys, Scope
from service.digests import content_digest
from service.engine import Classified
from service.errors import PROBLEM_TYPE, PROBLEMS, DecoderKilledError, KeyNotFoundError, MemoryShortError, problem_of
from service.multipart import FormLimits
from service.records import Commit
from service.settings import TenantRules
from service.store import RevisionConflictError
from tests.service.conftest import running, wait_until
from tests.service.plates import CHANNELS, CONTROL_WELLS, FakeEngine, fake_bundle, image, plane, tiff, well_files, with_file

DOCS = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
CONTROLS = "/batches/P1/controls"
FILES = well_files(CONTROL_WELLS)
FIRST = "A01_1_DNA.tif"
SEEN: set[str] = set()


def everything(store):
    """All that the store holds, but revisions and times."""
    return {batch_id: store.batch(batch_id) for batch_id in store.batch_ids()}


def refused(answer, slug, *, names=()):
    """Check one problem's shape and remember that its slug was produced."""
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["type"] == PROBLEM_TYPE + slug, body
    row = next(problem for problem in PROBLEMS.values() if problem.slug == slug)
    assert (answer.status_code, body["status"], body["title"]) == (row.status, row.status, row.title)
    assert ("retry-after" in answer.headers) == (row.retry_after_s is not None) == ("retry_after_s" in body)
    for name in names:
        assert name in body["detail"], body["detail"]
    SEEN.add(slug)
    return body


def declaring(height, width):
    """A TIFF of a few bytes whose header declares a huge image."""
    data = bytearray(tiff(np.ones((1, 1), np.uint16)))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as read:
        tags = read.pages[0].tags
        for name, value in (("ImageLength", height), ("ImageWidth", width)):
            tag = tags[name]
            size = 2 if tag.dtype == 3 else 4
            data[tag.valueoffset : tag.valueoffset + 4] = value.to_bytes(4, "little")
            if size == 2:
                data[tag.offset + 2 : tag.offset + 4] = (4).to_bytes(2, "little")
    return bytes(data)


NAN = plane("x").astype(np.float32)
NAN[3, 3] = np.nan
WIDE = np.array([[-3e38, 3e38], [0, 1]], np.float32).repeat(8, 0).repeat(8, 1)
SATURATED = np.full((16, 16), 65_535, np.uint16)
SATURATED[0] = 7
HOT = np.full((200, 200), 100, np.uint16)
HOT[100, 100] = 4_000

BAD_FILES = [
    ("not-a-tiff", with_file(FILES, FIRST, b""), [FIRST, "empty"]),
    ("not-a-tiff", with_file(FILES, FIRST, b"\x89PNG\r\n\x1a\n" + b"0" * 50), [FIRST, "A01", "site 1", "DNA"]),
    ("truncated-image", with_file(FILES, FIRST, tiff(plane("x"))[:-200]), [FIRST, "A01"]),
    ("truncated-image", with_file(FILES, FIRST, tiff(plane("x"), compression="zlib")[:-60]), [FIRST]),
    ("image-too-large", with_file(FILES, FIRST, declaring(100_000, 100_000)), [FIRST, "100000 x 100000"]),
    ("image-too-small", [item for item in FILES if "A01_1" not in item[1][0]] + well_files(["A01"], (1,), 8), ["A01"]),
    ("unsupported-image", with_file(FILES, FIRST, tiff(np.zeros((3, 16, 16), np.uint16))), [FIRST, "pages"]),
    ("unsupported-image", with_file(FILES, FIRST, tiff(np.arange(256.0).reshape(16, 16))), [FIRST, "float64"]),
    ("non-finite-image", with_file(FILES, FIRST, tiff(NAN)), [FIRST, "NaN"]),
    ("non-finite-image", with_file(FILES, FIRST, tiff(WIDE)), ["A01"]),
    ("blank-image", with_file(FILES, FIRST, tiff(HOT)), [FIRST, "A01", "all but a few"]),
    (
        "duplicate-image",
        with_file(FILES, FIRST, FILES[-1][1][1]),
        ["well A01 site 1 channel DNA", "well D01 site 2 channel RNA"],
    ),
    ("invalid-layout", [*FILES, image(f"A01_{'9' * 30}_DNA.tif", tiff(plane("x")))], ["999", "whole number"]),
    ("blank-image", with_file(FILES, FIRST, tiff(np.zeros((16, 16), np.uint16))), [FIRST, "A01", "DNA", "every pixel"]),
    ("saturated-image", with_file(FILES, FIRST, tiff(SATURATED)), [FIRST, "94%", "25%"]),
    ("mixed-sizes", with_file(FILES, FIRST, tiff(plane("x", 32))), ["A01", "site 1", "16 x 16", "32 x 32"]),
    ("missing-channel", FILES[1:], ["A01", "site 1", "DNA"]),
    ("missing-channel", [item for item in FILES if "RNA" not in item[1][0]], ["A01", "RNA"]),
    ("unknown-channel", [*FILES, image("A01_1_Mito.tif", tiff(plane("x")))], ["A01_1_Mito.tif", "DNA, ER, RNA"]),
    ("duplicate-plane", [*FILES, image("a1_01_dna.tiff", tiff(plane("x")))], ["a1_01_dna.tiff", FIRST]),
    ("invalid-well", [*FILES, image("Z99_1_DNA.tif", tiff(plane("x")))], ["Z99"]),
    ("invalid-layout", [*FILES, image("holiday.tif", tiff(plane("x")))], ["holiday.tif", "layout"]),
    ("no-images", [image("Mix_A01_s1_w1_thumb.tif", b"any")], ["images"]),
]


@pytest.mark.parametrize("path", ["controls", "predict"])
@pytest.mark.parametrize(("slug", "files", "names"), BAD_FILES)
def test_an_upload_with_one_bad_file_is_refused_whole(slug, files, names, path, client, store):
    if path == "predict":
        assert client.post("/batches/P1/controls", files=well_files(["G01", "H01", "I01", "J01"])).status_code == 201
        if slug in ("blank-image", "saturated-image"):
            files = [item for item in files if "A01_2" not in item[1][0]]
    before = everything(store)
    refused(client.post(f"/batches/P1/{path}", files=files), slug, names=names)
    assert everything(store) == before


@pytest.mark.parametrize(
    ("slug", "data", "names"),
    [
        ("invalid-request", {"pixel_size_um": "wide"}, ["wide"]),
        ("invalid-request", {"pixel_size_um": "-1"}, ["-1"]),
        ("invalid-request", {"pixel_size_um": "nan"}, ["nan"]),
        ("invalid-request", {"pixel_size_um": "1e-9"}, ["1e-9"]),
        ("invalid-request", {"chanels": "DNA"}, ["chanels"]),
        ("upload-too-large", {"channels": "DNA," * 300}, ["channels", "1,000"]),
        ("invalid-layout", {"layout": '[{"file": "a", "well": "A01", "site": 1, "channel": "DNA"}, {}]'}, ["object 2"]),
        ("invalid-layout", {"layout": "a,b\n1,2"}, ["file, well, site, channel"]),
        ("invalid-layout", {"layout": "file,well,site,channel\nother.tif,A01,1,DNA"}, ["layout", "A01_1_DNA.tif"]),
        ("invalid-well", {"layout": f"file,well,site,channel\n{FIRST},Z99,1,DNA"}, ["Z99"]),
    ],
)
def test_an_upload_with_a_bad_field_is_refused_whole(slug, data, names, client, store):
    refused(client.post(CONTROLS, files=FILES, data=data), slug, names=names)
    assert store.batch_ids() == []


def test_a_channel_number_without_a_name_is_refused(client):
    files = [image("r01c01f01p01-ch4sk1fk1fl1.tiff", tiff(plane("x")))]
    refused(client.post(CONTROLS, files=files), "unknown-channel", names=["number 4", "r01c01f01p01-ch4sk1fk1fl1.tiff"])


@pytest.mark.parametrize(
    "batch_id", ["a%2Fb", "..%2F..%2Fetc", "x" * 10_000, "x" * 129, ".hidden", "a%20b", "%C3%A9", "a%00b", "a:b"]
)
@pytest.mark.parametrize("path", ["/controls", "/predict"])
def test_an_unusable_batch_id_is_refused_clearly(batch_id, path, client, store):
    refused(client.post(f"/batches/{batch_id}{path}", files=FILES), "invalid-batch-id", names=["1 to 128"])
    refused(client.get(f"/batches/{batch_id}"), "invalid-batch-id")
    assert store.batch_ids() == []


def test_predict_before_controls_says_what_to_send(client, store):
    body = refused(client.post("/batches/P1/predict", files=FILES), "controls-required")
    assert "/batches/P1/controls" in body["detail"]
    assert "DNA, ER, RNA" in body["detail"]
    assert (body["batch_id"], body["wells_needed"]) == ("P1", 4)
    assert store.batch_ids() == []


def test_predict_with_too_few_controls_says_how_many_more(client, store):
    client.post(CONTROLS, files=well_files(CONTROL_WELLS[:3]))
    before = everything(store)
    answer = client.post("/batches/P1/predict", files=well_files(["E05"]))
    body = refused(answer, "too-few-controls", names=["send 1 more", "?context=blended"])
    assert (body["batch_id"], body["wells_needed"]) == ("P1", 1)
    assert everything(store) == before


def test_a_blend_without_any_control_is_refused_as_ever(client, store):
    answer = client.post("/batches/P1/predict?context=blended", files=well_files(["E05"]))
    body = refused(answer, "controls-required", names=["?context=source"])
    assert (body["batch_id"], body["wells_needed"]) == ("P1", 4)
    assert store.batch_ids() == []


def test_a_panel_is_refused_by_a_bundle_that_measures_none(client, store):
    answer = client.post(f"{CONTROLS}?role=panel", files=well_files(["E05"]))
    assert refused(answer, "panel-not-measured", names=["'controls'", "/batches/P1/predict"])["batch_id"] == "P1"
    assert store.batch_ids() == []


def test_no_well_is_a_control_and_of_the_panel(settings, storage, store, tmp_path):
    bundle = fake_bundle(tmp_path / "panel", context="panel")
    with running(settings.model_copy(update={"bundle": bundle.path}), FakeEngine(), storage) as client:
        client.post(CONTROLS, files=FILES)
        client.post(f"{CONTROLS}?role=panel", files=well_files(["E05"]))
        before = everything(store)
        answer = client.post(f"{CONTROLS}?role=panel", files=well_files(["E06", "B01"]))
        body = refused(answer, "control-as-panel", names=["B01"])
        assert (body["well"], body["wells"]) == ("B01", ["B01"])
        refused(client.post(CONTROLS, files=well_files(["E05", "E06"])), "treated-as-control", names=["E05", "panel"])
        answer = client.request("PUT", "/batches/P1/platemap", content=b"well,role\nA01,control\nE05,control\n")
        refused(answer, "control-as-panel", names=["E05", "panel"])
        assert everything(store) == before
        client.request("PUT", "/batches/P1/platemap", content=b"well,role\nA01,control\nE05,treated\nE06,control\n")
        answer = client.post(f"{CONTROLS}?role=panel", files=well_files(["E06"]))
        refused(answer, "control-as-panel", names=["E06", "plate map"])
        refused(client.post(f"{CONTROLS}?role=panel", json={"staged": True}), "invalid-request", names=["Name them"])


def test_another_image_for_a_kept_control_is_refused(client, store):
    client.post(CONTROLS, files=FILES)
    before = everything(store)
    other = with_file(FILES, "B01_2_ER.tif", tiff(plane("other")))
    body = refused(client.post(CONTROLS, files=other), "control-conflict", names=["B01", "ER", "replace=true"])
    assert (body["well"], body["site"], body["channel"]) == ("B01", 2, "ER")
    assert everything(store) == before


def test_a_well_answered_as_treated_is_no_control(client, store):
    client.post(CONTROLS, files=FILES)
    client.post("/batches/P1/predict", files=well_files(["E05"]))
    before = everything(store)
    refused(client.post(CONTROLS, files=well_files(["E05", "E06"])), "treated-as-control", names=["E05"])
    assert everything(store) == before


def test_another_plates_images_are_refused(client, store):
    def table(plate, wells):
        rows = [f"{w}_{s}_{c}.tif,{w},{s},{c},{plate}" for w in wells for s in (1, 2) for c in CHANNELS]
        return {"layout": "\n".join(["file,well,site,channel,Metadata_Plate", *rows])}

    client.post(CONTROLS, files=FILES, data=table("P1", CONTROL_WELLS))
    before = everything(store)
    answer = client.post("/batches/P1/predict", files=well_files(["E05"]), data=table("P2", ["E05"]))
    refused(answer, "plate-conflict", names=["P1", "P2"])
    refused(client.post(CONTROLS, files=well_files(["E01"]), data=table("P2", ["E01"])), "plate-conflict", names=["P2"])
    assert everything(store) == before
    same = client.post("/batches/P1/predict", files=well_files(["E05"]), data=table("p1", ["E05"]))
    assert same.status_code == 200


def test_another_pixel_size_than_the_batchs_is_refused(client, store):
    client.post(CONTROLS, files=FILES)
    before = everything(store)
    for path in ("controls", "predict"):
        answer = client.post(f"/batches/P1/{path}", files=FILES, data={"pixel_size_um": "0.6"})
        refused(answer, "pixel-size-conflict", names=["0.6", "without a pixel size"])
    assert everything(store) == before


def test_controls_of_another_image_recipe_whose_files_are_not_kept_are_asked_for_again(settings, tmp_path, storage):
    with running(settings.model_copy(update={"keep_control_images": False}), FakeEngine(), storage) as client:
        client.post(CONTROLS, files=FILES)
    recipe = ImageRecipe(channels=CHANNELS, size=8, shrink=2)
    other = fake_bundle(tmp_path / "other", recipe=recipe)
    with running(settings.model_copy(update={"bundle": other.path}), FakeEngine(), storage) as later:
        answer = later.post("/batches/P1/predict", files=well_files(["E05"]))
        refused(answer, "controls-of-another-recipe", names=["send the controls again"])
        report = later.post(CONTROLS, files=FILES).json()
        assert (report["adapted"], report["unusable_sites"]) == (True, 0)
        assert later.post("/batches/P1/predict", files=well_files(["E05"])).status_code == 200


def test_controls_without_finite_statistics_are_refused(client, engine, store):
    measured = Measured(np.full(3, np.inf, np.float32), np.ones(3, np.float32), np.ones((8, 3), np.float32))
    engine.measure = lambda *_: measured
    refused(client.post(CONTROLS, files=FILES), "unusable-controls", names=["not finite"])
    assert store.batch_ids() == []


def test_an_answer_that_is_not_finite_is_no_answer(client, engine, store):
    client.post(CONTROLS, files=FILES)
    before = everything(store)
    engine.classify = lambda images, *_: Classified(*(np.full((len(images), 1, 3), np.nan, np.float32),) * 2)
    body = refused(client.post("/batches/P1/predict", files=well_files(["E05"])), "non-finite-image", names=["not finite"])
    assert body["well"] == "E05"
    assert everything(store) == before


@pytest.mark.parametrize("pixel_size_um", ["0.04", "21"])
def test_a_pixel_size_far_from_the_networks_is_refused(pixel_size_um, settings, tmp_path, storage):
    recipe = ImageRecipe(channels=CHANNELS, size=16, shrink=1, pixel_size_um=1.0)
    other = fake_bundle(tmp_path / "sized", recipe=recipe)
    with running(settings.model_copy(update={"bundle": other.path}), FakeEngine(), storage) as sized:
        answer = sized.post(CONTROLS, files=FILES, data={"pixel_size_um": pixel_size_um})
    refused(answer, "unusable-pixel-size", names=[f"{pixel_size_um} µm", "network's 1 µm"])


def test_more_sites_than_are_held_at_once_are_refused(settings, storage):
    one_site = 4 * len(CHANNELS) * 16 * 16
    few = settings.model_copy(update={"max_request_input_bytes": 5 * one_site})
    with running(few, FakeEngine(), storage) as client:
        body = refused(client.post(CONTROLS, files=FILES), "upload-too-large", names=["8 sites", "at most 5"])
        assert body["max_sites"] == 5
        assert client.post(CONTROLS, files=well_files(CONTROL_WELLS, (1,))).status_code == 201
        answer = client.post("/batches/P1/predict", files=well_files(["E05"], range(6)))
        assert answer.json()["wells"][0]["sites"] == 6, "those that are classified are not held"


def test_an_upload_that_stands_still_gives_its_slot_back(settings, storage):
    impatient = settings.model_copy(update={"max_concurrent_requests": 1, "upload_idle_timeout_s": 0.05})
    with running(impatient, FakeEngine(), storage) as client:

        async def silent():
            yield HEADER
            await anyio.sleep_forever()

        answer = client.post(CONTROLS, content=silent(), headers={"content-type": FORM})
        refused(answer, "upload-timeout", names=["0.05 s"])
        assert answer.headers["connection"] == "close"
        assert client.post(CONTROLS, files=FILES).status_code == 201


@pytest.mark.parametrize("anew", [False, True])
def test_answers_for_a_batch_that_was_deleted_meanwhile_are_not_given(anew, client, engine, store):
    client.post(CONTROLS, files=FILES)
    classify = engine.classify

    def interrupted(images, statistics):
        engine.classify = classify
        assert client.delete("/batches/P1").status_code == 204
        if anew:
            assert client.post(CONTROLS, files=well_files(["E01", "F01", "G01", "H01"])).status_code == 201
        return classify(images, statistics)

    engine.classify = interrupted
    refused(client.post("/batches/P1/predict", files=well_files(["M01"])), "batch-not-found", names=["was deleted"])
    assert [batch.treated for batch in everything(store).values()] == ([frozenset()] if anew else [])


def test_what_is_not_kept_is_not_found(client):
    refused(client.get("/batches/P9"), "batch-not-found", names=["P9"])
    refused(client.delete("/batches/P9"), "batch-not-found", names=["P9"])


def test_paths_and_methods_that_do_not_exist(client):
    refused(client.get("/nowhere"), "not-found", names=["/nowhere"])
    refused(client.post("/model"), "method-not-allowed", names=["GET"])
    for path in ("controls", "predict"):
        answer = client.get(f"/batches/P1/{path}")
        refused(answer, "method-not-allowed", names=["POST"])
        assert answer.headers["allow"] == "POST"


def test_a_query_that_is_not_valid(client):
    refused(client.post("/batches/P1/predict?context=union", files=FILES), "invalid-request", names=["context"])
    refused(client.post(f"{CONTROLS}?replace=perhaps", files=FILES), "invalid-request", names=["replace"])
    mistyped = client.post("/batches/P1/predict?contxt=source", files=FILES)
    refused(mistyped, "invalid-request", names=["contxt", "context"])
    twice = client.post("/batches/P1/predict?context=source&context=controls", files=FILES)
    refused(twice, "invalid-request", names=["context", "2 times"])
    refused(client.get("/health/live?now=1"), "invalid-request", names=["now", "none"])


FORM = "multipart/form-data; boundary=x"
HEADER = b'--x\r\nContent-Disposition: form-data; name="images"; filename="A01_1_DNA.tif"\r\n\r\n'


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "text/plain"),
        (b"", "multipart/form-data"),
        (b"no parts", FORM),
        (HEADER + b"II*", FORM),
        (b"--x\r\nContent-Type: text/plain\r\n\r\nhello\r\n--x--\r\n", FORM),
        (b"", FORM + "x" * 5_000),
    ],
)
def test_a_body_that_is_no_complete_form(content, kind, client, store):
    refused(client.post(CONTROLS, content=content, headers={"content-type": kind}), "malformed-upload")
    assert store.batch_ids() == []


def limited(client, **limits):
    served = client.app.state.served
    wide = {"body_bytes": 10**9, "files": 10**4, "file_bytes": 10**8}
    receiver = replace(served.receiver, limits=FormLimits(**{**wide, **limits}))
    client.app.state.served = replace(served, receiver=receiver)


@pytest.mark.parametrize("limits", [{"body_bytes": 10_000}, {"files": 5}, {"file_bytes": 100}, {"field_bytes": 4}])
def test_an_upload_beyond_a_limit_is_refused(limits, client, store):
    limited(client, **limits)
    refused(client.post(CONTROLS, files=FILES, data={"channels": "DNA,ER,RNA"}), "upload-too-large")
    assert store.batch_ids() == []


def test_the_size_limit_holds_while_streaming_without_content_length(client):
    limited(client, body_bytes=1 << 20)
    sent = []

    async def endless():
        yield HEADER
        while len(sent) < 10_000:
            sent.append(1)
            yield b"0" * 65_536

    refused(
        client.post(CONTROLS, content=endless(), headers={"content-type": FORM}), "upload-too-large", names=["1,048,576"]
    )
    assert len(sent) < 20, "reading stopped at the limit"


def test_a_request_beyond_the_slots_is_told_to_come_back(settings, storage):
    engine, entered, leave = FakeEngine(), threading.Event(), threading.Event()
    with running(settings.model_copy(update={"max_concurrent_requests": 1}), engine, storage) as client:
        measure = engine.measure

        def slow(*given):
            entered.set()
            assert leave.wait(30)
            return measure(*given)

        engine.measure = slow
        first = []
        thread = threading.Thread(target=lambda: first.append(client.post(CONTROLS, files=FILES)))
        thread.start()
        assert entered.wait(30)
        refused(client.post(CONTROLS, files=FILES), "busy")
        assert client.get("/health/live").status_code == 200, "the loop is free"
        leave.set()
        thread.join()
        assert first[0].status_code == 201
        wait_until(lambda: client.post(CONTROLS, files=FILES).status_code == 201)


def test_who_asks_for_more_than_there_is_memory_for_is_told_to_come_back(client, engine, store):
    def short(*_):
        raise MemoryShortError("there is not the memory to measure 8 sites in one pass")

    engine.measure = short
    body = refused(client.post(CONTROLS, files=FILES), "memory-short", names=["8 sites"])
    assert body["retry_after_s"] == 5
    assert store.batch_ids() == []


def test_a_batch_that_never_holds_still_is_told_to_come_back(client):
    def always(*_, **__):
        raise RevisionConflictError

    client.app.state.served.batches.storage.of("default").commit = always
    refused(client.post(CONTROLS, files=FILES), "batch-busy", names=["P1"])


def test_a_store_that_cannot_write_is_told_as_such(client, settings):
    with sqlite3.connect(settings.data / "records.db") as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON record BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    other.close()
    refused(client.post(CONTROLS, files=FILES), "store-unavailable")


def test_a_service_whose_replay_disagrees_is_never_ready_and_says_why(settings, storage):
    engine = FakeEngine()
    classify = engine.classify
    engine.classify = lambda *given: Classified(*(part + 1 for part in classify(*given)[:2]))
    with running(settings, engine, storage) as client:
        body = refused(client.get("/health/ready"), "not-ready", names=["logits", "golden"])
        assert body["ready"] is False
        refused(client.post(CONTROLS, files=FILES), "not-ready")
        assert client.get("/health/live").status_code == 200


def test_a_service_is_not_ready_while_it_replays(settings, storage):
    engine, leave = FakeEngine(), threading.Event()
    measure = engine.measure
    engine.measure = lambda *given: (leave.wait(30), measure(*given))[1]
    with running(settings, engine, storage, wait=False) as client:
        refused(client.get("/health/ready"), "not-ready", names=["being replayed"])
        leave.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)


def test_an_unexpected_error_keeps_its_words_to_the_log(client, engine, store, caplog):
    def broken(*_):
        raise RuntimeError("the secret of the engine")

    engine.measure = broken
    body = refused(client.post(CONTROLS, files=FILES), "internal-error")
    assert "secret" not in body["detail"]
    assert body["reference"] in caplog.text
    assert store.batch_ids() == []


def test_a_request_that_http_does_not_allow(client):
    @client.app.get("/refused-by-http")
    def refuse():
        raise HTTPException(400, "not like this")

    refused(client.get("/refused-by-http"), "bad-request", names=["not like this"])


# --- images sent ahead, plate maps, answers -----------------------------------------------------------------------------

PLANE = tiff(plane("x"))


def put_plane(client, data=PLANE, place="E05/1/DNA", digest=None, query=""):
    said = content_digest(data) if digest is None else digest
    return client.request("PUT", f"/batches/P1/images/{place}{query}", content=data, headers={"Content-Digest": said})


@pytest.mark.parametrize("digest", ["", "sha-256=:AAAA:", "md5=:AAAA:", content_digest(b"another"), "sha-256=:%%%:"])
def test_a_plane_that_is_not_what_its_digest_says_is_refused(digest, client, store):
    refused(put_plane(client, digest=digest), "digest-mismatch", names=["sha"])
    assert store.batch_ids() == []


def test_a_plane_without_a_digest_is_refused(client):
    refused(
        client.request("PUT", "/batches/P1/images/E05/1/DNA", content=PLANE), "invalid-request", names=["content-digest"]
    )


@pytest.mark.parametrize(
    ("slug", "place"),
    [("invalid-well", "Z99/1/DNA"), ("invalid-layout", "E05/one/DNA"), ("unknown-channel", "E05/1/Mito")],
)
def test_a_plane_for_no_place_is_refused(slug, place, client, store):
    refused(put_plane(client, place=place), slug)
    assert store.batch_ids() == []


def test_another_plane_than_the_one_sent_ahead_is_refused(client):
    assert put_plane(client).status_code == 201
    body = refused(put_plane(client, tiff(plane("y"))), "staged-conflict", names=["E05", "DNA", "replace=true"])
    assert (body["well"], body["site"], body["channel"]) == ("E05", 1, "DNA")
    assert put_plane(client, tiff(plane("y")), query="?replace=true").status_code == 201


def test_a_plane_too_large_is_refused(client):
    client.app.state.served = replace(client.app.state.served, max_plane_bytes=100)
    refused(put_plane(client), "upload-too-large", names=["100"])


@pytest.mark.parametrize(
    ("slug", "body"),
    [
        ("invalid-request", b"{"),
        ("invalid-request", b"[]"),
        ("invalid-request", b"{}"),
        ("invalid-request", b'{"staged": true, "well": ["A01"]}'),
        ("invalid-request", b'{"staged": true, "pixel_size_um": -1, "wells": ["E05"]}'),
        ("invalid-request", b'{"staged": true}'),
        ("invalid-well", b'{"staged": true, "wells": ["Z99"]}'),
        ("no-images", b'{"staged": true, "wells": ["F05"]}'),
        ("missing-channel", b'{"staged": true, "wells": ["E05"]}'),
    ],
)
def test_a_json_body_that_names_no_images_is_refused(slug, body, client, store):
    put_plane(client)
    before = everything(store)
    refused(client.post(CONTROLS, content=body, headers={"content-type": "application/json"}), slug)
    assert everything(store) == before


def test_a_batch_without_a_plate_map_has_none(client):
    client.post(CONTROLS, files=FILES)
    refused(client.get("/batches/P1/platemap"), "platemap-not-found", names=["P1"])
    refused(client.get("/batches/P2/platemap"), "batch-not-found", names=["P2"])


def test_a_plate_map_and_controls_never_contradict_each_other(client, store):
    client.post(CONTROLS, files=FILES)
    before = everything(store)
    answer = client.request("PUT", "/batches/P1/platemap", content=b"well,role\nA01,treated\n")
    refused(answer, "treated-as-control", names=["A01"])
    refused(client.request("PUT", "/batches/P1/platemap", content=b"\xff\xfe"), "invalid-request", names=["UTF-8"])
    assert everything(store) == before
    client.request("PUT", "/batches/P1/platemap", content=b"well,role\nA01,control\nE05,treated\n")
    refused(client.post(CONTROLS, files=well_files(["E05"])), "treated-as-control", names=["E05", "plate map"])


def test_images_by_reference_are_the_operators_to_allow(settings, storage, tmp_path):
    (tmp_path / "screens").mkdir()
    roots = {"default": (f"file://{tmp_path}/screens/",)}
    with running(settings.model_copy(update={"roots": roots}), FakeEngine(), storage) as client:
        for slug, uri in (
            ("reference-not-allowed", "file:///etc/passwd"),
            ("reference-unreadable", f"{tmp_path}/screens/a.tif"),
        ):
            sent = [{"uri": uri, "well": "A01", "site": 1, "channel": channel} for channel in CHANNELS]
            refused(client.post(CONTROLS, json={"images": sent}), slug, names=[uri])
        refused(client.post(CONTROLS, json={"images": []}), "no-images")
        refused(client.post(CONTROLS, json={"images": sent * 2}), "duplicate-plane", names=["A01"])


def test_answers_are_given_in_three_forms_only(client):
    client.post(CONTROLS, files=FILES)
    answer = client.get("/batches/P1/predictions", headers={"Accept": "text/html"})
    refused(answer, "not-acceptable", names=["application/json", "text/csv", "parquet"])


# --- who may ask, how often ------------------------------------------------------------------------------------------


def test_without_a_key_that_opens_anything_nobody_is_let_in(client, storage):
    keys = Keys(storage.records)
    _, token = keys.create("mine", [Scope.READ])
    revoked, gone = keys.create("mine", [Scope.READ])
    keys.revoke(revoked.key_id)
    _, late = keys.create("mine", [Scope.READ], days=-1)
    for authorization in (
        None,
        "Bearer",
        "Bearer nonsense",
        f"Basic {token}",
        f"Bearer {token}x",
        f"Bearer {gone}",
        f"Bearer {late}",
    ):
        headers = {} if authorization is None else {"Authorization": authorization}
        answer = client.get("/batches", headers=headers)
        refused(answer, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/batches", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    body = refused(
        client.post(CONTROLS, files=FILES, headers={"Authorization": f"Bearer {token}"}), "forbidden", names=["'write'"]
    )
    assert "read" in body["detail"]


def test_a_key_that_sends_too_much_is_told_when_to_come_back(client, storage):
    _, token = Keys(storage.records).create("mine", [Scope.READ, Scope.WRITE], requests_per_minute=2, bytes_per_day=5_000)
    headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/batches", headers=headers).status_code == 200
    refused(client.post(CONTROLS, files=FILES, headers=headers), "too-many-requests", names=["5,000 bytes a day"])
    body = refused(client.get("/batches", headers=headers), "too-many-requests", names=["2 requests a minute"])
    assert 1 <= body["retry_after_s"] <= 60


def test_jobs_and_webhooks_that_are_not_there_are_not_found(client):
    refused(client.get("/jobs/none"), "job-not-found", names=["none"])
    refused(client.delete("/jobs/none"), "job-not-found")
    refused(client.delete("/webhooks/none"), "webhook-not-found", names=["none"])
    refused(client.post("/webhooks", json={"url": "ftp://host/"}), "invalid-request", names=["https://"])
    refused(client.post("/webhooks", json={"url": "https://host/", "events": ["batch.made"]}), "invalid-request")


def test_a_key_that_is_not_there_cannot_be_revoked(storage):
    with pytest.raises(KeyNotFoundError) as raised:
        Keys(storage.records).revoke("nothing")
    SEEN.add(problem_of(raised.value).slug)


# --- requests that are repeated ---------------------------------------------------------------------------------------


def test_an_idempotency_key_is_one_requests_alone(client, store):
    headers = {"Idempotency-Key": "k1"}
    assert client.post(CONTROLS, files=FILES, headers=headers).status_code == 201
    before = everything(store)
    for other in (
        lambda: client.post(CONTROLS, files=well_files(["E05"]), headers=headers),
        lambda: client.post(f"{CONTROLS}?replace=true", files=FILES, headers=headers),
        lambda: client.post("/batches/P1/predict", files=FILES, headers=headers),
    ):
        refused(other(), "idempotency-conflict", names=["key of its own"])
    refused(client.post(CONTROLS, files=FILES, headers={"Idempotency-Key": "k" * 256}), "invalid-request", names=["255"])
    assert everything(store) == before


def test_the_same_request_while_it_runs_is_told_to_wait(client, engine):
    entered, leave, first = threading.Event(), threading.Event(), []
    measure = engine.measure
    engine.measure = lambda *given: (entered.set(), leave.wait(30), measure(*given))[2]

    def send():
        return client.post(CONTROLS, files=FILES, headers={"Idempotency-Key": "k1"})

    thread = threading.Thread(target=lambda: first.append(send()))
    thread.start()
    assert entered.wait(30)
    refused(send(), "still-running")
    leave.set()
    thread.join()
    assert send().content == first[0].content


# --- text that is no text -----------------------------------------------------------------------------------------------

HALF = "\\ud800"  # half a surrogate pair, as JSON can say it and UTF-8 cannot
LAYOUT_OF_A_SITE = [
    {"file": f"A01_1_{channel}.tif", "well": "A01", "site": 1, "channel": channel, "Metadata_Plate": "BR1"}
    for channel in CHANNELS
]
REFERRED = {"uri": "file:///a.tif", "well": "A01", "site": 1, "channel": "DNA"}
JSON = {"content-type": "application/json"}
IDEMPOTENT = {"Idempotency-Key": "k1"}


def halved(value, name):
    """JSON whose member of that name, in every object, ends in half a surrogate pair."""
    return json.dumps([{**item, name: f"{item[name]}\ud800"} for item in value])


def posted_json(text, path="/batches/P1/controls", **headers):
    return ("POST", path, {"content": text.encode(), "headers": {**JSON, **headers}})


def posted_layout(text, **headers):
    data = text if isinstance(text, bytes) else text.encode()
    files = [*FILES[: len(CHANNELS)], ("layout", ("layout.json", data, "text/plain"))]
    return ("POST", "/batches/P1/controls", {"files": files, "headers": {**IDEMPOTENT, **headers}})


def mapped(content):
    return ("PUT", "/batches/P1/platemap", {"content": content})


NO_TEXT = {
    **{f"layout's {name}": posted_layout(halved(LAYOUT_OF_A_SITE, name)) for name in LAYOUT_OF_A_SITE[0]},
    "layout's key": posted_layout(json.dumps(LAYOUT_OF_A_SITE).replace('"file"', f'"{HALF}"')),
    "layout in surrogates of UTF-8": posted_layout(b"file,well,site,channel\n\xed\xa0\x80.tif,A01,1,DNA\n"),
    "layout of no UTF-8": posted_layout(b"file,well,site,channel\n\xff.tif,A01,1,DNA\n"),
    "layout in UTF-16": posted_layout("file,well,site,channel\na.tif,A01,1,DNA\n".encode("utf-16")),
    "layout with a NUL": posted_layout("file,well,site,channel\na\0.tif,A01,1,DNA\n"),
    "plate map's cell": mapped(f'[{{"well": "A01", "role": "control", "compound": "{HALF}"}}]'),
    "plate map's column": mapped(f'[{{"well": "A01", "role": "control", "{HALF}": ""}}]'),
    "plate map's well": mapped(f'[{{"well": "{HALF}", "role": "control"}}]'),
    "plate map's role": mapped(f'[{{"well": "A01", "role": "{HALF}"}}]'),
    "plate map in surrogates of UTF-8": mapped(b"well,role,a\nA01,control,\xed\xa0\x80\n"),
    **{
        f"image's {name}": posted_json('{"images": ' + halved([REFERRED], name) + "}", **IDEMPOTENT)
        for name in ("uri", "well", "site", "channel")
    },
    "address of no UTF-8": posted_json(json.dumps({"images": [{**REFERRED, "uri": "file:///screens/%ff"}]})),
    "address of half a pair in UTF-8": posted_json(json.dumps({"images": [{**REFERRED, "uri": "file:///%ed%a0%80"}]})),
    "table's address": posted_json(f'{{"load_data": "file:///{HALF}"}}'),
    "table's address of no UTF-8": posted_json('{"load_data": "file:///screens/%ff"}'),
    "staged wells": posted_json(f'{{"staged": true, "wells": ["{HALF}"]}}', path="/batches/P1/predict"),
    "a key of the body": posted_json(f'{{"{HALF}": true}}'),
    "a body that is no UTF-8": ("POST", CONTROLS, {"content": b'{"staged": "\xff"}', "headers": JSON}),
    "a job's wells": posted_json(f'{{"staged": true, "wells": ["{HALF}"]}}', Prefer="respond-async"),
    "webhook's url": posted_json(f'{{"url": "https://host/{HALF}"}}', path="/webhooks"),
    "webhook's host": posted_json('{"url": "https://[::/"}', path="/webhooks"),
    "webhook's host that folds to another": posted_json('{"url": "https://a\\u2100b/"}', path="/webhooks"),
    "webhook's control character": posted_json('{"url": "https://host/\\u0000"}', path="/webhooks"),
    "webhook's port": posted_json('{"url": "https://host:99999/"}', path="/webhooks"),
    "webhook's event": posted_json(f'{{"url": "https://host/", "events": ["{HALF}"]}}', path="/webhooks"),
    "webhook's key": posted_json(f'{{"url": "https://host/", "{HALF}": 1}}', path="/webhooks"),
    "webhook that is no UTF-8": ("POST", "/webhooks", {"content": b'{"url": "\xff"}', "headers": JSON}),
    "webhook that nests": posted_json('{"url": ' + "[" * 100_000, path="/webhooks"),
    "query": ("POST", f"{CONTROLS}?replace=%ed%a0%80", {"files": FILES, "headers": IDEMPOTENT}),
    "query of no UTF-8": ("POST", "/batches/P1/predict?context=%ff", {"files": FILES, "headers": IDEMPOTENT}),
    "query of a form": ("GET", "/batches/P1/predictions?format=%ed%a0%80", {}),
    "batch id": ("POST", "/batches/%ed%a0%80/controls", {"files": FILES}),
    "batch id of no UTF-8": ("GET", "/batches/%ff", {}),
    "job's id": ("GET", "/jobs/%ed%a0%80%00", {}),
    "webhook's id": ("DELETE", "/webhooks/%ff%00", {}),
    "plane's place": ("PUT", "/batches/P1/images/%ed%a0%80/%ff/%00", {"headers": {"Content-Digest": content_digest(b"")}}),
    "file's name": (
        "POST",
        CONTROLS,
        {"content": HEADER.replace(b"A01", b"\xff\xed\xa0\x80") + b"\r\n--x--\r\n", "headers": {"content-type": FORM}},
    ),
    "key": ("POST", CONTROLS, {"files": FILES, "headers": {"Idempotency-Key": "\xff".encode("latin-1")}}),
    "who asks": ("GET", "/batches", {"headers": {"Authorization": b"Bearer \xff"}}),
    "what is liked": ("GET", "/batches/P1/predictions", {"headers": {"Accept": b"\xff;q=\xff"}}),
}


@pytest.mark.parametrize(("method", "path", "options"), NO_TEXT.values(), ids=NO_TEXT)
def test_what_is_no_text_is_refused_as_such_and_never_a_fault_of_the_service(method, path, options, client, store):
    answer = client.request(method, path, **options)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert store.batch_ids() == []


def test_a_layout_with_half_a_surrogate_pair_is_no_layout(client):
    method, path, options = NO_TEXT["layout's Metadata_Plate"]
    refused(client.request(method, path, **options), "invalid-layout", names=["surrogate"])
    method, path, options = NO_TEXT["plate map's cell"]
    refused(client.request(method, path, **options), "invalid-layout", names=["surrogate"])
    method, path, options = NO_TEXT["address of no UTF-8"]
    refused(client.request(method, path, **options), "reference-not-allowed", names=["%ff"])


# --- tables that are too large ------------------------------------------------------------------------------------------

WELLS_1536 = [well_name(row, column) for row in range(32) for column in range(48)]
WIDE_HEADER = ["well", *(f"{number:03d}{'x' * 36}" for number in range(199))]
ODD_MAPS = [
    ("invalid-layout", "well,role\n" + "A01,control\n" * 1_537, ["1,536 rows", "1,537"]),
    ("invalid-layout", "well" + ",c" * 3 + ",d" * 197 + "\n" + "A01" + "," * 200 + "\n", ["twice"]),
    ("invalid-layout", "well," + ",".join(f"c{at}" for at in range(200)) + "\n" + "A01" + "," * 200, ["200 columns", "201"]),
    ("invalid-layout", f"well,{'x' * 201}\nA01,1\n", ["200 characters", "201"]),
    ("invalid-layout", f"{','.join(WIDE_HEADER)}\nA01{',' * 199}\n", ["4,000 bytes"]),
    ("invalid-layout", f"well,note\nA01,{'x' * 2_001}\n", ["2,000 characters", "A01", "note"]),
    ("upload-too-large", "well,note\n" + f"A01,{'x' * 2_000}\n" * 525, ["1,048,576"]),
]


@pytest.mark.parametrize(("slug", "text", "names"), ODD_MAPS)
def test_a_plate_map_beyond_a_bound_is_refused_with_the_bound(slug, text, names, client, store):
    refused(client.request("PUT", "/batches/P1/platemap", content=text.encode()), slug, names=names)
    assert store.batch_ids() == []


def test_a_plate_maps_report_is_little_larger_than_the_plate_map(client):
    header = ["well", "role", *(f"{number:03d}{'x' * 16}" for number in range(170))]
    rows = [f"{well},control" + "," * 170 for well in WELLS_1536]
    text = "\n".join([",".join(header), *rows])
    put = client.request("PUT", "/batches/P1/platemap", content=text.encode())
    assert put.json()["wells"]["AF48"] == ["AF48", "control", *[""] * 170]
    assert client.get("/batches/P1/platemap").json() == put.json()
    assert len(put.content) < 4 * len(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("b\n" * 500_000, ["400,000 lines"]),
        ("\n".join([",".join(f"c{at}" for at in range(50)), *["," * 49] * 100_001]), ["5,000,000 cells"]),
        ("[" + ",".join(['{"b":1}'] * 400_001) + "]", ["400,000 rows"]),
        ("file,well\n" + '"' * 600_000, ["500,000 bytes"]),
        ("x," * 300_000, ["500,000 bytes"]),
        ("[{" + ",".join(f'"{at}":1' for at in range(100_000)) + "}]", ["500,000"]),
    ],
    ids=["lines", "cells", "objects", "quote", "columns", "keys"],
)
def test_a_layout_larger_than_any_plates_is_refused_with_the_bound(text, names, client, store):
    slug = "invalid-layout" if names == ["500,000"] else "upload-too-large"
    data = text.encode()
    refused(client.post(CONTROLS, files=[*FILES, ("layout", ("layout.csv", data, "text/csv"))]), slug, names=names)
    assert store.batch_ids() == []


# --- what happens to the service --------------------------------------------------------------------------------------


def test_records_that_are_gone_are_told_as_lost(settings, storage):
    with running(settings, FakeEngine()) as client:
        client.post(CONTROLS, files=FILES)
        storage.records.commit(Commit({"lab": None}))
        for answer in (client.get("/batches"), client.get("/health/ready"), client.post(CONTROLS, files=FILES)):
            refused(answer, "store-lost", names=["backup"])


@pytest.mark.parametrize(
    ("slug", "end"),
    [
        ("undecodable-image", UndecodableImageError("the site takes longer than 1 s to decode")),
        ("decoder-killed", DecoderKilledError("the decoder was killed")),
    ],
)
def test_an_image_that_the_decoder_does_not_come_back_from_costs_its_request(slug, end, client, store):
    def ended(*_):
        raise end

    preparer = client.app.state.served.batches.preparer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(preparer.decoder.decode), "__call__", ended)
        refused(client.post(CONTROLS, files=FILES), slug)
    assert store.batch_ids() == []
    assert client.post(CONTROLS, files=FILES).status_code == 201


def test_a_page_of_another_site_gets_nothing_without_a_key(client):
    refused(client.get("/batches", headers={"host": "evil.example"}), "foreign-site", names=["evil.example"])
    refused(client.get("/batches", headers={"origin": "http://evil.example"}), "foreign-site", names=["evil.example"])


def test_what_does_not_fit_a_tenants_room_is_refused(settings, storage):
    rules = {"*": TenantRules(max_bytes=10_000)}
    with running(settings.model_copy(update={"tenants": rules}), FakeEngine(), storage) as client:
        body = refused(client.post(CONTROLS, files=FILES), "quota-exceeded", names=["10,000 bytes"])
        assert (body["kept_bytes"], body["max_bytes"]) == (0, 10_000)
        answer = client.post(CONTROLS, files=FILES, headers={"Prefer": "respond-async"})
        refused(answer, "quota-exceeded", names=["delete batches"])
        assert client.get("/batches").json()["batches"] == client.get("/jobs").json()["jobs"] == []
        assert storage.blobs.names("batches/") == []


def test_every_slug_of_the_table_is_documented_with_its_status():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted((slug, int(status)) for slug, status in rows) == sorted(
        {(problem.slug, problem.status) for problem in PROBLEMS.values()}
    )


def test_every_slug_of_the_table_was_produced_above(request):
    here = [item for item in request.session.items if item.module is request.module]
    if len(here) < 60:
        pytest.skip("only a selection of this file's tests ran")
    assert {problem.slug for problem in PROBLEMS.values()} == SEEN
