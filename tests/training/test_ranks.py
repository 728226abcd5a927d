"""A step is the same step however its plates are divided among processes and parts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import RunError
from model.network import ResNet, Running
from tests.training.processes import train_on
from training.episodes import Episodes, Share
from training.evaluate import score_plate
from training.progress import LAST, METRICS
from training.train import Run, TrainingConfig, load_network, prepare_run, train


def test_two_processes_take_the_steps_of_one_that_accumulates(config: TrainingConfig, tmp_path: Path) -> None:
    four = replace(config, steps=4, shape=replace(config.shape, plates=4))
    ways = {"one": four, "parts": replace(four, accumulate=2)}
    for name, way in ways.items():
        train(way, tmp_path / name, quiet=True)
    command = [
        *(str(Path(sys.executable).with_name("anchorwell-train")), "train", four.plates, str(tmp_path / "ranks")),
        *("--classes", ",".join(four.classes or ()), "--depth", "18", "--width", "4", "--size", "64", "--crop", "48"),
        *("--treated", "6", "--controls-min", "2", "--controls-max", "6", "--plates", "4"),
        *("--steps", "4", "--validate-every", "2", "--seed", "1", "--accelerator", "cpu", "--devices", "2"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"run: {tmp_path / 'ranks'}") == 1
    tables = {name: pd.read_csv(tmp_path / name / METRICS) for name in ("one", "parts", "ranks")}
    networks = {name: load_network(Run.load(tmp_path / name), LAST) for name in tables}
    for name in ("one", "ranks"):
        pd.testing.assert_frame_equal(tables[name], tables["parts"], rtol=1e-4)
        for found, expected in zip(networks[name].parameters(), networks["parts"].parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.05 * config.learning_rate)


def test_processes_average_running_statistics_and_score_every_plate_once(config: TrainingConfig, tmp_path: Path) -> None:
    frozen = replace(config, method="erm", learning_rate=0.0, steps=4, shape=replace(config.shape, plates=3))
    train_on(3, frozen, tmp_path / "run")
    run, plates = prepare_run(frozen, tmp_path / "run")
    found = load_network(run, LAST)
    members = [ResNet(run.spec) for _ in range(3)]
    for rank, member in enumerate(members):
        member.load_state_dict(
            {name: value for name, value in found.state_dict().items() if "running" not in name}, strict=False
        )
        episodes = Episodes(
            [plates[name] for name in run.split.train], run.recipe, frozen.shape, crop=48, seed=1, first=0, steps=4,
            with_controls=False, share=Share(rank, 3),
        )  # fmt: skip
        for step in range(4):
            member(torch.cat([episode.images for episode in episodes[step]]), Running(update=True))
    for mean in zip(found.running_statistics(), *(member.running_statistics() for member in members), strict=True):
        torch.testing.assert_close(mean[0], torch.stack(mean[1:]).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert len(run.split.validation) == 2, "fewer plates than processes"
    scores = [score_plate(found, run.method, plates[name], run.recipe, "source") for name in run.split.validation]
    last = pd.read_csv(run.path / METRICS).iloc[-1]
    assert last["val_loss"] == pytest.approx(np.mean([score.image_nll for score in scores]), rel=1e-4)
    assert last["val_well_accuracy"] == pytest.approx(np.mean([score.well_accuracy for score in scores]), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"devices": 64, "accelerator": "gpu"}, r"torch sees (no GPU|\d+ GPUs) on this machine"),
        (
            {"devices": 64, "accelerator": "auto"},
            r"64 devices are asked for and torch sees \d+ GPUs on this machine: ask for fewer",
        ),
        ({"devices": 2, "accumulate": 2}, "a step's 2 plates cannot be divided evenly among 2 processes in 2 parts"),
    ],
)
def test_what_a_machine_or_a_step_cannot_give_is_told_first(
    config: TrainingConfig, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    with pytest.raises(RunError, match=told):
        train(replace(config, **change), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_divided_otherwise_but_for_erm_whose_minibatches_would_be_others(
    config: TrainingConfig, tmp_path: Path
) -> None:
    for method, told in (
        ("cs-arm-bn", None),
        ("erm", r"another devices x num_nodes x accumulate \(it is 1, asked for is 2\)"),
    ):
        started = replace(config, method=method, steps=2)
        train(started, tmp_path / method, quiet=True)
        divided = replace(started, steps=4, accumulate=2)
        if told is None:
            train(divided, tmp_path / method, resume=True, quiet=True)
            continue
        with pytest.raises(RunError, match=told):
            train(divided, tmp_path / method, resume=True, quiet=True)
