"""A screen goes on when a node of its Ray cluster is lost, and answers as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(600)
def test_a_screen_survives_the_loss_of_a_node(tmp_path):
    out = tmp_path / "ray.json"
    command = [sys.executable, "-m", "benchmarks.ray_cluster", "--plates", "6", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2_000:]
    found = {bar["name"]: bar["value"] for bar in json.loads(out.read_text())}
    assert found["plates_answered"] == 6
    assert found["plates_answered_when_a_node_was_killed"] < 6
    assert found["largest_difference_from_one_process"] < 1e-5
