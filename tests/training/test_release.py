"""From runs to a bundle: which runs go together, which plates may calibrate them, what is served."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import LayoutError, LeakError, RunError
from model.network import FromContext
from training.calibrate import _Wells, fit_temperature
from training.contexts import control_statistics, mean_moments
from training.methods import make_method
from training.release import (
    calibration_plates,
    ensemble_of,
    load_plates_of_runs,
    load_run_plates,
    release,
    served_context,
)
from training.splits import Split
from training.train import RUN, Run, load_network


def altered(run: Run, path: Path, **changes: object) -> Run:
    """A run that is another's but for what is changed in its ``run.json``."""
    shutil.copytree(run.path, path)
    replace(run, path=path, **changes).save()  # type: ignore[arg-type]
    return Run.load(path)


def turned(split: Split) -> Split:
    """The split with the two labs' last batches changed about: validation tests, and the test validates."""
    return replace(split, validation=split.new_batch, new_batch=split.validation)


def test_runs_that_were_made_differently_are_told_apart(run: Run, erm_run: Run, tmp_path: Path) -> None:
    renamed = altered(run, tmp_path / "renamed", classes=tuple(reversed(run.classes)))
    smaller = altered(run, tmp_path / "smaller", recipe=replace(run.recipe, size=48))
    for other, told in ((erm_run, "method"), (renamed, "classes"), (smaller, r"size \(64 and 48\)")):
        with pytest.raises(RunError, match=f"make no ensemble: they differ in {told}"):
            release([run.path, other.path], tmp_path / "out", name="no", minimum_control_wells=4)
    assert not (tmp_path / "out").exists()


def test_a_plate_that_one_run_tests_or_trains_on_does_not_calibrate(run: Run, tmp_path: Path) -> None:
    plates = load_run_plates(run)
    same = calibration_plates([run, run], plates)
    assert tuple(plate.plate for plate in same.held_out) == run.split.validation
    assert tuple(plate.plate for plate in same.train) == tuple(sorted(run.split.train))
    tested = altered(run, tmp_path / "tested", split=turned(run.split))
    with pytest.raises(RunError, match=r"no plate was held out by all 2 runs: of 4 validation plates, 0 .* and 4 test"):
        calibration_plates([run, tested], plates)
    with pytest.raises(RunError, match="no plate was held out by all"):
        release([run.path, tested.path], tmp_path / "out", name="no", minimum_control_wells=4)


def test_a_batch_that_any_run_trained_on_does_not_calibrate(run: Run, tmp_path: Path) -> None:
    first, second = run.split.validation
    own = altered(run, tmp_path / "own", split=replace(run.split, train=(*run.split.train, first), validation=(second,)))
    with pytest.raises(RunError, match="the rest are of batches that another trained on"):
        calibration_plates([run, own], load_run_plates(run))


def test_members_of_other_training_plates_bring_their_own_source_and_normalisation(run: Run, tmp_path: Path) -> None:
    mine = run.split.train[:1]
    moved = replace(run.recipe, mean=tuple(m + 0.05 for m in run.recipe.mean), std=tuple(s * 1.5 for s in run.recipe.std))
    fold = altered(run, tmp_path / "fold", split=Split(mine, run.split.validation), recipe=moved)
    bundle, parity = release([run.path, fold.path], tmp_path / "out", name="folds", minimum_control_wells=4)
    assert parity.logits < 1e-3
    assert bundle.manifest.training["plates"] == sorted(run.split.train)
    assert bundle.manifest.recipe == run.recipe
    plates, network = load_run_plates(run), load_network(run)
    features = network.features
    expected = mean_moments([control_statistics(network, plates[name], moved) for name in mine])
    source = bundle.training_statistics.source
    np.testing.assert_allclose(source.mean[features:], expected.mean, rtol=1e-3, atol=1e-4)
    whole = mean_moments([control_statistics(network, plates[name], run.recipe) for name in run.split.train])
    np.testing.assert_allclose(source.mean[:features], whole.mean, rtol=1e-3, atol=1e-4)
    assert source.sites == expected.sites
    rows = plates[mine[0]].control_rows
    with torch.no_grad():
        together, _ = ensemble_of([run, fold])(torch.from_numpy(plates[mine[0]].served(rows, run.recipe)), FromContext())
        alone, _ = network(torch.from_numpy(plates[mine[0]].served(rows, moved)), FromContext())
    torch.testing.assert_close(together[:, 1], alone, rtol=1e-3, atol=1e-3)


def test_one_temperature_makes_the_averaged_probabilities_likeliest() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = (4.0 * rng.normal(size=(180, 2, 3)) + 5.0 * np.eye(3)[np.repeat(labels, 3)][:, None]).astype(np.float32)
    wells = _Wells(
        batch="B", embeddings=np.zeros((60, 2)), labels=labels, controls=np.zeros(60, np.bool_),
        in_context=np.zeros(60, np.bool_), site_logits=logits, site_wells=np.repeat(np.arange(60), 3), left_out={},
    )  # fmt: skip

    def nll(temperature: float) -> float:
        averaged = torch.softmax(torch.from_numpy(logits).double() / temperature, dim=2).reshape(60, 6, 3).mean(1)
        return float(-averaged[torch.arange(60), torch.from_numpy(labels)].log().mean())

    found = fit_temperature([wells])
    assert 0.3 < found < 3.0  # within the bounds that are searched
    assert nll(found) <= min(nll(temperature) for temperature in np.geomspace(0.2, 5, 400)) + 1e-7

    panel = np.arange(60) < 20
    surer = np.where(np.repeat(panel, 3)[:, None, None], 20 * logits, logits)
    without = fit_temperature([replace(wells, site_logits=surer, in_context=panel)])
    alone = replace(wells, labels=labels[~panel], in_context=panel[~panel], site_logits=logits[60:],
                    site_wells=np.repeat(np.arange(40), 3))  # fmt: skip
    assert without == pytest.approx(fit_temperature([alone]), rel=1e-4)
    with pytest.raises(LayoutError, match="beside those of their contexts"):
        fit_temperature([replace(wells, in_context=np.ones(60, np.bool_))])


def test_plates_of_a_run_that_are_gone_are_all_named(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.config.plates, tmp_path / "plates")
    moved = replace(run, config=replace(run.config, plates=str(tmp_path / "plates")))
    gone = sorted((run.split.train[0], run.split.validation[0]))
    for name in gone:
        (tmp_path / "plates" / f"{name}.plate.json").unlink()
    with pytest.raises(RunError, match=rf"plates lacks the plates {', '.join(gone)} of {run.path}: fetch them again"):
        load_run_plates(moved)


def test_plates_of_a_run_that_were_changed_or_leak_are_refused(run: Run) -> None:
    first = run.split.train[0]
    with pytest.raises(RunError, match=f"on the plates {first} of .* are not those that {run.path} was begun with"):
        load_run_plates(replace(run, plates={**run.plates, first: "0" * 64}))
    moved = replace(run.split, train=run.split.train[1:], new_batch=(*run.split.new_batch, first))
    with pytest.raises(LeakError, match=rf"plate {first} \(new_batch\)"):
        load_run_plates(replace(run, split=moved))


def test_runs_that_know_other_plates_by_one_name_make_no_ensemble(run: Run, tmp_path: Path) -> None:
    first = run.split.validation[0]
    other = replace(run, path=tmp_path, plates={**run.plates, first: "0" * 64})
    with pytest.raises(RunError, match=f"{first} of {tmp_path} are other plates than those of the runs before"):
        load_plates_of_runs([run, other])


def test_baselines_are_not_served() -> None:
    for name in ("instancenorm", "arm-bn", "erm-zscore"):
        with pytest.raises(ValueError, match="the service serves erm and cs-arm-bn"):
            served_context(make_method(name))


def test_a_run_reads_back_as_it_was_saved(run: Run) -> None:
    assert json.loads((run.path / RUN).read_text())["split"] == json.loads(json.dumps(asdict(run.split)))
