"""Jobs: answered later, run again when a worker dies, with effect once; and webhooks that tell of them."""

import contextlib
import json
import socket
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from service.blobs import memory_blobs
from service.deeds import Deed
from service.errors import InvalidRequestError, JobNotFoundError, StoreUnavailableError
from service.jobs import LEASE, MAX_ATTEMPTS, Asked, Jobs
from service.records import Commit, ConflictError, MemoryRecords
from service.storage import Storage
from service.webhooks import RETRIES_S, Webhooks
from tests.service.conftest import running, wait_until
from tests.service.plates import CHANNELS, CONTROL_WELLS, FakeEngine, image, ome_tiff, plane, well_files
from tests.service.test_images import put_plane, staged
from tests.service.test_routes import adapted, by_well

LATER = {"Prefer": "respond-async"}


class Clock:
    """A clock that is set."""

    def __init__(self):
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.at

    def advance(self, **by):
        self.at += timedelta(**by)


class Nothing:
    """Events that nobody wants."""

    def commit(self, *_):
        return Commit({})


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def later(settings, storage):
    """The app with its background work."""
    engine = FakeEngine()
    with running(settings, engine, storage) as client:
        client.engine = engine
        yield client


def ended(client, answer):
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    place = answer.headers["location"]
    wait_until(lambda: client.get(place).json()["state"] not in ("queued", "running"))
    return client.get(place).json()


def test_a_form_or_staged_planes_are_answered_later_as_they_would_be_at_once(later):
    job = ended(later, later.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=LATER))
    assert (job["state"], job["kind"], job["batch_id"]) == ("done", "controls", "P1")
    assert job["controls"]["statistics_id"] == adapted(later, "P2")["statistics_id"]
    staged(later, ["E05", "F05"])
    job = ended(later, later.post("/batches/P1/predict", json={"staged": True}, headers=LATER))
    assert [well["well"] for well in job["prediction"]["wells"]] == ["E05", "F05"]
    assert by_well(later.get("/batches/P1/predictions").json()).keys() == {"E05", "F05"}
    assert [item["state"] for item in later.get("/jobs").json()["jobs"]] == ["done", "done"]


def test_a_request_that_cannot_be_answered_fails_at_once_or_as_a_job(later):
    assert later.post("/batches/P1/controls", json={"staged": True, "wells": ["A01"]}, headers=LATER).status_code == 404
    staged(later, ["E05"])
    job = ended(later, later.post("/batches/P1/predict", json={"staged": True}, headers=LATER))
    assert job["state"] == "failed"
    assert job["problem"]["type"].endswith("controls-required")
    assert job["prediction"] is None


def test_a_job_repeated_under_its_key_is_one_job(later):
    headers = {**LATER, "Idempotency-Key": "k"}
    answers = [later.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=headers) for _ in range(2)]
    assert answers[0].json()["job_id"] == answers[1].json()["job_id"]
    assert answers[1].status_code == 202
    assert len(later.get("/jobs").json()["jobs"]) == 1


def test_a_deleted_job_has_no_effect_and_is_gone(settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        answer = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=LATER)
        place = answer.headers["location"]
        assert client.delete(place).status_code == 204
        assert client.get(place).status_code == client.delete(place).status_code == 404
        served = client.app.state.served
        served.later.jobs.run(f"job/default{place.removeprefix('/jobs')}", served.later.run)
        assert client.get("/batches/P1").status_code == 404
        assert storage.blobs.names("batches/") == [], "nor are its images"


def run_later(settings, storage, answer, engine=None):
    """Let another process do a job that was asked for."""
    with running(settings.model_copy(update={"workers": 1}), engine or FakeEngine(), storage) as client:
        client.app.state.served.later.jobs.look_after()
        return ended(client, answer)


def test_a_form_is_answered_later_on_its_own_images_whatever_was_sent_ahead(settings, storage):
    waiting = settings.model_copy(update={"workers": 0})
    with running(waiting, FakeEngine(), storage) as client:
        adapted(client)
        put_plane(client, "P1", "E05", 3, "DNA")  # an incomplete site of the same well
        staged(client, ["E05"], sites=(4,))
        files = well_files(["E05"], sites=(1, 2))
        at_once = client.post("/batches/P1/predict", files=files).json()["wells"]
        answer = client.post("/batches/P1/predict", files=files, headers=LATER)
    job = run_later(settings, storage, answer)
    assert job["prediction"]["wells"] == at_once
    assert at_once[0]["sites"] == 2


def test_channels_of_one_file_are_answered_later_too(settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        adapted(client)
        files = [image("E05_1.ome.tif", ome_tiff(CHANNELS, [plane(name) for name in CHANNELS]))]
        at_once = client.post("/batches/P1/predict", files=files)
        assert at_once.status_code == 200, at_once.text
        answer = client.post("/batches/P1/predict", files=files, headers=LATER)
    assert run_later(settings, storage, answer)["prediction"]["wells"] == at_once.json()["wells"]


def test_a_job_is_of_the_images_that_were_there_when_it_was_asked_for(settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        adapted(client)
        staged(client, ["E05"])
        answer = client.post("/batches/P1/predict", json={"staged": True}, headers=LATER)
        staged(client, ["F05"])
        put_plane(client, "P1", "E05", 1, "DNA", salt="other", replace=True)
    job = run_later(settings, storage, answer)
    assert (job["state"], job["problem"]["type"].rpartition("/")[2]) == ("failed", "staged-conflict")
    assert job["problem"]["well"] == "E05"


@pytest.mark.parametrize("form", [True, False])
def test_a_job_is_of_the_batch_that_was_there_when_it_was_asked_for(form, settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        adapted(client)
        staged(client, ["E05"])
        sent = {"files": well_files(["E05"])} if form else {"json": {"staged": True}}
        answer = client.post("/batches/P1/predict", **sent, headers=LATER)
        client.delete("/batches/P1")
        adapted(client)
        staged(client, ["E05"])
    job = run_later(settings, storage, answer)
    assert (job["state"], job["problem"]["type"].rpartition("/")[2]) == ("failed", "batch-not-found")


@pytest.mark.parametrize("headers", [{}, LATER])
def test_a_request_for_what_is_staged_may_be_repeated_when_more_is(headers, later):
    adapted(later)
    staged(later, ["E05"])
    keyed = {"json": {"staged": True}, "headers": {**headers, "Idempotency-Key": "k"}}
    first = later.post("/batches/P1/predict", **keyed)
    staged(later, ["F05"])
    again = later.post("/batches/P1/predict", **keyed)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    later.delete("/batches/P1")
    assert later.post("/batches/P1/predict", **keyed).json() == first.json()


def test_a_repeated_request_for_a_job_tells_where_it_is(later):
    headers = {**LATER, "Idempotency-Key": "k"}
    first, again = (later.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=headers) for _ in range(2))
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.headers["location"], again.headers["preference-applied"]) == (first.headers["location"], "respond-async")


def test_a_job_that_is_deleted_while_it_runs_has_no_effect(jobs):
    name = put(jobs)

    def run(_, deed):
        jobs.delete(Deed("t"), name.rpartition("/")[2])
        jobs.records.commit(Commit({"effect": b"1"}).and_also(deed.done("test", "P1", {})))

    with pytest.raises(ConflictError):
        jobs.run(name, run)
    assert jobs.records.read(["effect", name]) == [None, None]


def test_a_job_that_nobody_enqueued_is_found(settings, storage):
    with running(settings.model_copy(update={"workers": 0}), FakeEngine(), storage) as client:
        answer = client.post("/batches/P1/controls", files=well_files(CONTROL_WELLS), headers=LATER)
    with running(settings.model_copy(update={"workers": 1}), FakeEngine(), storage) as client:
        client.app.state.served.later.jobs.look_after()
        assert ended(client, answer)["state"] == "done"


# --- leases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def jobs(clock):
    return Jobs(Storage(MemoryRecords(), memory_blobs()), lambda *_: None, Nothing(), clock)


def put(jobs, **asked):
    return f"job/t/{jobs.put(Deed('t'), 'controls', 'P1', Asked({}, **asked)).job_id}"


def state(jobs, name):
    return jobs.get("t", name.rpartition("/")[2])


def effect(jobs, name):
    """Run a job whose effect is one more record."""

    def run(_, deed):
        made = Commit({f"effect/{len(jobs.records.scan('effect/'))}": b"1"})
        jobs.records.commit(made.and_also(deed.done("test", "P1", {})))

    jobs.run(name, run)


def test_a_job_whose_worker_died_runs_again_after_its_lease(jobs, clock):
    name = put(jobs)

    def die(*_):
        raise SystemExit

    with pytest.raises(SystemExit):
        jobs.run(name, die)
    effect(jobs, name)
    assert state(jobs, name).state == "running", "the lease still holds"
    clock.advance(seconds=LEASE.total_seconds() + 1)
    effect(jobs, name)
    assert (state(jobs, name).state, state(jobs, name).attempt) == ("done", 2)


def test_a_job_that_two_workers_run_takes_effect_once(jobs, clock):
    name = put(jobs)

    def slow(_, deed):
        clock.advance(seconds=LEASE.total_seconds() + 1)  # this worker hangs, and loses its lease
        effect(jobs, name)
        jobs.records.commit(Commit({"effect/late": b"1"}).and_also(deed.done("test", "P1", {})))

    with pytest.raises(ConflictError):
        jobs.run(name, slow)
    assert [key for key, _ in jobs.records.scan("effect/")] == ["effect/0"]
    assert state(jobs, name).state == "done"


def test_a_fault_of_the_moment_is_tried_again_and_ends_at_last(jobs, clock):
    name = put(jobs)

    def unavailable(*_):
        raise StoreUnavailableError("Redis is away")

    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert state(jobs, name).state != "failed"
        jobs.run(name, unavailable)
        assert state(jobs, name).attempt == attempt
        clock.advance(seconds=LEASE.total_seconds() + 1)
    assert state(jobs, name).problem.type.endswith("store-unavailable")


def test_a_job_that_kills_its_workers_is_given_up(jobs, clock):
    name = put(jobs)

    def die(*_):
        raise SystemExit

    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(SystemExit):
            jobs.run(name, die)
        clock.advance(seconds=LEASE.total_seconds() + 1)
    jobs.run(name, die)
    assert state(jobs, name).state == "failed"
    assert f"begun {MAX_ATTEMPTS} times" in state(jobs, name).problem.detail


@pytest.mark.parametrize("end", ["done", "failed", "deleted"])
def test_images_kept_for_a_job_go_with_its_end(end, jobs):
    store = jobs.storage.of("t")
    store.put_files({"0a1/image": b"abc"})
    name = put(jobs, files=("0a1/image",), size=3)
    assert store.usage.kept_bytes() == 3

    def invalid(*_):
        raise InvalidRequestError("not like this")

    {
        "done": lambda: effect(jobs, name),
        "failed": lambda: jobs.run(name, invalid),
        "deleted": lambda: jobs.delete(Deed("t"), name.rpartition("/")[2]),
    }[end]()
    assert (store.usage.kept_bytes(), jobs.storage.blobs.names()) == (0, [])


def test_a_fault_of_the_request_ends_a_job_at_once(jobs):
    name = put(jobs)

    def invalid(*_):
        raise InvalidRequestError("not like this")

    jobs.run(name, invalid)
    assert (state(jobs, name).state, state(jobs, name).problem.detail) == ("failed", "not like this")


def test_another_tenant_sees_no_job(jobs):
    name = put(jobs)
    with pytest.raises(JobNotFoundError):
        jobs.get("other", name.rpartition("/")[2])
    assert jobs.all("other").jobs == ()


# --- webhooks --------------------------------------------------------------------------------------------------------


class Receiver(BaseHTTPRequestHandler):
    """Takes events, as often as it is told to."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.server.taken.append((dict(self.headers.items()), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.taken, server.statuses = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/events"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def verified(secret, taken):
    headers, body = taken
    return Webhook(secret).verify(body, headers)


def test_what_happens_to_a_batch_is_told_signed_and_once(settings, storage, receiver):
    allowed = settings.model_copy(update={"webhook_networks": ("127.0.0.0/8",)})
    with running(allowed, FakeEngine(), storage) as client:
        made = client.post("/webhooks", json={"url": receiver.url}).json()
        assert "secret" not in client.get("/webhooks").json()["webhooks"][0]
        adapted(client)
        adapted(client)
        staged(client, ["E05"])
        ended(client, client.post("/batches/P1/predict", json={"staged": True}, headers=LATER))
        ended(client, client.post("/batches/P9/controls", files=well_files(["E05"]), headers=LATER))
        client.post("/batches/P1/predict", json={"staged": True, "wells": ["E05"]}, headers=LATER)
        wait_until(lambda: len(receiver.taken) >= 4)
        told = [verified(made["secret"], taken) for taken in receiver.taken]
        kinds = sorted(event["type"] for event in told)
        assert kinds == ["batch.adapted", "batch.adapted", "batch.classified", "batch.classified"]
        classified = next(event for event in told if event["type"] == "batch.classified")
        assert (classified["data"]["batch_id"], classified["data"]["wells"]) == ("P1", ["E05"])
        with pytest.raises(WebhookVerificationError):
            verified("whsec_" + "A" * 43, receiver.taken[0])
        assert client.delete(f"/webhooks/{made['webhook_id']}").status_code == 204


@pytest.fixture
def webhooks(clock):
    return Webhooks(MemoryRecords(), lambda *_: None, ("127.0.0.0/8",), clock)


def told(webhooks, url):
    """An event for one address; gives the delivery's name and the address's secret."""
    made = webhooks.create(Deed("t"), url, ["batch.adapted"])
    webhooks.records.commit(webhooks.commit(Deed("t"), "batch.adapted", "P1", b'{"adapted": true}'))
    ((name, _),) = webhooks.records.scan("delivery/")
    return name, made.secret


def test_an_event_that_is_not_taken_is_told_again_for_days_with_the_same_id(webhooks, receiver, clock):
    clock.at = datetime.now(UTC)
    name, secret = told(webhooks, receiver.url)
    receiver.statuses[:] = [500, 302, 404]
    for wait_s in (*RETRIES_S[:3], 0):
        webhooks.deliver(name)
        webhooks.deliver(name)  # not due
        clock.advance(seconds=wait_s)
    assert len(receiver.taken) == 4
    assert len({headers["webhook-id"] for headers, _ in receiver.taken}) == 1
    assert verified(secret, receiver.taken[0])["data"]["adapted"] is True
    assert webhooks.records.scan("delivery/") == []
    assert sum(RETRIES_S) > 2.5 * 86_400


def test_an_event_that_is_never_taken_is_given_up_after_days(webhooks, receiver, clock):
    name, _ = told(webhooks, receiver.url)
    receiver.statuses[:] = [500] * 50
    for wait_s in (*RETRIES_S, 0):
        assert webhooks.records.scan("delivery/")
        webhooks.deliver(name)
        clock.advance(seconds=wait_s)
    assert webhooks.records.scan("delivery/") == []


class Unending(BaseHTTPRequestHandler):
    """Answers for as long as it is listened to: at once and a lot, or a byte of the header now and then."""

    def do_POST(self):
        if not self.server.drips:
            self.send_response(200)
            self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.ended.wait(0.01 if self.server.drips else 0):
                self.wfile.write(b"H" if self.server.drips else bytes(1 << 16))
                self.server.sent += 1
        self.server.ended.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def unending():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unending)
    server.drips, server.sent, server.ended = False, 0, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/events"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def test_of_an_answer_only_the_status_is_read(webhooks, unending):
    name, _ = told(webhooks, unending.url)
    webhooks.deliver(name)
    assert webhooks.records.scan("delivery/") == [], "it was taken"
    assert unending.ended.wait(20), "the connection is closed on an answer that does not end"
    assert unending.sent < 1_000, "64 KiB each"


def test_an_attempt_ends_in_time_however_slowly_it_is_answered(webhooks, unending):
    unending.drips = True
    hasty = replace(webhooks, timeout_s=0.3)
    name, _ = told(hasty, unending.url)
    hasty.deliver(name)
    ((_, data),) = hasty.records.scan("delivery/")
    assert json.loads(data)["last_error"] == "no answer within 0.3 s"


UNUSABLE = [
    "http://" + "a" * 64 + ".example/",
    "http://lims..example/",
    "http://lims.example:99999/",
    "http://lims.example:0/",
    "http://user:word@lims.example/",
    "http://[::1/",
    "http://lims.example/\x00",
    "http://lims.example/" + "a" * 70_000,
    "http://\uff01.example/",
    "http:///path",
    "//lims.example/",
]


@pytest.mark.parametrize("url", UNUSABLE)
def test_an_address_that_nothing_can_be_posted_to_is_refused(url, client):
    answer = client.post("/webhooks", json={"url": url})
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (422, "invalid-request")


def test_an_address_that_turns_out_to_be_unusable_is_a_failure_like_another(webhooks):
    name, _ = told(webhooks, "http://lims.example/")
    ((at, data),) = webhooks.records.scan("webhook/")
    webhooks.records.commit(Commit({at: data.replace(b"lims.example", b"lims..example")}))
    webhooks.deliver(name)
    ((_, data),) = webhooks.records.scan("delivery/")
    assert "no address" in json.loads(data)["last_error"]
    assert datetime.fromisoformat(json.loads(data)["due"]) == webhooks.now() + timedelta(seconds=RETRIES_S[0])


def test_a_name_of_other_letters_is_looked_up_and_told_as_the_net_writes_it(webhooks, receiver, monkeypatch):
    asked = []
    really = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: asked.append(host) or really("127.0.0.1", *more, **named)
    )
    name, _ = told(webhooks, f"http://zürich.example:{receiver.server_port}/events")
    webhooks.deliver(name)
    assert asked[0] == "xn--zrich-kva.example"
    assert receiver.taken[0][0]["host"] == f"xn--zrich-kva.example:{receiver.server_port}"


PRIVATE = ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0", "[::ffff:10.0.0.1]", "100.64.0.1"]
TRANSLATED = ["[64:ff9b::10.0.0.1]", "[2002:a00:1::1]", "[2002:7f00:1::]", "[64:ff9b:1::10.0.0.1]", "[::10.0.0.1]"]


@pytest.mark.parametrize("host", [*PRIVATE, *TRANSLATED, "[fec0::1]", "224.0.0.1"])
def test_nothing_is_sent_to_private_addresses_unless_they_are_allowed(host, webhooks):
    closed, url = replace(webhooks, allowed=()), f"http://{host}:9/events"
    with pytest.raises(InvalidRequestError, match="private address"):
        closed.create(Deed("t"), url, ["batch.adapted"])
    name, _ = told(replace(webhooks, allowed=("0.0.0.0/0", "::/0")), url)  # allowed once, and no more
    closed.deliver(name)
    ((_, data),) = closed.records.scan("delivery/")
    assert "private address" in json.loads(data)["last_error"]
    (listed,) = closed.all("t").webhooks
    assert (listed.waiting, "private address" in listed.last_error) == (1, True)


@pytest.mark.parametrize(
    ("address", "networks", "reached"),
    [
        ("93.184.216.34", (), True),
        ("2606:4700::1", (), True),
        ("64:ff9b::93.184.216.34", (), True),
        ("64:ff9b::10.1.2.3", ("10.1.0.0/16",), True),
        ("64:ff9b::10.2.2.3", ("10.1.0.0/16",), False),
        ("2002:a01:203::1", ("10.1.0.0/16",), True),
        ("fd00::1", ("fd00::/8",), True),
    ],
)
def test_an_address_within_an_address_is_judged_as_what_it_leads_to(address, networks, reached, webhooks):
    assert replace(webhooks, allowed=networks)._may_reach(address) is reached


def test_what_a_name_leads_to_is_looked_at_once_and_used(webhooks, receiver, monkeypatch):
    asked = []

    def resolve(host, *others, **options):
        asked.append(host)
        return really("127.0.0.1", *others, **options)

    really = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    name, _ = told(webhooks, f"http://lims.example:{receiver.server_port}/events")
    asked.clear()
    webhooks.deliver(name)
    assert asked.count("lims.example") == 1
    assert receiver.taken[0][0]["host"] == f"lims.example:{receiver.server_port}"


def test_a_webhook_asked_for_again_under_its_key_is_one_webhook(client):
    sent = {"json": {"url": "https://93.184.216.34/events"}, "headers": {"Idempotency-Key": "k"}}
    first, again = (client.post("/webhooks", **sent) for _ in range(2))
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    assert len(client.get("/webhooks").json()["webhooks"]) == 1
    other = client.post("/webhooks", **{**sent, "json": {"url": "https://93.184.216.34/others"}})
    assert other.json()["type"].endswith("idempotency-conflict")


def test_an_address_that_was_deleted_is_told_nothing_more(webhooks, receiver):
    name, _ = told(webhooks, receiver.url)
    (endpoint,) = webhooks.all("t").webhooks
    webhooks.delete(Deed("t"), endpoint.webhook_id)
    webhooks.deliver(name)
    assert (receiver.taken, webhooks.records.scan("delivery/")) == ([], [])
