"""Runs that are killed go on as if nothing had been; what cannot be gone on with is said in one sentence."""

import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.errors import RunError
from tests.training.processes import dying_while_writing, ended, killed_after, resumed, started
from training.progress import BEST, LAST, METRICS, RESUMABLE, read_checkpoint
from training.train import Run, TrainingConfig, load_network, train


def test_a_run_killed_at_any_moment_goes_the_way_an_unbroken_one_goes(config: TrainingConfig, tmp_path: Path) -> None:
    longer = replace(config, steps=8, schedule="cosine", weight_decay=0.01, patience=3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ended(started(resumed, longer, whole)) == 0
    killed_after(longer, broken, rows=1)
    assert not (broken / LAST).exists()
    dying = started(dying_while_writing, longer, broken, 4)  # best and last of two validations, or last of three
    assert ended(dying) == -signal.SIGKILL
    assert list((broken / LAST).parent.glob(".*.partial"))
    assert read_checkpoint(broken / LAST, RESUMABLE)["global_step"] in (2, 4)
    killed_after(longer, broken, rows=int(np.random.default_rng().integers(3, 7)))
    assert ended(started(resumed, longer, broken)) == 0
    pd.testing.assert_frame_equal(pd.read_csv(broken / METRICS), pd.read_csv(whole / METRICS), check_exact=True)
    for checkpoint in (BEST, LAST):
        expected, found = (read_checkpoint(path / checkpoint)["state_dict"] for path in (whole, broken))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not list((broken / LAST).parent.glob(".*.partial"))


def test_metrics_are_one_table_with_a_row_a_step(run: Run) -> None:
    metrics = pd.read_csv(run.path / METRICS)
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert metrics["train_loss"].notna().all()
    assert metrics["val_loss"].notna().tolist() == [False, True] * 3
    assert metrics["val_well_accuracy"].notna().tolist() == [False, True] * 3


def test_steps_that_are_no_multiple_of_the_validations_are_kept_to(config: TrainingConfig, tmp_path: Path) -> None:
    train(replace(config, steps=3), tmp_path / "run", quiet=True)
    train(replace(config, steps=5), tmp_path / "run", resume=True, quiet=True)
    metrics = pd.read_csv(tmp_path / "run" / METRICS)
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5]
    assert metrics["val_loss"].notna().tolist() == [False, True, True, False, True]


def test_patience_is_kept_over_resumes(config: TrainingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hopeless = replace(config, learning_rate=0.0, steps=3, validate_every=1, patience=3)
    train(hopeless, tmp_path / "run", quiet=True)
    for _ in range(2):
        train(replace(hopeless, steps=9), tmp_path / "run", resume=True, quiet=True)
        assert pd.read_csv(tmp_path / "run" / METRICS)["step"].tolist() == [1, 2, 3, 4]  # the first, and three no better
    assert caplog.text.count("nothing is left to train") == 1


def test_a_run_directory_that_was_moved_keeps_its_best_network(config: TrainingConfig, tmp_path: Path) -> None:
    train(replace(config, steps=2), tmp_path / "here", quiet=True)
    best = (tmp_path / "here" / BEST).read_bytes()
    moved = Path(shutil.move(tmp_path / "here", tmp_path / "there"))
    stored = read_checkpoint(moved / LAST)
    stored["callbacks"]["Checkpoints"]["lowest"] = 0.0  # nothing that follows is better
    torch.save(stored, moved / LAST)
    train(replace(config, steps=4), moved, resume=True, quiet=True)
    assert (moved / BEST).read_bytes() == best


def test_a_full_disk_is_told_and_leaves_what_was_there(config: TrainingConfig, tmp_path: Path) -> None:
    run = train(replace(config, steps=2), tmp_path / "run", quiet=True)
    before = (run.path / LAST).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may grow beyond: as a full disk
    try:
        with pytest.raises(RunError, match=r"no space is left to write .* free some, then resume the run"):
            train(config, run.path, resume=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.path / LAST).read_bytes() == before
    assert not list((run.path / LAST).parent.glob(".*.partial"))
    train(config, run.path, resume=True, quiet=True)
    assert pd.read_csv(run.path / METRICS)["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_gone_on_with_is_told(config: TrainingConfig, tmp_path: Path) -> None:
    run = train(replace(config, steps=2), tmp_path / "run", quiet=True)
    last = run.path / LAST
    whole = last.read_bytes()
    other = read_checkpoint(last)
    other["state_dict"]["network.conv1.weight"] = torch.zeros(1, 2, 3, 4)
    for content, told in (
        (whole[: len(whole) // 2], "no whole checkpoint .* delete it to begin the run anew"),
        (b"", "no whole checkpoint"),
        (b"not a checkpoint", "no whole checkpoint"),
        ((run.path / BEST).read_bytes(), "no checkpoint to go on from, it lacks optimizer_states"),
        (other, r"of another network: network.conv1.weight is \(1, 2, 3, 4\), expected \(4, 5, 7, 7\)"),
    ):
        if isinstance(content, bytes):
            last.write_bytes(content)
        else:
            torch.save(content, last)
        with pytest.raises(RunError, match=told):
            train(config, run.path, resume=True, quiet=True)
    last.unlink()
    again = train(config, run.path, resume=True, quiet=True)
    assert pd.read_csv(again.path / METRICS)["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_network_that_is_not_there_or_not_whole_is_told(config: TrainingConfig, tmp_path: Path) -> None:
    run = train(replace(config, steps=2), tmp_path / "run", quiet=True)
    (run.path / BEST).write_bytes((run.path / BEST).read_bytes()[:1000])
    with pytest.raises(RunError, match=r"best\.ckpt is no whole checkpoint"):
        load_network(run)
    (run.path / BEST).unlink()
    with pytest.raises(RunError, match=r"best\.ckpt is not there"):
        load_network(run)


def test_a_loss_that_is_never_finite_is_told(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the validation loss was never a finite number"):
        train(replace(config, learning_rate=1e30), tmp_path / "run", quiet=True)
