"""What the service answers: frozen values, JSON at the edge, read back as they are by the client."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(BaseModel):
    """RFC 9457: what was wrong, and what to do next. Members beside these name the batch, well, site, channel or file."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str = Field(description="ends in the slug of docs/errors.md: what a program looks at")
    title: str
    status: int
    detail: str = Field(description="for people: what was expected, what was found, and the next step")
    retry_after_s: int | None = Field(default=None, description="with 429 and 503: when to come back")


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
    provider: str = Field(description="what the network ran on: CUDAExecutionProvider, CPUExecutionProvider or OpenVINO")
    precision: str = Field(description="arithmetic of the network: fp32, fp16 or bf16")
    version: str = Field(description="of the service")


class Measured(Provenance):
    """What was sent to a batch, and the statistics that it is answered with."""

    batch_id: str
    adapted: bool = Field(description="whether the answer stands on this batch's control statistics")
    statistics_id: str | None = Field(
        description="digest of what the statistics were measured on and with; None: not adapted"
    )
    scale_id: str | None = Field(
        description="digest of the scale that the batch's controls gave the images; None: the bundle's recipe has none"
    )
    context: str = Field(
        description="controls; panel, with the panel beside them; blended, with the mean of the training plates; or source, "
        "the answer without adaptation"
    )
    trained_context: str = Field(description="the context that the network was trained for")
    context_wells: tuple[str, ...] = Field(description="control wells that were measured")
    context_panel: tuple[str, ...] = Field(description="wells of the panel that were measured")
    context_sites: int = Field(description="sites that were measured")
    left_out: tuple[LeftOut, ...] = Field(description="sites that are kept but were not measured")
    prior_weight: float | None = Field(
        description="share of the training plates' mean statistics in a blend, averaged over the network's features; "
        "None: not blended"
    )
    distance: float | None = Field(
        description="how far the plate's statistics lie from those of the training plates, in spreads between them"
    )
    percentile: float | None = Field(description="share of held-out training plates, in percent, that lie as near or nearer")
    out_of_range: bool | None = Field(description="whether the plate's statistics are unlike those of training")
    pixel_size_um: float | None = Field(description="µm per pixel that the images were taken at")
    notices: tuple[str, ...] = Field(
        description="what was assumed, and what is unlike training: to be read before the answers"
    )
    saturation: tuple[Saturation, ...] = Field(description="channels whose images are noticeably saturated")
    skipped: tuple[SkippedFile, ...] = Field(description="files that carried nothing to measure")
    seconds: Mapping[str, float] = Field(
        description="seconds by stage, those that there were; they overlap and do not add up. `total`: of all. `receive`: "
        "reading the request. `prepare`, `measure`: control images and their statistics. `images`: wells, from reading the "
        "first file to the last one's answer; in it `classify`, the sum of the network's passes, which run side by side, "
        "and `network`, the making of a network of the batch's own: 0 where that was kept or another request made it, "
        "absent where none is made (ANCHORWELL_CLASSIFY_BYTES)"
    )


class ControlsReport(Measured):
    """What became of control images: the statistics measured, or how many wells they still need."""

    wells_needed: int = Field(description="control wells missing before the batch is adapted")
    control_wells: int = Field(description="control wells kept so far")
    control_sites: int = Field(description="control sites kept so far")
    panel_wells: int = Field(description="wells of the panel kept so far")
    unusable_sites: int = Field(description="kept sites that another bundle's image recipe prepared")
    created_at: datetime | None


class WellPrediction(_Value):
    """One well's answer. ``control`` wells are kept as controls of this batch."""

    well: str
    label: str = Field(description="the most probable class")
    probability: float = Field(description="of that class, calibrated on held-out plates")
    probabilities: Mapping[str, float] = Field(description="of every class; the mean over the well's sites")
    entropy: float = Field(description="of the probabilities, in nats: 0 is certain, ln(classes) is no idea")
    sites: int = Field(description="sites that were answered")
    refused: tuple[RefusedImage, ...] = Field(description="sites that were left out, and why")
    spread: float = Field(description="how much the sites disagree: standard deviation of the label's probability over them")
    distance_to_controls: float | None = Field(
        description="the well's embedding against this plate's controls; None without adaptation"
    )
    distance_to_class: float = Field(description="the well's embedding against the nearest class of the training plates")
    resembles_controls: bool | None = Field(
        description="whether the well is as near this plate's controls as held-out control wells are to theirs"
    )
    out_of_range: bool = Field(
        description="whether the well is far from every class of training, or its plate is out of range"
    )
    control: bool = Field(description="whether the well is kept as one of this batch's controls")


class Prediction(Measured):
    """Answers of the wells sent, and the statistics that all of them were normalised with."""

    wells: tuple[WellPrediction, ...]
    kept: bool = Field(
        description="whether the answers are kept, for GET …/predictions; without adaptation, and while the store is away, "
        "they are not"
    )


class KeptPrediction(WellPrediction):
    """A well's latest answer, and what it stood on."""

    batch_id: str
    plate: str = Field(description="Metadata_Plate of the controls' table; the batch's id when none named one")
    statistics_id: str
    context: str = Field(default="controls", description="controls, panel or blended, as when it was answered")
    bundle: str = Field(description="digest of the bundle that answered")
    stale: bool = Field(description="whether the batch's controls, or the served bundle, are others since")
    answered_at: datetime
    platemap: Mapping[str, str] = Field(description="the well's row of the plate map")
    embedding: tuple[float, ...] = Field(description="mean of the network's embedding over the well's sites")


class KeptPredictions(_Value):
    """The latest answer of every well of a batch."""

    batch_id: str
    wells: tuple[KeptPrediction, ...]


class KeptImage(Site):
    """One plane that is kept: staged until its well is asked for, or of a control, or of the panel."""

    channel: str
    sha256: str
    state: Literal["staged", "control", "panel"]


class ImageList(_Value):
    """The planes kept of a batch."""

    batch_id: str
    images: tuple[KeptImage, ...]


class PlateMapReport(_Value):
    """A plate map as it is kept."""

    batch_id: str
    columns: tuple[str, ...]
    wells: Mapping[str, tuple[str, ...]] = Field(description="each well's row, its cells in the order of the columns")
    control_wells: tuple[str, ...] = Field(description="wells that it calls negative controls")
    treated_wells: tuple[str, ...] = Field(description="wells that it calls anything else")


class BatchSummary(_Value):
    """What is kept of a batch. ``adapted`` and ``statistics_id`` are under the bundle that is served now."""

    batch_id: str
    adapted: bool
    statistics_id: str | None
    wells_needed: int
    control_wells: tuple[str, ...]
    control_sites: int
    panel_wells: tuple[str, ...]
    unusable_sites: int
    treated_wells: tuple[str, ...]
    pixel_size_um: float | None
    plate: str | None = Field(description="what the controls' table names; None when none did")
    changed_at: datetime


class BatchList(_Value):
    """The batches kept, in order of their names, and what the tenant's images take in all."""

    batches: tuple[BatchSummary, ...]
    following: str | None = Field(default=None, description="where there are more: ask again with after=<this>")
    kept_bytes: int = Field(description="bytes of images that the tenant keeps")
    max_bytes: int | None = Field(description="bytes that it may keep; null when the operator set no bound")


class JobReport(_Value):
    """A request that is answered later."""

    job_id: str
    kind: Literal["controls", "predict"]
    batch_id: str
    state: Literal["queued", "running", "done", "failed"]
    attempt: int = Field(description="how many times a worker began it")
    wells_done: int = Field(description="wells that are answered, while it runs")
    wells: int = Field(description="wells that were asked for, while it runs")
    created_at: datetime
    finished_at: datetime | None
    controls: ControlsReport | None = Field(description="the answer of a done job of that kind")
    prediction: Prediction | None = Field(description="the answer of a done job of that kind")
    problem: Problem | None = Field(description="why a failed job failed")


class JobList(_Value):
    """A tenant's jobs, the newest first."""

    jobs: tuple[JobReport, ...]


class WebhookReport(_Value):
    """An address that events are told to."""

    webhook_id: str
    url: str
    events: tuple[str, ...]
    created_at: datetime
    waiting: int = Field(default=0, description="events that it has not taken yet")
    last_error: str | None = Field(default=None, description="why the latest of them was not taken")


class NewWebhook(WebhookReport):
    """A new address, with the secret that its events are signed with: told this once."""

    secret: str


class WebhookList(_Value):
    """A tenant's addresses."""

    webhooks: tuple[WebhookReport, ...]


class WebhookRequest(BaseModel):
    """An address, and what it wants to be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="https://…, reached from the service; private addresses only where the operator allows")
    events: tuple[Literal["batch.adapted", "batch.classified", "job.failed"], ...] = (
        "batch.adapted",
        "batch.classified",
        "job.failed",
    )


class Recipe(_Value):
    """How planes become the network's input."""

    channels: tuple[str, ...]
    size: int = Field(description="pixels of the network's input, along each side")
    shrink: int = Field(description="every so many pixels one is taken, when the pixel size is not known")
    pixel_size_um: float | None = Field(description="the network's pixel size, which planes are resampled to")
    scaling: Literal["percentile-8bit", "fixed-scale", "control-scale"] = Field(
        description="control-scale takes its scale from the batch's control images"
    )
    percentile: float = Field(description="percentile-8bit: the percentile of each plane that becomes 1")
    full_scale: tuple[float, ...] | None = Field(description="fixed-scale: the grey level of each channel that becomes 1")
    control_percentiles: tuple[float, float] = Field(
        description="control-scale: the percentiles of the control images that become 0 and 1"
    )
    illumination: Literal["none", "controls"] = Field(
        description="whether the control images' light over the field is divided out"
    )
    mean: tuple[float, ...]
    std: tuple[float, ...]


Plain = str | int | float | bool | None


class ModelCard(Provenance):
    """The served bundle."""

    name: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    recipe: Recipe
    method: str
    trained_context: str
    minimum_control_wells: int
    max_context_sites: int
    members: int = Field(description="networks whose probabilities are averaged")
    features: int
    temperature: float
    network: Mapping[str, Plain | list[Plain]] = Field(description="shape of the network")
    training: Mapping[str, Plain | list[Plain] | list[Mapping[str, Plain | list[Plain]]]] = Field(
        description="what it was trained on, and how each of its members was"
    )


class Live(_Value):
    """The process answers."""

    live: bool = True


class Ready(Provenance):
    """The bundle's golden images were replayed and agreed, and the store answers."""

    ready: bool = True
