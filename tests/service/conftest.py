"""The app over a fake engine and a real store, a Redis server when there is one, and what they keep."""

import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import redis
from anyio.from_thread import start_blocking_portal
from redis.backoff import NoBackoff
from redis.retry import Retry

from model.bundle import Bundle
from service.app import create_app
from service.decoding import InlineDecoder, SiteDecoder
from service.records import MemoryRecords
from service.records_redis import RedisRecords
from service.records_sqlite import SqliteRecords
from service.settings import Settings
from service.storage import open_storage
from tests.service.plates import FakeEngine, fake_bundle


def wait_until(condition, timeout_s=20.0):
    """Poll until something holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return fake_bundle(tmp_path_factory.mktemp("fake") / "bundle")


class AppClient:
    """Calls the app as a server would, from any thread; server errors are answered, as they are in service."""

    def __init__(self, app, portal):
        self.app = app
        self._portal = portal
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def request(self, method, url, **options):
        return self._portal.call(lambda: self._http.request(method, url, **options))

    def get(self, url, **options):
        return self.request("GET", url, **options)

    def post(self, url, **options):
        return self.request("POST", url, **options)

    def delete(self, url, **options):
        return self.request("DELETE", url, **options)

    async def readiness(self):
        return await self.app.state.served.readiness.decided()


def inline_decoder(settings):
    """Decodes in this process."""
    return InlineDecoder(SiteDecoder(Bundle.load(settings.bundle).manifest.recipe, settings.image_limits))


@contextmanager
def running(settings, engine=None, storage=None, *, wait=True, workers=False):
    """The real app with its lifespan; waits for the golden replay's verdict.

    It decodes in this process unless workers are asked for: starting them for every test would take minutes.
    """
    decoder = None if workers else inline_decoder(settings)
    app = create_app(settings, engine=engine, storage=storage, decoder=decoder)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.router.lifespan_context(app)),
    ):
        client = AppClient(app, portal)
        if wait:
            portal.call(client.readiness)
        yield client


@pytest.fixture
def settings(bundle, tmp_path):
    return Settings(bundle=bundle.path, data=tmp_path / "data", device="cpu", threads=1)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def storage(settings):
    opened = open_storage(settings.data)
    yield opened
    opened.close()


@pytest.fixture
def store(storage):
    """The batches of the tenant that anonymous requests are of."""
    return storage.of("default")


@pytest.fixture
def client(settings, engine, storage):
    with running(settings, engine, storage) as running_client:
        yield running_client


@contextmanager
def redis_server(folder, port, *options):
    """A Redis of our own that syncs every write."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine: the Redis store is not tested")
    command = [binary, "--port", str(port), "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"]
    with subprocess.Popen([*command, "--save", "", "--bind", "127.0.0.1", *options], stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as probe:
                wait_until(lambda: answers(probe))
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}/0"


def answers(probe):
    try:
        return probe.ping()
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False


@pytest.fixture(params=["memory", "sqlite", "redis"])
def records(request, tmp_path):
    """Each kind of records, empty."""
    if request.param == "memory":
        opened = MemoryRecords()
    elif request.param == "sqlite":
        opened = SqliteRecords(tmp_path / "records.db")
    else:
        opened = RedisRecords(emptied(request.getfixturevalue("redis_url")))
    yield opened
    opened.close()


@pytest.fixture(params=["embedded", "redis"])
def any_storage(request, tmp_path):
    """A lab's storage as it is embedded, and at scale; empty."""
    url = emptied(request.getfixturevalue("redis_url")) if request.param == "redis" else None
    opened = open_storage(tmp_path / "lab", url)
    yield opened
    opened.close()


def emptied(url):
    with redis.Redis.from_url(url) as server:
        server.flushdb()
    return url
