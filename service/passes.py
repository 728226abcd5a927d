"""The queue of a device: a site goes into a pass of the network at once while one is free; while none is, sites gather.

Knows no network: what a pass does is given.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from service.priority import give_way

Asked = TypeVar("Asked")
Given = TypeVar("Given")


class Passes(Generic[Asked, Given]):
    """Runs passes, several at once, each of what waited longest and of as much like it as one takes."""

    def __init__(
        self,
        run: Callable[[Sequence[Asked]], Sequence[Given]],
        like: Callable[[Asked, Asked], bool],
        *,
        at_once: int,
        most: int,
    ) -> None:
        """Make a queue.

        Args:
            run: does one pass; gives an answer to each that was asked, in their order.
            like: whether two may share a pass.
            at_once: passes that run side by side.
            most: how many share one.
        """
        self._run, self._like, self._most = run, like, most
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Asked, Future[Given]]] = deque()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="pass", initializer=give_way)

    def put(self, asked: Asked) -> "Future[Given]":
        """Queue one; whoever does not wait for it any more cancels it."""
        future: Future[Given] = Future()
        with self._lock:
            self._waiting.append((asked, future))
        self._threads.submit(self._next)
        return future

    def _next(self) -> None:
        taken = self._taken()
        if not taken:  # all that was put was taken with what was put before
            return
        try:
            found = self._run([asked for asked, _ in taken])
        except BaseException as error:  # noqa: BLE001 (whoever asked is told)
            for _, future in taken:
                future.set_exception(error)
        else:
            for (_, future), given in zip(taken, found, strict=True):
                future.set_result(given)

    def _taken(self) -> "list[tuple[Asked, Future[Given]]]":
        """Take the first that somebody still waits for, and what is like it; the others keep their places."""
        taken: list[tuple[Asked, Future[Given]]] = []
        left: deque[tuple[Asked, Future[Given]]] = deque()
        with self._lock:
            while self._waiting and len(taken) < self._most:
                asked, future = self._waiting.popleft()
                if taken and not self._like(taken[0][0], asked):
                    left.append((asked, future))
                elif future.set_running_or_notify_cancel():
                    taken.append((asked, future))
            self._waiting.extendleft(reversed(left))
        return taken
