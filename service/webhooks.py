"""Webhooks: what happened, told to an address of the tenant's, signed after the Standard Webhooks, until it is taken.

An event is written in the commit of what it tells of, one delivery for each address, and kept until the address answers 2xx
or days have passed. A receiver that sees an event's id again has seen the event. Private addresses are refused unless the
operator allows them, at the moment of each delivery, to the very address that is then connected to; no redirect is followed.
Of an answer only the status is read, and an attempt as a whole has its time, however the address answers.
"""

import ipaddress
import json
import logging
import socket
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from secrets import token_bytes, token_hex
from typing import Any

import anyio
import anyio.to_thread
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
_CLAIM = timedelta(seconds=60)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PORTS = range(1, 1 << 16)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

log = logging.getLogger("anchorwell")


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
    timeout_s: float = 20.0

    # --- addresses ---------------------------------------------------------------------------------------------------

    def create(self, deed: Deed, url: str, events: Sequence[str]) -> schemas.NewWebhook:
        """Keep an address; its secret is told this once.

        Raises:
            InvalidRequestError: an address that nothing may be sent to, or an event that there is not.
        """
        address = _checked_url(url)
        with suppress(OSError):  # a name that leads nowhere yet
            self._allowed_address(address.raw_host.decode(), address.port or 443)
        unknown = sorted(set(events) - set(EVENTS))
        if unknown or not events:
            raise InvalidRequestError(f"events are some of {', '.join(EVENTS)}; not {', '.join(unknown) or 'none'}")
        secret = "whsec_" + b64encode(token_bytes(32)).decode()
        told = tuple(dict.fromkeys(events))
        endpoint = Endpoint(token_hex(8), deed.tenant, url, told, secret, self.now().isoformat())
        made = schemas.NewWebhook.model_validate(vars(endpoint))
        beside = deed.done("webhook.created", endpoint.webhook_id, {"url": url}, made.model_dump_json().encode())
        self.records.commit(Commit({endpoint.name: canonical_json(vars(endpoint))}, scope=endpoint.name).and_also(beside))
        return made

    def all(self, tenant: str) -> schemas.WebhookList:
        """A tenant's addresses, and what is still to be told to each."""
        waiting: defaultdict[str, list[Delivery]] = defaultdict(list)
        for _, data in scan_all(self.records, f"{DELIVERIES}{tenant}/"):
            delivery = _delivery(data)
            waiting[delivery.endpoint].append(delivery)
        return schemas.WebhookList(
            webhooks=tuple(
                schemas.WebhookReport.model_validate({**vars(item), **_waiting(waiting[item.name])})
                for item in self._endpoints(tenant)
            )
        )

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
            status = anyio.run(self._post, endpoint.url, delivery.body, headers)
        except TimeoutError:
            return f"no answer within {self.timeout_s:g} s"
        except (OSError, UnicodeError, httpx.HTTPError, httpx.InvalidURL, InvalidRequestError) as error:
            return str(error)[:200] or type(error).__name__
        return None if httpx.codes.is_success(status) else f"HTTP {status}"

    async def _post(self, address: str, body: str, headers: Mapping[str, str]) -> int:
        """Post to the very address that was found to be allowed, whatever its name leads to later; gives the status.

        Raises:
            InvalidRequestError: nothing may be sent there. TimeoutError: it took too long, name and answer together.
            OSError, httpx.HTTPError: it cannot be reached.
        """
        url = _checked_url(address)
        host, port = url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)
        with anyio.fail_after(self.timeout_s):
            found = await anyio.to_thread.run_sync(self._allowed_address, host, port, abandon_on_cancel=True)
            pinned = url.copy_with(host=found, port=port)
            sent = {**headers, "host": url.netloc.decode()}
            async with (
                httpx.AsyncClient(follow_redirects=False, timeout=self.timeout_s, trust_env=False) as client,
                client.stream("POST", pinned, content=body, headers=sent, extensions={"sni_hostname": host}) as answer,
            ):
                return answer.status_code

    def _allowed_address(self, host: str, port: int) -> str:
        found = [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self._may_reach(address):
                raise InvalidRequestError(f"{host} is at {address}, which is a private address: nothing is sent there")
        return found[0]

    def _may_reach(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        end = _end_of(ip)
        networks = [ipaddress.ip_network(network) for network in self.allowed]
        return _is_public(end) or any(at in network for network in networks for at in (ip, end))

    def _conclude(self, delivery: Delivery, error: str | None) -> None:
        """Forget what was taken; try the rest again later, and give up after days."""
        was = canonical_json(vars(delivery))
        if error is None or delivery.attempt > len(RETRIES_S):
            self._write(delivery.name, None, was)
            return
        log.warning("webhook %s: attempt %d: %s", delivery.endpoint.rpartition("/")[2], delivery.attempt, error)
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


def _end_of(ip: _Address) -> _Address:
    """Return the IPv4 address that an IPv6 address leads to (mapped, 6to4, NAT64), or else the address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return ip.ipv4_mapped or ip.sixtofour or translated or ip


def _is_public(ip: _Address) -> bool:
    odd = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not odd


def _checked_url(text: str) -> httpx.URL:
    """Read an address that events can be posted to.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        url = httpx.URL(text)
        url.raw_host.decode().encode("idna")  # what looking the name up does: a label has 1 to 63 letters
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    port_is_valid = url.port is None or url.port in _PORTS
    if url.scheme not in ("https", "http") or not url.host or url.userinfo or not port_is_valid:
        raise InvalidRequestError(f"{text[:200]!r} is no address that events can be posted to: https://host/path")
    return url


def _waiting(deliveries: Sequence[Delivery]) -> dict[str, Any]:
    failed = [delivery for delivery in deliveries if delivery.last_error]
    last = max(failed, key=lambda delivery: delivery.due, default=None)
    return {"waiting": len(deliveries), "last_error": None if last is None else last.last_error}


def _endpoint(data: bytes) -> Endpoint:
    value = json.loads(data)
    return Endpoint(**{**value, "events": tuple(value["events"])})


def _delivery(data: bytes) -> Delivery:
    return Delivery(**json.loads(data))
