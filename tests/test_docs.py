"""Every command of the guide runs, in order, as it stands there."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guide.md"
START_TIMEOUT_S = 60


def blocks() -> list[tuple[str, str]]:
    """The guide's code blocks: (language, text), but for lines that say that they are not run."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
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
        "COLUMNS": "140", "OMP_NUM_THREADS": "2",
    }  # fmt: skip


def serve(text: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the guide's server and wait until it says that it is ready."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {text}"],
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


def test_every_command_of_the_guide_runs_as_it_stands(tmp_path: Path, environment: dict[str, str]) -> None:
    server, shell, outputs = None, "", []
    try:
        for language, text in blocks():
            if text.startswith("anchorwell serve"):
                server = serve(text.strip(), tmp_path, environment)
                continue
            variables = re.findall(r"^\w+=.*\n", text, re.MULTILINE) if language == "bash" else []
            outputs.append(run(language, shell + text if language == "bash" else text, tmp_path, environment))
            shell += "".join(variables)
    finally:
        if server is not None:
            server.terminate()
            assert server.wait(30) in (0, -signal.SIGTERM)
            server.communicate()
    told = "\n".join(outputs)
    for words in ("12 simulated plates", "null: intensity", "ONNX against torch", "adapted SIM02B03P01", "context controls"):
        assert words in told
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert len(answers) == 8 * 2 + 2


def test_the_readme_names_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text(encoding="utf-8")):
        name = "".join(target)
        assert name.startswith("http") or (ROOT / name).exists(), name
