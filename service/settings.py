"""What an operator sets, read once from variables, a secrets directory and a file; docs/settings.md tells each."""

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from model.bundle import Precision
from model.images import ImageLimits
from service.errors import StartError
from service.storage import Storage, open_storage

CONFIG = "ANCHORWELL_CONFIG"
"""Names a TOML file of settings; variables go before it."""
SECRETS = "ANCHORWELL_SECRETS_DIR"
"""Names a directory with a file a setting, as containers mount secrets: ``anchorwell_redis``."""


_NEARLY = 0.93
"""How like a setting's a variable's name must be, to be taken for it misspelt."""


class TenantRules(BaseModel):
    """How much a tenant may keep, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int | None = Field(default=None, gt=0, description="most bytes of images")
    keep_days: float | None = Field(default=None, gt=0, description="a batch is deleted so long after its last change")
    keep_staged_days: float | None = Field(
        default=None, gt=0, description="a plane that was sent ahead is deleted after that"
    )


class StorageSettings(BaseSettings):
    """Where everything is kept: all that the operator's commands need."""

    model_config = SettingsConfigDict(env_prefix="ANCHORWELL_", frozen=True, extra="ignore")

    data: Path = Field(
        default=Path("anchorwell-data"),
        description="directory of everything kept, made when missing: records, images, spool",
    )
    redis: str | None = Field(
        default=None, description="keep records in Redis instead: redis://…, rediss://… or redis+sentinel://host:port/NAME"
    )
    objects: str | None = Field(default=None, description="keep images in object storage instead: s3://bucket/prefix")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (no .env file is read)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (its directory is named by a variable)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options of the command line go before variables, variables before secrets, secrets before the file."""
        config, secrets = os.environ.get(CONFIG), os.environ.get(SECRETS)
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if secrets:
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=_existing(Path(secrets), SECRETS)))
        if config:
            sources.append(_toml_settings(settings_cls, _existing(Path(config), CONFIG)))
        return tuple(sources)

    def storage_warnings(self) -> list[str]:
        """What could be lost as the store is set, a sentence each."""
        if self.redis is None:
            return []
        from service.records_redis import durability_warnings  # noqa: PLC0415 (an embedded service needs no Redis)

        return durability_warnings(self.redis)

    @classmethod
    def misspelt(cls) -> list[str]:
        """Variables that are no settings but look like one, a sentence each: they would be passed over in silence."""
        known = [f"ANCHORWELL_{name.upper()}" for name in cls.model_fields]
        near = {name: get_close_matches(name, known, 1, _NEARLY) for name in os.environ if name not in known}
        return [f"the variable {name} is no setting: is {like[0]} meant?" for name, like in near.items() if like]

    @classmethod
    def given(cls, **options: Any) -> Self:
        """Make settings of a command's options: those that are None were not given, and are read as ever."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    def open_storage(self) -> Storage:
        """Open what is kept.

        Raises:
            StartError: it cannot be used.
        """
        return open_storage(self.data, self.redis, self.objects)


class Settings(StorageSettings):
    """The service's configuration: frozen, and printed at start without secrets."""

    model_config = SettingsConfigDict(env_prefix="ANCHORWELL_", frozen=True, extra="forbid")

    bundle: Path = Field(description="directory of the exported bundle to serve")
    roots: Mapping[str, tuple[str, ...]] = Field(
        default={}, description="places that each tenant may refer to images in: file:///directory/, s3://bucket/prefix/"
    )
    tenants: Mapping[str, TenantRules] = Field(
        default={}, description="how much each tenant may keep, and for how long; '*' is every tenant that is not named"
    )
    keep_control_images: bool = Field(
        default=True,
        description="keep the controls' files as they were sent, so that a bundle with another recipe can use them",
    )
    workers: int = Field(
        1, ge=0, description="jobs and deliveries run at once by this process; 0 leaves them to 'anchorwell worker'"
    )
    webhook_networks: tuple[str, ...] = Field(
        default=(), description="private networks that webhooks may be sent to all the same"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA when it is there; cuda refuses to start without it"
    )
    precision: Precision = Field(
        "fp32",
        description="bf16 is about twice as fast on processors that have it, with OpenVINO, and a little less exact; "
        "fp16 is for CUDA",
    )
    threads: int = Field(
        0,
        ge=0,
        description="threads of one inference on the CPU and of image decoding; 0: all cores that it may use",
    )
    measure_bytes: int = Field(
        4 << 30,
        gt=0,
        description="memory that one pass over a batch's controls may take; of more sites some of each well are",
    )
    classify_bytes: int = Field(
        1 << 30,
        ge=0,
        description="memory for networks of single batches, on a CPU, which classify a little faster; where fewer than nine "
        "fit, one network takes every batch's statistics",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of their own for metrics, where no key is asked for",
    )
    metrics_host: str = Field("127.0.0.1", description="address that the metrics' port listens on")
    log_format: Literal["text", "json"] = Field("text", description="log for people, or one JSON object a line")
    drain_timeout_s: int = Field(60, gt=0, description="how long running requests may go on after SIGTERM")
    allow_anonymous: bool = Field(
        default=False, description="allow an address that others can reach, although there are no API keys"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="names, beside localhost, that requests without an API key may call the service by"
    )
    max_upload_bytes: int = Field(4 << 30, gt=0, description="largest request body")
    max_upload_files: int = Field(20_000, gt=0, description="most files in one request")
    max_concurrent_requests: int = Field(8, gt=0, description="uploads worked on at once; further ones get a 503")
    max_staging_bytes: int = Field(
        1 << 30, gt=0, description="bytes of single planes received at once, in memory; further ones get a 503"
    )
    upload_idle_timeout_s: float = Field(30.0, gt=0, description="longest time in which nothing of an upload arrives")
    max_request_input_bytes: int = Field(2 << 30, gt=0, description="largest network input of one request's controls")
    decode_timeout_s: float = Field(120.0, gt=0, description="longest time that one site may take to decode")
    max_image_pixels: int = Field(64_000_000, gt=0, description="most pixels that one plane may declare")
    max_saturated_share: float = Field(
        0.25, gt=0, le=1, description="largest share of a plane's pixels at the top of the range"
    )

    def rules(self, tenant: str) -> TenantRules:
        """What a tenant may keep."""
        return self.tenants.get(tenant, self.tenants.get("*", TenantRules()))

    @property
    def image_limits(self) -> ImageLimits:
        """What one plane may be."""
        return ImageLimits(max_pixels=self.max_image_pixels, max_saturated_share=self.max_saturated_share)

    def check_exposure(self, *, keys: bool) -> None:
        """Refuse an address that others can reach unless there are API keys, or that was allowed by name.

        Raises:
            StartError: the host is not loopback, there are no keys, and ``allow_anonymous`` is off.
        """
        if not (keys or self.allow_anonymous or is_loopback(self.host)):
            raise StartError(
                f"host {self.host} can be reached by others and there are no API keys: make one with 'anchorwell keys "
                "create', listen on 127.0.0.1, or set ANCHORWELL_ALLOW_ANONYMOUS=1 if something else keeps strangers out"
            )

    def lines(self) -> list[str]:
        """Every setting as ``name = value``, passwords left out."""
        values = {**self.model_dump(), "redis": self.redis and without_password(self.redis)}
        return [f"{name} = {value}" for name, value in values.items() if value is not None]


def _toml_settings(settings_cls: type[BaseSettings], path: Path) -> TomlConfigSettingsSource:
    try:
        return TomlConfigSettingsSource(settings_cls, toml_file=path)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{CONFIG} names {path}, which is not TOML: {error}") from None


def _existing(path: Path, variable: str) -> Path:
    if not path.exists():
        raise StartError(f"{variable} names {path}, which is not there")
    return path


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: who it reaches is not known
        return False


def without_password(url: str) -> str:
    """Return a URL with its password starred out."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{place}"))
