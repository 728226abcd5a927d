"""Training: fetched plates, a method and a budget in; a run directory out, that resumes where it stopped.

A run directory holds ``run.json`` (config, split, classes, recipe), ``checkpoints/best.ckpt`` and ``last.ckpt``, and the
logs ``logs/metrics.csv`` and TensorBoard's. The minibatch of a step depends on the seed and the step's number alone, and
no other number is drawn after the first weights: a resumed run goes the way an unbroken one would have gone.

Several processes share every step's plates, one process a GPU (or, on a CPU, as many as asked for). Statistics are those
of a plate, and a plate is never divided, so processes exchange gradients alone. For erm a minibatch is what passes
through one process at once; its running statistics are the mean over processes, taken before each validation.
"""

import fcntl
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from model.bundle import recipe_from_json, recipe_json
from model.errors import LayoutError, RunError
from model.images import ImageRecipe
from model.network import STAGES, NetworkSpec, ResNet
from training.contexts import panel_rows, require_controls
from training.dataset import PlateSites, moments
from training.episodes import Episode, Episodes, EpisodeShape, Share
from training.evaluate import score_plate
from training.methods import Method, make_method, training_loss
from training.plates import DISK_FULL, open_plates, plate_table, plates_recipe, read_json, require_recipe, write_whole
from training.progress import (
    BEST,
    LAST,
    RESUMABLE,
    Checkpoints,
    MetricsTable,
    Stopping,
    WholeCheckpoints,
    is_finished,
    read_checkpoint,
    require_weights,
    tidy,
)
from training.splits import Split, check_split, read_split, refuse_repeated_images, split_by_batch

RUN, LOCK = "run.json", ".lock"
_CHOICES = {
    "depth": tuple(STAGES),
    "schedule": ("constant", "cosine"),
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("fp32", "bf16"),
}
_LEAST_PX = 32  # the network halves its input five times
_LEAST = {
    **dict.fromkeys(("width", "steps", "validate_every", "patience", "devices", "num_nodes", "accumulate"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "seed", "loader_workers"), 0),
    **dict.fromkeys(("size", "crop"), _LEAST_PX),
}
_HOW = frozenset({"accelerator", "devices", "num_nodes", "accumulate", "loader_workers", "steps"})
"""What a resumed run may do otherwise; ``steps`` and how a step is divided are looked at by themselves."""

log = logging.getLogger("anchorwell.training")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on but its plates' pixels.

    ``plates`` is a folder that was fetched, with its recipe. ``split`` is a file of purposes (see ``training.splits``);
    without it whole batches, and ``test_lab``, are held out by rule. ``steps`` optimiser steps at most, validated every
    ``validate_every``; training stops when the validation loss has not fallen for ``patience`` validations. ``crop`` is the
    side of the random crops trained on (``size`` by default; smaller ones train faster), ``size`` that of the centre crops
    validated on and served. ``schedule`` ``constant`` is the paper's; ``cosine`` decays to a hundredth, for short budgets.

    A step's plates are divided among ``devices`` processes on each of ``num_nodes`` machines (which share the run
    directory), and there pass in ``accumulate`` parts one after the other: less memory, the same step. ``precision``
    ``bf16`` computes convolutions and activations in bfloat16, weights and BN statistics in float32; validation is always
    in float32, as networks are served. ``fp32`` is torch's: convolutions in TF32 where a GPU has it.

    Raises ValueError where a number is out of range or a name is none of its choices.
    """

    plates: str
    method: str = "cs-arm-bn"
    context: str = "controls"
    stop_gradient: bool = False
    test_lab: str | None = None
    split: str | None = None
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
    devices: int = 1
    num_nodes: int = 1
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    loader_workers: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)}; it is one of {', '.join(map(str, choices))}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (value is None and name == "crop") and not least <= value < math.inf:
                raise ValueError(f"{name} is {value}; it is {least} or more")
        repeated = sorted({label for label in self.classes or () if (self.classes or ()).count(label) > 1})
        if repeated:
            raise ValueError(f"the classes name {', '.join(repeated)} more than once: an output belongs to one class")
        if make_method(self.method, self.context).with_controls and not self.shape.controls_min:
            raise ValueError(
                f"controls_min is 0: {self.method} takes its statistics from control images, of which a step draws 1 or more"
            )

    @property
    def ranks(self) -> int:
        """Processes that train."""
        return self.devices * self.num_nodes

    @property
    def parts(self) -> int:
        """In how many parts a step's plates pass, over all processes."""
        return self.ranks * self.accumulate


@dataclass(frozen=True)
class Run:
    """What a run directory says of itself; ``plates`` has the sha256 of every plate with a purpose."""

    path: Path
    config: TrainingConfig
    split: Split
    classes: tuple[str, ...]
    recipe: ImageRecipe
    plates: Mapping[str, str]

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
            "plates": dict(self.plates),
        }
        write_whole(self.path / RUN, json.dumps(content, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read a run directory.

        Raises:
            RunError: ``run.json`` is damaged, or of an older version.
        """
        return read_json(path / RUN, lambda content: cls._of(path, content), "put it back, or train into another directory")

    @classmethod
    def _of(cls, path: Path, content: dict[str, Any]) -> "Run":
        if "config" in content and "plates" not in content:
            raise RunError(f"{path / RUN} was written by an older version, without its plates' sha256: train the run anew")
        return cls(
            path=path,
            config=config_from_json(content["config"]),
            split=Split.from_json(content["split"]),
            classes=tuple(content["classes"]),
            recipe=recipe_from_json(content["recipe"]),
            plates=dict(content["plates"]),
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
        self.losses: list[Tensor] = []  # of the step's parts that have passed
        self.scores = torch.zeros(0)

    @property
    def share(self) -> Share:
        """What of a step is this process's."""
        return Share(self.trainer.global_rank, self.trainer.world_size, self.run.config.accumulate)

    def train_dataloader(self) -> DataLoader[list[Episode]]:
        """Return the coming epoch's steps: an epoch is what lies between two validations."""
        config, first = self.run.config, self.trainer.global_step
        episodes = Episodes(
            self.train_plates,
            self.run.recipe,
            config.shape,
            crop=config.crop or config.size,
            seed=config.seed,
            first=first,
            steps=min(config.validate_every, config.steps - first),
            with_controls=self.method.with_controls,
            zscore=self.method.zscore,
            panels=[panel_rows(plate, config.shape.panel_wells) for plate in self.train_plates]
            if self.method.context == "panel"
            else (),
            share=self.share,
        )
        return DataLoader(
            episodes,
            batch_size=None,
            shuffle=False,
            num_workers=config.loader_workers,
            pin_memory=self.device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[int]:
        """Return numbers of this process's validation plates: as many on each, some beyond the last plate."""
        share = self.share
        rounds = math.ceil(len(self.validation_plates) / share.ranks)
        return DataLoader(range(share.rank, rounds * share.ranks, share.ranks), batch_size=None)  # type: ignore[arg-type]

    def training_step(self, episodes: list[Episode], _number: int) -> Tensor:
        """One part's loss; the step's, the mean over parts and processes, is logged with its last part."""
        loss = training_loss(self.network, self.method, episodes)
        self.losses.append(loss.detach())
        if len(self.losses) == self.run.config.accumulate:
            self.log("train_loss", torch.stack(self.losses).mean(), prog_bar=True, batch_size=1, sync_dist=True)
            self.losses.clear()
        return loss

    def on_validation_start(self) -> None:
        """Take the mean of the processes' running statistics: what one average over all their minibatches would be."""
        if self.trainer.world_size > 1 and self.method.context == "source":
            for buffer in self.network.buffers():
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))
        self.scores = torch.zeros(len(self.validation_plates), 2, device=self.device)

    def validation_step(self, number: int, _number: int) -> None:
        """Score a held-out plate as the method would be used on it."""
        if number >= len(self.validation_plates):
            return
        plate = self.validation_plates[int(number)]
        with torch.autocast(self.device.type, enabled=False):
            score = score_plate(
                self.network,
                self.method,
                plate,
                self.run.recipe,
                self.method.context,
                panel_wells=self.run.config.shape.panel_wells,
            )
        self.scores[number] = self.scores.new_tensor([score.image_nll, score.well_accuracy])

    def on_validation_epoch_end(self) -> None:
        """Bring the plates' scores together: every process knows all of them, and stops when the others do."""
        scores = self.trainer.strategy.reduce(self.scores, reduce_op="sum")
        for name, value in zip(("val_loss", "val_well_accuracy"), scores.mean(dim=0), strict=True):
            self.log(name, value, prog_bar=True, batch_size=1)

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
        LayoutError: they cannot be split, or one to train or validate on has none of the classes. RunError: nothing was
            fetched, or smaller fields.
        LeakError: the split lets training see what it is tested on.
    """
    folder = Path(config.plates)
    recipe = replace(plates_recipe(folder), size=config.size)
    require_recipe(folder, recipe)
    unlabelled = open_plates(folder)
    require_size(unlabelled.values(), max(config.size, config.crop or 0))
    split = _split(config, unlabelled)
    classes = _classes([unlabelled[name] for name in split.train], config.classes)
    plates = {name: plate.with_classes(classes) for name, plate in unlabelled.items()}
    _require_treated(split, plates)
    mean, std = moments([plates[name] for name in split.train])
    digests = {name: plates[name].sha256 for name in sorted(split.purposes())}
    return Run(path, config, split, classes, replace(recipe, mean=mean, std=std), digests), plates


def _split(config: TrainingConfig, plates: Mapping[str, PlateSites]) -> Split:
    table = plate_table(plates)
    if config.split is not None and config.test_lab is not None:
        raise RunError("a split in a file says which lab is tested on: leave test_lab out")
    split = split_by_batch(table, config.test_lab) if config.split is None else read_split(Path(config.split), table)
    check_split(split, table)
    repeated = refuse_repeated_images(split, plates)
    if repeated:
        log.warning("%d images are there several times:\n%s", len(repeated), "\n".join(map(str, repeated)))
    bare = [plate for plate in split.purposes() if not plates[plate].controls.any()]
    if bare:
        log.warning("no negative controls on %s: only methods that need none can use them", ", ".join(bare))
    return split


def _require_treated(split: Split, plates: Mapping[str, PlateSites]) -> None:
    """Refuse plates to train and validate on that have no treated site of the classes; warn of such to test on."""
    without = [name for name in split.purposes() if not len(plates[name].treated)]
    needed = [name for name in without if name in (*split.train, *split.validation)]
    if needed:
        raise LayoutError(
            f"no treated site of the classes on {', '.join(needed)}, of the plates to train or validate on: "
            "name other classes, or give these plates no purpose in a split of your own"
        )
    if without:
        log.warning("no treated site of the classes on %s: nothing is tested there", ", ".join(without))


def require_size(plates: Iterable[PlateSites], size: int) -> None:
    """Check that fields are as large as a network's input.

    Raises:
        RunError: a plate's are smaller.
    """
    for plate in plates:
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

    ``resume`` goes on from the last checkpoint if there is one. With several devices the program is started once for each,
    by Lightning (which repeats the command line) or by torchrun or a cluster's scheduler: all of them call this.

    Raises:
        RunError: the machine lacks the devices; a step cannot be divided so; the directory holds a run and ``resume`` is
            off, or another process trains it; the run was started with another config or on other plates, its checkpoint is
            not whole; a loss is not finite; the disk is full.
        NoControlsError: the method is trained on controls, and a plate has none.
    """
    require_devices(config)
    require_division(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    last = path / LAST
    stored = read_checkpoint(last, RESUMABLE) if resume and last.is_file() else None
    done, epochs = (0, 0) if stored is None else (int(stored["global_step"]), int(stored["epoch"]) + 1)
    epochs += math.ceil(max(0, config.steps - done) / config.validate_every)
    with _quietly(quiet=quiet), _disk(path):
        trainer = make_trainer(config, path, epochs=epochs, done=done, quiet=quiet)
        with _held(path) if trainer.is_global_zero else nullcontext():
            if trainer.is_global_zero and (path / RUN).is_file():
                require_same_run(Run.load(path).config, config, path, resume=resume)
            run, plates = prepare_run(config, path)
            run = as_started(run)
            _require_context(run, plates)
            module = MetaTraining(run, plates)
            if stored is not None:
                require_weights(last, stored["state_dict"], module.state_dict())
            if trainer.is_global_zero:
                if stored is None or not is_finished(stored, config.steps):
                    run.save()
                tidy(path, done)
            try:
                trainer.fit(module, ckpt_path=None if stored is None else str(last), weights_only=True)
            except BaseException:
                for process in getattr(trainer.strategy.launcher, "procs", []):  # they would wait for this one
                    process.kill()
                raise
    if trainer.is_global_zero and not (path / BEST).is_file():
        raise RunError(f"{path / BEST} is gone: put it back, or delete {last.name} beside it to begin the run anew")
    if stored is not None and trainer.global_step == done:
        log.warning("nothing is left to train: %s has had its steps, or stopped early", path)
    return run


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a run directory against other processes that would train into it.

    Raises:
        RunError: one of them holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a loader's worker that outlives a killed run holds nothing
        except (BlockingIOError, PermissionError):
            raise RunError(f"{path} is being trained by another process: wait for it, or name another directory") from None
        yield


def require_devices(config: TrainingConfig) -> None:
    """Check that this machine has what the config asks for.

    Raises:
        RunError: it has not; says what it has.
    """
    gpus = torch.cuda.device_count()
    on_gpu = config.accelerator == "gpu" or (config.accelerator == "auto" and (gpus > 0 or config.devices > 1))
    if config.accelerator == "gpu" and not gpus:
        raise RunError("torch sees no GPU on this machine: train with the accelerator cpu, or install a torch with CUDA")
    if on_gpu and gpus < config.devices:
        raise RunError(
            f"{config.devices} devices are asked for and torch sees {gpus} GPUs on this machine: "
            "ask for fewer, or for the accelerator cpu, which takes any number of processes"
        )
    if on_gpu and gpus and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise RunError(f"{torch.cuda.get_device_name()} has no bfloat16: train with the precision fp32")


def require_division(config: TrainingConfig) -> None:
    """Check that a step's plates can be divided among processes and parts.

    Raises:
        RunError: they cannot.
    """
    if config.shape.plates % config.parts:
        raise RunError(
            f"a step's {config.shape.plates} plates cannot be divided evenly among {config.ranks} processes in "
            f"{config.accumulate} parts: make plates a multiple of {config.parts}"
        )


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
    mixed = make_method(asked.method, asked.context).context == "source"
    if mixed and asked.parts != started.parts:  # its minibatches would be others
        differences.append(f"devices x num_nodes x accumulate (it is {started.parts}, asked for is {asked.parts})")
    if differences:
        raise RunError(f"{path} was started with another {', another '.join(differences)}")


def as_started(run: Run) -> Run:
    """Return a run that is gone on with, with the very recipe that it was started with.

    Raises:
        RunError: its plates, their labels, or the file that splits them, were changed; names what differs.
    """
    if not (run.path / RUN).is_file():
        return run
    started = Run.load(run.path)
    before, now = started.split.purposes(), run.split.purposes()
    changed = sorted(plate for plate in before.keys() | now.keys() if before.get(plate) != now.get(plate))
    differences = [f"purposes of the plates {', '.join(changed)}"] if changed else []
    if started.classes != run.classes:
        differences.append(f"classes (they were {', '.join(started.classes)}, and are {', '.join(run.classes)})")
    other = sorted(plate for plate in before.keys() & now.keys() if started.plates[plate] != run.plates[plate])
    if other:
        differences.append(f"images, labels or wells on the plates {', '.join(other)}")
    differences += [f"{name} of the images" for name in _recipe_differences(started.recipe, run.recipe)]
    if differences:
        raise RunError(f"{run.path} was started with other {', other '.join(differences)}: start another run")
    return replace(run, recipe=started.recipe)


def _recipe_differences(started: ImageRecipe, now: ImageRecipe) -> list[str]:
    """Name what differs of two recipes; mean and std may in their last digits, which hang on the machine."""
    before, after = asdict(started), asdict(now)
    measured = ("mean", "std")
    return [name for name in before if name not in measured and before[name] != after[name]] + [
        name for name in measured if not np.allclose(before[name], after[name], rtol=1e-9, atol=0)
    ]


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


def make_trainer(config: TrainingConfig, path: Path, *, epochs: int, done: int, quiet: bool) -> lightning.Trainer:
    """Return a trainer of so many epochs in all, whose first ``done`` steps were taken before."""
    callbacks = [MetricsTable(path), Stopping(config.patience), Checkpoints(path)]
    if not quiet:
        callbacks.append(TQDMProgressBar())
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        # Running statistics are brought together before each validation, instead of overwritten in every pass.
        strategy=DDPStrategy(broadcast_buffers=False) if config.ranks > 1 else "auto",
        use_distributed_sampler=False,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        accumulate_grad_batches=config.accumulate,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=TensorBoardLogger(path, name="logs", version="", purge_step=done),
        plugins=[WholeCheckpoints()],
        enable_progress_bar=not quiet,
        enable_model_summary=False,
    )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say in one sentence that a run's disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunError(
            f"no space is left to write {path} ({error.strerror}); what was checkpointed before is whole: "
            "free some, then resume the run"
        ) from error


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
    """Return a run's trained network, on the CPU, in evaluation mode.

    Raises:
        RunError: the checkpoint is not there, not whole, or of another network.
    """
    stored = read_checkpoint(run.path / checkpoint)["state_dict"]
    network = ResNet(run.spec)
    weights = {name.removeprefix("network."): value for name, value in stored.items()}
    require_weights(run.path / checkpoint, weights, network.state_dict())
    network.load_state_dict(weights)
    return network.eval()
