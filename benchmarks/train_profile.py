"""Where a training step's time goes: forward and backward, optimiser, waiting for the loader, and the rest.

Plates are simulated in memory, steps are the trainer's own. Two networks on 128 px crops of 270 px fields: a ResNet-18 of
width 16 and the full ResNet-50. Then ratios of ways to compute a step, each way's steps taken in turn with those of the
others in one run, so that what else the machine does strikes all of them alike.

Run from the repository root: `python -m benchmarks.train_profile [--steps 12] [--networks resnet18w16,resnet50]`.
"""

import argparse
import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.bars import Bar, table, write_bars
from model.images import ImageRecipe
from model.network import ResNet
from training.dataset import NO_LABEL, PlateSites
from training.episodes import Episode, Episodes, EpisodeShape
from training.methods import Method, training_loss
from training.splits import Split
from training.train import MetaTraining, Run, TrainingConfig, make_trainer

AT_LEAST_COMPUTING = 0.85  # of a step's time, loader inline
AT_MOST_WAITING = 0.05  # of a step's time, loader in a process of its own
CROP_PX, FIELD_PX, CHANNELS, CLASSES = 128, 270, 5, 8
WARM_UP = 2
RECIPE = ImageRecipe(
    channels=("RNA", "ER", "AGP", "Mito", "DNA"), size=CROP_PX, mean=(0.09, 0.09, 0.11, 0.08, 0.06), std=(0.1,) * CHANNELS
)


@dataclass(frozen=True)
class Workload:
    """A network and how much of a plate each of its steps takes."""

    depth: Literal[18, 34, 50]
    width: int
    shape: EpisodeShape


NETWORKS = {
    "resnet18w16": Workload(18, 16, EpisodeShape(treated=24, controls_min=8, controls_max=32, plates=4)),
    "resnet50": Workload(50, 64, EpisodeShape(treated=8, controls_min=4, controls_max=12, plates=2)),
}


def simulated_plate(number: int, treated: int = 64, controls: int = 32) -> PlateSites:
    """A plate of noise: what is in the pixels costs no time."""
    count = treated + controls
    rng = np.random.default_rng(number)
    wells = np.array([f"{'ABCDEFGH'[at % 8]}{1 + at // 8:02d}" for at in range(count)])
    is_control = np.arange(count) >= treated
    return PlateSites(
        plate=f"P{number}", lab="simulated", batch=f"B{number}", wells=wells,
        names=np.where(is_control, "DMSO", np.char.add("class", (np.arange(count) % CLASSES).astype(str))),
        labels=np.where(is_control, NO_LABEL, np.arange(count) % CLASSES).astype(np.int64), controls=is_control,
        images=rng.integers(0, 256, (count, CHANNELS, FIELD_PX, FIELD_PX), dtype=np.uint8),
        intensities=np.zeros((count, CHANNELS, 2), np.float32), recipe=RECIPE,
    )  # fmt: skip


def make_run(workload: Workload, path: Path, steps: int, workers: int) -> Run:
    """Describe a run of so many steps and one validation."""
    config = TrainingConfig(
        plates="simulated", depth=workload.depth, width=workload.width, size=CROP_PX, shape=workload.shape, steps=steps,
        validate_every=steps, loader_workers=workers, accelerator="auto",
    )  # fmt: skip
    plates = [f"P{number}" for number in range(workload.shape.plates + 2)]
    split = Split(train=tuple(plates[1:]), validation=(plates[0],))
    return Run(path, config, split, tuple(f"class{label}" for label in range(CLASSES)), RECIPE, plates={})


# --- shares ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Seconds of one step, mean over steps, and what it is made of."""

    step_s: float
    forward_s: float
    backward_s: float
    optimiser_s: float
    waiting_s: float

    @property
    def computing(self) -> float:
        """Share of the step's time in forward and backward."""
        return (self.forward_s + self.backward_s) / self.step_s


class Clock(SimpleProfiler):
    """Records what the trainer's parts take, and when steps begin."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[float] = []

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.begun.append(time.perf_counter())
        super().start(action_name)

    def describe(self) -> None:
        """Print nothing: the bars say it."""

    def seconds(self, ending: str, steps: int) -> float:
        """Mean seconds a step of the actions whose name has an ending, without the first steps."""
        durations = [taken for name, taken in self.recorded_durations.items() if name.endswith(ending)]
        return float(np.sum([taken[WARM_UP:steps] for taken in durations]) / (steps - WARM_UP))


def measure_shares(workload: Workload, plates: dict[str, PlateSites], steps: int, workers: int) -> Shares:
    """Train for a number of steps (one more begins the last step's successor) and take the time of each."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(workload, Path(folder), steps + 1, workers)
        module = MetaTraining(run, plates)
        trainer = make_trainer(run.config, run.path, epochs=1, done=0, quiet=True)
        clock = Clock()
        trainer.profiler = clock  # type: ignore[attr-defined]
        trainer.fit(module)
    forward, backward = clock.seconds("Strategy.training_step", steps), clock.seconds("Strategy.backward", steps)
    return Shares(
        step_s=(clock.begun[steps] - clock.begun[WARM_UP]) / (steps - WARM_UP),
        forward_s=forward,
        backward_s=backward,
        optimiser_s=clock.seconds("MetaTraining.optimizer_step", steps) - forward - backward,
        waiting_s=clock.seconds("train_dataloader_next", steps),
    )


def share_bars(name: str, inline: Shares, worker: Shares) -> list[Bar]:
    """One row for each figure of a network's steps."""
    parts = {"forward": inline.forward_s, "backward": inline.backward_s, "optimiser": inline.optimiser_s}
    return [
        Bar(f"train_{name}_computing_share", inline.computing, "", at_least=AT_LEAST_COMPUTING),
        *(Bar(f"train_{name}_{part}_share", seconds / inline.step_s, "") for part, seconds in parts.items()),
        Bar(f"train_{name}_loading_share", inline.waiting_s / inline.step_s, ""),
        Bar(f"train_{name}_step", inline.step_s, "s"),
        Bar(f"train_{name}_worker_waiting_share", worker.waiting_s / worker.step_s, "", at_most=AT_MOST_WAITING),
        Bar(f"train_{name}_worker_step", worker.step_s, "s"),
    ]


# --- ratios ----------------------------------------------------------------------------------------------------------

Step = Callable[[list[Episode]], None]


def step_with(
    run: Run, method: Method, precision: Callable[[], AbstractContextManager[object]], memory: torch.memory_format
) -> Step:
    """Return what takes one step of forward and backward in a way of its own."""
    torch.manual_seed(0)
    network = ResNet(run.spec).to(memory_format=memory)  # type: ignore[call-overload]

    def step(episodes: list[Episode]) -> None:
        network.zero_grad()
        laid = [replace(episode, images=episode.images.contiguous(memory_format=memory)) for episode in episodes]
        with precision():
            loss = training_loss(network, method, laid)
        loss.backward()  # type: ignore[no-untyped-call]

    return step


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Compute as the trainer's bf16 does."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


def ratio_bars(name: str, workload: Workload, plates: dict[str, PlateSites], steps: int) -> list[Bar]:
    """Each way's time over that of the default: float32, channels last, statistics of the controls."""
    run = make_run(workload, Path("unused"), steps, 0)
    context, plain = run.method, Method("erm", "source")
    last, first = torch.channels_last, torch.contiguous_format
    ways = {
        "default": step_with(run, context, contextlib.nullcontext, last),
        "bf16": step_with(run, context, bfloat16, last),
        "channels_first": step_with(run, context, contextlib.nullcontext, first),
        "stop_gradient": step_with(run, replace(context, stop_gradient=True), contextlib.nullcontext, last),
        "plain_bn": step_with(run, plain, contextlib.nullcontext, last),
    }
    middle = (workload.shape.controls_min + workload.shape.controls_max) // 2
    shape = replace(workload.shape, controls_min=middle, controls_max=middle)  # all ways take equally many images
    with_controls, without = (
        Episodes(
            [plates[plate] for plate in run.split.train],
            RECIPE,
            shape,
            crop=CROP_PX,
            seed=0,
            first=0,
            steps=steps + 1,
            with_controls=controls,
        )
        for controls in (True, False)
    )
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(steps + 1):
        drawn = {way: (without if way == "plain_bn" else with_controls)[number] for way in ways}
        for way, step in ways.items():
            begun = time.perf_counter()
            step(drawn[way])
            taken[way].append(time.perf_counter() - begun)
    found = []
    for way in [way for way in ways if way != "default"]:
        ratios = np.array(taken[way][1:]) / np.array(taken["default"][1:])
        low, high = np.quantile(ratios, [0.025, 0.975])
        value = float(np.median(ratios))
        found.append(Bar(f"train_{name}_{way}_over_default", value, "", interval=(float(low), float(high))))
    return found


def main() -> None:
    """Measure, write build/train-profile.json and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bars: list[Bar] = []
    for name in arguments.networks.split(","):
        workload = NETWORKS[name]
        plates = {f"P{number}": simulated_plate(number) for number in range(workload.shape.plates + 2)}
        inline, worker = (measure_shares(workload, plates, arguments.steps, workers) for workers in (0, 1))
        bars += share_bars(name, inline, worker)
        bars += ratio_bars(name, workload, plates, arguments.steps)
    write_bars(bars, Path("build/train-profile.json"))
    print(f"SIMULATED plates, {CROP_PX} px crops, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(bars))
    if not all(bar.holds in (True, None) for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
