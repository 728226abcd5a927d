"""The command line: simulation needs no torch, and wrong input is one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from tests.training import made_up
from training import cli
from training.index import write_index

WITHOUT_TORCH = """
import sys
for name in ("torch", "lightning", "pandas", "onnx", "sklearn"):
    sys.modules[name] = None  # importing it raises ImportError
from training.cli import main
main()
"""


def run(*arguments: str, code: str = "from training.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_plates_are_simulated_without_torch(tmp_path: Path) -> None:
    small = (
        "--labs",
        "1",
        "--batches",
        "1",
        "--plates",
        "1",
        "--sites",
        "1",
        "--wells-per-class",
        "0",
        "--inactive-wells",
        "0",
    )
    done = run("simulate", str(tmp_path / "plates"), *small, code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert "1 simulated plates, 16 sites" in done.stdout
    assert len(list(tmp_path.rglob("*.tif"))) == 16 * 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("simulate", "{out}", "--wells-per-class", "50"), "the plate has room for 80"),
        (("index", "{out}", "--out", "{out}/index.csv"), "no load_data.csv below"),
        (("fetch", "{out}/index.csv", "{out}/plates", "--scaling", "none"), "index.csv"),
        (("fetch", "{index}", "{out}/plates", "--pixel-size-um", "0"), "pixel_size_um 0 is not positive and finite"),
        (("index", "{out}", "--out", "{out}/i.csv", "--channels", "DNA,DNA"), "'DNA' is empty or there twice"),
        (("fetch", "{index}", "{out}/plates", "--workers", "0"), "workers is 0; it is 1 or more"),
        (("fetch", "{index}", "{out}/plates", "--shrink", "0"), "shrink is 0; it is a number of pixels, 1 or more"),
        (("train", "{out}/plates", "{out}/run"), "holds no plates"),
        (("train", "{out}/plates", "{out}/run", "--method", "magic"), "no method 'magic'"),
        (("train", "{out}/plates", "{out}/run", "--depth", "19"), "depth is 19; it is one of 18, 34, 50"),
        (("train", "{out}/plates", "{out}/run", "--accelerator", "tpu"), "accelerator is tpu; it is one of auto, cpu, gpu"),
        (("train", "{out}/plates", "{out}/run", "--treated", "0"), "treated is 0; it is 1 or more"),
        (("evaluate", "--out", "{out}/results"), "name runs to evaluate, or a grid file with seeds to train"),
        (("evaluate", "{out}/run", "--out", "{out}/results"), "run.json"),
        (("index", "{out}", "--out", "{out}/i.csv", "--load-data", "x"), "--out ends in .parquet"),
        (("index", "{out}", "--out", "{out}/i.parquet", "--load-data", "x"), "no plate.csv or plate.csv.gz in it"),
        (("export", "{out}/run", "."), "is not empty"),
        (("export", "{out}/run", "{out}/bundle"), "run.json"),
        (
            (
                "import-checkpoint",
                "{out}",
                "--classes",
                "a,b",
                "--calibration",
                "{out}",
                "--out",
                "{out}/b",
                "--context",
                "panel",
            ),
            "--context is one of controls, union, source",
        ),
        (("report", "{out}", "--out", "{out}/report"), "has no cells.parquet"),
        (("embeddings", "{out}/table.parquet", "--out", "{out}"), "table.parquet"),
        (("cost", "--depth", "19", "--out", "{out}"), "--depth is one of 18, 34, 50"),
        (("cost", "--size", "0", "--out", "{out}"), "size is 0; it is 1 or more"),
    ],
)
def test_wrong_input_is_told_without_a_traceback(
    arguments: tuple[str, ...], told: str, index: pd.DataFrame, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_index(index, tmp_path / "plates.csv")
    error = refused(*(argument.format(out=tmp_path, index=tmp_path / "plates.csv") for argument in arguments))
    assert told in " ".join(error.split())
    assert "Traceback" not in error


def test_a_command_that_is_refused_ends_with_an_error_and_no_traceback(tmp_path: Path) -> None:
    done = run("train", str(tmp_path / "plates"), str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command that ends with an error says on standard error, within this process, which has torch loaded."""

    def told(*arguments: str | Path, codes: tuple[int, ...] = (1, 2)) -> str:
        monkeypatch.setattr(sys, "argv", ["anchorwell-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in codes
        return capsys.readouterr().err

    return told


@pytest.fixture
def told_by_main(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The last line of that, whole, of one that ends with 1."""
    monkeypatch.setattr(cli, "console", Console(stderr=True, width=1_000))
    return lambda *arguments: refused(*arguments, codes=(1,)).splitlines()[-1]


def test_a_file_in_the_way_is_one_line_with_its_path(
    index: pd.DataFrame, plates_root: Path, tmp_path: Path, told_by_main: Callable[..., str]
) -> None:
    table = tmp_path / "index.csv"
    write_index(index, table)
    assert told_by_main("simulate", table) == f"error: {table}: File exists"
    assert told_by_main("fetch", table, table) == f"error: {table}: File exists"
    assert told_by_main("index", plates_root, "--out", table / "i.csv") == f"error: {table}: File exists"


def test_a_full_disk_is_one_line_with_the_path(plates_root: Path, tmp_path: Path, told_by_main: Callable[..., str]) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "index.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        told = told_by_main("index", plates_root, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told == f"error: {out}: File too large"


def test_a_full_disk_is_told_by_folder_whatever_is_written(
    tmp_path: Path, told_by_main: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder, out = made_up.write(tmp_path / "results", made_up.cells(seeds=1)), tmp_path / "out"
    monkeypatch.setattr("training.plots.accuracies", full)
    assert told_by_main("report", folder, "--out", out) == f"error: {out}: No space left on device"
    monkeypatch.setattr("training.embeddings.write_whole", full)
    told = told_by_main("embeddings", folder / "embeddings.parquet", "--out", out)
    assert told == f"error: {out}: No space left on device"
    monkeypatch.setattr("training.cost.measure_cost", full)
    assert told_by_main("cost", "--out", out) == f"error: {out}: No space left on device"


def test_a_method_that_was_not_evaluated_is_not_reported(tmp_path: Path, told_by_main: Callable[..., str]) -> None:
    folder = made_up.write(tmp_path / "results", made_up.cells(seeds=1))
    for asked in (("--method", "nope"), ("--context", "nope")):
        assert " with context " in told_by_main("report", folder, "--out", tmp_path / "report", *asked)
        assert not (tmp_path / "report").exists()


def test_embeddings_are_scored_into_a_results_folder_and_reported_beside_the_rest(tmp_path: Path) -> None:
    cells = made_up.cells()
    one = cells["plate"] == cells.loc[cells["setting"] == "new_batch", "plate"].iloc[0]
    place = {"lab": "L1", "batch": "B7", "plate": "B7p2"}  # a plate of the embeddings too
    shared = cells.assign(**{name: cells[name].where(~one, value) for name, value in place.items()})
    folder = made_up.write(tmp_path / "results", shared)
    embedded = run("embeddings", str(folder / "embeddings.parquet"), "--out", str(folder))
    assert embedded.returncode == 0, embedded.stderr
    assert "tvn erm source new_lab: " in embedded.stdout
    reported = run("report", str(folder), "--out", str(tmp_path / "report"), "--method", "arm-bn", "--context", "treated")
    assert reported.returncode == 0, reported.stderr
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| tvn (erm source) |" in text
    assert "arm-bn (treated) in domain" in text, "the method asked for has the confusions"
