"""Webhooks: what happened, told to an address of the tenant's, signed after the Standard Webhooks, until it is taken.

An event is written in the commit of what it tells of, one delivery for each address, and kept until the address answers 2xx
or days have passed. A receiver that sees an event's id again has seen the event. Private addresses are refused unless the
operator allows them, at the moment of each delivery, to the very address that is then connected to; no redirect is followed.
"""

import ipaddress
import json
import socket
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from secrets import token_bytes, token_hex
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx
from standardwebhooks import Webhook

from model.statistics import canonical_json
from service import schemas
from service.deeds import Deed
from service.errors import InvalidRequestError, WebhookNotFoundError
from service.records import Commit, ConflictError, Records, scan_all

EVENTS = ("batch.adapted", "batch.classified", "job.failed")
ENDPOINTS = "webhook/"
DELIVERIES = "delivery/"
RETRIES_S = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200, 86_400, 86_400)
"""How long after each failed attempt the next one is made: about three days in all."""
_TIMEOUT_S = 20.0
_CLAIM = timedelta(seconds=60)


@dataclass(frozen=True)
class Endpoint:
    """An address that a tenant wants events told to, with the secret that signs them."""

    webhook_id: str
    tenant: str
    url: str
    events: tuple[str, ...]
    secret: str
    created_at: str

    @property
    def name(self) -> str:
        """Its record."""
        return f"{ENDPOINTS}{self.tenant}/{self.webhook_id}"


@dataclass(frozen=True)
class Delivery:
    """One event for one address, and when it is tried next."""

    delivery_id: str
    endpoint: str
    event_id: str
    body: str
    due: str
    attempt: int = 0
    last_error: str = ""

    @property
    def name(self) -> str:
        """Its record."""
        return f"{DELIVERIES}{self.delivery_id}"


@dataclass(frozen=True)
class Webhooks:
    """Every tenant's addresses, and what is still to be told to them."""

    records: Records
    enqueue: Callable[[str, str, float], None]
    allowed: Sequence[str] = ()
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))

    # --- addresses ---------------------------------------------------------------------------------------------------

    def create(self, deed: Deed, url: str, events: Sequence[str]) -> schemas.NewWebhook:
        """Keep an address; its secret is told this once.

        Raises:
            InvalidRequestError: an address that nothing may be sent to, or an event that there is not.
        """
        _check_url(url)
        unknown = sorted(set(events) - set(EVENTS))
        if unknown or not events:
            raise InvalidRequestError(f"events are some of {', '.join(EVENTS)}; not {', '.join(unknown) or 'none'}")
        secret = "whsec_" + b64encode(token_bytes(32)).decode()
        told = tuple(dict.fromkeys(events))
        endpoint = Endpoint(token_hex(8), deed.tenant, url, told, secret, self.now().isoformat())
        beside = deed.done("webhook.created", endpoint.webhook_id, {"url": url})
        self.records.commit(Commit({endpoint.name: canonical_json(vars(endpoint))}, scope=endpoint.name).and_also(beside))
        return schemas.NewWebhook.model_validate(vars(endpoint))

    def all(self, tenant: str) -> schemas.WebhookList:
        """A tenant's addresses."""
        found = self._endpoints(tenant)
        return schemas.WebhookList(webhooks=tuple(schemas.WebhookReport.model_validate(vars(item)) for item in found))

    def delete(self, deed: Deed, webhook_id: str) -> None:
        """Tell an address nothing more.

        Raises:
            WebhookNotFoundError: the tenant has no such address.
        """
        found = next((item for item in self._endpoints(deed.tenant) if item.webhook_id == webhook_id), None)
        if found is None:
            raise WebhookNotFoundError(f"there is no webhook {webhook_id[:40]!r}")
        beside = deed.done("webhook.deleted", webhook_id, {})
        self.records.commit(Commit({found.name: None}, scope=found.name).and_also(beside))

    def _endpoints(self, tenant: str) -> list[Endpoint]:
        return [_endpoint(data) for _, data in scan_all(self.records, f"{ENDPOINTS}{tenant}/")]

    # --- events ------------------------------------------------------------------------------------------------------

    def commit(self, deed: Deed, action: str, subject: str, answer: bytes | None) -> Commit:
        """Write an event for every address that wants it: what stands beside a change."""
        if action not in EVENTS:
            return Commit({})
        changes: dict[str, bytes | None] = {}
        event_id = f"evt_{token_hex(12)}"
        for endpoint in self._endpoints(deed.tenant):
            if action in endpoint.events:
                body = canonical_json(
                    {"type": action, "timestamp": self.now().isoformat(), "data": _told(action, subject, answer)}
                ).decode()
                due = self.now().isoformat()
                delivery = Delivery(f"{deed.tenant}/{token_hex(12)}", endpoint.name, event_id, body, due)
                changes[delivery.name] = canonical_json(vars(delivery))
                self.enqueue("delivery", delivery.name, 1.0)  # by then the commit stands; if it does not, there is none
        return Commit(changes)

    def look_after(self) -> None:
        """Enqueue what is due."""
        for name, data in scan_all(self.records, DELIVERIES):
            if datetime.fromisoformat(_delivery(data).due) <= self.now():
                self.enqueue("delivery", name, 0.0)

    def deliver(self, name: str) -> None:
        """Make one attempt, when it is due and nobody makes it."""
        (data,) = self.records.read([name])
        if data is None:
            return
        delivery = _delivery(data)
        if datetime.fromisoformat(delivery.due) > self.now():
            return
        claimed = replace(delivery, due=(self.now() + _CLAIM).isoformat(), attempt=delivery.attempt + 1)
        try:
            self.records.commit(Commit({name: canonical_json(vars(claimed))}, {name: data}, scope=name))
        except ConflictError:
            return
        self._conclude(claimed, self._attempt(claimed))

    def _attempt(self, delivery: Delivery) -> str | None:
        """Send an event; what went wrong, or None."""
        (data,) = self.records.read([delivery.endpoint])
        if data is None:
            return None  # nobody wants it any more
        endpoint = _endpoint(data)
        at = self.now()
        headers = {
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": Webhook(endpoint.secret).sign(delivery.event_id, at, delivery.body),
            "content-type": "application/json",
        }
        try:
            answer = self._post(endpoint.url, delivery.body, headers)
        except (OSError, UnicodeError, httpx.HTTPError, httpx.InvalidURL, InvalidRequestError) as error:
            return str(error)[:200] or type(error).__name__
        return None if answer.is_success else f"HTTP {answer.status_code}"

    def _post(self, url: str, body: str, headers: Mapping[str, str]) -> httpx.Response:
        """Post to the very address that was found to be allowed, whatever its name leads to a moment later."""
        parts = _check_url(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = self._allowed_address(parts.hostname or "", port)
        shown = f"[{address}]" if ":" in address else address
        pinned = parts._replace(netloc=f"{shown}:{port}").geturl()
        sent = {**headers, "host": parts.netloc.rpartition("@")[2]}
        with httpx.Client(follow_redirects=False, timeout=_TIMEOUT_S, trust_env=False) as client:
            return client.post(pinned, content=body, headers=sent, extensions={"sni_hostname": parts.hostname})

    def _allowed_address(self, host: str, port: int) -> str:
        found = [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self._may_reach(address):
                raise InvalidRequestError(f"{host} is at {address}, which is a private address: nothing is sent there")
        return found[0]

    def _may_reach(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        networks = [ipaddress.ip_network(network) for network in self.allowed]
        return (mapped.is_global and not mapped.is_multicast) or any(
            mapped.version == network.version and mapped in network for network in networks
        )

    def _conclude(self, delivery: Delivery, error: str | None) -> None:
        """Forget what was taken; try the rest again later, and give up after days."""
        was = canonical_json(vars(delivery))
        if error is None or delivery.attempt > len(RETRIES_S):
            self._write(delivery.name, None, was)
            return
        wait_s = RETRIES_S[delivery.attempt - 1]
        due = (self.now() + timedelta(seconds=wait_s)).isoformat()
        self._write(delivery.name, canonical_json(vars(replace(delivery, due=due, last_error=error))), was)
        self.enqueue("delivery", delivery.name, float(wait_s))

    def _write(self, name: str, value: bytes | None, was: bytes) -> None:
        try:
            self.records.commit(Commit({name: value}, {name: was}, scope=name))
        except ConflictError:
            return


def _told(action: str, subject: str, answer: bytes | None) -> dict[str, Any]:
    """What an event tells: names and numbers to look the rest up by, never a whole answer."""
    body = json.loads(answer) if answer else {}
    told: dict[str, Any] = {"batch_id": subject}
    if action == "job.failed":
        return {**told, **body}
    told["statistics_id"] = body.get("statistics_id")
    if action == "batch.adapted":
        return {**told, "adapted": body.get("adapted"), "wells_needed": body.get("wells_needed")}
    return {**told, "wells": [well["well"] for well in body.get("wells", ())]}


def _check_url(url: str) -> SplitResult:
    parts = _split_url(url)
    if parts is None or parts.scheme not in ("https", "http") or not parts.hostname or parts.username:
        raise InvalidRequestError(f"{url[:200]!r} is no address that events can be posted to: https://host/path")
    return parts


def _split_url(url: str) -> SplitResult | None:
    """Split an address; None when it is no text, or its host or port cannot be told."""
    try:
        url.encode()
        httpx.URL(url)
        parts = urlsplit(url)
        port = parts.port
    except (ValueError, httpx.InvalidURL):
        return None
    return None if port == 0 else parts


def _endpoint(data: bytes) -> Endpoint:
    value = json.loads(data)
    return Endpoint(**{**value, "events": tuple(value["events"])})


def _delivery(data: bytes) -> Delivery:
    return Delivery(**json.loads(data))
