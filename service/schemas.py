"""What the service answers: frozen values, JSON at the edge, read back as they are by the client."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Site(_Value):
    """One field of view."""

    well: str
    site: int


class SkippedFile(_Value):
    """A file that carried nothing to measure."""

    file: str
    reason: str


class LeftOut(Site):
    """A control site that is kept but was not measured."""

    reason: str


class Saturation(_Value):
    """How saturated one channel's images are: the worst plane, and how many have more than 0.1 % of such pixels."""

    channel: str
    planes: int
    worst_share: float
    worst_well: str
    worst_site: int


class RefusedImage(_Value):
    """A site of a well that was left out of its answer, and why."""

    site: int
    problem: str = Field(description="slug of the problem, as in the error's type")
    detail: str


class Provenance(_Value):
    """What answered."""

    bundle: str = Field(description="digest of the served bundle")
    provider: str
    precision: str
    version: str


class Measured(Provenance):
    """What was sent to a batch, and the statistics that it is answered with."""

    batch_id: str
    adapted: bool
    statistics_id: str | None
    context: str
    trained_context: str
    context_wells: tuple[str, ...]
    context_sites: int
    left_out: tuple[LeftOut, ...]
    distance: float | None
    percentile: float | None
    out_of_range: bool | None = Field(description="whether the plate's statistics are unlike those of training")
    pixel_size_um: float | None
    notices: tuple[str, ...]
    saturation: tuple[Saturation, ...]
    skipped: tuple[SkippedFile, ...]
    seconds: Mapping[str, float]


class ControlsReport(Measured):
    """What became of control images: the statistics measured, or how many wells they still need."""

    wells_needed: int = Field(description="control wells missing before the batch is adapted")
    control_wells: int = Field(description="control wells kept so far")
    control_sites: int = Field(description="control sites kept so far")
    unusable_sites: int = Field(description="kept control sites that another bundle's image recipe prepared")
    created_at: datetime | None


class WellPrediction(_Value):
    """One well's answer. ``control`` wells are kept as controls of this batch."""

    well: str
    label: str
    probability: float
    probabilities: Mapping[str, float]
    entropy: float
    sites: int
    refused: tuple[RefusedImage, ...]
    spread: float
    distance_to_controls: float | None
    distance_to_class: float
    resembles_controls: bool | None
    out_of_range: bool
    control: bool


class Prediction(Measured):
    """Answers of the wells sent, and the statistics that all of them were normalised with."""

    wells: tuple[WellPrediction, ...]


class BatchSummary(_Value):
    """What is kept of a batch. ``adapted`` and ``statistics_id`` are under the bundle that is served now."""

    batch_id: str
    adapted: bool
    statistics_id: str | None
    wells_needed: int
    control_wells: tuple[str, ...]
    control_sites: int
    unusable_sites: int
    treated_wells: tuple[str, ...]
    pixel_size_um: float | None
    plate: str | None
    changed_at: datetime


class BatchList(_Value):
    """The batches kept."""

    batches: tuple[BatchSummary, ...]


class ModelCard(Provenance):
    """The served bundle."""

    name: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    recipe: Mapping[str, Any]
    method: str
    trained_context: str
    minimum_control_wells: int
    max_context_sites: int
    features: int
    temperature: float
    network: Mapping[str, Any]
    training: Mapping[str, Any]


class Live(_Value):
    """The process answers."""

    live: bool = True


class Ready(Provenance):
    """The bundle's golden images were replayed and agreed, and the store answers."""

    ready: bool = True
