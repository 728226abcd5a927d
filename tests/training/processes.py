"""Processes that train, forked from a server that has imported what they need, so that they start quickly and alike."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import training.progress
from training.train import TrainingConfig, train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def started(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def ended(process: BaseProcess, within_s: float = 120.0) -> int | None:
    """Wait for a process and return its exit code; one that hangs is killed."""
    process.join(within_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"a process was still running after {within_s} s")
    return process.exitcode


def resumed(config: TrainingConfig, path: Path) -> None:
    train(config, path, resume=True, quiet=True)


def killed_after(config: TrainingConfig, path: Path, rows: int) -> None:
    """Resume, and kill the process as soon as its metrics have so many rows."""
    process, metrics = started(resumed, config, path), path / "logs" / "metrics.csv"
    while process.is_alive() and not (metrics.is_file() and metrics.read_bytes().count(b"\n") > rows):
        time.sleep(0.005)
    process.kill()
    assert ended(process) == -signal.SIGKILL


def dying_while_writing(config: TrainingConfig, path: Path, number: int) -> None:
    """Resume, and be killed when half of the checkpoint written ``number``-th is on disk."""
    whole, written = training.progress.write_whole, [0]

    def write(place: Path, content: bytes) -> None:
        written[0] += place.suffix == ".ckpt"
        if written[0] == number:
            place.with_name(f".{place.name}.{os.getpid()}.partial").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(place, content)

    training.progress.write_whole = write
    resumed(config, path)


def as_rank(rank: int, port: int, config: TrainingConfig, path: Path) -> None:
    """Train as one of several processes that a scheduler started."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ.update(address, WORLD_SIZE=str(config.devices))
    train(config, path, quiet=True)


def train_on(ranks: int, config: TrainingConfig, path: Path) -> None:
    """Train in so many processes on this machine's cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [started(as_rank, rank, port, replace(config, devices=ranks), path) for rank in range(ranks)]
    assert [ended(process) for process in together] == [0] * ranks
