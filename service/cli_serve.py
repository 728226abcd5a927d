"""``anchorwell serve`` and ``worker``, which import no more than they must before the engine is begun beside the rest."""

import asyncio
import errno
import gc
import logging
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from model.errors import AnchorwellError
from service.errors import StartError
from service.logs import configure_logs
from service.settings import Settings, is_loopback
from service.terminal import err, out, run

if TYPE_CHECKING:
    from service.engine import Opening

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run one of these two commands alone, sooner than the whole command line would."""
    run(app)


@app.command()
def serve(
    bundle: Annotated[Path | None, typer.Option(help="the bundle to serve (ANCHORWELL_BUNDLE)")] = None,
    data: Annotated[Path | None, typer.Option(help="directory of everything kept (ANCHORWELL_DATA)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda (ANCHORWELL_DEVICE)")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32; on a CPU bf16, on CUDA fp16 (ANCHORWELL_PRECISION)")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on (ANCHORWELL_HOST)")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on (ANCHORWELL_PORT)")] = None,
) -> None:
    """Serve a bundle over HTTP; docs/settings.md lists every ANCHORWELL_ variable."""
    settings = Settings.given(bundle=bundle, data=data, device=device, precision=precision, host=host, port=port)
    end_logs = configure_logs(settings.log_format, err)
    if settings.log_format == "text":
        for line in settings.lines():
            err.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    else:
        logging.getLogger("anchorwell").info("settings", extra={"settings": settings.lines()})
    listening = _listening(settings.host, settings.port)
    engine = _begun_engine(settings)
    from service.app import create_app  # noqa: PLC0415 (as the engine)
    from service.server import run_server  # noqa: PLC0415 (as the engine)

    application = create_app(settings, engine=engine)
    if settings.allow_anonymous and not is_loopback(settings.host):
        err.print(
            f"[bold yellow]WARNING[/]  anyone who reaches {settings.host}:{settings.port} can read, change and delete "
            "every batch without an API key: ANCHORWELL_ALLOW_ANONYMOUS is set",
            soft_wrap=True,
        )
    run_server(application, settings, listening, _announced, end_logs)


@app.command()
def worker(
    bundle: Annotated[Path | None, typer.Option(help="the bundle to work with (ANCHORWELL_BUNDLE)")] = None,
    data: Annotated[Path | None, typer.Option(help="directory of everything kept (ANCHORWELL_DATA)")] = None,
) -> None:
    """Run jobs and webhook deliveries, without HTTP; a service with ANCHORWELL_WORKERS=0 leaves them to this one."""
    settings = Settings.given(bundle=bundle, data=data)
    configure_logs(settings.log_format, err)
    settings = settings.model_copy(update={"workers": max(1, settings.workers)})
    engine = _begun_engine(settings)
    from service.app import compose  # noqa: PLC0415 (as the engine)

    composition = compose(settings, engine=engine, listens=False)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    asyncio.run(composition.begin())
    reason = composition.served.readiness.reason
    stop_metrics = composition.serve_metrics()  # which tells others that it works
    if reason is None:
        out.print("Anchorwell works in the background", highlight=False)
        stopped.wait()
    stop_metrics()
    composition.end()
    if reason is not None:
        raise AnchorwellError(f"the worker cannot begin: {reason}")


def _announced(url: str) -> None:
    out.print(f"Anchorwell is ready at {url}", highlight=False, markup=False)


def _begun_engine(settings: Settings) -> "Opening":
    """Begin to make the engine, on another core than the imports that follow.

    They make what stays: nothing looks for what can go until requests are let in.
    """
    gc.disable()
    from service.engine import open_engine  # noqa: PLC0415 (the client's commands need no onnxruntime)

    return open_engine(settings)


def _listening(host: str, port: int) -> list[socket.socket]:
    """Take the address, of a name all that it has, before anything else is begun.

    Raises:
        StartError: it cannot be had.
    """
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            taken = socket.socket(family, kind, protocol)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken.bind((address[0], found[0].getsockname()[1] if found else port, *address[2:]))
            found.append(taken)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"port {port} of {host} is in use: give another with --port, 0 takes a free one") from None
        if not found:
            raise StartError(f"{host}:{port} cannot be listened on: {error.strerror}") from None
    return found
