"""A stack of docker-compose.yml under a name of its own: brought up, asked, hurt, and taken down with all that it kept."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "anchorwell-tried"


def run(*command: str | Path, check: bool = True, env: Mapping[str, str] | None = None) -> str:
    """Run a command in the project's root; returns what it printed, errors too.

    Raises:
        RuntimeError: it failed; says with what.
    """
    found = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **(env or {})}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if check and found.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {found.returncode}:\n{found.stdout[-4_000:]}")
    return found.stdout


def compose_command() -> list[str]:
    """`docker compose` where it is there, else the older `docker-compose`."""
    is_plugin = not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    return ["docker", "compose"] if is_plugin else [shutil.which("docker-compose") or "docker-compose"]


def until(ask: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.25) -> float:
    """Wait until something is so; returns how many seconds that took.

    Raises:
        TimeoutError: it never was.
    """
    begun = time.monotonic()
    while not ask():
        if time.monotonic() - begun > timeout_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)
    return time.monotonic() - begun


class Stack:
    """One profile's services; in a ``with``, everything of it goes at the end, volumes too."""

    def __init__(self, *profiles: str, port: int = 8765, files: Sequence[Path] = (), **variables: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"ANCHORWELL_PORT": str(port), "COMPOSE_PROJECT_NAME": PROJECT, **variables}
        self._command = [*compose_command(), "-f", "docker-compose.yml"]
        for file in files:
            self._command += ["-f", str(file)]
        for profile in profiles:
            self._command += ["--profile", profile]

    def __enter__(self) -> Self:
        self.down()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            print(self.compose("logs", "--tail", "12", "--no-color", check=False)[-12_000:])
        self.down()

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Give Compose a command."""
        return run(*self._command, *arguments, check=check, env=self.environment)

    def run(self, service: str, *command: str, **streams: IO[bytes]) -> None:
        """Run a command in a container of a service's own, with files for what it reads or writes."""
        options = ("run", "--rm", "--no-deps", "-T", service)
        environment = {**os.environ, **self.environment}
        subprocess.run([*self._command, *options, *command], cwd=ROOT, env=environment, check=True, **streams)

    def up(self, *services: str, timeout_s: float = 180) -> float:
        """Bring services up; returns the seconds until the stack is ready."""
        begun = time.monotonic()
        self.compose("up", "-d", *services)
        until(self.is_ready, timeout_s, f"{self.url} is ready")
        return time.monotonic() - begun

    def down(self) -> None:
        """Take all of it down, volumes too."""
        everything = ("--profile", "scale", "--profile", "gpu", "--profile", "observe")
        run(*self._command, *everything, "down", "-v", "--remove-orphans", "-t", "5", check=False, env=self.environment)

    def is_ready(self) -> bool:
        """Whether it takes requests."""
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=6).is_success
        except httpx.TransportError:
            return False

    def ids(self, service: str) -> list[str]:
        """The running containers of a service, the oldest first."""
        labels = {"project": PROJECT, "service": service}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return run("docker", "ps", "-q", *filters).split()[::-1]

    def healthy(self, service: str) -> list[str]:
        """Of those, the ones that are healthy."""
        return [one for one in self.ids(service) if inspected(one)["State"].get("Health", {}).get("Status") == "healthy"]

    def inside(self, service: str, *command: str) -> str:
        """Run a command in the first container of a service."""
        return run("docker", "exec", self.ids(service)[0], *command)


def inspected(name: str) -> dict:
    """What the engine says of a container or an image."""
    return json.loads(run("docker", "inspect", name))[0]


def address(container: str, network: str = "default") -> str:
    """A container's address in one of the stack's networks."""
    return inspected(container)["NetworkSettings"]["Networks"][f"{PROJECT}_{network}"]["IPAddress"]


def killed(container: str) -> None:
    """Kill what runs in a container as a crash does: without telling the engine, which would take it for a wish."""
    os.kill(inspected(container)["State"]["Pid"], 9)
