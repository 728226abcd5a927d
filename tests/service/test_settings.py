"""What an operator sets, and what is refused."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from model.bundle import Bundle
from service.app import create_app
from service.engine import open_engine
from service.errors import StartError
from service.settings import Settings, StorageSettings, is_loopback
from service.storage import open_storage
from tests.service.conftest import running

DOCS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def told(default):
    return str(default).lower() if isinstance(default, bool) else default


def test_measuring_keeps_to_the_memory_that_it_is_given(tiny_bundle_path, tmp_path, caplog):
    settings = Settings(bundle=tiny_bundle_path, data=tmp_path, device="cpu", threads=1)
    each = open_engine(settings).engine.result().bytes_a_site
    with running(settings.model_copy(update={"measure_bytes": 5 * each})) as client:
        assert client.get("/model").json()["max_context_sites"] == 5
    assert "lets 5 control sites of a batch be measured" in caplog.text
    fewest = Bundle.load(tiny_bundle_path).manifest.minimum_control_wells
    with pytest.raises(StartError, match=f"set at least {fewest * each:,}"):
        create_app(settings.model_copy(update={"measure_bytes": fewest * each - 1}))


def test_every_setting_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `ANCHORWELL_([A-Z_]+)` \| (.+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else "none" if field.default is None else f"`{told(field.default)}`"
        expected[name.upper()] = default
        assert field.description, name
    assert rows == expected


def test_settings_are_read_from_the_environment_and_frozen(monkeypatch):
    monkeypatch.setenv("ANCHORWELL_BUNDLE", "/bundles/one")
    monkeypatch.setenv("ANCHORWELL_MAX_UPLOAD_BYTES", "1000")
    settings = Settings()
    assert (settings.bundle, settings.max_upload_bytes) == (Path("/bundles/one"), 1000)
    with pytest.raises(ValidationError):
        settings.port = 1


def test_settings_are_printed_without_secrets():
    lines = Settings(bundle="b", redis="rediss://plates:s3cret@host:6379/0").lines()
    assert "redis = rediss://plates:***@host:6379/0" in lines
    assert not any("s3cret" in line for line in lines)
    unset = [name for name, field in Settings.model_fields.items() if field.default is None and name != "redis"]
    assert len(lines) == len(Settings.model_fields) - len(unset)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.4", False), ("plates.example", False)],
)  # fmt: skip
def test_only_loopback_is_safe_without_keys(host, loopback):
    assert is_loopback(host) is loopback


def test_an_address_that_others_reach_is_refused_unless_allowed_by_name(bundle, tmp_path):
    settings = Settings(bundle=bundle.path, host="0.0.0.0", data=tmp_path / "data")
    with pytest.raises(StartError, match="ALLOW_ANONYMOUS"):
        create_app(settings)
    settings.check_exposure(keys=True)
    settings.model_copy(update={"allow_anonymous": True}).check_exposure(keys=False)


def test_settings_come_from_a_file_and_a_secrets_directory_too(monkeypatch, tmp_path):
    (tmp_path / "lab.toml").write_text('bundle = "/bundles/one"\nredis = "redis://file:6379/0"\nport = 8100\n')
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "anchorwell_redis").write_text("rediss://plates:s3cret@host:6379/0\n")
    monkeypatch.setenv("ANCHORWELL_CONFIG", str(tmp_path / "lab.toml"))
    monkeypatch.setenv("ANCHORWELL_SECRETS_DIR", str(tmp_path / "secrets"))
    monkeypatch.setenv("ANCHORWELL_PORT", "8200")
    settings = Settings()
    assert (settings.bundle, settings.port) == (Path("/bundles/one"), 8200)
    assert settings.redis == "rediss://plates:s3cret@host:6379/0"
    assert StorageSettings().redis == settings.redis


def test_a_variable_that_is_nearly_a_setting_is_told_of(monkeypatch):
    assert Settings.misspelt() == []
    for name in ("ANCHORWELL_PRECISON", "ANCHORWELL_URL", "ANCHORWELL_API_KEY", "ANCHORWELL_PORT_8000_TCP", "PRECISION"):
        monkeypatch.setenv(name, "fp16")
    assert Settings.misspelt() == ["the variable ANCHORWELL_PRECISON is no setting: is ANCHORWELL_PRECISION meant?"]


@pytest.mark.parametrize("name", [".", "records.db", "queue.db", "spool"])
def test_a_data_directory_that_cannot_be_written_is_refused_at_start(name, monkeypatch, tmp_path):
    open_storage(tmp_path / "data").close()
    for made in ("queue.db", "spool", "lost+found"):
        (tmp_path / "data" / made).mkdir()
    locked = (tmp_path / "data" / name).resolve()
    lost = tmp_path / "data" / "lost+found"
    monkeypatch.setattr("os.access", lambda path, _: Path(path).resolve() != lost)
    open_storage(tmp_path / "data").close()
    monkeypatch.setattr("os.access", lambda path, _: Path(path).resolve() not in (lost, locked))
    with pytest.raises(StartError, match=rf"{locked} cannot be written by this user"):
        open_storage(tmp_path / "data")


def test_a_data_directory_that_is_a_file_is_refused_at_start(tmp_path):
    (tmp_path / "data").write_text("plates")
    with pytest.raises(StartError, match="data cannot be used: File exists"):
        open_storage(tmp_path / "data")


def test_a_settings_file_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("ANCHORWELL_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(StartError, match=r"ANCHORWELL_CONFIG names .*none\.toml"):
        Settings()
