"""Who may import whom; and that the service runs where there is no torch."""

import ast
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICE = sorted((ROOT / "service").glob("*.py"))
MODEL = sorted((ROOT / "model").glob("*.py"))
COMMANDS = {"cli.py", "cli_operate.py", "cli_screen.py", "cli_serve.py", "terminal.py"}


def imported(path):
    """Every module a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def importers(files, package):
    return {path.name for path in files if any(f"{name}.".startswith(f"{package}.") for name in imported(path))}


@pytest.mark.parametrize("package", ["torch", "lightning", "training", "model.network"])
def test_the_service_never_imports_training_or_torch(package):
    assert importers(SERVICE, package) == set()


@pytest.mark.parametrize(
    "package", ["service", "training", "onnxruntime", "fastapi", "starlette", "httpx", "redis", "sqlite3"]
)
def test_the_model_imports_neither_of_its_users(package):
    assert importers(MODEL, package) == set()


@pytest.mark.parametrize(
    ("package", "files", "allowed"),
    [
        ("torch", MODEL, {"network.py"}),
        ("onnxruntime", SERVICE, {"runtime_onnx.py"}),
        ("openvino", SERVICE, {"runtime_openvino.py"}),
        ("onnx", SERVICE, {"graphs.py"}),
        ("redis", SERVICE, {"records_redis.py"}),
        ("sqlite3", SERVICE, {"records_sqlite.py"}),
        ("ray", SERVICE, {"screen_ray.py"}),
        ("pebble", SERVICE, {"decoding.py"}),
        ("pyarrow", SERVICE, {"arrow.py", "index.py"}),
        ("huey", SERVICE, {"queue.py"}),
        ("httpx", SERVICE, {"client.py", "references.py", "webhooks.py"}),
        ("uvicorn", SERVICE, {"protocol.py", "server.py"}),
        ("typer", SERVICE, COMMANDS),
        ("rich", SERVICE, {*COMMANDS, "logs.py"}),
        ("prometheus_client", SERVICE, {"telemetry.py"}),
        ("opentelemetry", SERVICE, {"otlp.py", "tracing.py"}),
        ("opentelemetry.sdk", SERVICE, {"otlp.py"}),
    ],
)
def test_an_edge_is_known_to_one_module(package, files, allowed):
    assert importers(files, package) == allowed


def test_routes_hold_no_try():
    tree = ast.parse((ROOT / "service" / "routes.py").read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Try | ast.TryStar) for node in ast.walk(tree))


def test_the_service_imports_where_torch_and_training_cannot_be():
    program = (
        "import sys, importlib\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'lightning', 'training') or name == 'model.network':\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"for name in {[path.stem for path in SERVICE if path.stem != '__init__']}:\n"
        "    importlib.import_module('service.' + name)\n"
        f"for name in {[path.stem for path in MODEL if path.stem not in ('__init__', 'network')]}:\n"
        "    importlib.import_module('model.' + name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_service_loads_arrow_when_a_table_is_there():
    program = "import sys, service.app; from service.tables import table_of_any_kind; table_of_any_kind(b'a\\n1')"
    for line, loaded in (("", "False"), ("; from service.arrow import parquet_table", "True")):
        command = [sys.executable, "-c", f"{program}{line}; print('pyarrow' in sys.modules)"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == loaded


def test_an_engine_is_begun_before_what_only_clients_and_servers_import():
    program = "import sys, service.cli_serve; print({'uvicorn', 'fastapi', 'onnxruntime', 'httpx'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def kept_at_home(program, home):
    """What a program leaves in the home of whoever runs it."""
    home.mkdir()
    untold = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_", "CI"))}
    graph = ROOT / "examples" / "bundles" / "cs-arm-bn" / "classify.onnx"
    command = [sys.executable, "-c", program, graph]
    subprocess.run(command, cwd=ROOT, env={**untold, "HOME": str(home)}, check=True, capture_output=True)
    return [path.name for path in home.rglob("*")]


def test_onnxruntime_tells_its_makers_nothing_of_a_lab(tmp_path):
    program = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    if not kept_at_home(program, tmp_path / "as-it-comes"):
        pytest.skip("this onnxruntime keeps no name for the machine")
    assert kept_at_home(f"import model; {program}", tmp_path / "ours") == []


def test_openvino_tells_nobody_of_a_lab(tmp_path):
    if "openvino-telemetry" not in {package.name for package in distributions()}:
        pytest.skip("this OpenVINO tells nobody")
    asked = "import socket; socket.getaddrinfo = lambda *given, **_: print('asked for', given[0]) or exit(1)"
    assert kept_at_home(f"{asked}; import openvino", tmp_path / "as-it-comes") != []
    assert kept_at_home(f"{asked}; import service.runtime_openvino", tmp_path / "ours") == []
