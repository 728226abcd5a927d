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
from training.progress import BEST, COMING, LAST, METRICS, RESUMABLE, read_checkpoint, tidy
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
    with pytest.raises(RunError, match=r"the \w+ loss is nan at step 2, of which no checkpoint is kept: start another run"):
        train(replace(config, learning_rate=1e30), tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_loss_that_is_finite_no_more_leaves_the_checkpoints_before(config: TrainingConfig, tmp_path: Path) -> None:
    run = train(replace(config, steps=2), tmp_path / "run", quiet=True)
    before = {name: (run.path / name).read_bytes() for name in (BEST, LAST)}
    stored = read_checkpoint(run.path / LAST)
    stored["state_dict"]["network.classifier.bias"] *= torch.nan
    torch.save(stored, run.path / LAST)
    with pytest.raises(RunError, match="the training loss is nan at step 4"):
        train(config, run.path, resume=True, quiet=True)
    assert (run.path / BEST).read_bytes() == before[BEST]
    assert read_checkpoint(run.path / LAST)["global_step"] == 2


def test_the_best_network_is_there_only_beside_what_says_how_far_the_run_came(
    config: TrainingConfig, tmp_path: Path
) -> None:
    whole = train(replace(config, steps=2), tmp_path / "whole", quiet=True)
    best, last = ((whole.path / name).stat().st_size for name in (BEST, LAST))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((best + last) // 2, limits[1]))  # room for the smaller of the two
    try:
        with pytest.raises(RunError, match="no space is left to write"):
            train(replace(config, steps=2), tmp_path / "run", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run" / BEST).exists()
    train(replace(config, steps=2), tmp_path / "run", resume=True, quiet=True)
    expected, found = (read_checkpoint(path / BEST)["state_dict"] for path in (whole.path, tmp_path / "run"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not (tmp_path / "run" / COMING).exists()


def test_a_best_network_that_was_on_its_way_is_put_in_its_place(tmp_path: Path) -> None:
    for name, step in ((LAST, 4), (COMING, 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": {}, "global_step": step}, tmp_path / name)
    coming = (tmp_path / COMING).read_bytes()
    tidy(tmp_path, 4)
    assert (tmp_path / BEST).read_bytes() == coming
    torch.save({"state_dict": {}, "global_step": 6}, tmp_path / COMING)
    tidy(tmp_path, 4)
    assert (tmp_path / BEST).read_bytes() == coming, "its last checkpoint was never written"
    assert not (tmp_path / COMING).exists()


def test_a_changed_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(4_000)}}, path)
    whole = path.read_bytes()
    read_checkpoint(path)
    for damaged in (whole[:5_000], whole[: len(whole) // 2] + b"\x01" + whole[len(whole) // 2 + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=rf"{path} is no whole checkpoint \(.*\): put a whole one in its place"):
            read_checkpoint(path)


def test_a_finished_run_without_its_network_is_told(config: TrainingConfig, tmp_path: Path) -> None:
    brief = replace(config, steps=2)
    run = train(brief, tmp_path / "run", quiet=True)
    (run.path / BEST).unlink()
    with pytest.raises(RunError, match=r"best\.ckpt is gone: put it back, or delete last\.ckpt beside it to begin"):
        train(brief, run.path, resume=True, quiet=True)
