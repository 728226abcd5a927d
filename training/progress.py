"""What a run leaves behind as it goes: its checkpoints, one table of metrics, and when it stops early.

A run that is killed at any moment is gone on with from ``last.ckpt``, which is whole or not there. ``best.ckpt`` is put in
its place once ``last.ckpt`` of its step is there: where it lies, the other says how far the run has come. Knows nothing of
networks and plates.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from model.errors import RunError
from training.plates import write_whole

BEST, LAST, METRICS = "checkpoints/best.ckpt", "checkpoints/last.ckpt", "logs/metrics.csv"
COMING = "checkpoints/coming.ckpt"
"""What will be ``best.ckpt`` when ``last.ckpt`` is written."""
RESUMABLE = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "epoch")
_DAMAGE = (
    OSError, RuntimeError, EOFError, KeyError, ValueError, struct.error, zlib.error, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip
_PARTIAL = ".*.partial"
_COLUMNS = ("step", "train_loss", "val_loss", "val_well_accuracy")


def read_checkpoint(path: Path, needed: tuple[str, ...] = ("state_dict",)) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        RunError: it is not there, was cut short, or lacks what is ``needed``.
    """
    if not path.is_file():
        raise RunError(f"{path} is not there: the run has no validated network yet")
    try:
        _require_sound(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _DAMAGE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path} is no whole checkpoint ({reason[:200]}): {_NEXT}") from None
    absent = [name for name in needed if name not in stored] if isinstance(stored, dict) else list(needed)
    if absent:
        raise RunError(f"{path} is no checkpoint to go on from, it lacks {', '.join(absent)}: {_NEXT}")
    return dict(stored)


def _require_sound(path: Path) -> None:
    """Check the checksums of a checkpoint, which torch does not look at."""
    with zipfile.ZipFile(path) as stored:
        changed = stored.testzip()
    if changed is not None:
        raise ValueError(f"the checksum of {changed} in it is another")


def is_finished(stored: Mapping[str, Any], steps: int) -> bool:
    """Tell whether a checkpoint to go on from has had so many steps, or stopped early."""
    waits = [state for state in stored["callbacks"].values() if "wait_count" in state]
    return int(stored["global_step"]) >= steps or any(state["wait_count"] >= state["patience"] for state in waits)


_NEXT = "put a whole one in its place, or delete it to begin the run anew"


def require_weights(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint's weights are of the network that is to be trained.

    Raises:
        RunError: they are not; names the first that differs.
    """
    for name in sorted({*stored, *expected}):
        found, asked = (tuple(state[name].shape) if name in state else "absent" for state in (stored, expected))
        if found != asked:
            raise RunError(f"{path} is of another network: {name} is {found}, expected {asked}: {_NEXT}")


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then moves it there: what lies there is always whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write; a disk that is full leaves the checkpoint before this one."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(place, content.getvalue())
        except OSError:
            sweep(place.parent)
            raise


def sweep(folder: Path) -> None:
    """Remove what writes that were cut short left in a folder."""
    for left in folder.glob(_PARTIAL):
        left.unlink()


def tidy(run: Path, step: int) -> None:
    """Finish what a run that ended while it wrote its checkpoints left, and remove what it left half done.

    Args:
        run: its directory.
        step: that of ``last.ckpt``; 0 where there is none.
    """
    coming = run / COMING
    sweep(coming.parent)
    if coming.is_file() and int(read_checkpoint(coming, ("global_step",))["global_step"]) == step:
        coming.replace(run / BEST)
    coming.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """After every validation: ``best.ckpt``, the weights of the lowest loss so far, and ``last.ckpt``, to go on from.

    Raises:
        RunError: a loss is not finite, so that neither is written.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.lowest = math.inf

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        loss = float(trainer.callback_metrics["val_loss"])
        _require_finite(self.run, trainer.global_step, training=trainer.callback_metrics["train_loss"], validation=loss)
        better = loss < self.lowest
        if better:
            self.lowest = loss
            trainer.save_checkpoint(self.run / COMING, weights_only=True)
        trainer.save_checkpoint(self.run / LAST)
        if better and trainer.is_global_zero:
            (self.run / COMING).replace(self.run / BEST)

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest = float(state_dict["lowest"])


def _require_finite(run: Path, step: int, **losses: float | Tensor) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise RunError(
                f"{run}: the {name} loss is {float(loss)} at step {step}, of which no checkpoint is kept: start another run "
                "with a lower learning rate"
            )


class Stopping(EarlyStopping):
    """Stops when the validation loss has not fallen for ``patience`` validations, also a run resumed after the last one."""

    def __init__(self, patience: int) -> None:
        super().__init__("val_loss", patience=patience)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        trainer.should_stop = self.wait_count >= self.patience


class MetricsTable(Callback):
    """``metrics.csv``: one row an optimiser step, with the validation's results where one followed it.

    A resumed run cuts off what was written after its checkpoint and goes on below.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self.step = 0
        self.row: list[str] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.step = trainer.global_step
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join([",".join(_COLUMNS) + "\n", *_rows_until(self.path, self.step)]).encode())

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step > self.step:
            self._write(trainer)
            self.step = trainer.global_step
            self.row = [str(self.step), repr(float(trainer.callback_metrics["train_loss"])), "", ""]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.row[2:] = [repr(float(trainer.callback_metrics[name])) for name in _COLUMNS[2:]]
        self._write(trainer)

    def _write(self, trainer: lightning.Trainer) -> None:
        if self.row and trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(",".join(self.row) + "\n")
        self.row = []


def _rows_until(path: Path, step: int) -> list[str]:
    """Return a table's rows up to a step; the last line of a killed run may be torn."""
    if not path.is_file():
        return []
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
