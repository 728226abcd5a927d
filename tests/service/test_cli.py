"""The real ``anchorwell`` process with a real bundle, driven by the client and by the other commands."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from model.errors import AnchorwellError
from service.client import (
    AnchorwellClient,
    ProblemError,
    ServiceUnreachableError,
    StatisticsChangedError,
    chunks_of_wells,
    merged,
)
from tests.service.conftest import emptied, free_port, wait_until
from tests.service.plates import CONTROL_WELLS, well_files

ANCHORWELL = Path(sys.executable).parent / "anchorwell"
TREATED = ("E05", "F05", "G05")
PLATEMAP = "well,role\n" + "".join(f"{w},control\n" for w in CONTROL_WELLS) + "".join(f"{w},treated\n" for w in TREATED)


@contextmanager
def serving(bundle, folder, **environment):
    """``anchorwell serve`` on a free port; gives the process and the URL it printed."""
    settings = {
        "BUNDLE": bundle,
        "DATA": f"{folder}/data",
        "PORT": 0,
        "THREADS": 1,
        "DEVICE": "cpu",
        **environment,
    }
    given = {f"ANCHORWELL_{name}": str(value) for name, value in settings.items()}
    log = (Path(folder) / "serve.log").open("w+")
    with (
        log,
        subprocess.Popen(
            [ANCHORWELL, "serve"], env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        line = process.stdout.readline()
        found = re.fullmatch(r"Anchorwell is ready at (http://127\.0\.0\.1:\d+)\n", line)
        log.seek(0)
        assert found, (line, log.read())
        wait_until(lambda: re.search(r"the network runs on \w+, in fp32", Path(log.name).read_text(encoding="utf-8")))
        yield process, found[1]
        process.terminate()
        process.wait(20)


def run(*arguments, **environment):
    return subprocess.run(
        [ANCHORWELL, *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def url(tiny_bundle_path, tmp_path_factory):
    with serving(tiny_bundle_path, tmp_path_factory.mktemp("served")) as (_, served_url):
        yield served_url


@pytest.fixture(scope="module")
def plate(tmp_path_factory):
    """A folder with four control wells, three treated ones, a plate map and a thumbnail."""
    folder = tmp_path_factory.mktemp("plate")
    for _, (name, data, _) in well_files([*CONTROL_WELLS, *TREATED], size=64):
        (folder / name).write_bytes(data)
    (folder / "Mix_A01_s1_w1_thumb.tif").write_bytes(b"a thumbnail")
    (folder / "platemap.csv").write_text(PLATEMAP)
    return folder


def of_wells(plate, wells):
    return [path for path in plate.glob("*.tif") if path.name[:3] in wells]


def test_the_command_line_tells_its_commands_and_each_its_usage():
    told = run("--help").stdout
    names = ("serve", "worker", "restore", "screen", "adapt", "predict", "batches", "watch", "keys", "audit")
    assert [name for name in names if f"│ {name} " in told] == list(names)
    for name in names:
        assert f"Usage: anchorwell {name} " in run(name, "--help").stdout


def test_the_log_is_whole_when_a_signal_ends_a_service(tiny_bundle_path, tmp_path):
    with serving(tiny_bundle_path, tmp_path) as (process, _):
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    assert "Finished server process" in (tmp_path / "serve.log").read_text(encoding="utf-8")


def test_the_client_adapts_predicts_and_forgets(url, plate):
    seen = []
    with AnchorwellClient(url) as client:
        assert client.ready().provider == "CPUExecutionProvider"
        report = client.adapt("C1", of_wells(plate, CONTROL_WELLS))
        assert report.adapted
        whole = client.predict("C1", of_wells(plate, TREATED), progress=lambda done, total: seen.append((done, total)))
        assert whole.statistics_id == report.statistics_id
        assert [well.well for well in whole.wells] == list(TREATED)
        assert seen[-1] == (18, 18)
        assert client.batch("C1") in client.batches().batches
        client.delete("C1")
        with pytest.raises(ProblemError, match="no batch C1") as refused:
            client.batch("C1")
        assert (refused.value.slug, refused.value.status) == ("batch-not-found", 404)


def test_chunking_never_changes_an_answer(url, plate):
    with AnchorwellClient(url) as client:
        client.adapt("C2", of_wells(plate, CONTROL_WELLS))
        whole = client.predict("C2", of_wells(plate, TREATED))
        chunked = client.predict("C2", of_wells(plate, TREATED), request_bytes=1)
    assert chunked.wells == whole.wells


def test_the_client_sends_no_empty_request():
    with AnchorwellClient("http://127.0.0.1:9") as client, pytest.raises(AnchorwellError, match="no image files"):
        client.predict("P1", [])


def test_a_layout_places_files_for_the_client_too(url, plate, tmp_path):
    rows = ["file,well,site,channel"]
    for number, path in enumerate(sorted(of_wells(plate, (*CONTROL_WELLS, *TREATED)))):
        (tmp_path / f"{number}.tif").write_bytes(path.read_bytes())
        rows.append(",".join([f"{number}.tif", *path.stem.split("_")]))
    (tmp_path / "layout.csv").write_text("\n".join(rows))
    (tmp_path / "platemap.csv").write_text(PLATEMAP)
    options = ["--layout", tmp_path / "layout.csv", "--platemap", tmp_path / "platemap.csv", "--url", url, "--json"]
    assert json.loads(run("adapt", "C3", tmp_path, *options).stdout)["control_wells"] == 4
    assert len(json.loads(run("predict", "C3", tmp_path, *options).stdout)["wells"]) == 3


def test_chunks_are_whole_wells_under_the_budget(plate):
    files = sorted(of_wells(plate, TREATED))
    size = files[0].stat().st_size
    chunks = list(chunks_of_wells(files, None, 12 * size))
    assert [sorted({path.name[:3] for path in chunk}) for chunk in chunks] == [["E05", "F05"], ["G05"]]
    assert len(list(chunks_of_wells(files, None, 1))) == 3


def test_answers_on_different_statistics_are_not_merged(url, plate):
    with AnchorwellClient(url) as client:
        client.adapt("C4", of_wells(plate, CONTROL_WELLS))
        first = client.predict("C4", of_wells(plate, ["E05"]))
    with pytest.raises(StatisticsChangedError):
        merged([first, first.model_copy(update={"statistics_id": "another"})])


def test_what_another_bundle_answered_is_asked_again_when_replicas_agree(url, plate, monkeypatch):
    monkeypatch.setattr("service.client._RETRY_S", 0)
    with AnchorwellClient(url) as client:
        client.adapt("C6", of_wells(plate, CONTROL_WELLS))
        new = client.predict("C6", of_wells(plate, ["E05"]))
        old, card = new.model_copy(update={"bundle": "old"}), client.model()
        cards, asked = iter([card, card.model_copy(update={"bundle": "old"})]), []
        monkeypatch.setattr(client, "model", lambda: next(cards, card))  # one replica is still of the old bundle at first

        def ask():
            asked.append(1)
            return new

        found = client._of_one_bundle([ask] * 3, [old, new, old])
        assert ([answer.bundle for answer in found], len(asked)) == ([new.bundle] * 3, 2)
        assert client._of_one_bundle([], [new, new]) == [new, new], "which asks for nothing"


def test_who_is_told_to_come_back_waits_longer_each_time_and_not_for_ever(monkeypatch):
    waits = []
    monkeypatch.setattr("service.client.time.sleep", waits.append)
    busy = httpx.Response(503, headers={"Retry-After": "1"}, json={"title": "busy", "status": 503})
    with AnchorwellClient("http://127.0.0.1:9") as client:
        monkeypatch.setattr(client._http, "request", lambda *_, **__: busy)
        with pytest.raises(ProblemError, match="busy"):
            client.batches()
        assert waits == [1, 2, 4, 8, 15, 15, 15]
        waits.clear()
        busy.headers["Retry-After"] = "86400"
        with pytest.raises(ProblemError, match="busy"):
            client.batches()
        assert waits == []


def test_nobody_there_is_one_readable_error():
    with AnchorwellClient(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(ServiceUnreachableError):
        client.model()


def test_the_commands_tell_a_plate_from_start_to_end(url, plate, tmp_path):
    platemap = plate / "platemap.csv"
    adapted = run("adapt", "K1", plate, "--platemap", platemap, "--url", url)
    assert adapted.returncode == 0, adapted.stderr
    assert "adapted K1 on 8 sites of 4 control wells" in adapted.stdout
    table = tmp_path / "answers.csv"
    predicted = run("predict", "K1", plate, "--platemap", platemap, "--url", url, "--csv", table)
    assert predicted.returncode == 0, predicted.stderr
    assert all(well in predicted.stdout for well in TREATED)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["well"] for row in rows] == list(TREATED)
    assert sum(float(rows[0][f"p_{name}"]) for name in ("alpha", "beta", "gamma")) == pytest.approx(1)
    told = json.loads(run("predict", "K1", plate, "--platemap", platemap, "--url", url, "--json").stdout)
    assert [well["label"] for well in told["wells"]] == [row["label"] for row in rows]
    assert "K1" in run("batches", "--url", url).stdout
    source = run("predict", "K1", plate, "--platemap", platemap, "--url", url, "--context", "source", "--json")
    assert json.loads(source.stdout)["adapted"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "none", "PLATE", "--platemap", "PLATE/platemap.csv"], "no controls"),
        (["adapt", "no/such", "PLATE", "--platemap", "PLATE/platemap.csv"], "not a batch id"),
        (["adapt", "K2", "EMPTY"], "no .tif"),
        (["adapt", "K2", "PLATE"], "Give --platemap"),
        (["adapt", "K2", "PLATE", "--platemap", "PLATE/nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(arguments, words, url, plate, tmp_path):
    given = [word.replace("PLATE", str(plate)).replace("EMPTY", str(tmp_path)) for word in arguments]
    done = run(*given, "--url", url)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_too_few_controls_are_kept_and_told_by_exit_code(url, plate):
    done = run("adapt", "K3", *of_wells(plate, CONTROL_WELLS[:1]), "--url", url)
    assert done.returncode == 3
    assert "3 more are needed" in done.stdout
    assert f"1 wells are taken for controls, {CONTROL_WELLS[0]}" in done.stderr
    assert "--context blended answers" in " ".join(done.stdout.split())


def test_few_controls_are_blended_when_the_context_is_named(url, plate):
    run("adapt", "K6", *of_wells(plate, CONTROL_WELLS[:1]), "--url", url)
    treated = of_wells(plate, TREATED)
    plain = run("predict", "K6", *treated, "--url", url)
    assert (plain.returncode, "--context blended" in plain.stderr) == (1, True), plain.stderr
    blend = run("predict", "K6", *treated, "--url", url, "--context", "blended", "--json")
    answer = json.loads(blend.stdout)
    assert (answer["context"], answer["context_wells"], answer["prior_weight"]) == ("blended", ["A01"], 0.5)
    shown = run("predict", "K6", *treated, "--url", url, "--context", "blended", COLUMNS="200").stdout
    assert "context blended" in shown
    assert "50% of the weight" in shown


def test_the_panels_wells_are_named(tiny_bundle_path, plate, tmp_path):
    bundle = tmp_path / "panel"
    shutil.copytree(tiny_bundle_path, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "context": "panel"}))
    with serving(bundle, tmp_path) as (_, url):
        done = run("adapt", "K1", *of_wells(plate, CONTROL_WELLS), "--url", url)
        assert "(adapt --panel)" in " ".join(done.stdout.split()), done.stdout
        done = run("adapt", "K1", plate, "--panel", "f05,E05", "--url", url)
        assert "of 4 control wells and 2 of the panel" in " ".join(done.stdout.split()), done.stderr
        assert run("adapt", "K1", plate, "--panel", "H12", "--url", url).stderr.endswith("images is of well H12\n")
        with AnchorwellClient(url) as client:
            assert client.batch("K1").panel_wells == ("E05", "F05")
            assert client.predict("K1", of_wells(plate, ["G05"])).context == "panel"


def test_a_refusal_names_the_flag_and_files_left_out_are_counted(url, plate, tmp_path):
    wells = sorted(of_wells(plate, CONTROL_WELLS))
    rows = [",".join([path.name, *path.stem.split("_")]) for path in wells]
    (tmp_path / "layout.csv").write_text("\n".join(["file,well,site,channel", *rows]))
    options = ["--platemap", plate / "platemap.csv", "--url", url]
    adapted = run("adapt", "K4", plate, "--layout", tmp_path / "layout.csv", *options)
    assert adapted.returncode == 0, adapted.stderr
    assert "19 of 43 image files are not in the layout" in adapted.stderr
    changed = tmp_path / wells[0].name
    changed.write_bytes((plate / f"{TREATED[0]}_1_DNA.tif").read_bytes())
    assert "--replace puts the new one" in run("adapt", "K4", changed, *wells[1:3], *options).stderr


def test_a_table_never_cuts_a_class(url, plate):
    platemap = ["--platemap", plate / "platemap.csv", "--url", url]
    run("adapt", "K5", plate, *platemap)
    for width, columns in ((60, ["probability", "sites"]), (140, ["probability", "entropy", "to controls"])):
        done = run("predict", "K5", plate, *platemap, COLUMNS=width)
        assert all(column in done.stdout for column in columns), done.stdout
        assert ("entropy" in done.stdout) == (width > 100)
        assert "…" not in done.stdout


def test_serve_refuses_what_it_cannot_do_in_one_line(tiny_bundle_path, tmp_path):
    data = tmp_path / "data"
    for arguments, words in (
        (["--bundle", tmp_path, "--data", data], "not a bundle"),
        (["--data", data], "say --bundle, or set ANCHORWELL_BUNDLE"),
        (["--bundle", tiny_bundle_path, "--data", data, "--host", "0.0.0.0"], "ALLOW_ANONYMOUS"),
        (["--bundle", tiny_bundle_path, "--data", tmp_path / "no" / "such" / "folder"], "there is no folder"),
        (["--bundle", tiny_bundle_path, "--data", data, "--device", "tpu"], "device"),
        (
            ["--bundle", tiny_bundle_path, "--data", data, "--device", "cpu", "--precision", "fp16"],
            "fp16 is offered on CUDA",
        ),
    ):
        done = run("serve", *arguments)
        assert done.returncode == 1, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_at_once(tiny_bundle_path, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--bundle", tiny_bundle_path, "--data", tmp_path / "data", "--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr.splitlines()[-1]


def test_a_setting_that_is_not_json_is_one_line(tiny_bundle_path):
    done = run("serve", ANCHORWELL_BUNDLE=tiny_bundle_path, ANCHORWELL_ALLOWED_HOSTS="anchorwell")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "allowed_hosts" in done.stderr
    assert "JSON" in done.stderr


def test_a_name_is_listened_on_at_all_of_its_addresses(tiny_bundle_path, tmp_path):
    with serving(tiny_bundle_path, tmp_path, HOST="localhost") as (_, url):
        for address in {found[4][0] for found in socket.getaddrinfo("localhost", None)}:
            host = f"[{address}]" if ":" in address else address
            httpx.get(f"http://{host}:{url.rpartition(':')[2]}/health/live").raise_for_status()


def test_serve_ends_on_sigterm_and_keeps_what_it_acknowledged(tiny_bundle_path, plate, tmp_path):
    with serving(tiny_bundle_path, tmp_path) as (process, url), AnchorwellClient(url) as client:
        report = client.adapt("S1", of_wells(plate, CONTROL_WELLS))
        before = client.predict("S1", of_wells(plate, TREATED))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in (tmp_path / "serve.log").read_text()
    with serving(tiny_bundle_path, tmp_path) as (process, url), AnchorwellClient(url) as client:
        again = client.predict("S1", of_wells(plate, TREATED))
        process.kill()
    assert (again.statistics_id, again.wells) == (report.statistics_id, before.wells)


def test_serve_warns_loudly_when_others_can_reach_it(tiny_bundle_path, tmp_path):
    with serving_anywhere(tiny_bundle_path, tmp_path) as log:
        assert "WARNING" in log
        assert "without an API key" in log


@contextmanager
def serving_anywhere(bundle, folder):
    given = {"BUNDLE": bundle, "DATA": f"{folder}/data", "PORT": 0, "HOST": "0.0.0.0", "ALLOW_ANONYMOUS": 1}
    environment = {**os.environ, **{f"ANCHORWELL_{name}": str(value) for name, value in given.items()}}
    with (Path(folder) / "serve.log").open("w+") as log:
        command = [ANCHORWELL, "serve"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            process.stdout.readline()
            yield (Path(folder) / "serve.log").read_text()
            process.terminate()
            process.wait(20)


def test_a_worker_runs_what_a_service_leaves_to_it(tiny_bundle_path, plate, tmp_path):
    data = tmp_path / "data"
    with serving(tiny_bundle_path, tmp_path, WORKERS=0) as (_, url):
        files = [("images", (path.name, path.read_bytes(), "image/tiff")) for path in of_wells(plate, CONTROL_WELLS)]
        place = httpx.post(f"{url}/batches/W1/controls", files=files, headers={"Prefer": "respond-async"}).headers[
            "location"
        ]
        assert httpx.get(url + place).json()["state"] == "queued"
        command = [ANCHORWELL, "worker", "--bundle", tiny_bundle_path, "--data", data]
        metrics = free_port()
        given = {"THREADS": "1", "DEVICE": "cpu", "METRICS_PORT": str(metrics), "HOST": "0.0.0.0"}
        environment = {**os.environ, **{f"ANCHORWELL_{name}": value for name, value in given.items()}}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert "works in the background" in process.stdout.readline(), "it needs no key, for it does not listen"
            wait_until(lambda: httpx.get(url + place).json()["state"] == "done")
            assert "anchorwell_engine" in httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
            process.terminate()
            assert process.wait(60) == 0


def test_keys_are_made_listed_and_revoked_and_the_audit_log_holds(tiny_bundle_path, tmp_path):
    data = ("--data", tmp_path / "data")
    token = run("keys", "create", "--tenant", "lab", "--scope", "read", "--note", "LIMS", *data).stdout.strip()
    with serving(tiny_bundle_path, tmp_path) as (_, url):
        assert httpx.get(f"{url}/batches").status_code == 401
        assert httpx.get(f"{url}/batches", headers={"Authorization": f"Bearer {token}"}).json()["batches"] == []
        key_id = token.split("_")[1]
        assert key_id in run("keys", "list", *data, COLUMNS=200).stdout
        assert token.split("_", 2)[2] not in run("keys", "list", *data, COLUMNS=200).stdout
        assert "revoked" in run("keys", "revoke", key_id, *data).stdout
        wait_until(lambda: httpx.get(f"{url}/batches", headers={"Authorization": f"Bearer {token}"}).status_code == 401)
    held = run("audit", "verify", *data)
    assert "2 entries hold" in held.stdout
    end = held.stdout.split()[-1]
    assert run("audit", "verify", "--expect", end, *data).returncode == 0
    actions = [json.loads(line)["action"] for line in run("audit", "show", *data).stdout.splitlines()]
    assert actions == ["key.created", "key.revoked"]
    with sqlite3.connect(tmp_path / "data" / "records.db") as db:
        changed = "CAST(replace(CAST(value AS TEXT), 'key.created', 'key.nothing') AS BLOB)"
        db.execute(f"UPDATE record SET value = {changed} WHERE key LIKE 'audit/entry/%1'")
    db.close()
    broken = run("audit", "verify", *data)
    assert broken.returncode == 4
    assert "entry 2 does not follow" in broken.stderr


def test_a_flushed_redis_is_restored_while_the_service_runs(tiny_bundle_path, plate, tmp_path, redis_url):
    emptied(redis_url)
    where = {"REDIS": redis_url}
    with serving(tiny_bundle_path, tmp_path, **where) as (_, url), AnchorwellClient(url) as client:
        client.adapt("R1", of_wells(plate, CONTROL_WELLS))
        before = client.predict("R1", of_wells(plate, TREATED))
        emptied(redis_url)
        assert httpx.get(f"{url}/batches").json()["type"].endswith("store-lost")
        done = run("restore", "--data", tmp_path / "data", ANCHORWELL_REDIS=redis_url)
        assert "restored" in done.stdout, done.stderr
        assert client.predict("R1", of_wells(plate, TREATED)).wells == before.wells
        assert [batch.batch_id for batch in client.batches().batches] == ["R1"]
        again = run("restore", "--data", tmp_path / "data", ANCHORWELL_REDIS=redis_url)
        assert (again.returncode, "already" in again.stderr) == (1, True)


@pytest.mark.parametrize("command", [("keys", "list"), ("keys", "revoke", "0" * 12), ("audit", "verify"), ("audit", "show")])
def test_a_mistyped_data_directory_is_not_taken_for_an_empty_lab(command, tmp_path):
    done = run(*command, "--data", tmp_path / "nosuch")
    assert (done.returncode, f"there is no lab in {tmp_path / 'nosuch'}" in done.stderr) == (1, True)
    assert not (tmp_path / "nosuch").exists()


def test_a_settings_file_that_is_not_toml_is_one_line(tmp_path):
    (tmp_path / "settings.toml").write_text("redis = nothing\n")
    done = run("keys", "list", ANCHORWELL_CONFIG=tmp_path / "settings.toml")
    assert (done.returncode, "settings.toml, which is not TOML" in done.stderr, "Traceback" in done.stderr) == (
        1,
        True,
        False,
    )


def test_watch_answers_a_dropped_plate_with_an_api_key(tiny_bundle_path, plate, tmp_path):
    drop = tmp_path / "drop"
    shutil.copytree(plate, drop / "W7")
    (drop / "W7" / "platemap.csv").write_text(f"{PLATEMAP}H12,trt\n")
    token = run("keys", "create", "--data", tmp_path / "data").stdout.strip()
    with serving(tiny_bundle_path, tmp_path) as (_, url):
        watch = ("watch", drop, "--settle-s", "0", "--once", "--url", url)
        refused = run(*watch, "--partial")
        assert (refused.returncode, "An API key is needed" in refused.stderr) == (1, True)
        assert not (drop / "W7" / "anchorwell").exists(), "the plate is not to blame"
        incomplete = run(*watch, ANCHORWELL_API_KEY=token)
        assert "have no images: H12" in incomplete.stdout, incomplete.stderr
        assert (incomplete.returncode, "error.json in each tells: W7" in incomplete.stderr) == (1, True)
        done = run(*watch, "--partial", ANCHORWELL_API_KEY=token)
        assert "3 wells answered on 4 control wells; left out without images: H12" in done.stdout, done.stderr
    rows = list(csv.DictReader((drop / "W7" / "anchorwell" / "predictions.csv").read_text().splitlines()))
    assert [row["Metadata_Well"] for row in rows] == list(TREATED)
