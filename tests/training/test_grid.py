"""A grid leaves tidy tables of every method beside the nulls, goes on where it stopped, and makes anew what changed."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from model.bundle import file_sha256
from model.errors import RunError
from tests.training.conftest import RECIPE
from training.fetch import fetch
from training.grid import (
    Axes,
    FinishedRun,
    Grid,
    Task,
    cell_rows,
    evaluate_grid,
    labs_of_their_seed,
    overview,
    read_grid,
    tasks_of,
)  # fmt: skip
from training.methods import WAYS
from training.progress import BEST, COMING
from training.queries import ALL, DEFAULT, Cell, Draws
from training.results import read_results
from training.train import Run, TrainingConfig

COLUMNS = {
    "method", "context", "setting", "seed", "lab", "batch", "plate", "controls", "query", "alpha", "blended", "images",
    "wells", "image_accuracy", "well_accuracy", "macro_f1", "nll", "ece", "brier", "temperature", "nll_before", "ece_before",
    "brier_before",
}  # fmt: skip
NULLS = {"null: majority", "null: position", "null: intensity", "null: intensity-relative"}
OURS = ("erm", "adabn-treated", "cs-arm-bn controls", "cs-arm-bn controls blended", "cs-arm-bn source")
GRID = Grid(
    methods=OURS,
    cells=(Axes(controls=(0, 1, 99)), Axes(query_wells=(1, 3)), Axes(query_wells=(3,), alpha=(0.1, 0))),
    embeddings=("cs-arm-bn controls",),
)


def quiet(_done: int, _total: int) -> None:
    """Show no progress."""


def evaluated(runs, out: Path, grid: Grid = GRID, told: list[str] | None = None, progress=quiet):
    return evaluate_grid(grid, runs, out, tell=(told if told is not None else []).append, progress=progress)


@pytest.fixture(scope="module")
def results(run: Run, erm_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    evaluated([run, erm_run], out)
    return out


def parts(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_cells_have_a_row_a_plate_and_the_nulls_stand_beside_the_methods(results: Path, run: Run) -> None:
    cells = pd.read_parquet(results / "cells.parquet")
    assert set(cells.columns) >= COLUMNS
    keys = ["method", "context", "setting", "seed", "lab", "batch", "plate", "controls", "query", "alpha", "blended"]
    assert not cells.duplicated(keys).any()
    default = cells[(cells["controls"] == ALL) & (cells["query"] == ALL) & np.isinf(cells["alpha"])]
    tested = sum(map(len, run.split.tests().values()))
    ways = default.groupby(["method", "context", "blended"])["plate"].nunique()
    assert (ways == tested).all()
    assert len(ways) == len(NULLS) + len(OURS)
    assert set(default["method"]) >= NULLS
    assert all(default[name].between(0, 1).all() for name in ("well_accuracy", "image_accuracy", "macro_f1", "ece"))
    assert "cs-arm-bn controls blended" in overview(cells)


def test_axes_vary_one_at_a_time_and_only_where_they_matter(results: Path) -> None:
    cells = pd.read_parquet(results / "cells.parquet")
    erm, ours = (
        cells[(cells["method"] == m) & (cells["context"] == c)] for m, c in (("erm", "source"), ("cs-arm-bn", "controls"))
    )
    assert set(erm["controls"]) == {ALL}
    assert set(erm["query_wells"]) == set(ours["query_wells"]) == {ALL, 1, 3}
    assert set(ours.loc[ours["blended"], "controls"]) == {ALL, 0, 1}
    assert set(ours.loc[~ours["blended"], "controls"]) == {ALL, 1}, "nothing can be measured on no wells"
    assert set(cells.loc[np.isfinite(cells["alpha"]), "query"]) == {3}, "one site a well: three images are three wells"


def test_a_well_alone_is_called_the_same_by_controls_and_another_way_by_treated(results: Path) -> None:
    cells = pd.read_parquet(results / "cells.parquet").set_index(["method", "context", "blended", "query_wells"])
    cells = cells[(cells["controls"] == ALL) & np.isinf(cells["alpha"])]
    assert (cells.loc["adabn-treated", "treated", False, 1]["wells"] == 8).all()
    for name, same in (("cs-arm-bn", True), ("adabn-treated", False)):
        context = "controls" if same else "treated"
        alone, together = (cells.loc[name, context, False, query].set_index("plate")["nll"] for query in (1, ALL))
        assert np.allclose(alone, together) is same, "eight draws deal all eight wells"


def test_predictions_are_of_the_default_cell_and_sum_to_one(results: Path, run: Run) -> None:
    predictions = pd.read_parquet(results / "predictions.parquet")
    probabilities = predictions[[f"p:{name}" for name in run.classes]]
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert not predictions.duplicated(["method", "context", "seed", "plate", "well"]).any()
    cells = pd.read_parquet(results / "cells.parquet")
    cells = cells[(cells["controls"] == ALL) & (cells["query"] == ALL) & ~cells["blended"]]
    right = (predictions["called"] == predictions["label"]).groupby([predictions["method"], predictions["plate"]]).mean()
    expected = cells[cells["method"] == "erm"].set_index("plate")["well_accuracy"]
    assert np.allclose(right.loc["erm"].sort_index(), expected.sort_index())
    assert (probabilities.idxmax(axis=1).str.removeprefix("p:") == predictions["called"]).all()
    assert predictions["confidence_before"].between(1 / len(run.classes) - 1e-9, 1).all()
    temperatures = pd.read_parquet(results / "cells.parquet").groupby(["method", "context"])["temperature"].first()
    assert (temperatures != 1).any()
    for way, part in predictions.groupby(["method", "context"]):
        sharper = part["confidence_before"] > probabilities.loc[part.index].max(axis=1) - 1e-6
        assert sharper.all() if temperatures[way] >= 1 else not sharper.all(), way


def test_embeddings_are_of_wells_with_controls_on_training_and_test_plates(results: Path, run: Run) -> None:
    table = pd.read_parquet(results / "embeddings.parquet")
    assert set(table["Metadata_setting"]) == {"train", *run.split.tests()}
    assert set(table["Metadata_Plate"]).isdisjoint(run.split.validation)
    assert set(table["Metadata_pert_type"]) == {"negcon", "trt"}
    assert [name for name in table if not name.startswith("Metadata_")] == [f"e{number:03d}" for number in range(32)]
    assert not table.duplicated(["Metadata_Plate", "Metadata_Well"]).any()
    assert np.isfinite(table.filter(regex=r"^e\d").to_numpy()).all()


def test_what_is_there_is_not_made_again(results: Path, run: Run, erm_run: Run) -> None:
    before, cells = parts(results), pd.read_parquet(results / "cells.parquet")
    evaluated([run, erm_run], results)
    assert parts(results) == before
    pd.testing.assert_frame_equal(pd.read_parquet(results / "cells.parquet"), cells)
    more = GRID.model_copy(update={"cells": (*GRID.cells, Axes(query_wells=(2,)))})
    evaluated([run, erm_run], results, more)
    made = parts(results)
    assert before.items() <= made.items()
    assert len(made) - len(before) == len(NULLS) + len(OURS)
    evaluated([run, erm_run], results)
    pd.testing.assert_frame_equal(pd.read_parquet(results / "cells.parquet"), cells)


class KilledError(Exception):
    """The evaluation stops here."""


def test_a_killed_evaluation_goes_on(results: Path, run: Run, erm_run: Run, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:  # noqa: ARG001 (a progress's shape)
        if done == 7:
            raise KilledError

    with pytest.raises(KilledError):
        evaluated([run, erm_run], tmp_path, progress=kill)
    assert not (tmp_path / "cells.parquet").exists()
    before = parts(tmp_path)
    evaluated([run, erm_run], tmp_path)
    assert before.items() <= parts(tmp_path).items()
    assert parts(tmp_path).keys() == parts(results).keys() & parts(tmp_path).keys()
    for name in ("cells", "predictions", "embeddings"):
        whole, resumed = (pd.read_parquet(folder / f"{name}.parquet") for folder in (results, tmp_path))
        pd.testing.assert_frame_equal(resumed, whole)


def test_a_run_that_was_trained_on_is_evaluated_anew(erm_run: Run, tmp_path: Path) -> None:
    copy = replace(erm_run, path=tmp_path / "run")
    copy.save()
    stored = torch.load(erm_run.path / BEST, map_location="cpu", weights_only=True)
    (copy.path / BEST).parent.mkdir()
    torch.save(stored, copy.path / BEST)
    small = Grid(methods=("erm",), cells=())
    evaluated([copy], tmp_path / "results", small)
    before = parts(tmp_path / "results")
    stored["state_dict"]["network.classifier.bias"] += torch.arange(8.0)
    torch.save(stored, copy.path / BEST)
    first = pd.read_parquet(tmp_path / "results" / "cells.parquet")
    evaluated([copy], tmp_path / "results", small)
    made = parts(tmp_path / "results").keys() - before.keys()
    assert {name.split(".")[1] for name in made} == {"cells", "predictions"}
    assert len(made) == 2, "the nulls stand"
    again = pd.read_parquet(tmp_path / "results" / "cells.parquet")
    assert len(again) == len(first)
    assert not np.allclose(again["nll"], first["nll"])


def test_the_folder_says_budgets_and_what_was_left_out(run: Run, erm_run: Run, tmp_path: Path) -> None:
    longer = replace(erm_run, config=replace(erm_run.config, learning_rate=0.5))
    told: list[str] = []
    evaluated([run, longer], tmp_path, Grid(methods=("erm", "arm-bn"), cells=()), told)
    assert told == [
        "seed 1: arm-bn is left out: no run of the network arm-bn",
        "seed 1: budgets are NOT equal: the runs differ in learning_rate",
    ]
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["told"] == told
    assert {one["network"]: one["budget"]["learning_rate"] for one in about["runs"]} == {"cs-arm-bn": 1e-3, "erm": 0.5}
    assert about["runs"][0]["budget"]["images_per_step"] == 2 * run.config.shape.rows
    assert "one at a time" in about["cells"]


def test_without_controls_what_needs_none_is_evaluated_and_the_rest_is_told(run: Run, erm_run: Run) -> None:
    runs = {name: FinishedRun(one, name) for name, one in (("erm", erm_run), ("cs-arm-bn", run))}
    bare = {name: replace(plate, controls=np.zeros(len(plate.wells), bool)) for name, plate in runs["erm"].plates.items()}
    for one in runs.values():
        one.__dict__["plates"] = bare
    told: list[str] = []
    grid = Grid(methods=("erm", "adabn-treated", "adabn-controls", "cs-arm-bn source"), cells=())
    tasks = tasks_of(1, runs, grid, told.append)
    assert [task.named["method"] for task in tasks] == [*sorted(NULLS - {"null: intensity-relative"}, key=[
        "null: majority", "null: position", "null: intensity"].index), "erm", "adabn-treated"]  # fmt: skip
    assert len(told) == 2
    assert all("it needs negative controls on the plates of training and validation" in text for text in told)


def test_a_test_plate_without_controls_alone_is_left_out_of_what_needs_them(run: Run) -> None:
    finished = FinishedRun.of(run)
    bare, *_ = run.split.new_batch
    plates = dict(finished.plates)
    finished.__dict__["plates"] = plates | {bare: replace(plates[bare], controls=np.zeros(len(plates[bare].wells), bool))}
    told: list[str] = []
    tasks = tasks_of(
        1, {"cs-arm-bn": finished}, Grid(methods=("cs-arm-bn controls", "cs-arm-bn source"), cells=()), told.append
    )
    assert told == [f"seed 1: cs-arm-bn controls has no negative controls on {bare}: left out"]
    ours, source = (set(cell_rows(task, DEFAULT, Draws())[0]["plate"]) for task in tasks[-2:])
    assert source - ours == {bare}
    assert ours


def test_wells_and_sites_that_are_not_scored_are_told(run: Run, erm_run: Run) -> None:
    unnamed = FinishedRun.of(replace(erm_run, config=replace(erm_run.config, classes=None)))
    told: list[str] = []
    tasks_of(1, {"erm": unnamed}, Grid(methods=("erm",), cells=()), told.append)
    wells = len(run.split.in_domain)
    assert f"seed 1: treated wells of labels that are no class are not scored (in_domain): inactive ({wells})" in told
    told.clear()
    tasks_of(1, {"erm": FinishedRun.of(erm_run)}, Grid(methods=("erm",), cells=()), told.append)
    assert told == [], "classes were named"


def test_what_makes_seeds_differ_is_refused_or_told(run: Run, erm_run: Run, tmp_path: Path) -> None:
    second = replace(erm_run, config=replace(erm_run.config, seed=2, learning_rate=0.5), path=tmp_path / "run")
    (tmp_path / "run").symlink_to(erm_run.path)
    with pytest.raises(RunError, match="other classes: not comparable"):
        evaluated([erm_run, replace(second, classes=run.classes[:2])], tmp_path)
    shutil.copytree(erm_run.path, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "checkpoints" / "last.ckpt").unlink()
    told: list[str] = []
    unfinished = replace(second, path=tmp_path / "unfinished")
    evaluated([erm_run, unfinished], tmp_path / "results", Grid(methods=("erm",), cells=(Axes(controls=(99,)),)), told)
    assert "seeds 1 and 2: budgets of erm are NOT equal: they differ in learning_rate" in told
    assert "seed 2: how many of its 6 steps erm had is not known (checkpoints/last.ckpt is not there)" in told
    missing = "no method evaluated here uses controls and can do without any: a cell is not scored (control wells 0,"
    told.clear()
    evaluated([run], tmp_path / "results", Grid(methods=("cs-arm-bn controls",), cells=(Axes(controls=(0,)),)), told)
    assert any(text.startswith(missing) for text in told), told


def test_ways_that_nobody_named_are_left_out_without_a_word(erm_run: Run, tmp_path: Path) -> None:
    told: list[str] = []
    cells = evaluated([erm_run], tmp_path / "results", Grid(cells=()), told)
    assert not any("no run of the network" in text for text in told)
    assert "cs-arm-bn" not in set(cells["method"])


def test_an_embedding_that_is_asked_for_and_has_no_run_is_told(erm_run: Run, tmp_path: Path) -> None:
    told: list[str] = []
    evaluated([erm_run], tmp_path / "results", Grid(cells=(), embeddings=("cs-arm-bn controls",)), told)
    assert "seed 1: cs-arm-bn controls is left out: no run of the network cs-arm-bn" in told


def test_cells_that_no_plate_has_wells_for_are_told(erm_run: Run, tmp_path: Path) -> None:
    told: list[str] = []
    grid = Grid(methods=("erm", "adabn-controls"), cells=(Axes(controls=(99,)),))
    evaluated([erm_run], tmp_path / "results", grid, told)
    missing = "no test plate has the wells for a cell of the grid (control wells 99, treated wells sent all, alpha inf)"
    assert f"{missing}: not scored" in told


def test_tables_are_of_the_evaluation_that_tells_of_them(run: Run, erm_run: Run, tmp_path: Path) -> None:
    grid = Grid(methods=("erm",), cells=())
    evaluated([run, erm_run], tmp_path, grid)
    before = (tmp_path / "predictions.parquet").read_bytes()
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["tables"] == {name: file_sha256(tmp_path / name) for name in ("cells.parquet", "predictions.parquet")}
    next((tmp_path / "parts").glob("*.predictions.parquet")).unlink()
    (tmp_path / "predictions.parquet").unlink()
    (tmp_path / "predictions.parquet").mkdir()  # cannot be written
    with pytest.raises(OSError, match="predictions"):
        evaluated([run, erm_run], tmp_path, grid)
    assert not (tmp_path / "about.json").exists()
    (tmp_path / "predictions.parquet").rmdir()
    evaluated([run, erm_run], tmp_path, grid)
    assert (tmp_path / "predictions.parquet").read_bytes() == before


def test_a_test_plate_of_controls_alone_is_left_out_and_told(run: Run, erm_run: Run) -> None:
    finished = FinishedRun.of(erm_run)
    bare = run.split.new_batch[0]
    plates = {**finished.plates, bare: finished.plates[bare].with_classes(())}
    finished.__dict__["plates"] = plates
    told: list[str] = []
    small = Grid(methods=("erm",), cells=(Axes(query_wells=(2,), alpha=(math.inf, 0.1, 0)),))
    tasks = tasks_of(1, {"erm": finished}, small, told.append)
    assert told == [f"seed 1: no treated site of the classes on {bare} (new_batch): left out"]
    for task, cell in itertools.product(tasks, small.every_cell):
        rows, _ = cell_rows(task, cell, small.draws)
        tested = {name for names in run.split.tests().values() for name in names}
        assert set(rows["plate"]) == tested - {bare}
    finished.__dict__["plates"] = {name: plate.with_classes(()) for name, plate in plates.items()}
    with pytest.raises(RunError, match=f"{erm_run.path} has no test plate with a treated site of its classes"):
        tasks_of(1, {"erm": finished}, small, told.append)


def test_networks_that_need_controls_are_left_untrained_where_there_are_none(
    index: pd.DataFrame, config: TrainingConfig, tmp_path: Path
) -> None:
    fetch(index[index["role"] != "control"], tmp_path / "plates", RECIPE)
    path = written(
        tmp_path / "grid.yaml",
        seeds=[{"seed": 3, "plates": str(tmp_path / "plates")}],
        runs=str(tmp_path / "runs"),
        training=budget(config),
        methods=["erm", "adabn-treated", "adabn-controls", "cs-arm-bn controls"],
        cells=[],
    )
    told: list[str] = []
    cells = evaluated([], tmp_path / "results", read_grid(path), told)
    assert set(cells["method"]) == {*NULLS - {"null: intensity-relative"}, "erm", "adabn-treated"}
    assert not (tmp_path / "runs" / "seed-3" / "cs-arm-bn" / "run.json").exists()
    assert "cs-arm-bn is not trained: plate SIM01B01P01 has no negative-control wells" in " ".join(told)
    assert "adabn-controls is left out: it needs negative controls" in " ".join(told)


def test_a_panel_is_as_large_as_the_one_trained_with(run: Run) -> None:
    larger = replace(run, config=replace(run.config, shape=replace(run.config.shape, panel_wells=3)))
    assert FinishedRun.of(larger).network.panel_wells == 3


def test_runs_that_cannot_be_compared_are_refused(run: Run, erm_run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="same network and seed"):
        evaluated([run, run], tmp_path)
    other = replace(erm_run, classes=erm_run.classes[::-1])
    with pytest.raises(RunError, match="not comparable"):
        evaluated([run, other], tmp_path)
    with pytest.raises(RunError, match="name runs to evaluate, or a grid file with seeds"):
        evaluated([], tmp_path)
    odd = replace(erm_run, config=replace(erm_run.config, method="cs-arm-bn", context="union", stop_gradient=True))
    with pytest.raises(RunError, match="a network of no method that is evaluated"):
        evaluated([odd], tmp_path)
    shutil.copytree(run.path, tmp_path / "stopped")
    shutil.copy(tmp_path / "stopped" / BEST, tmp_path / "stopped" / COMING)
    with pytest.raises(RunError, match="stopped was stopped while it wrote its checkpoints"):
        evaluated([replace(run, path=tmp_path / "stopped")], tmp_path)


def test_a_run_on_other_images_is_not_compared_and_one_cut_short_is_told(run: Run, erm_run: Run, tmp_path: Path) -> None:
    scaled = replace(erm_run, recipe=replace(erm_run.recipe, mean=tuple(value + 1 for value in erm_run.recipe.mean)))
    with pytest.raises(RunError, match="one seed and another recipe: not comparable"):
        evaluated([run, scaled], tmp_path)
    steps = erm_run.config.steps
    longer = [replace(one, config=replace(one.config, steps=steps + 4)) for one in (run, erm_run)]
    told: list[str] = []
    evaluated(longer, tmp_path, Grid(methods=("erm",), cells=()), told)
    assert f"seed 1: erm had {steps} of {steps + 4} steps: stopped by its validation, or not finished" in told
    assert read_results(tmp_path).told == tuple(told)


def test_plates_of_two_seeds_that_share_a_name_are_not_taken_for_one(erm_run: Run) -> None:
    """As simulated ones do: every seed has its own SIM01B01P01."""
    others = dict.fromkeys(erm_run.plates, "0" * 64)
    again = FinishedRun(replace(erm_run, config=replace(erm_run.config, seed=2), plates=others), "erm")
    first = FinishedRun.of(erm_run)
    table = pd.DataFrame({"lab": ["L", "L"], "seed": [1, 2]})
    work = [(Task(seed, one, WAYS[0]), "cells", DEFAULT) for seed, one in ((1, first), (2, again))]
    assert labs_of_their_seed(table, work)["lab"].tolist() == ["L of seed 1", "L of seed 2"]
    same = [(Task(seed, first, WAYS[0]), "cells", DEFAULT) for seed in (1, 2)]
    assert labs_of_their_seed(table, same) is table


def test_baselines_of_embeddings_that_are_made_anew_do_not_stay(run: Run, tmp_path: Path) -> None:
    grid = Grid(methods=("cs-arm-bn controls",), cells=(), embeddings=("cs-arm-bn controls",))
    evaluated([run], tmp_path, grid)
    (tmp_path / "cells-embedding.parquet").touch()
    (tmp_path / "cells-embedding-others.parquet").touch()
    evaluated([run], tmp_path, grid)
    assert (tmp_path / "cells-embedding.parquet").is_file(), "the table is the same"
    evaluated([run], tmp_path, grid.model_copy(update={"embeddings": ()}))
    assert not (tmp_path / "cells-embedding.parquet").is_file()
    assert (tmp_path / "cells-embedding-others.parquet").is_file()


def written(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def budget(config: TrainingConfig) -> dict:
    return {
        "depth": 18, "width": 4, "size": 64, "crop": 48, "steps": 2, "validate_every": 1,
        "classes": list(config.classes or ()), "accelerator": "cpu",
        "shape": {"treated": 6, "controls_min": 2, "controls_max": 6, "plates": 2},
    }  # fmt: skip


def test_a_grid_file_trains_what_is_missing_once(config: TrainingConfig, tmp_path: Path) -> None:
    path = written(
        tmp_path / "grid.yaml",
        seeds=[{"seed": 3, "plates": config.plates}],
        runs=str(tmp_path / "runs"),
        training=budget(config),
        methods=["erm", "cs-arm-bn-stopgrad"],
        cells=[{"controls": [1]}],
        draws={"controls": 1, "queries": 2},
    )
    cells = evaluated([], tmp_path / "results", read_grid(path))
    assert set(cells["method"]) == {*NULLS, "erm", "cs-arm-bn-stopgrad"}
    assert set(cells["seed"]) == {3}
    trained = Run.load(tmp_path / "runs" / "seed-3" / "cs-arm-bn-stopgrad")
    assert (trained.config.context, trained.config.stop_gradient, trained.config.steps) == ("controls", True, 2)
    before = parts(tmp_path / "results")
    evaluated([], tmp_path / "results", read_grid(path))
    assert parts(tmp_path / "results") == before


def test_numbers_of_a_grid_file_may_be_words(tmp_path: Path) -> None:
    path = written(tmp_path / "grid.yaml", cells=[{"controls": ["all", 2], "query_wells": [4], "alpha": ["none", 0, 0.1]}])
    expected = {Cell(controls, 4, alpha) for controls in (ALL, 2) for alpha in (math.inf, 0, 0.1)} | {DEFAULT}
    found = read_grid(path).every_cell
    assert found[0] == DEFAULT
    assert set(found) == expected
    assert read_grid(path).ways == WAYS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"metods": ["erm"]}, "metods: Extra inputs are not permitted"),
        ({"cells": [{"controls": [-7]}]}, "no such cell"),
        ({"cells": [{"alpha": [0.1]}]}, "give query_wells beside it"),
        ({"methods": ["magic"]}, "no method 'magic'; the methods are erm, erm-zscore"),
        ({"embeddings": ["cs-arm-bn controls blended"]}, "no embeddings of 'cs-arm-bn controls blended'"),
        ({"training": {"seed": 4}}, "training in the grid has seed, which is not to be set there"),
        ({"training": {"stepps": 4}}, "training in the grid has stepps, which is not to be set there"),
        ({"training": {"steps": "many"}}, "training in the grid: steps: Input should be a valid integer"),
        ({"runs": None}, "no folder for their runs"),
        ({"seeds": [{"seed": 1, "plates": "a"}, {"seed": 1, "plates": "b"}]}, "a seed is named twice"),
    ],
)
def test_a_wrong_grid_file_is_told_before_anything_is_trained(content: dict, told: str, tmp_path: Path) -> None:
    asked = {"seeds": [{"seed": 1, "plates": str(tmp_path)}], "runs": str(tmp_path / "runs"), **content}
    with pytest.raises(RunError, match=told):
        evaluated([], tmp_path / "results", read_grid(written(tmp_path / "grid.yaml", **asked)))
    assert not (tmp_path / "runs").exists()


def test_some_of_the_seeds_can_be_asked_for(tmp_path: Path) -> None:
    seeds = [{"seed": number, "plates": "p"} for number in (1, 2, 3)]
    grid = read_grid(written(tmp_path / "grid.yaml", seeds=seeds, runs="runs"))
    assert [asked.seed for asked in grid.only([3, 1]).seeds] == [1, 3]
    assert grid.only(None) == grid
    with pytest.raises(RunError, match="no seed 4"):
        grid.only([4])


def test_what_is_no_yaml_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("methods: [erm", encoding="utf-8")
    with pytest.raises(RunError, match=r"grid\.yaml is not YAML: [^\n]*$"):
        read_grid(tmp_path / "grid.yaml")
