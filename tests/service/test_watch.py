"""A watched directory: each plate once, restarts included; and what the client does when it is not answered."""

import errno
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pandas as pd
import pytest

from model.errors import AnchorwellError
from service.client import AnchorwellClient, ProblemError, ServiceUnreachableError
from service.watch import Form, Watcher
from tests.service.plates import CONTROL_WELLS, well_files
from tests.service.test_images import PLATEMAP
from tests.service.test_routes import adapted

TREATED = ("E05", "F05")


@pytest.fixture
def connected(client):
    """The client library, talking to the app in this process."""

    def answer(request):
        sent = client.request(request.method, str(request.url), content=request.read(), headers=dict(request.headers))
        told = {name: sent.headers[name] for name in ("content-type", "retry-after") if name in sent.headers}
        return httpx.Response(sent.status_code, content=sent.content, headers=told)

    library = AnchorwellClient("http://127.0.0.1")
    library._http = httpx.Client(base_url="http://127.0.0.1", transport=httpx.MockTransport(answer))
    yield library
    library.close()


@pytest.fixture
def drop(tmp_path):
    """Drops a plate into the watched directory."""
    directory = tmp_path / "drop"
    directory.mkdir()

    def dropped(name="P1", wells=(*CONTROL_WELLS, *TREATED), platemap=PLATEMAP):
        folder = directory / name
        (folder / "images").mkdir(parents=True)
        for _, (file, data, _) in well_files(wells):
            (folder / "images" / file).write_bytes(data)
        if platemap is not None:
            (folder / "plate_map.csv").write_text(platemap)
        return folder

    dropped.directory = directory
    return dropped


def watcher(connected, drop, **options):
    return Watcher(connected, drop.directory, **{"settle_s": 0.0, **options})


def test_a_plate_that_is_dropped_is_answered_once_restarts_included(connected, drop, client):
    folder = drop()
    (outcome,) = watcher(connected, drop).look()
    assert (outcome.batch_id, outcome.done) == ("P1", True)
    table = pd.read_csv(folder / "anchorwell" / "predictions.csv")
    assert list(table["Metadata_Well"]) == list(TREATED)
    assert list(table["Metadata_compound"]) == ["BRD-1, salt", "BRD-2"]
    assert json.loads((folder / "anchorwell" / "report.json").read_text())["adapted"] is True
    again = watcher(connected, drop)
    assert list(again.look()) == []
    assert again.waiting == {}
    assert len(client.get("/batches").json()["batches"]) == 1


def test_a_plate_waits_until_its_plate_map_is_there_and_nothing_changes(connected, drop):
    now = [0.0]
    watching = watcher(connected, drop, settle_s=30.0, clock=lambda: now[0])
    folder = drop(platemap=None)
    assert list(watching.look()) == []
    now[0] = 40.0
    assert (list(watching.look()), len(watching.waiting)) == ([], 1)
    (folder / "plate_map.csv").write_text(PLATEMAP)
    assert list(watching.look()) == []
    now[0] = 60.0
    assert list(watching.look()) == [], "the folder changed 20 s ago"
    now[0] = 80.0
    assert [outcome.done for outcome in watching.look()] == [True]


def test_a_refused_plate_is_told_once_and_tried_again_when_it_changes(connected, drop):
    folder = drop(wells=(*CONTROL_WELLS[:2], *TREATED))
    watching = watcher(connected, drop, partial=True)
    (outcome,) = watching.look()
    assert (outcome.done, "2 more control wells" in outcome.told) == (False, True)
    assert "2 more" in json.loads((folder / "anchorwell" / "error.json").read_text())["detail"]
    assert list(watching.look()) == list(watcher(connected, drop).look()) == []
    for _, (file, data, _) in well_files(CONTROL_WELLS[2:]):
        (folder / "images" / file).write_bytes(data)
    assert [outcome.done for outcome in watching.look()] == [True]
    assert not (folder / "anchorwell" / "error.json").exists()


@pytest.mark.parametrize(
    ("name", "platemap", "words"),
    [
        ("not a batch", PLATEMAP, "not a batch id"),
        ("P1", "well,compound\nA01,DMSO\n", "which wells are controls"),
        ("P1", "no table", "no rows"),
        ("P1", PLATEMAP.replace("DMSO,DMSO", "trt,DMSO"), "no image"),
    ],
)
def test_a_plate_that_cannot_be_answered_says_why_beside_it(name, platemap, words, connected, drop):
    folder = drop(name, platemap=platemap)
    (outcome,) = watcher(connected, drop).look()
    assert (outcome.done, words in outcome.told) == (False, True), outcome.told
    assert words in (folder / "anchorwell" / "error.json").read_text()


def test_what_a_plate_waits_for_is_told_and_only_a_plate_map_comes_from_outside(connected, drop):
    watching = watcher(connected, drop)
    drop("P1", platemap=None)
    assert list(watching.look()) == []
    assert (watching.has_work, "'platemap' in its name" in watching.waiting["P1"]) == (False, True)
    drop("P2")
    with AnchorwellClient("http://127.0.0.1:1") as away:
        waits = watcher(away, drop)
        assert list(waits.look()) == []
    assert (waits.has_work, "no answer from" in waits.waiting["P2"]) == (True, True)


def test_plates_that_stay_refused_are_listed_at_every_look(connected, drop):
    drop("P1", wells=CONTROL_WELLS)
    watching = watcher(connected, drop)
    for outcomes in (1, 0):
        assert (len(list(watching.look())), watching.refused) == (outcomes, ["P1"])


def test_a_plate_whose_wells_have_no_images_yet_waits_for_them(connected, drop):
    now = [0.0]
    watching = watcher(connected, drop, settle_s=30.0, clock=lambda: now[0])
    folder = drop(wells=(*CONTROL_WELLS, TREATED[0]))
    assert (list(watching.look()), len(watching.waiting)) == ([], 1)
    now[0] = 40.0
    (outcome,) = watching.look()
    assert (outcome.done, "1 of the 6 wells of the plate map have no images: F05" in outcome.told) == (False, True)
    error = json.loads((folder / "anchorwell" / "error.json").read_text())
    assert (error["wells_without_images"], "--partial" in error["detail"]) == (["F05"], True)
    assert list(watching.look()) == list(watcher(connected, drop).look()) == []
    for _, (file, data, _) in well_files(TREATED[1:]):
        (folder / "images" / file).write_bytes(data)
    assert (list(watching.look()), len(watching.waiting)) == ([], 1)
    now[0] = 80.0
    assert [outcome.told for outcome in watching.look()] == ["2 wells answered on 4 control wells"]
    assert json.loads((folder / "anchorwell" / "report.json").read_text())["wells_without_images"] == []


def test_wells_without_images_are_left_out_and_listed_when_that_is_asked_for(connected, drop):
    folder = drop(wells=(*CONTROL_WELLS, TREATED[0]))
    assert [outcome.done for outcome in watcher(connected, drop).look()] == [False]
    (outcome,) = watcher(connected, drop, partial=True).look()
    assert outcome.told == "1 wells answered on 4 control wells; left out without images: F05"
    assert json.loads((folder / "anchorwell" / "report.json").read_text())["wells_without_images"] == ["F05"]
    assert not (folder / "anchorwell" / "error.json").exists()


def test_many_wells_without_images_are_all_named_in_the_file_and_some_in_the_line(connected, drop):
    more = "".join(f"G{column:02d},trt,BRD-3,1\n" for column in range(1, 21))
    folder = drop(platemap=PLATEMAP + more)
    (outcome,) = watcher(connected, drop).look()
    assert "20 of the 26 wells" in outcome.told
    assert "G12 and 8 more" in outcome.told
    assert len(json.loads((folder / "anchorwell" / "error.json").read_text())["wells_without_images"]) == 20


@pytest.mark.parametrize("name", ["plate_map.csv", "load_data.csv"])
def test_a_table_that_is_not_utf_8_is_refused_and_other_plates_go_on(name, connected, drop):
    folder = drop("P1")
    (folder / name).write_bytes(PLATEMAP.replace("dose_um", "dose (µM)").encode("latin-1"))
    drop("P2")
    outcomes = {outcome.batch_id: outcome for outcome in watcher(connected, drop).look()}
    assert (outcomes["P1"].done, outcomes["P2"].done) == (False, True)
    detail = json.loads((folder / "anchorwell" / "error.json").read_text())["detail"]
    assert detail == f"{name} is not UTF-8 text: save it as UTF-8 (in Excel: CSV UTF-8)"


def test_a_file_that_goes_while_its_folder_is_looked_at_makes_the_plate_wait(connected, drop, monkeypatch):
    fleeting = drop("P1") / "images" / "A01_1_DNA.tif.partial"
    fleeting.write_bytes(b"a copy that is not whole")
    really = Path.is_file

    def seen_once(path):
        there = really(path)
        if path == fleeting:
            path.unlink(missing_ok=True)
        return there

    monkeypatch.setattr(Path, "is_file", seen_once)
    watching = watcher(connected, drop)
    assert (list(watching.look()), len(watching.waiting)) == ([], 1)
    assert [outcome.done for outcome in watching.look()] == [True]


def test_an_image_that_goes_while_it_is_sent_makes_the_plate_wait(connected, drop, monkeypatch):
    folder = drop("P1")
    send = connected.send_platemap

    def move_the_plate_away(*sent):
        answer = send(*sent)
        folder.rename(drop.directory.parent / "elsewhere")
        return answer

    monkeypatch.setattr(connected, "send_platemap", move_the_plate_away)
    watching = watcher(connected, drop)
    assert (list(watching.look()), len(watching.waiting)) == ([], 1)
    assert (list(watching.look()), len(watching.waiting)) == ([], 0)


def test_a_folder_that_may_not_be_read_ends_the_watch(connected, drop, monkeypatch):
    drop("P1")

    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("service.watch.fingerprint", denied)
    with pytest.raises(PermissionError):
        list(watcher(connected, drop).look())


def test_a_service_that_is_away_makes_plates_wait(drop):
    drop()
    with AnchorwellClient("http://127.0.0.1:1") as away:
        watching = watcher(away, drop)
        assert (list(watching.look()), len(watching.waiting)) == ([], 1)


def test_answers_are_written_in_the_form_asked_for(connected, drop):
    folder = drop()
    list(watcher(connected, drop, form=Form.PARQUET).look())
    assert list(pd.read_parquet(folder / "anchorwell" / "predictions.parquet")["Metadata_Well"]) == list(TREATED)


# --- the client ------------------------------------------------------------------------------------------------------


def test_the_client_sends_ahead_only_what_is_not_there(connected, drop, client):
    folder = drop()
    images = list((folder / "images").iterdir())
    connected.stage("P1", images)
    counted = client.get("/metrics").text
    connected.stage("P1", images)
    puts = 'anchorwell_requests_total{method="PUT",route="/batches/{batch_id}/images/{well}/{site}/{channel}",status="201"}'
    assert client.get("/metrics").text.count(puts) == counted.count(puts) == 1
    assert f"{puts} {len(images)}.0" in client.get("/metrics").text
    connected.send_platemap("P1", PLATEMAP)
    report = connected.adapt_staged("P1")
    assert report.statistics_id == adapted(client, "P2")["statistics_id"]
    assert [well.well for well in connected.predict_staged("P1").wells] == list(TREATED)
    assert [well.well for well in connected.predictions("P1").wells] == list(TREATED)
    shutil.rmtree(folder)


def treated_images(drop):
    return [path for path in (drop() / "images").iterdir() if path.name.split("_")[0] in TREATED]


def test_wells_are_answered_while_the_next_are_sent_as_they_are_once_all_are_there(connected, drop, client):
    adapted(client, "P1")
    adapted(client, "P2")
    images = treated_images(drop)
    one_well = sum(path.stat().st_size for path in images if path.name.startswith(TREATED[0]))
    told: list[tuple[int, int]] = []
    found = connected.predict_while_sending("P1", images, request_bytes=one_well, progress=lambda *at: told.append(at))
    connected.stage("P2", images)
    assert found.wells == connected.predict_staged("P2").wells
    assert [well.well for well in found.wells] == list(TREATED)
    assert max(told) == (len(images), len(images))
    posts = 'anchorwell_requests_total{method="POST",route="/batches/{batch_id}/predict",status="200"}'
    assert f"{posts} {len(TREATED) + 1}.0" in client.get("/metrics").text


def test_a_batch_without_controls_is_told_before_all_is_sent(connected, drop):
    images = treated_images(drop)
    with pytest.raises(ProblemError, match="controls"):
        connected.predict_while_sending("P1", images, request_bytes=1)


def test_files_that_number_their_channels_are_not_sent_ahead_without_the_channels_names(connected, drop, tmp_path, client):
    adapted(client, "P1")
    for path in treated_images(drop):
        well, site, channel = path.stem.split("_")
        number = ("RNA", "DNA", "-", "ER").index(channel) + 1
        row, column = ord(well[0]) - ord("A") + 1, int(well[1:])
        (tmp_path / f"r{row:02}c{column:02}f{int(site):02}p01-ch{number}sk1fk1fl1.tiff").write_bytes(path.read_bytes())
    (tmp_path / "r05c05f01p01-ch3sk1fk1fl1.tiff").write_bytes(b"of a channel that is not used")
    numbered = list(tmp_path.glob("*.tiff"))
    for send in (connected.stage, connected.predict_while_sending):
        with pytest.raises(AnchorwellError, match="give the names of channels in the order of their numbers"):
            send("P1", numbered)
    named = connected.predict_while_sending("P1", numbered, channels=["RNA", "DNA", "-", "ER"])
    connected.stage("P1", numbered, channels=("RNA", "DNA", "-", "ER"))
    adapted(client, "P2")
    assert named.wells == connected.predict_while_sending("P2", treated_images(lambda: tmp_path / "drop" / "P1")).wells


def table_of(names):
    """A layout of a plate's files, which gives its name and resolution."""
    rows = [f"{name},{','.join(Path(name).stem.split('_'))},PLATE1,6e-7" for name in names]
    return "\n".join(["file,well,site,channel,Metadata_Plate,Metadata_ImageResolutionX", *rows])


def test_a_layout_of_another_plate_or_pixel_size_is_refused_before_anything_is_sent(connected, drop, client):
    images, controls = treated_images(drop), well_files(CONTROL_WELLS)
    layout = table_of(path.name for path in images)
    form = {"layout": table_of(name for _, (name, _, _) in controls)}
    assert client.post("/batches/P1/controls", files=controls, data=form).json()["adapted"]
    with pytest.raises(AnchorwellError, match="layout is of plate 'OTHER'"):
        connected.predict_while_sending("P1", images, layout.replace("PLATE1", "OTHER"))
    with pytest.raises(AnchorwellError, match=r"layout says 0\.6 µm per pixel, 0\.7 is asked for"):
        connected.predict_while_sending("P1", images, layout, pixel_size_um=0.7)
    found = connected.predict_while_sending("P1", images, layout)
    assert ([well.well for well in found.wells], found.pixel_size_um) == (list(TREATED), pytest.approx(0.6))


class Breaking(BaseHTTPRequestHandler):
    """Takes a request and breaks the connection, the first times."""

    def do_POST(self):
        self.server.keys.append(self.headers["idempotency-key"])
        self.rfile.read(int(self.headers["content-length"]))
        if len(self.server.keys) < 3:
            self.connection.close()
            return
        body = b'{"title": "enough", "detail": "of this", "status": 409}'
        self.send_response(409)
        self.send_header("Content-Type", "application/problem+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_request_whose_answer_was_lost_is_sent_again_under_the_same_key(monkeypatch):
    monkeypatch.setattr("service.client._RETRY_S", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    server.keys = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with AnchorwellClient(f"http://127.0.0.1:{server.server_port}") as library, pytest.raises(Exception, match="enough"):
        library.adapt_staged("P1")
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1
    server.shutdown()
    server.server_close()
    with AnchorwellClient(f"http://127.0.0.1:{server.server_port}") as library, pytest.raises(ServiceUnreachableError):
        library.adapt_staged("P1")
