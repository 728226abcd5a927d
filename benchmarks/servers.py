"""Processes that reliability is measured on: the service and Redis, on loopback, killed and started again."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import tifffile

from model.bundle import Bundle
from service.digests import content_digest

BUNDLE = Path("examples/bundles/cs-arm-bn")
PIXELS = 256
START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """``anchorwell serve`` on one port, over one data directory."""

    data: Path
    redis: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it takes requests."""
        settings = {"BUNDLE": BUNDLE, "DATA": self.data, "PORT": self.port, "DEVICE": "cpu", "LOG_FORMAT": "json"}
        if self.redis is not None:
            settings["REDIS"] = self.redis
        given = {f"ANCHORWELL_{name}": str(value) for name, value in settings.items()}
        log = (self.data.parent / f"{self.data.name}.log").open("ab")
        command = [str(Path(sys.executable).with_name("anchorwell")), "serve"]
        environment = {**os.environ, **given, **self.environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is installed, nothing is compiled at each start
        self.process = subprocess.Popen(  # noqa: S603 (our own program)
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self.wait()

    def wait(self) -> None:
        """Wait until it takes requests."""
        end = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(timeout=5) as client:  # one: to make them takes the cores from who starts
            while time.monotonic() < end:
                try:
                    if client.get(f"{self.url}/health/ready").status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.02)
        raise SystemExit(f"the service did not get ready: see {self.data}.log")

    def kill(self) -> None:
        """Kill it, and its workers, as a power cut would."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, and wait."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(120)

    def processes(self) -> list[int]:
        """The service and the workers that it began."""
        assert self.process is not None
        return [process for process in _running() if _session_of(process) == self.process.pid]

    def memory_bytes(self) -> int:
        """Resident memory of the service, its decoders not counted."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise AssertionError("a running process has a size")


def _running() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session_of(process: int) -> int | None:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


@dataclass
class Redis:
    """A Redis that syncs every write, on one port, over one folder."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        binary = shutil.which("redis-server")
        if binary is None:
            raise SystemExit("redis-server is not installed")
        options = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--bind", "127.0.0.1"]
        self.process = subprocess.Popen(  # noqa: S603 (found on the path)
            [binary, "--port", str(self.port), "--dir", str(self.folder), *options], stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    probe.sendall(b"PING\r\n")
                    if probe.recv(100).startswith(b"+PONG"):
                        return
            time.sleep(0.02)
        raise SystemExit("redis-server did not get ready")

    def kill(self) -> None:
        """Kill it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Let it stand still, its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def channels() -> tuple[str, ...]:
    """Those of the demo bundle."""
    return Bundle.load(BUNDLE).manifest.channels


def plane_bytes(*name: object) -> bytes:
    """A small grey TIFF that depends on its name alone."""
    seed = np.frombuffer(repr(name).encode(), np.uint8)
    rng = np.random.default_rng(seed)
    blocks = rng.gamma(2.0, 900.0, (PIXELS // 8, PIXELS // 8)).repeat(8, 0).repeat(8, 1)
    pixels = blocks + rng.normal(0, 50, (PIXELS, PIXELS))

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.clip(pixels, 0, 65_535).astype(np.uint16), photometric="minisblack")
    return buffer.getvalue()


def form(batch: str, wells: list[str], names: tuple[str, ...]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """The multipart files of some wells, one site each."""
    return [
        ("images", (f"{well}_1_{channel}.tif", plane_bytes(batch, well, channel), "image/tiff"))
        for well in wells
        for channel in names
    ]


def put_plane(client: httpx.Client, batch: str, well: str, channel: str) -> httpx.Response:
    """Send one plane ahead."""
    data = plane_bytes(batch, well, channel)
    path = f"/batches/{batch}/images/{well}/1/{channel}"
    return client.put(path, content=data, headers={"Content-Digest": content_digest(data)})
