"""Training runs, stops, resumes exactly, and can be read back."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import LayoutError, RunError
from model.images import ImageRecipe
from model.network import FromContext, NetworkSpec, ResNet
from tests.training.conftest import RECIPE
from training.episodes import Episode, EpisodeShape
from training.evaluate import score_plate
from training.fetch import fetch
from training.methods import make_method, training_loss
from training.progress import BEST, LAST, METRICS
from training.splits import Split
from training.train import Run, TrainingConfig, cosine, load_network, prepare_run, train


def test_a_run_leaves_its_config_checkpoints_and_logs(run: Run) -> None:
    assert Run.load(run.path) == run
    assert (run.path / BEST).is_file()
    assert (run.path / LAST).is_file()
    metrics = pd.read_csv(run.path / "logs" / "metrics.csv")
    assert metrics["val_loss"].notna().sum() == 3
    assert metrics["train_loss"].notna().any()
    assert list((run.path / "logs").glob("events.out.tfevents.*"))


def test_a_resumed_run_ends_where_an_unbroken_one_does(config: TrainingConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole", quiet=True)
    stopped = replace(config, steps=4)
    train(stopped, tmp_path / "broken", quiet=True)
    resumed = train(config, tmp_path / "broken", resume=True, quiet=True)
    whole = load_network(Run.load(tmp_path / "whole"), LAST)
    again = load_network(resumed, LAST)
    for expected, found in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_is_never_written_over_nor_resumed_as_another(run: Run, config: TrainingConfig) -> None:
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        train(config, run.path, quiet=True)
    with pytest.raises(RunError, match=r"another seed \(it is \d+, asked for is 99\)"):
        train(replace(config, seed=99), run.path, resume=True, quiet=True)
    with pytest.raises(RunError, match="only more, at a constant rate"):
        train(replace(config, steps=1), run.path, resume=True, quiet=True)
    assert (run.path / "run.json").read_bytes() == before


def test_a_run_is_not_gone_on_with_on_plates_of_other_labels_or_another_recipe(
    config: TrainingConfig, index: pd.DataFrame, tmp_path: Path
) -> None:
    plates = tmp_path / "plates"
    own = replace(config, plates=str(plates), classes=None, method="erm", steps=2)
    relabelled = index.assign(label=index["label"].replace("antimitotic", "other"))
    wells = index["Metadata_Well"][(index["Metadata_Plate"] == "SIM01B01P01") & (index["role"] != "control")].unique()
    swapped = index.replace({"Metadata_Well": {wells[0]: wells[-1], wells[-1]: wells[0]}})
    linear = replace(RECIPE, scaling="fixed-scale", full_scale=(65535.0,) * 5)
    brighter = replace(linear, full_scale=(4095.0,) * 5)

    def trained(rows: pd.DataFrame, recipe: ImageRecipe, **changes: int) -> bytes:
        shutil.rmtree(plates, ignore_errors=True)
        fetch(rows, plates, recipe)
        train(replace(own, **changes), tmp_path / "run", resume=True, quiet=True)  # type: ignore[arg-type]
        return (tmp_path / "run" / "run.json").read_bytes()

    before = trained(index, linear)
    with pytest.raises(RunError, match=r"other classes \(they were actin_edge, antimitotic, .*, and are actin_edge, .*\)"):
        trained(relabelled, linear, steps=4)
    with pytest.raises(RunError, match="started with other images, labels or wells on the plates SIM01B01P01"):
        trained(swapped, linear, steps=4)
    with pytest.raises(RunError, match="started with other full_scale of the images, other mean of the images, other std"):
        trained(index, brighter, steps=4)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert trained(index, linear) == before


def test_a_finished_run_keeps_its_config(config: TrainingConfig, tmp_path: Path) -> None:
    hopeless = replace(config, learning_rate=0.0, steps=40, validate_every=1, patience=1)
    train(hopeless, tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "run.json").read_bytes()
    train(replace(hopeless, steps=80, loader_workers=1), tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_finished_run_that_is_resumed_says_so(
    config: TrainingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brief = replace(config, steps=2)
    for resume in (False, True):
        assert not caplog.messages
        train(brief, tmp_path / "run", resume=resume, quiet=True)
    assert "nothing is left to train" in caplog.text


def test_a_label_that_no_training_well_has_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no training well is labelled typo; the labels are"):
        train(replace(config, classes=("typo", "antimitotic")), tmp_path / "run", quiet=True)


def test_training_stops_when_held_out_batches_no_longer_improve(config: TrainingConfig, tmp_path: Path) -> None:
    hopeless = replace(config, learning_rate=0.0, steps=40, validate_every=1, patience=2)
    run = train(hopeless, tmp_path / "run", quiet=True)
    metrics = pd.read_csv(run.path / "logs" / "metrics.csv")
    assert metrics["val_loss"].notna().sum() < 10


def test_the_recipes_mean_and_std_come_from_training_plates(run: Run) -> None:
    assert len(run.recipe.mean) == 5
    assert all(0 < std < 1 for std in run.recipe.std)


def test_one_label_is_no_classification(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="1 labels"):
        train(replace(config, classes=("antimitotic",)), tmp_path / "run", quiet=True)


def test_the_schedule_rises_and_decays() -> None:
    factors = [cosine(step, 100) for step in range(100)]
    assert factors[0] < factors[4] == max(factors)
    assert factors[-1] == pytest.approx(0.01, abs=0.01)


def test_bfloat16_runs_keep_float32_weights_and_validate_in_float32(config: TrainingConfig, tmp_path: Path) -> None:
    runs = {
        precision: train(replace(config, precision=precision), tmp_path / precision, quiet=True)  # type: ignore[arg-type]
        for precision in ("fp32", "bf16")
    }
    losses = {precision: pd.read_csv(run.path / METRICS) for precision, run in runs.items()}
    first = {precision: table["train_loss"].iloc[0] for precision, table in losses.items()}
    assert first["bf16"] != first["fp32"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.05)
    network = load_network(runs["bf16"], LAST)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    run, plates = prepare_run(runs["bf16"].config, runs["bf16"].path)
    scores = [score_plate(network, run.method, plates[name], run.recipe, "controls") for name in run.split.validation]
    assert losses["bf16"]["val_loss"].iloc[-1] == pytest.approx(np.mean([score.image_nll for score in scores]), rel=1e-5)


@pytest.mark.parametrize("name", ["cs-arm-bn", "erm"])
def test_a_network_learns_in_bfloat16_with_statistics_in_float32(name: str) -> None:
    torch.manual_seed(0)
    network, method = ResNet(NetworkSpec(channels=2, classes=2, width=4)), make_method(name)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    controls, losses = 4 if method.with_controls else 0, []
    for _ in range(20):
        labels = torch.arange(8) % 2
        images = torch.randn(controls + 8, 2, 64, 64)
        images[controls:][labels == 1, :, :, 32:] *= 0.3
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(network, method, [Episode(images, labels, controls)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.median(losses[-7:]) < 0.5 * losses[0]
    norm = FromContext(slice(0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = network(images, norm)
    assert logits.dtype == torch.bfloat16
    assert {value.dtype for value in (*norm.means, *norm.variances, *network.buffers())} == {torch.float32}


def test_a_loader_in_another_process_brings_the_same_steps(config: TrainingConfig, tmp_path: Path) -> None:
    brief = replace(config, steps=3, validate_every=3)
    inline, worker = (train(replace(brief, loader_workers=n), tmp_path / str(n), quiet=True) for n in (0, 1))
    pd.testing.assert_frame_equal(pd.read_csv(inline.path / METRICS), pd.read_csv(worker.path / METRICS))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 99}, "depth is 99; it is one of 18, 34, 50"),
        ({"schedule": "linear"}, "schedule is linear; it is one of constant, cosine"),
        ({"accelerator": "tpu"}, "accelerator is tpu; it is one of auto, cpu, gpu"),
        ({"precision": "fp8"}, "precision is fp8; it is one of fp32, bf16"),
        ({"width": 0}, "width is 0; it is 1 or more"),
        ({"size": 8}, "size is 8; it is 32 or more"),
        ({"crop": 4}, "crop is 4; it is 32 or more"),
        ({"crop": 0}, "crop is 0; it is 32 or more"),
        ({"crop": -4}, "crop is -4; it is 32 or more"),
        ({"num_nodes": 0}, "num_nodes is 0; it is 1 or more"),
        ({"validate_every": 0}, "validate_every is 0; it is 1 or more"),
        ({"steps": -1}, "steps is -1; it is 1 or more"),
        ({"patience": 0}, "patience is 0; it is 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it is 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it is 0 or more"),
        ({"seed": -1}, "seed is -1; it is 0 or more"),
        ({"loader_workers": -1}, "loader_workers is -1; it is 0 or more"),
        ({"classes": ("a", "a", "b")}, "the classes name a more than once: an output belongs to one class"),
        ({"method": "magic"}, "no method 'magic'"),
        ({"shape": EpisodeShape(controls_min=0)}, "controls_min is 0: cs-arm-bn takes its statistics from control images"),
    ],
)
def test_a_training_that_cannot_be_is_told_before_anything_is_read(
    config: TrainingConfig, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        replace(config, **change)
    without = replace(config, method="erm", shape=EpisodeShape(controls_min=0, controls_max=0))
    assert without.shape.controls_min == 0, "a method without controls draws none"


@pytest.fixture
def saved(config: TrainingConfig, tmp_path: Path) -> Path:
    """A run directory with its ``run.json`` alone."""
    Run(tmp_path / "run", config, Split(("A",), ("B",)), ("a", "b"), RECIPE, {"A": "0", "B": "1"}).save()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda _: {}, r"is damaged \(it has no 'config'\): put it back"),
        (lambda _: [], "is damaged"),
        (lambda whole: {**whole, "config": {**whole["config"], "colour": 1}}, "is damaged .*colour"),
        (lambda whole: {**whole, "config": {**whole["config"], "shape": None}}, "is damaged"),
        (lambda whole: {**whole, "config": {**whole["config"], "depth": 99}}, "is damaged .depth is 99; it is one of 18"),
        (lambda whole: {**whole, "split": {"train": ["A"], "validation": ["A"]}}, "is damaged .plates with two purposes"),
        (
            lambda whole: {name: value for name, value in whole.items() if name != "plates"},
            "was written by an older version",
        ),
    ],
)
def test_a_run_that_says_of_itself_what_cannot_be_is_told_by_its_file(
    saved: Path, damage: Callable[[Any], Any], told: str
) -> None:
    path = saved / "run.json"
    assert Run.load(saved).plates == {"A": "0", "B": "1"}
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=rf"{path} {told}"):
        Run.load(saved)


@pytest.mark.parametrize("left", [0, 40])
def test_a_run_whose_file_was_cut_short_is_told_by_it(saved: Path, left: int) -> None:
    path = saved / "run.json"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(RunError, match=rf"{path} is damaged \(.*\): put it back"):
        Run.load(saved)


HOLDING = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


def test_a_run_that_another_process_trains_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for resume in (False, True):
            with pytest.raises(RunError, match="run is being trained by another process: wait for it, or name another dir"):
                train(config, path, resume=resume, quiet=True)
        other.communicate()
    assert [found.name for found in path.iterdir()] == [".lock"]
