"""What operators read: logs, as lines of text or JSON. No tenant, batch or well is named."""

import atexit
import logging
from collections.abc import Callable
from functools import cache
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from rich.console import Console
from rich.logging import RichHandler


def configure_logs(form: Literal["text", "json"], console: Console) -> Callable[[], None]:
    """Log to standard error: for people, or one JSON object a line with the request's id where there is one.

    Lines are written by a thread of their own, so that nobody waits for whoever reads them; gives what ends that.
    """
    if form == "text" and console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    elif form == "text":
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_json_formatter())
    handler.addFilter(_is_news)
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    logging.basicConfig(level=logging.INFO, handlers=[_Unformatted(lines)], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    writer = QueueListener(lines, handler)
    writer.start()
    end = cache(writer.stop)  # may be asked twice
    atexit.register(end)
    return end


def _json_formatter() -> JsonFormatter:
    names = {"levelname": "level", "name": "logger", "asctime": "at"}
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    return JsonFormatter(
        fields, "%Y-%m-%dT%H:%M:%S%z", rename_fields=names, reserved_attrs=[*RESERVED_ATTRS, "color_message"]
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out what the queue says, again and again, while Redis is away: the store tells that once."""
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("huey") and type(error).__module__.startswith("redis."))


class _Unformatted(QueueHandler):
    """Leaves a record's formatting, its traceback's too, to the thread that writes it."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.message = record.getMessage()
        return record
