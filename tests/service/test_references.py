"""Images by reference: what a tenant may read, and what nobody may."""

import errno
import io
import os

import pandas as pd
import pytest

from service.access import Keys, Scope
from service.errors import ReferenceNotAllowedError, ReferenceUnreadableError, StartError, UploadTooLargeError
from service.keeping import FileKeeper
from service.references import References
from tests.service.conftest import running
from tests.service.plates import CHANNELS, CONTROL_WELLS, FakeEngine, well_files
from tests.service.s3 import s3
from tests.service.test_routes import predicted

WELLS = (*CONTROL_WELLS, "E05", "F05")


@pytest.fixture
def screens(tmp_path):
    """A folder of images that a tenant may refer to, and a secret beside it."""
    folder = tmp_path / "screens"
    (folder / "P1").mkdir(parents=True)
    for _, (name, data, _) in well_files(WELLS):
        (folder / "P1" / name).write_bytes(data)
    (tmp_path / "secret.tif").write_bytes(b"canary")
    (tmp_path / "screens-of-others").mkdir()
    (tmp_path / "screens-of-others" / "a.tif").write_bytes(b"canary")
    (folder / "link.tif").symlink_to(tmp_path / "secret.tif")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.tif")
    return folder


@pytest.fixture
def references(screens, tmp_path):
    return References({"mine": (f"file://{screens}/",)}, tmp_path, 10_000)


@pytest.fixture
def remote(settings, storage, screens):
    with running(
        settings.model_copy(update={"roots": {"default": (f"file://{screens}/", "s3://plates/lab/")}}), FakeEngine(), storage
    ) as client:
        yield client


def rows(place, wells=WELLS):
    return [
        {
            "Metadata_Plate": "P1",
            "Metadata_Well": well,
            "Metadata_Site": site,
            **{f"URL_Orig{channel}": f"{place}/{well}_{site}_{channel}.tif" for channel in CHANNELS},
        }
        for well in wells
        for site in (1, 2)
    ]


def images(place, wells):
    return [
        {"uri": f"{place}/{well}_{site}_{channel}.tif", "well": well, "site": site, "channel": channel}
        for well in wells
        for site in (1, 2)
        for channel in CHANNELS
    ]


def test_what_is_below_a_root_is_read(references, screens):
    place = screens / "P1" / "A01_1_DNA.tif"
    content = place.read_bytes()
    with references.on_disk("mine", f"file://{place}") as file:
        place.unlink()
        place.symlink_to(screens.parent / "secret.tif")
        assert file.read() == content, "what is decoded is what was checked"
    assert not file.path.exists()
    place.unlink()
    place.write_bytes(content)
    assert references.read("mine", f"{screens}/P1/A01_1_DNA.tif", 10_000)


@pytest.mark.parametrize(
    "uri",
    [
        "file://{screens}/../secret.tif",
        "file://{screens}/P1/../../secret.tif",
        "file://{screens}/%2e%2e/secret.tif",
        "file://{screens}/P1/%2e%2e%2f%2e%2e%2fsecret.tif",
        "file://{screens}-of-others/a.tif",
        "file://{screens}",
        "file://host{screens}/P1/A01_1_DNA.tif",
        "file:{screens}/P1/A01_1_DNA.tif",
        "{screens}/../secret.tif",
        "/etc/passwd",
        "//etc/passwd",
        "etc/passwd",
        "http://127.0.0.1/a.tif",
        "https://example.org/a.tif",
        "s3://plates/lab/a.tif",
        "ftp://host/a",
        "file:///etc/passwd%00.tif",
        "file://{screens}/a\\..\\..\\secret.tif",
        "file://{screens}/\n",
        "x" * 3_000,
        "",
    ],
)
def test_what_is_below_no_root_is_not_read(uri, references, screens):
    with pytest.raises(ReferenceNotAllowedError), references.on_disk("mine", uri.format(screens=screens)):
        pass
    with pytest.raises(ReferenceNotAllowedError):
        references.read("other", f"file://{screens}/P1/A01_1_DNA.tif", 100)


@pytest.mark.parametrize(
    "name", ["link.tif", "linked/secret.tif", "linked/screens/P1/A01_1_DNA.tif", "pipe.tif", "P1", "none.tif"]
)
def test_links_pipes_folders_and_what_is_not_there_are_not_read(name, references, screens):
    with pytest.raises(ReferenceUnreadableError) as raised, references.on_disk("mine", f"file://{screens}/{name}"):
        pass
    assert "canary" not in raised.value.detail


def test_a_link_put_in_after_the_check_is_not_followed(references, screens, tmp_path):
    uri = f"file://{screens}/P1/A01_1_DNA.tif"
    references.place("mine", uri)
    (screens / "P1" / "A01_1_DNA.tif").unlink()
    (screens / "P1" / "A01_1_DNA.tif").symlink_to(tmp_path / "secret.tif")
    with pytest.raises(ReferenceUnreadableError), references.on_disk("mine", uri):
        pass


def test_a_file_that_is_too_large_is_not_copied_whole(references, screens):
    (screens / "large.tif").write_bytes(b"0" * 10_001)
    with pytest.raises(UploadTooLargeError, match="10,000"), references.on_disk("mine", f"file://{screens}/large.tif"):
        pass


def test_a_file_that_changes_while_controls_are_kept_is_not_kept_as_what_was_decoded(remote, screens, monkeypatch):
    keep = FileKeeper.__call__

    def changed(self, slices):
        if slices["DNA"].name == "B01_1_DNA.tif":
            (screens / "P1" / "B01_1_DNA.tif").write_bytes((screens / "P1" / "E05_1_DNA.tif").read_bytes())
        return keep(self, slices)

    monkeypatch.setattr(FileKeeper, "__call__", changed)
    answer = remote.post("/batches/P1/controls", json={"images": images(f"file://{screens}/P1", CONTROL_WELLS)})
    assert answer.status_code == 422, answer.text
    assert "was changed while it was read" in answer.json()["detail"]
    assert remote.get("/batches/P1").status_code == 404


def test_a_file_that_a_disk_does_not_give_is_named(remote, screens, monkeypatch):
    def fails(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("service.decoding.os.pread", fails)
    answer = remote.post("/batches/P1/controls", json={"images": images(f"file://{screens}/P1", CONTROL_WELLS)})
    assert answer.status_code == 422, answer.text
    assert "Stale file handle" in answer.json()["detail"]


def test_a_plate_by_reference_gets_the_answers_of_one_that_was_sent(remote, screens):
    place = f"file://{screens}/P1"
    report = remote.post("/batches/P1/controls", json={"images": images(place, CONTROL_WELLS)})
    assert report.status_code == 201, report.text
    answer = remote.post("/batches/P1/predict", json={"images": images(place, ["E05", "F05"])}).json()
    remote.post("/batches/P2/controls", files=well_files(CONTROL_WELLS))
    assert answer["wells"] == predicted(remote, ["E05", "F05"], batch="P2")["wells"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_load_data_table_by_reference_tells_where_a_whole_plate_lies(kind, remote, screens):
    table = pd.DataFrame(rows(f"file://{screens}/P1"))
    path = screens / f"load_data.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    body = {"load_data": f"file://{path}"}
    assert remote.post("/batches/P1/controls", json=body).json()["type"].endswith("invalid-request"), "which are controls?"
    report = remote.post("/batches/P1/controls", json={**body, "wells": list(CONTROL_WELLS)}).json()
    assert report["context_wells"] == list(CONTROL_WELLS)
    assert remote.get("/batches/P1").json()["plate"] == "P1"
    assert [well["well"] for well in remote.post("/batches/P1/predict", json=body).json()["wells"]] == ["E05", "F05"]


def test_a_root_that_is_no_place_is_told_at_start_and_a_plain_folder_is_one(tmp_path):
    for root in ("screens/", "http://lab/", "file://host/x"):
        with pytest.raises(StartError, match="roots of tenant lab"):
            References({"lab": (root,)}, tmp_path, 100)
    (tmp_path / "a.tif").write_bytes(b"abc")
    assert References({"lab": (f"{tmp_path}/",)}, tmp_path, 100).read("lab", f"file://{tmp_path}/a.tif", 100) == b"abc"


def test_what_is_relative_in_a_load_data_table_begins_where_it_lies(remote, screens):
    table = pd.DataFrame(rows("P1")).rename(columns=lambda name: name.replace("URL_", "FileName_"))
    assert any(name.startswith("FileName_") for name in table)
    for name in [name for name in table if name.startswith("FileName_")]:
        table[name.replace("FileName_", "PathName_")] = "P1"
        table[name] = table[name].str.removeprefix("P1/")
    table.to_csv(screens / "load_data.csv", index=False)
    for uri in (f"file://{screens}/load_data.csv", f"{screens}/load_data.csv"):
        body = {"load_data": uri, "wells": list(CONTROL_WELLS)}
        assert remote.post("/batches/P1/controls", json=body).json()["context_wells"] == list(CONTROL_WELLS)


def test_a_parquet_table_is_a_layout_too(client):
    table = pd.DataFrame(
        [{"file": f"{w}{s}{c}", "well": w, "site": s, "channel": c} for w in CONTROL_WELLS for s in (1, 2) for c in CHANNELS]
    )
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    renamed = [
        (name.removesuffix(".tif").replace("_", ""), data, kind) for _, (name, data, kind) in well_files(CONTROL_WELLS)
    ]
    files = [("images", file) for file in renamed]
    files.append(("layout", ("layout.parquet", buffer.getvalue(), "application/octet-stream")))
    assert client.post("/batches/P1/controls", files=files).json()["adapted"] is True
    broken = ("layout", ("layout.parquet", buffer.getvalue()[:300], "application/octet-stream"))
    assert client.post("/batches/P2/controls", files=[*files[:-1], broken]).json()["type"].endswith("invalid-layout")


def test_one_address_that_is_not_allowed_refuses_a_whole_table(remote, screens, store, tmp_path):
    table = rows(f"file://{screens}/P1")
    table[-1]["URL_OrigER"] = f"file://{tmp_path}/secret.tif"
    pd.DataFrame(table).to_csv(screens / "load_data.csv", index=False)
    body = {"load_data": f"file://{screens}/load_data.csv", "wells": list(CONTROL_WELLS)}
    answer = remote.post("/batches/P1/controls", json=body)
    assert answer.json()["type"].endswith("reference-not-allowed")
    assert "secret.tif" in answer.json()["detail"]
    assert store.batch_ids() == []


def test_references_are_a_tenants_own(remote, storage, screens):
    _, token = Keys(storage.records).create("other", [Scope.READ, Scope.WRITE])
    body = {"images": images(f"file://{screens}/P1", CONTROL_WELLS)}
    answer = remote.post("/batches/P1/controls", json=body, headers={"Authorization": f"Bearer {token}"})
    assert answer.json()["type"].endswith("reference-not-allowed")


def test_images_in_object_storage_are_read_without_redirects(settings, storage, screens, monkeypatch):
    roots = {"default": ("s3://plates/lab/",)}
    with s3(monkeypatch) as server, running(settings.model_copy(update={"roots": roots}), FakeEngine(), storage) as client:
        for path in (screens / "P1").iterdir():
            server.objects[f"/plates/lab/P1/{path.name}"] = path.read_bytes()
        sent = {"images": images("s3://plates/lab/P1", CONTROL_WELLS)}
        assert client.post("/batches/P1/controls", json=sent).status_code == 201
        other = {"images": images("s3://plates/other/P1", CONTROL_WELLS)}
        assert client.post("/batches/P2/controls", json=other).json()["type"].endswith("reference-not-allowed")
        server.objects["/secret"] = server.objects.pop("/plates/lab/P1/E05_1_DNA.tif")
        server.redirects["/plates/lab/P1/E05_1_DNA.tif"] = f"http://127.0.0.1:{server.server_port}/secret"
        answer = client.post("/batches/P1/predict", json={"images": images("s3://plates/lab/P1", ["E05"])})
        assert answer.json()["type"].endswith("reference-unreadable"), answer.text
