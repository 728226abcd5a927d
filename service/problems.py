"""Every refusal as an HTTP answer, RFC 9457 problem+json: ``errors.py``'s table, and what the framework raises."""

import json
import logging
import secrets
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from model.errors import AnchorwellError
from service.errors import (
    MEDIA_TYPE,
    AnsweredBefore,
    BadRequestError,
    InvalidBatchIdError,
    InvalidRequestError,
    MalformedUploadError,
    MethodNotAllowedError,
    NotReadyError,
    RouteNotFoundError,
    ServiceError,
    problem_body,
    problem_of,
)

log = logging.getLogger("anchorwell")


def problem_response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """Render an error as problem+json; 429 and 503 carry ``Retry-After``."""
    problem, body = problem_of(error), problem_body(error)
    extra = {"Retry-After": str(body["retry_after_s"])} if problem.retry_after_s is not None else {}
    if problem.status == 401:  # noqa: PLR2004 (RFC 9110 asks for it)
        extra["WWW-Authenticate"] = "Bearer"
    if problem.status == 408:  # noqa: PLR2004 (the rest of the body may still come: it is not the next request)
        extra["Connection"] = "close"
    return Response(
        json.dumps(body, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers={**(headers or {}), **extra},
    )


def accepted_headers(job_id: str) -> dict[str, str]:
    """Headers of an answer that a job was taken."""
    return {"Location": f"/jobs/{job_id}", "Preference-Applied": "respond-async"}


def install_handlers(app: FastAPI) -> None:
    """Let every error of the app, routing and validation included, leave as problem+json."""

    async def known(_: Request, error: Exception) -> Response:
        # The service's own faults belong in its log; that it is not ready yet it is asked again and again.
        if problem_of(error).status >= 500 and not isinstance(error, NotReadyError):  # noqa: PLR2004
            log.warning("%s: %s", type(error).__name__, problem_body(error)["detail"])
        return problem_response(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
        return problem_response(InvalidRequestError("; ".join(faults)))

    async def left(_: Request, error: Exception) -> Response:
        return problem_response(MalformedUploadError(str(error) or type(error).__name__))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers  # noqa: PLR2004
        return problem_response(_http_error(request, error), headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        reference = secrets.token_hex(4)
        log.error("reference %s: %s %s failed", reference, request.method, request.url.path, exc_info=error)
        return problem_response(_UnexpectedError(reference))

    async def answered(_: Request, answer: Exception) -> Response:
        assert isinstance(answer, AnsweredBefore)
        headers = {"Idempotency-Replayed": "true"}
        if answer.status == 202:  # noqa: PLR2004
            headers |= accepted_headers(json.loads(answer.body)["job_id"])
        return Response(answer.body, status_code=answer.status, media_type="application/json", headers=headers)

    app.add_exception_handler(AnsweredBefore, answered)
    app.add_exception_handler(AnchorwellError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


class _UnexpectedError(AnchorwellError):
    """Stands for an error whose words are kept from the client; takes the last row of the table."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"an unexpected error; the service's log has it under {reference}", reference=reference)


def _http_error(request: Request, error: HTTPException) -> ServiceError:
    if error.status_code == 404 and b"%2f" in request.scope.get("raw_path", b"").lower():  # noqa: PLR2004
        name = request.url.path.removeprefix("/batches/")[:40]
        return InvalidBatchIdError(f"{name!r} is not a batch id: 1 to 128 letters, digits, '.', '_' or '-'")
    if error.status_code == 404:  # noqa: PLR2004
        return RouteNotFoundError(f"there is no {request.url.path[:200]}; see /docs for what there is")
    if error.status_code == 405:  # noqa: PLR2004
        return MethodNotAllowedError(
            f"{request.url.path[:200]} does not take {request.method}; it takes {_allowed(request)}"
        )
    return BadRequestError(str(error.detail))


def _allowed(request: Request) -> str:
    """The methods that a path takes, over all its routes."""
    scopes = {method: {**request.scope, "method": method} for method in ("DELETE", "GET", "HEAD", "POST", "PUT")}
    routes = request.app.routes
    return ", ".join(
        name for name, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)
    )
