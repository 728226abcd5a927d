"""What an operator sets, and what is refused."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.app import create_app
from service.errors import StartError
from service.settings import Settings, is_loopback

DOCS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_every_setting_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `ANCHORWELL_([A-Z_]+)` \| (.+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        )
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
    lines = Settings(bundle="b", store="rediss://plates:s3cret@host:6379/0").lines()
    assert "store = rediss://plates:***@host:6379/0" in lines
    assert not any("s3cret" in line for line in lines)
    assert len(lines) == len(Settings.model_fields)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.4", False), ("plates.example", False)],
)  # fmt: skip
def test_only_loopback_is_safe_without_keys(host, loopback):
    assert is_loopback(host) is loopback


def test_an_address_that_others_reach_is_refused_unless_allowed_by_name(bundle, tmp_path):
    settings = Settings(bundle=bundle.path, host="0.0.0.0", store=f"sqlite:///{tmp_path}/s.db")
    with pytest.raises(StartError, match="ALLOW_ANONYMOUS"):
        create_app(settings)
    settings.model_copy(update={"allow_anonymous": True}).check_exposure()
