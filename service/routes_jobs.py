"""HTTP of what happens later: jobs and webhooks. Holds no ``try``."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from service import schemas
from service.multipart import received_body
from service.posts import JSON, parsed
from service.routes import IDEMPOTENCY_KEY, PROBLEM, Administering, Reading, Serving, Writing, inlined

MAX_WEBHOOK_BYTES = 128 << 10
_WEBHOOK: dict[str, Any] = {
    "requestBody": {"required": True, "content": {JSON: {"schema": inlined(schemas.WebhookRequest)}}},
    "parameters": [IDEMPOTENCY_KEY],
}

router = APIRouter()


@router.get("/jobs", response_model=schemas.JobList, responses=PROBLEM)
def list_jobs(deed: Reading, served: Serving) -> schemas.JobList:
    """List the tenant's jobs, the newest first."""
    return served.later.jobs.all(deed.tenant)


@router.get("/jobs/{job_id}", response_model=schemas.JobReport, responses=PROBLEM)
def get_job(job_id: str, deed: Reading, served: Serving) -> schemas.JobReport:
    """Tell how far a job is, or how it ended: its answer is in ``controls`` or ``prediction``, a failure in ``problem``."""
    return served.later.jobs.get(deed.tenant, job_id)


@router.delete("/jobs/{job_id}", status_code=204, responses=PROBLEM)
def delete_job(job_id: str, deed: Writing, served: Serving) -> Response:
    """Forget a job: one that runs takes no effect any more; what one did stays done."""
    served.later.jobs.delete(deed, job_id)
    return Response(status_code=204)


@router.post("/webhooks", status_code=201, response_model=schemas.NewWebhook, responses=PROBLEM, openapi_extra=_WEBHOOK)
async def create_webhook(request: Request, deed: Administering, served: Serving) -> schemas.NewWebhook:
    """Tell events to an address; the answer has the secret that signs them (Standard Webhooks), this once."""
    body = await received_body(request, MAX_WEBHOOK_BYTES, served.receiver.limits.idle_timeout_s)
    wanted = parsed(schemas.WebhookRequest, body)
    async with served.receiver.keyed(request, deed, wanted, 201) as keyed:
        return await run_in_threadpool(served.webhooks.create, keyed, wanted.url, wanted.events)


@router.get("/webhooks", response_model=schemas.WebhookList, responses=PROBLEM)
def list_webhooks(deed: Administering, served: Serving) -> schemas.WebhookList:
    """List the addresses that events are told to."""
    return served.webhooks.all(deed.tenant)


@router.delete("/webhooks/{webhook_id}", status_code=204, responses=PROBLEM)
def delete_webhook(webhook_id: str, deed: Administering, served: Serving) -> Response:
    """Tell an address nothing more."""
    served.webhooks.delete(deed, webhook_id)
    return Response(status_code=204)
