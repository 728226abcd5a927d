"""Training: fetched plates, a method and a budget in; a run directory out, that resumes where it stopped.

A run directory holds ``run.json`` (config, split, classes, recipe), ``checkpoints/best.ckpt`` and ``last.ckpt``, and the
logs ``logs/metrics.csv`` and TensorBoard's. The minibatch of a step depends on the seed and the step's number alone, so a
resumed run sees what an unbroken one would have seen.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from model.bundle import recipe_from_json, recipe_json
from model.errors import LayoutError, RunError
from model.images import ImageRecipe
from model.network import NetworkSpec, ResNet
from training.contexts import panel_rows, require_controls
from training.dataset import PlateSites, moments
from training.episodes import Episode, Episodes, EpisodeShape
from training.evaluate import score_plate
from training.methods import Method, make_method, training_loss
from training.plates import open_plates, plate_table, plates_recipe
from training.splits import Split, split_by_batch

RUN = "run.json"
_HOW = frozenset({"accelerator", "loader_workers", "steps"})
"""What a resumed run may do otherwise; ``steps`` is looked at by itself."""

log = logging.getLogger("anchorwell.training")
BEST, LAST, METRICS = "checkpoints/best.ckpt", "checkpoints/last.ckpt", "logs/metrics.csv"


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on but its plates' pixels.

    ``plates`` is a folder that was fetched, with its recipe. ``steps`` optimiser steps at most, validated every
    ``validate_every``; training stops when the validation loss has not fallen for ``patience`` validations. ``crop`` is the
    side of the random crops trained on (``size`` by default; smaller ones train faster), ``size`` that of the centre crops
    validated on and served. ``schedule`` ``constant`` is the paper's; ``cosine`` decays to a hundredth, for short budgets.
    """

    plates: str
    method: str = "cs-arm-bn"
    context: str = "controls"
    stop_gradient: bool = False
    test_lab: str | None = None
    depth: Literal[18, 34, 50] = 50
    width: int = 64
    antialiased: bool = True
    size: int = 256
    crop: int | None = None
    classes: tuple[str, ...] | None = None
    shape: EpisodeShape = field(default_factory=EpisodeShape)
    steps: int = 20_000
    validate_every: int = 200
    patience: int = 20
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    seed: int = 0
    accelerator: str = "auto"
    loader_workers: int = 0


@dataclass(frozen=True)
class Run:
    """What a run directory says of itself."""

    path: Path
    config: TrainingConfig
    split: Split
    classes: tuple[str, ...]
    recipe: ImageRecipe

    @property
    def method(self) -> Method:
        """The method trained."""
        return make_method(self.config.method, self.config.context, stop_gradient=self.config.stop_gradient)

    @property
    def spec(self) -> NetworkSpec:
        """The network trained."""
        config = self.config
        return NetworkSpec(
            channels=len(self.recipe.channels),
            classes=len(self.classes),
            depth=config.depth,
            width=config.width,
            antialiased=config.antialiased,
        )

    def save(self) -> None:
        """Write ``run.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "config": asdict(self.config),
            "split": asdict(self.split),
            "classes": self.classes,
            "recipe": recipe_json(self.recipe),
        }
        (self.path / RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read a run directory."""
        content = json.loads((path / RUN).read_text(encoding="utf-8"))
        return cls(
            path=path,
            config=config_from_json(content["config"]),
            split=Split.from_json(content["split"]),
            classes=tuple(content["classes"]),
            recipe=recipe_from_json(content["recipe"]),
        )


def config_from_json(value: Mapping[str, Any]) -> TrainingConfig:
    """Read what ``dataclasses.asdict`` made of a config."""
    classes = None if value["classes"] is None else tuple(value["classes"])
    return TrainingConfig(**{**value, "classes": classes, "shape": EpisodeShape(**value["shape"])})


class MetaTraining(lightning.LightningModule):
    """Lightning's view of a run: losses per step, validation per plate, optimiser and schedule."""

    def __init__(self, run: Run, plates: Mapping[str, PlateSites]) -> None:
        super().__init__()
        self.run = run
        self.method = run.method
        self.network = ResNet(run.spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_plates = [plates[name] for name in run.split.train]
        self.validation_plates = [plates[name] for name in run.split.validation]

    def train_dataloader(self) -> DataLoader[list[Episode]]:
        """Return the coming epoch's steps: an epoch is what lies between two validations."""
        config = self.run.config
        episodes = Episodes(
            self.train_plates,
            self.run.recipe,
            config.shape,
            crop=config.crop or config.size,
            seed=config.seed,
            first=self.current_epoch * config.validate_every,
            steps=config.validate_every,
            with_controls=self.method.with_controls,
            zscore=self.method.zscore,
            panels=[panel_rows(plate, config.shape.panel_wells) for plate in self.train_plates]
            if self.method.context == "panel"
            else (),
        )
        return DataLoader(episodes, batch_size=None, shuffle=False, num_workers=config.loader_workers)

    def val_dataloader(self) -> DataLoader[int]:
        """Return the validation plates' numbers."""
        return DataLoader(range(len(self.validation_plates)), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Move a step's episodes; plate numbers stay where they are."""
        if not isinstance(batch, list):
            return batch
        return [replace(e, images=e.images.to(device), labels=e.labels.to(device)) for e in batch]

    def training_step(self, episodes: list[Episode], _number: int) -> Tensor:
        """One step's loss."""
        loss = training_loss(self.network, self.method, episodes)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(episodes))
        return loss

    def validation_step(self, number: int, _number: int) -> None:
        """Score a held-out plate as the method would be used on it."""
        plate = self.validation_plates[int(number)]
        panel_wells = self.run.config.shape.panel_wells
        score = score_plate(self.network, self.method, plate, self.run.recipe, self.method.context, panel_wells=panel_wells)
        self.log("val_loss", score.image_nll, prog_bar=True, batch_size=1)
        self.log("val_well_accuracy", score.well_accuracy, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Adam, as in the paper; decoupled weight decay where asked for."""
        config = self.run.config
        optimiser = torch.optim.AdamW(self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        if config.schedule == "constant":
            return optimiser
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, config.steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(step: int, steps: int) -> float:
    """Learning-rate factor: a linear rise over the first twentieth, then half a cosine down to a hundredth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    share = min(1.0, (step - rise) / max(1, steps - rise))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def prepare_run(config: TrainingConfig, path: Path) -> tuple[Run, dict[str, PlateSites]]:
    """Open the fetched plates, split them, and take the recipe's mean and std from the training plates.

    Raises:
        LayoutError: they cannot be split or have no such classes. RunError: nothing was fetched, or smaller fields.
    """
    folder = Path(config.plates)
    recipe = replace(plates_recipe(folder), size=config.size)
    unlabelled = open_plates(folder)
    _require_size(unlabelled, max(config.size, config.crop or 0))
    split = split_by_batch(plate_table(unlabelled), config.test_lab)
    classes = _classes([unlabelled[name] for name in split.train], config.classes)
    plates = {name: plate.with_classes(classes) for name, plate in unlabelled.items()}
    mean, std = moments([plates[name] for name in split.train])
    return Run(path, config, split, classes, replace(recipe, mean=mean, std=std)), plates


def _require_size(plates: Mapping[str, PlateSites], size: int) -> None:
    for plate in plates.values():
        height, width = plate.images.shape[-2:]
        if min(height, width) < size:
            raise RunError(f"plate {plate.plate} was fetched with {height} x {width} pixels; the network asks for {size}")


def _classes(train: Sequence[PlateSites], asked: tuple[str, ...] | None) -> tuple[str, ...]:
    labels = {label for plate in train for label in np.unique(plate.names[~plate.controls]).tolist() if label}
    classes = asked or tuple(sorted(labels))
    if len(classes) < 2:  # noqa: PLR2004
        raise LayoutError(f"the training plates have {len(classes)} labels; a classifier needs two or more")
    absent = sorted(set(classes) - labels)
    if absent:
        raise LayoutError(
            f"no training well is labelled {', '.join(absent)}; the labels are {', '.join(sorted(labels))}"[:600]
        )
    return classes


def train(config: TrainingConfig, path: Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train as ``config`` says into the run directory ``path``.

    ``resume`` goes on from the last checkpoint if there is one.

    Raises:
        RunError: the directory holds a run and ``resume`` is off, or the run was started with another config.
        NoControlsError: the method is trained on controls, and a plate has none.
    """
    if (path / RUN).is_file():
        require_same_run(Run.load(path).config, config, path, resume=resume)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    last = path / LAST
    resumed = resume and last.is_file()
    run, plates = prepare_run(config, path)
    _require_context(run, plates)
    run.save()
    module = MetaTraining(run, plates)
    done = _steps_done(last) if resumed else -1
    with _quietly(quiet=quiet):
        trainer = _trainer(run, resumed=resumed, quiet=quiet)
        trainer.fit(module, ckpt_path=str(last) if resumed else None, weights_only=True)
    if trainer.global_step == done:
        log.warning("nothing is left to train: %s has had its steps, or stopped early", path)
    return run


def require_same_run(started: TrainingConfig, asked: TrainingConfig, path: Path, *, resume: bool) -> None:
    """Check that a run directory may be gone on with: as it was started, or for more steps at a constant rate.

    Raises:
        RunError: it may not; names what differs.
    """
    if not resume:
        raise RunError(f"{path} holds a run already: resume it, or name another directory")
    differences = [
        f"{item.name} (it is {getattr(started, item.name)}, asked for is {getattr(asked, item.name)})"
        for item in fields(TrainingConfig)
        if item.name not in _HOW and getattr(started, item.name) != getattr(asked, item.name)
    ]
    longer = asked.schedule == "constant" and asked.steps >= started.steps
    if asked.steps != started.steps and not longer:
        differences.append(f"steps (it is {started.steps}; only more, at a constant rate, can be gone on with)")
    if differences:
        raise RunError(f"{path} was started with another {', another '.join(differences)}")


def _require_context(run: Run, plates: Mapping[str, PlateSites]) -> None:
    """Check that every plate has the context that the method is trained with.

    Raises:
        NoControlsError: a plate without controls. RunError: no images of the panel are asked for.
    """
    if run.method.context == "panel" and not run.config.shape.panel:
        raise RunError("the context panel is trained on images of the panel: say how many a step draws (shape.panel)")
    if run.method.needs_controls:
        for name in (*run.split.train, *run.split.validation):
            require_controls(plates[name])


def _steps_done(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def _trainer(run: Run, *, resumed: bool, quiet: bool) -> lightning.Trainer:
    config = run.config
    folder = run.path / "checkpoints"
    callbacks: list[Any] = [
        EarlyStopping("val_loss", patience=config.patience),
        ModelCheckpoint(folder, "best", monitor="val_loss", enable_version_counter=False),
        ModelCheckpoint(folder, "last", enable_version_counter=False),  # every validation's, to resume from
    ]
    if not quiet:
        callbacks.append(TQDMProgressBar())
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=math.ceil(config.steps / config.validate_every),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, min(10, config.validate_every)),
        callbacks=callbacks,
        logger=_loggers(run.path, resumed=resumed),
        enable_progress_bar=not quiet,
        enable_model_summary=False,
    )


def _loggers(path: Path, *, resumed: bool) -> Sequence[Any]:
    """Log to CSV and TensorBoard; a resumed run keeps the CSV of its earlier parts beside the new one."""
    metrics = path / METRICS
    if resumed and metrics.is_file():
        metrics.rename(metrics.with_name(f"metrics-{len(list(metrics.parent.glob('metrics-*.csv'))) + 1}.csv"))
    return [CSVLogger(path, name="logs", version=""), TensorBoardLogger(path, name="logs", version="")]


@contextmanager
def _quietly(*, quiet: bool) -> Iterator[None]:
    """Silence Lightning's advice (loader workers, existing folders); a quiet run prints nothing at all."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")
            yield
    finally:
        logger.setLevel(level)


def load_network(run: Run, checkpoint: str = BEST) -> ResNet:
    """Return a run's trained network, on the CPU, in evaluation mode."""
    stored = torch.load(run.path / checkpoint, map_location="cpu", weights_only=True)
    network = ResNet(run.spec)
    prefix = "network."
    network.load_state_dict({name.removeprefix(prefix): value for name, value in stored["state_dict"].items()})
    return network.eval()
