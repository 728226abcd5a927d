"""Training runs, stops, resumes exactly, and can be read back."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from model.errors import LayoutError, RunError
from training.train import BEST, LAST, Run, TrainingConfig, cosine, load_network, train


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
