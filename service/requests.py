"""Every request's id, time and line in the log. The id is taken from ``X-Request-ID`` or drawn, and told in the answer."""

import logging
import re
import time
from collections.abc import Callable
from secrets import token_hex

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BusyError
from service.problems import problem_response

HEADER = "X-Request-ID"
_USABLE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
QUIET = ("/health/live", "/health/ready", "/metrics")

_IMAGES = re.compile(r"/batches/[^/]+/(controls|predict)")

log = logging.getLogger("anchorwell.requests")


class Requests:
    """Middleware that names, times and logs each request; ``count`` is told method, route, status and seconds."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int, float], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _USABLE.fullmatch(given) else token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        start, statuses = time.perf_counter(), [500]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[:] = [message["status"]]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            self._tell(scope, request_id, statuses[0], time.perf_counter() - start)

    def _tell(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PUT", "DELETE") else "other"
        self._count(method, route, status, seconds)
        if route not in QUIET:
            told = {
                "request_id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            }
            log.info("%s %s %s in %.3f s", method, route, status, seconds, extra=told)


class Admission:
    """Middleware that turns posts of images away at once while all slots are taken, before anything of them is looked at."""

    def __init__(self, app: ASGIApp, require_room: Callable[[], None]) -> None:
        self._app = app
        self._require_room = require_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless there is no slot for it."""
        if scope["type"] == "http" and scope["method"] == "POST" and _IMAGES.fullmatch(scope["path"]):
            try:
                self._require_room()
            except BusyError as error:
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
