"""What lets a request in: slots, counts of what a key sends, whence requests without one come, and bounds on HTTP itself."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import anyio
import pytest
import uvicorn

from service import multipart
from service.access import Keys, Scope
from service.digests import content_digest
from service.errors import BusyError, ForeignSiteError
from service.gates import Neighbours, Slots, Turns
from service.kept import Kept
from service.multipart import SPOOL_PREFIX, spooled, sweep_spool
from service.protocol import MAX_HEADER_BYTES, PIECE_BYTES, BoundedHttpProtocol
from tests.service.conftest import free_port, running, wait_until
from tests.service.plates import FakeEngine, plane, tiff, well_files

CONTROLS = "/batches/P1/controls"
FILES = well_files(["A01", "B01", "C01", "D01"])


# --- slots -----------------------------------------------------------------------------------------------------------


def test_a_tenant_that_holds_slots_leaves_one_for_another():
    slots = Slots(3)
    with slots.taken("a"), slots.taken("a"):
        with pytest.raises(BusyError), slots.taken("a"):
            pass
        with slots.taken("b"), pytest.raises(BusyError), slots.taken("c"):
            pass
    with slots.taken("c"), slots.taken("c"):
        pass


def test_what_is_larger_than_all_slots_is_held_alone():
    slots = Slots(10, "bytes")
    with slots.taken("a", 50), pytest.raises(BusyError), slots.taken("b", 1):
        pass
    with slots.taken("a", 6), slots.taken("b", 4):
        pass


# --- what a key sends ------------------------------------------------------------------------------------------------


def limited(storage, **limits):
    _, token = Keys(storage.records).create("default", [Scope.READ, Scope.WRITE], **limits)
    return {"Authorization": f"Bearer {token}"}


def test_bytes_of_an_undeclared_length_are_counted_as_they_arrive(client, storage):
    headers = limited(storage, bytes_per_day=1_000)

    async def chunked():
        for _ in range(4):
            yield b"x" * 300

    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(CONTROLS, content=chunked(), headers={**headers, **kind}).status_code == 429


def test_a_request_that_is_refused_for_its_bytes_uses_none_of_the_day(client, storage):
    headers = limited(storage, bytes_per_day=1_000)
    put = {"method": "PUT", "url": "/batches/P1/platemap", "headers": headers}
    assert client.request(**put, content=b"x" * 900).status_code == 422
    answer = client.request(**put, content=b"x" * 200)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert client.request(**put, content=b"x" * 50).status_code == 422


def test_requests_a_minute_are_bounded(client, storage):
    headers = limited(storage, requests_per_minute=2)
    assert [client.get("/batches", headers=headers).status_code for _ in range(3)] == [200, 200, 429]


# --- from where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", None),
        ("[::1]:8000", None),
        ("192.168.1.7", None),
        ("localhost:8000", "http://localhost:8000"),
        ("LOCALHOST", None),
        ("scope-3.lab", None),
        ("", None),
    ],
)
def test_programs_that_call_by_address_or_by_a_name_that_was_given_are_let_in(host, origin):
    Neighbours(("scope-3.lab",)).require(host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),
        ("127.0.0.1.evil.example:8000", None),
        ("127.0.0.1:8000", "http://evil.example"),
        ("localhost:8000", "null"),
        ("localhost:8000", "http://localhost:3000"),
        ("[evil.example]:8000", None),
    ],
)
def test_pages_of_other_sites_are_not(host, origin):
    with pytest.raises(ForeignSiteError):
        Neighbours().require(host, origin)


def test_a_key_may_be_used_under_any_name_from_any_site(client, storage):
    foreign = {"host": "evil.example", "origin": "http://evil.example"}
    answer = client.get("/batches", headers=foreign)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (403, "foreign-site")
    assert client.get("/health/ready", headers=foreign).status_code == 200
    _, token = Keys(storage.records).create("default", [Scope.READ])
    assert client.get("/batches", headers={**foreign, "Authorization": f"Bearer {token}"}).status_code == 200


# --- HTTP itself -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echo_port():
    """A server with the service's protocol that answers with the size of a body, and into how many pieces it came apart.

    Of a body for ``/first`` it waits for the first piece alone.
    """

    async def app(scope, receive, send):
        sizes, more = [], True
        while more:
            message = await receive()
            sizes += [len(message["body"])] if message.get("body") else []
            more = message.get("more_body", False) and not (sizes and scope["path"] == "/first")
        told = [(b"x-size", str(sum(sizes)).encode()), (b"x-pieces", str(len(sizes)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": told})
        await send({"type": "http.response.body", "body": b""})

    port = free_port()
    config = uvicorn.Config(app, port=port, http=BoundedHttpProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield port
    server.should_exit = True
    thread.join()


def answers(port, *blocks):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for block in blocks:
            try:
                connection.sendall(block)
            except OSError:
                break
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while data := connection.recv(1 << 16):
                received += data
        except OSError:
            pass
        return received


def test_headers_without_end_close_the_connection(echo_port):
    start = b"GET / HTTP/1.1\r\nhost: x\r\nx-filler: "
    assert answers(echo_port, start, *[b"x" * 8_192] * 64)[:12] in (
        b"HTTP/1.1 400",
        b"",
    )  # closed, perhaps before it is read
    assert answers(echo_port, start + b"x" * (MAX_HEADER_BYTES // 2) + b"\r\nconnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_bodies_of_any_size_and_requests_one_after_another_pass(echo_port):
    body = b"y" * 700_000
    post = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 700000\r\n\r\n" + body
    last = post.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n")
    received = answers(echo_port, post + post, post[:300_000], post[300_000:] + last)
    assert received.count(b"x-size: 700000") == 4


def test_a_large_body_is_handed_on_in_large_pieces(echo_port):
    body = b"y" * (20 * PIECE_BYTES)
    head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
    told = dict(line.split(b": ") for line in answers(echo_port, head + body).split(b"\r\n") if b": " in line)
    assert int(told[b"x-size"]) == len(body)
    assert 10 <= int(told[b"x-pieces"]) <= 25


def test_what_arrives_of_a_body_is_handed_on_although_no_more_does(echo_port):
    with socket.create_connection(("127.0.0.1", echo_port), timeout=10) as connection:
        connection.sendall(b"POST /first HTTP/1.1\r\nhost: x\r\ncontent-length: 700000\r\n\r\nabc")
        assert b"x-size: 3" in connection.recv(1 << 16)


def test_an_upload_that_only_drips_gives_its_slot_back(settings, storage, monkeypatch):
    monkeypatch.setattr(multipart, "SLOWEST_BYTES_PER_S", 1 << 40)
    with running(settings.model_copy(update={"upload_idle_timeout_s": 0.2}), FakeEngine(), storage) as client:

        async def dripping():
            while True:
                yield b"x"
                await anyio.sleep(0.01)

        answer = client.post(CONTROLS, content=dripping(), headers={"content-type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 408
        assert client.post(CONTROLS, files=FILES).status_code == 201


@pytest.mark.parametrize("declared", [True, False])
def test_an_address_for_events_is_not_read_at_any_length(declared, client):
    async def chunked():
        for _ in range(64):
            yield b" " * 65_536

    content = b" " * (4 << 20) if declared else chunked()
    answer = client.post("/webhooks", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (413, "upload-too-large")


# --- the spool -------------------------------------------------------------------------------------------------------


def test_what_dead_processes_left_in_the_spool_goes_and_what_is_in_use_stays(tmp_path, monkeypatch):
    left = tmp_path / f"{SPOOL_PREFIX}left"
    left.write_bytes(b"of a process that is no more")
    with spooled(tmp_path) as used:
        sweep_spool(tmp_path)
        assert left.exists()  # it may have been made a moment ago, by a process that is about to lock it
        later = time.time() + 3_600
        monkeypatch.setattr(time, "time", lambda: later)
        sweep_spool(tmp_path)
        assert [str(path) for path in tmp_path.iterdir()] == [used.name]
    assert list(tmp_path.iterdir()) == []


# --- turns -----------------------------------------------------------------------------------------------------------


class Counted:
    """Calls something, and counts how many call it together."""

    def __init__(self, call):
        self.call, self.most, self._working, self._lock = call, 0, 0, threading.Lock()

    def __call__(self, *given, **named):
        with self._lock:
            self._working += 1
            self.most = max(self.most, self._working)
        try:
            time.sleep(0.05)  # so that they would meet
            return self.call(*given, **named)
        finally:
            with self._lock:
                self._working -= 1


def statuses_of(send, count=6):
    """Send requests together."""
    with ThreadPoolExecutor(count) as pool:
        return [answer.status_code for answer in pool.map(send, range(count))]


def test_no_more_requests_work_at_once_than_there_are_cores_and_one(settings, storage):
    engine = FakeEngine()
    with running(settings, engine, storage) as client:
        assert client.post(CONTROLS, files=FILES).status_code == 201
        engine.classify = Counted(engine.classify)
        files = well_files(["E05"], (1,))
        assert statuses_of(lambda _: client.post("/batches/P1/predict", files=files)) == [200] * 6
    assert 1 <= engine.classify.most <= settings.threads + 1


def test_no_more_planes_are_kept_at_once_than_there_are_cores(settings, storage, monkeypatch):
    stage = Counted(Kept.stage)
    monkeypatch.setattr(Kept, "stage", lambda *given, **named: stage(*given, **named))  # noqa: PLW0108 (it is a method)

    def send(number):
        data = tiff(plane(number))
        path = f"/batches/P1/images/E05/{number + 1}/DNA"
        return client.request("PUT", path, content=data, headers={"Content-Digest": content_digest(data)})

    with running(settings, FakeEngine(), storage) as client:
        assert statuses_of(send) == [201] * 6
    assert 1 <= stage.most <= settings.threads


@pytest.mark.anyio
async def test_who_waits_too_long_for_a_turn_is_told_to_come_back_and_the_next_gets_one():
    turns, release = Turns(1, 0.05), threading.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.taken, release.wait)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BusyError, match=r"requests before took longer than 0\.05 s"):
            await turns.taken(list)
        release.set()
    assert await turns.taken(lambda: "done") == "done"


def test_a_post_is_turned_away_before_anything_of_it_is_read_while_all_slots_are_taken(settings, storage):
    with running(settings.model_copy(update={"max_concurrent_requests": 1}), FakeEngine(), storage) as client:

        async def never():
            raise AssertionError("nobody asks for the body")
            yield b""

        with client.app.state.served.upload_slots.taken("somebody"):
            for path in (CONTROLS, "/batches/P1/predict"):
                answer = client.post(path, content=never(), headers={"Authorization": "Bearer of nobody"})
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert client.get("/batches").status_code == 200
        assert client.post(CONTROLS, files=FILES).status_code == 201
