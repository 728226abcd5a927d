"""What an operator sets, read once from ``ANCHORWELL_…`` variables; docs/settings.md tells each."""

import ipaddress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.images import ImageLimits
from service.errors import StartError


class Settings(BaseSettings):
    """The service's configuration: frozen, and printed at start without secrets."""

    model_config = SettingsConfigDict(env_prefix="ANCHORWELL_", frozen=True, extra="forbid")

    bundle: Path = Field(description="directory of the exported bundle to serve")
    store: str = Field(
        "sqlite:///anchorwell.db", description="where batches are kept: sqlite:///FILE, redis://… or rediss://…"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA when it is there; cuda refuses to start without it"
    )
    threads: int = Field(0, ge=0, description="threads of one inference on the CPU and of image decoding; 0: all cores")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    allow_anonymous: bool = Field(
        default=False, description="allow an address that others can reach, although there are no API keys"
    )
    max_upload_bytes: int = Field(4 << 30, gt=0, description="largest request body")
    max_upload_files: int = Field(20_000, gt=0, description="most files in one request")
    max_concurrent_requests: int = Field(8, gt=0, description="uploads worked on at once; further ones get a 503")
    upload_idle_timeout_s: float = Field(30.0, gt=0, description="longest time in which nothing of an upload arrives")
    max_request_input_bytes: int = Field(
        2 << 30, gt=0, description="largest network input of one request's controls, or of one well's sites"
    )
    max_decoding_pixels: int = Field(
        128_000_000, gt=0, description="most pixels decoded at once, over all requests; one plane is always taken"
    )
    max_image_pixels: int = Field(64_000_000, gt=0, description="most pixels that one plane may declare")
    max_saturated_share: float = Field(
        0.25, gt=0, le=1, description="largest share of a plane's pixels at the top of the range"
    )

    @property
    def image_limits(self) -> ImageLimits:
        """What one plane may be."""
        return ImageLimits(max_pixels=self.max_image_pixels, max_saturated_share=self.max_saturated_share)

    def check_exposure(self) -> None:
        """Refuse an address that others can reach unless that was allowed by name.

        Raises:
            StartError: the host is not loopback and ``allow_anonymous`` is off.
        """
        if not self.allow_anonymous and not is_loopback(self.host):
            raise StartError(
                f"host {self.host} can be reached by others and there are no API keys: listen on 127.0.0.1, "
                "or set ANCHORWELL_ALLOW_ANONYMOUS=1 if something else keeps strangers out"
            )

    def lines(self) -> list[str]:
        """Every setting as ``name = value``, passwords left out."""
        values = {**self.model_dump(), "store": without_password(self.store)}
        return [f"{name} = {value}" for name, value in values.items()]


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
