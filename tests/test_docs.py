"""Every command of the guide runs, in order, as it stands there."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.main import get_command

from training.cli import app
from training.grid import Grid
from training.methods import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
TOLD = {
    "training.md": ("12 plates", "12 plates written", "null: majority", "report: ", "ONNX against torch"),
    "lims.md": (
        "cs-arm-bn",
        '"state":"staged"',
        '"adapted":true',
        "'Metadata_Well'",
        "batch.classified second True",
        "answered on",
    ),
    "guide.md": (
        "12 simulated plates",
        "null: intensity",
        "ONNX against torch",
        "adapted SIM02B03P01",
        "context controls",
        "context blended",
    ),
    "screens.md": (
        "2 plates answered, 0 were there already, 0 refused; 16 wells: answers",
        "1 plates answered, 0 were there already, 0 refused; 8 wells: answers-in-parts",
        "2 plates answered, 0 were there already, 0 refused; 16 wells: answers-by-ray",
    ),
}
"""Pages whose commands are run, and what these say; of two processes the one takes the first two, the other the rest."""
ANSWERS = {"guide.md": 8 * 2 + 2, "lims.md": 8 * 2}
"""Wells answered on a page."""
START_TIMEOUT_S = 60


def blocks(page: str) -> list[tuple[str, str]]:
    """A page's code blocks: (language, text), but for lines that say that they are not run."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    kept = [(language, "".join(line for line in text.splitlines(True) if "not run by the test" not in line))
            for language, text in found]  # fmt: skip
    return [(language, text) for language, text in kept if text.strip()]


@pytest.fixture
def environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ, "PATH": path, "ANCHORWELL_PORT": str(port), "ANCHORWELL_URL": f"http://127.0.0.1:{port}",
        "COLUMNS": "140", "OMP_NUM_THREADS": "2", "ANCHORWELL_BUNDLE": str(ROOT / "examples" / "bundles" / "cs-arm-bn"),
    }  # fmt: skip


def serve(text: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the guide's server and wait until it says that it is ready."""
    process = subprocess.Popen(
        ["bash", "-c", text.replace("anchorwell serve", "exec anchorwell serve")],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    watchdog.cancel()
    assert "Anchorwell is ready" in line, process.communicate()
    return process


def run(language: str, text: str, folder: Path, environment: dict[str, str]) -> str:
    local = text.replace("http://127.0.0.1:8000", environment["ANCHORWELL_URL"])
    command = [sys.executable, "-c", local] if language == "python" else ["bash", "-euo", "pipefail", "-c", local]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", TOLD)
def test_every_command_of_a_page_runs_as_it_stands(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    server, shell, outputs = None, "", []
    try:
        for language, text in blocks(page):
            if "anchorwell serve" in text:
                server = serve(shell + text.strip(), tmp_path, environment)
                continue
            variables = re.findall(r"^\w+=.*[^\\]\n", text, re.MULTILINE) if language == "bash" else []
            outputs.append(run(language, shell + text if language == "bash" else text, tmp_path, environment))
            shell += "".join(variables)
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(90) in (0, -signal.SIGTERM)
            server.communicate()
    told = "\n".join(outputs)
    for words in TOLD[page]:
        assert words in told, told
    if page in ANSWERS:
        assert len(pd.read_csv(tmp_path / "answers.csv")) == ANSWERS[page]


def test_the_commands_for_the_full_set_have_only_options_that_there_are() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = get_command(app)
    lines = block.replace("\\\n", " ").splitlines()
    assert len(lines) > 3
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert program == "anchorwell-train"
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= known, line


def test_the_grid_that_the_documentation_shows_is_one() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    grid = Grid.model_validate(yaml.safe_load(block))
    configured = [grid.config(seed, NETWORKS[way.network]) for seed in grid.seeds for way in grid.ways]
    assert {(config.depth, config.steps, config.shape.plates) for config in configured} == {(18, 700, 4)}


def test_the_readme_names_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text(encoding="utf-8")):
        name = "".join(target)
        assert name.startswith("http") or (ROOT / name).exists(), name
