"""Every refusal: one table from exception class to slug, title and status. ``problems.py`` makes answers of them.

ServiceError                     what is wrong with a request or the service, beyond the plate itself (``model.errors``)
├── RequestError                 the request cannot be taken as it is
│   ├── InvalidBatchIdError      a batch id that could not stand in a path or a key
│   ├── DigestError              a body that is not what its Content-Digest says, or without one
│   ├── NotAcceptableError       an answer in a form that is not given
│   ├── InvalidRequestError      a field of the request that is missing, unknown or malformed
│   ├── MalformedUploadError     a body that is no complete multipart form
│   ├── ReferenceNotAllowedError an address below none of the places that the tenant may read from
│   ├── ReferenceUnreadableError a file that is referred to and cannot be read
│   ├── NoImagesError            a form without one image that could be used
│   ├── UploadTooLargeError      more bytes, files or sites than the service takes
│   └── UploadTimeoutError       a body of which nothing more arrived
├── AccessError                  the caller may not do that
│   ├── UnauthorizedError        no key where one is needed, or none that opens anything
│   ├── ForbiddenError           the key lacks a scope
│   ├── ForeignSiteError         another site's page asks, by a browser, without a key
│   ├── KeyNotFoundError         there is no such key
│   └── TooManyRequestsError     more requests, or bytes, than the key may send
├── JobError                     a job that cannot be told of, or goes on no more
│   ├── JobNotFoundError         the tenant has no such job
│   ├── JobAbandonedError        every worker that began the job died; told in the job, never an HTTP answer
│   └── JobCancelledError        the job was deleted, or taken by another worker; never an HTTP answer
├── WebhookNotFoundError         the tenant has no such webhook
├── RepeatError                  an Idempotency-Key that cannot be used so
│   ├── IdempotencyConflictError the key was used for another request
│   └── StillRunningError        the same request is still running
├── BatchError                   the request does not fit what is kept for the batch
│   ├── BatchNotFoundError       nothing is kept under that id
│   ├── PlateMapNotFoundError    the batch has no plate map
│   ├── StagedConflictError      another image for a plane that was sent ahead
│   ├── ControlConflictError     another image for a control plane that is kept
│   ├── TreatedAsControlError    a control well that was answered as a treated one, or is of the panel
│   ├── ControlAsPanelError      a well of the panel that is a control
│   ├── PanelNotMeasuredError    a panel for a bundle that measures none
│   ├── PixelSizeConflictError   another pixel size than the batch's
│   ├── QuotaExceededError       no room for more images of the tenant's
│   ├── PlateConflictError       images of another plate than the batch's controls
│   └── RecipeChangedError       kept controls that were prepared by another bundle's image recipe
├── UnavailableError             not now: the same request may succeed later
│   ├── NotReadyError            the bundle's golden images have not been replayed, or did not agree
│   ├── BusyError                every request slot is taken
│   ├── MemoryShortError         there is not the memory for a pass of the network
│   ├── BatchBusyError           other requests kept changing the batch
│   ├── DecoderKilledError       the process that decoded an image was killed from outside
│   ├── StoreUnavailableError    the store cannot be reached, or cannot write
│   └── StoreLostError           the store answers, but the lab's records are gone from it
├── RouteError                   the path or its method does not exist
│   ├── RouteNotFoundError       no such path
│   ├── MethodNotAllowedError    the path does not take this method
│   └── BadRequestError          a request that HTTP itself does not allow
├── BlobMissingError             what a record names is not among the kept files
└── StartError                   the service cannot start as it is configured; never an HTTP answer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model import errors as plate
from model.errors import AnchorwellError

PROBLEM_TYPE = "https://anchorwell.dev/problems/"
MEDIA_TYPE = "application/problem+json"


class ServiceError(AnchorwellError):
    """What is wrong with a request or the service, beyond the plate itself."""


class RequestError(ServiceError):
    """The request cannot be taken as it is."""


class InvalidBatchIdError(RequestError):
    """A batch id that could not stand in a path or a key."""


class DigestError(RequestError):
    """A body that is not what its Content-Digest says, or without one."""


class NotAcceptableError(RequestError):
    """An answer in a form that is not given."""


class InvalidRequestError(RequestError):
    """A field of the request that is missing, unknown or malformed."""


class MalformedUploadError(RequestError):
    """A body that is no complete multipart form."""


class ReferenceNotAllowedError(RequestError):
    """An address below none of the places that the tenant may read from."""


class ReferenceUnreadableError(RequestError):
    """A file that is referred to and cannot be read."""


class NoImagesError(RequestError):
    """A form without one image that could be used."""


class UploadTooLargeError(RequestError):
    """More bytes, files or sites than the service takes."""


class UploadTimeoutError(RequestError):
    """A body of which nothing more arrived."""


class AccessError(ServiceError):
    """The caller may not do that."""


class UnauthorizedError(AccessError):
    """No key where one is needed, or none that opens anything."""


class ForbiddenError(AccessError):
    """The key lacks a scope."""


class ForeignSiteError(AccessError):
    """Another site's page asks, by a browser, without a key."""


class KeyNotFoundError(AccessError):
    """There is no such key."""


class TooManyRequestsError(AccessError):
    """More requests, or bytes, than the key may send."""


class JobError(ServiceError):
    """A job that cannot be told of, or goes on no more."""


class JobNotFoundError(JobError):
    """The tenant has no such job."""


class JobAbandonedError(JobError):
    """Every worker that began the job died; told in the job, never an HTTP answer."""


class JobCancelledError(JobError):
    """The job was deleted, or taken by another worker; never an HTTP answer."""


class WebhookNotFoundError(ServiceError):
    """The tenant has no such webhook."""


class RepeatError(ServiceError):
    """An Idempotency-Key that cannot be used so."""


class IdempotencyConflictError(RepeatError):
    """The key was used for another request."""


class StillRunningError(RepeatError):
    """The same request is still running."""


class BatchError(ServiceError):
    """The request does not fit what is kept for the batch."""


class BatchNotFoundError(BatchError):
    """Nothing is kept under that id."""


class PlateMapNotFoundError(BatchError):
    """The batch has no plate map."""


class StagedConflictError(BatchError):
    """Another image for a plane that was sent ahead."""


class ControlConflictError(BatchError):
    """Another image for a control plane that is kept."""


class TreatedAsControlError(BatchError):
    """A control well that was answered as a treated one, or is of the panel."""


class ControlAsPanelError(BatchError):
    """A well of the panel that is a control."""


class PanelNotMeasuredError(BatchError):
    """A panel for a bundle that measures none."""


class PixelSizeConflictError(BatchError):
    """Another pixel size than the batch's."""


class QuotaExceededError(BatchError):
    """No room for more images of the tenant's."""


class PlateConflictError(BatchError):
    """Images of another plate than the batch's controls."""


class RecipeChangedError(BatchError):
    """Kept controls that were prepared by another bundle's image recipe."""


class UnavailableError(ServiceError):
    """Not now: the same request may succeed later."""


class NotReadyError(UnavailableError):
    """The bundle's golden images have not been replayed, or did not agree."""


class BusyError(UnavailableError):
    """Every request slot is taken."""


class MemoryShortError(UnavailableError):
    """There is not the memory for a pass of the network."""


class BatchBusyError(UnavailableError):
    """Other requests kept changing the batch."""


class DecoderKilledError(UnavailableError):
    """The process that decoded an image was killed from outside."""


class StoreUnavailableError(UnavailableError):
    """The store cannot be reached, or cannot write."""


class StoreLostError(UnavailableError):
    """The store answers, but the lab's records are gone from it."""


class BlobMissingError(ServiceError):
    """What a record names is not among the kept files."""


class RouteError(ServiceError):
    """The path or its method does not exist."""


class RouteNotFoundError(RouteError):
    """No such path."""


class MethodNotAllowedError(RouteError):
    """The path does not take this method."""


class BadRequestError(RouteError):
    """A request that HTTP itself does not allow."""


class StartError(ServiceError):
    """The service cannot start as it is configured; never an HTTP answer."""


class AnsweredBefore(Exception):  # noqa: N818 (no error: the answer of the first request)
    """The request was answered before: ``status`` and ``body`` are that answer's."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__("answered before")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Problem:
    """How a class of error is told over HTTP."""

    slug: str
    title: str
    status: int
    retry_after_s: int | None = None


PROBLEMS: Mapping[type[Exception], Problem] = {
    plate.WellNameError: Problem("invalid-well", "Not a well", 422),
    plate.LayoutError: Problem("invalid-layout", "Well, site or channel of a file is not known", 422),
    plate.TableTooLargeError: Problem("upload-too-large", "The upload is too large", 413),
    plate.UnknownChannelError: Problem("unknown-channel", "The bundle has no such channel", 422),
    plate.MissingChannelError: Problem("missing-channel", "A site lacks a channel", 422),
    plate.DuplicatePlaneError: Problem("duplicate-plane", "Two files for one well, site and channel", 422),
    plate.DuplicateImageError: Problem("duplicate-image", "One image for two wells, sites or channels", 422),
    plate.NotATiffError: Problem("not-a-tiff", "Not a TIFF", 422),
    plate.TruncatedImageError: Problem("truncated-image", "The image is cut short or damaged", 422),
    plate.ImageTooLargeError: Problem("image-too-large", "The image declares too many pixels", 422),
    plate.ImageTooSmallError: Problem("image-too-small", "The image has too few pixels", 422),
    plate.PixelSizeError: Problem("unusable-pixel-size", "A pixel size too far from the network's", 422),
    plate.UnsupportedImageError: Problem("unsupported-image", "A kind of TIFF that is not read", 422),
    plate.NonFiniteImageError: Problem("non-finite-image", "NaN or infinite pixels", 422),
    plate.BlankImageError: Problem("blank-image", "The image is blank", 422),
    plate.SaturatedImageError: Problem("saturated-image", "Too many saturated pixels", 422),
    plate.MixedSizesError: Problem("mixed-sizes", "The channels of one site differ in size", 422),
    plate.UndecodableImageError: Problem("undecodable-image", "The image cannot be decoded within bounds", 422),
    plate.NoControlsError: Problem("controls-required", "The batch has no controls", 409),
    plate.TooFewControlsError: Problem("too-few-controls", "The batch has too few control wells", 409),
    plate.ContextError: Problem("unusable-controls", "The controls give no usable statistics", 422),
    InvalidBatchIdError: Problem("invalid-batch-id", "Not a batch id", 422),
    DigestError: Problem("digest-mismatch", "The body is not what its Content-Digest says", 400),
    NotAcceptableError: Problem("not-acceptable", "The answer is not given in that form", 406),
    InvalidRequestError: Problem("invalid-request", "A field of the request is not valid", 422),
    MalformedUploadError: Problem("malformed-upload", "Not a complete multipart form", 400),
    ReferenceNotAllowedError: Problem("reference-not-allowed", "The tenant may not read from there", 403),
    ReferenceUnreadableError: Problem("reference-unreadable", "A file that is referred to cannot be read", 422),
    NoImagesError: Problem("no-images", "The form has no usable image", 422),
    UploadTooLargeError: Problem("upload-too-large", "The upload is too large", 413),
    UploadTimeoutError: Problem("upload-timeout", "Nothing more of the upload arrived", 408),
    UnauthorizedError: Problem("unauthorized", "An API key is needed", 401),
    ForbiddenError: Problem("forbidden", "The API key lacks a scope", 403),
    ForeignSiteError: Problem("foreign-site", "Not from another site without a key", 403),
    KeyNotFoundError: Problem("key-not-found", "No such API key", 404),
    TooManyRequestsError: Problem("too-many-requests", "More than this API key may send", 429, retry_after_s=1),
    JobNotFoundError: Problem("job-not-found", "No such job", 404),
    WebhookNotFoundError: Problem("webhook-not-found", "No such webhook", 404),
    IdempotencyConflictError: Problem("idempotency-conflict", "The Idempotency-Key is another request's", 422),
    StillRunningError: Problem("still-running", "The same request is still running", 409, retry_after_s=1),
    BatchNotFoundError: Problem("batch-not-found", "No such batch", 404),
    PlateMapNotFoundError: Problem("platemap-not-found", "The batch has no plate map", 404),
    StagedConflictError: Problem("staged-conflict", "Another image was sent ahead for this plane", 409),
    ControlConflictError: Problem("control-conflict", "Another image is kept for this control plane", 409),
    TreatedAsControlError: Problem("treated-as-control", "A treated well was sent as a control", 409),
    ControlAsPanelError: Problem("control-as-panel", "A control was sent as a well of the panel", 409),
    PanelNotMeasuredError: Problem("panel-not-measured", "The served bundle measures no panel", 409),
    PixelSizeConflictError: Problem("pixel-size-conflict", "The batch has another pixel size", 409),
    PlateConflictError: Problem("plate-conflict", "The batch is of another plate", 409),
    QuotaExceededError: Problem("quota-exceeded", "No room for more images of this tenant", 403),
    RecipeChangedError: Problem("controls-of-another-recipe", "The kept controls need to be sent again", 409),
    NotReadyError: Problem("not-ready", "The service is not ready", 503, retry_after_s=2),
    BusyError: Problem("busy", "Every request slot is taken", 503, retry_after_s=1),
    MemoryShortError: Problem("memory-short", "There is not the memory for a pass of the network", 503, retry_after_s=5),
    BatchBusyError: Problem("batch-busy", "Other requests keep changing the batch", 503, retry_after_s=2),
    DecoderKilledError: Problem("decoder-killed", "The decoder was killed", 503, retry_after_s=5),
    StoreUnavailableError: Problem("store-unavailable", "The store cannot be used", 503, retry_after_s=5),
    StoreLostError: Problem("store-lost", "The lab's records are gone from the store", 503, retry_after_s=30),
    RouteNotFoundError: Problem("not-found", "No such path", 404),
    MethodNotAllowedError: Problem("method-not-allowed", "The path does not take this method", 405),
    BadRequestError: Problem("bad-request", "Not a valid HTTP request", 400),
    Exception: Problem("internal-error", "The service failed", 500),
}
"""A class that is not named takes its nearest base's row."""


def problem_of(error: Exception) -> Problem:
    """Return the row of an error's class, or of its nearest base."""
    return next(PROBLEMS[base] for base in type(error).__mro__ if base in PROBLEMS)


def problem_body(error: Exception) -> dict[str, Any]:
    """Tell an error as the members of problem+json."""
    problem = problem_of(error)
    members: dict[str, Any] = dict(error.members) if isinstance(error, AnchorwellError) else {}
    if problem.retry_after_s is not None:
        members.setdefault("retry_after_s", problem.retry_after_s)
    return {
        **members,
        "type": PROBLEM_TYPE + problem.slug,
        "title": problem.title,
        "status": problem.status,
        "detail": error.detail if isinstance(error, AnchorwellError) else str(error) or type(error).__name__,
    }
