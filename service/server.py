"""uvicorn, as it runs this service: on sockets that are there, telling when requests are taken."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.protocol import BoundedHttpProtocol
from service.routes import Served
from service.settings import Settings


def run_server(
    app: FastAPI,
    settings: Settings,
    listening: list[socket.socket],
    announce: Callable[[str], None],
    ended: Callable[[], None],
) -> None:
    """Serve until a signal ends it; announces the URL, once requests are taken, and says when all is done."""
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )
    _AnnouncingServer(config, app.state.served, announce, ended).run(sockets=listening)


class _AnnouncingServer(uvicorn.Server):
    """Announces the URL once requests are taken, and logs what the network runs on."""

    def __init__(
        self, config: uvicorn.Config, served: Served, announce: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._served, self._tell, self._ended = served, announce, ended
        self._announcement: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._ended()  # the signal that ended it is raised once more, and ends the process there

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announcement = asyncio.create_task(self._announce())

    async def shutdown(self, sockets: Any = None) -> None:
        if self._announcement is not None:
            self._announcement.cancel()
        await super().shutdown(sockets)

    async def _announce(self) -> None:
        if await self._served.readiness.decided():
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            engine = self._served.batches.engine
            logging.getLogger("anchorwell").info("the network runs on %s, in %s", engine.provider, engine.precision)
            self._tell(f"http://{shown}:{port}")
