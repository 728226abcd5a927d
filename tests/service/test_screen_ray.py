"""Decoding on a cluster: what a site's task ends with is told as what it means for the images."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from model.errors import BlankImageError
from model.layout import SiteKey
from service import screen_ray
from service.screen_ray import FarDecoder

KEY = SiteKey("A01", 1)


class Own:
    """A decoder of one's own."""

    def site(self, *_):
        done = Future()
        done.set_result("by itself")
        return done


@pytest.fixture
def ended(monkeypatch):
    """Lets the next site's task end with an error, or a result."""
    outcome = SimpleNamespace(is_=None)

    def get(_):
        if isinstance(outcome.is_, Exception):
            raise outcome.is_
        return outcome.is_

    monkeypatch.setattr(screen_ray.ray, "get", get)
    monkeypatch.setattr(screen_ray.ray, "wait", lambda tasks, timeout: (tasks, []))  # noqa: ARG005 (as ray names it)
    monkeypatch.setattr(screen_ray, "_decoded", SimpleNamespace(remote=lambda *_: None))

    def site(of):
        outcome.is_ = of
        return FarDecoder(None, 4, 120.0, Own()).site(KEY, {}, None)

    return site


def test_a_decoded_site_is_given_on(ended):
    assert ended("a site").result() == "a site"


def test_what_is_wrong_with_an_image_is_told_as_such(ended):
    error = RayTaskError("site", "traceback", BlankImageError("shows nothing").about(well="A01"))
    with pytest.raises(BlankImageError, match="shows nothing") as told:
        ended(error).result()
    assert told.value.members["well"] == "A01"


@pytest.mark.parametrize("error", [WorkerCrashedError(), OutOfMemoryError("of the machine"), NodeDiedError("gone")])
def test_what_the_cluster_did_not_come_to_an_end_with_is_decoded_here(error, ended):
    assert ended(error).result() == "by itself"


def test_while_the_cluster_decodes_something_a_long_queue_is_waited_for(monkeypatch):
    clock, waited = SimpleNamespace(now=1_000.0), []
    monkeypatch.setattr(screen_ray.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(screen_ray, "_decoded", SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(screen_ray.ray, "get", lambda _: "far")
    decoder = FarDecoder(None, 4, 120.0, Own())

    def wait(tasks, timeout):  # noqa: ARG001 (as ray names it)
        waited.append(clock.now)
        clock.now += 15
        decoder._heard = clock.now  # of another site
        return (tasks, []) if len(waited) > 5 else ([], tasks)

    monkeypatch.setattr(screen_ray.ray, "wait", wait)
    assert (decoder.site(KEY, {}, None).result(), decoder.far) == ("far", 1)


def test_a_cluster_without_a_core_to_spare_is_not_waited_for_again_at_once(monkeypatch):
    clock, asked = SimpleNamespace(now=1_000.0), []
    monkeypatch.setattr(screen_ray.time, "monotonic", lambda: clock.now)

    def wait(tasks, timeout):
        clock.now += timeout
        return [], tasks

    monkeypatch.setattr(screen_ray.ray, "wait", wait)
    monkeypatch.setattr(screen_ray.ray, "cancel", lambda task, force: asked.append("cancelled"))  # noqa: ARG005 (as above)
    monkeypatch.setattr(screen_ray, "_decoded", SimpleNamespace(remote=lambda *_: asked.append("asked")))
    decoder = FarDecoder(None, 4, 120.0, Own())
    assert [decoder.site(KEY, {}, None).result() for _ in range(3)] == ["by itself"] * 3
    assert asked == ["asked", "cancelled"]
    clock.now += 61
    decoder.site(KEY, {}, None)
    assert asked == ["asked", "cancelled"] * 2
