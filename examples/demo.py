"""The demo: two simulated plates of a lab that no bundle ever saw, through the real service, adapted and not.

Simulates the plates, starts ``anchorwell serve`` on a free loopback port for each of the two committed bundles, uploads
the control wells and classifies the treated ones through the client. Writes ``build/demo/summary.json`` and
``build/demo/plates.png``. Needs no torch.

Run: ``make demo``, or ``python -m examples.demo``.
"""

import csv
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from examples.plate_picture import Call, PlatePicture, draw_plates
from model.layout import parse_file_name, parse_platemap
from service.client import AnchorwellClient
from service.schemas import Prediction
from training.simulate import CLASSES, SimulationPlan, simulate

OUT = Path("build/demo")
BUNDLES = Path(__file__).parent / "bundles"
PLAN = SimulationPlan(labs=1, batches=1, plates=2, first_lab=5, seed=2025, sites=2, wells_per_class=8, inactive_wells=8)
START_TIMEOUT_S = 60
console = Console()


@dataclass(frozen=True)
class Plate:
    """One simulated plate: its barcode, image files by role, pixel size and the true label of each well."""

    name: str
    controls: tuple[Path, ...]
    treated: tuple[Path, ...]
    pixel_size_um: float
    labels: dict[str, str]

    @property
    def scored(self) -> list[str]:
        """Wells that have a class."""
        return sorted(well for well, label in self.labels.items() if label in CLASSES)


@dataclass(frozen=True)
class Answers:
    """One plate's answers: the ERM twin unadapted and on the plate's controls (AdaBN); CS-ARM-BN on source and adapted."""

    unadapted: Prediction
    adabn: Prediction
    source: Prediction
    adapted: Prediction


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a stage and show its progress bar."""
        started = time.monotonic()
        with Progress(
            TextColumn(f"{name:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), console=console
        ) as bar:
            task = bar.add_task(name, total=1)
            yield lambda done, total: bar.update(task, completed=done, total=total)
            bar.update(task, completed=1, total=1)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)


# --- the story -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the demo; exit code 1 when a server does not end cleanly."""
    started, clock = time.monotonic(), Clock()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    console.print("Two SIMULATED plates of a lab that the bundles never saw\n", style="bold")
    with clock.stage("simulate") as tell:
        report = simulate(PLAN, OUT / "plates", workers=2, progress=tell)
    plates = [read_plate(OUT / "plates" / folder) for folder in report.plates]
    answers, peak_server_mb = serve_and_ask(plates, clock)
    with clock.stage("draw"):
        picture = OUT / "plates.png"
        draw_plates([plate_picture(*pair) for pair in zip(plates, answers, strict=True)], CLASSES, picture)
    summary = {
        "unadapted_accuracy": accuracy(plates, [a.unadapted for a in answers]),
        "adabn_accuracy": accuracy(plates, [a.adabn for a in answers]),
        "source_accuracy": accuracy(plates, [a.source for a in answers]),
        "adapted_accuracy": accuracy(plates, [a.adapted for a in answers]),
        "wells": sum(len(plate.scored) for plate in plates),
        "seconds": {**clock.seconds, "total": round(time.monotonic() - started, 2)},
        "peak_rss_mb": round(peak_server_mb + own_peak_mb()),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary, plates, answers, picture)


def serve_and_ask(plates: list[Plate], clock: Clock) -> tuple[list[Answers], float]:
    """Serve both bundles, adapt and classify every plate; returns the answers and the servers' peak memory in MB."""
    with clock.stage("start both servers"):
        servers = [Server(BUNDLES / name, OUT) for name in ("cs-arm-bn", "erm")]
    ours, erm = servers
    try:
        with AnchorwellClient(ours.url) as client, AnchorwellClient(erm.url) as erm_client:
            answers = [ask(plate, client, erm_client, clock) for plate in plates]
    finally:
        peaks = [server.stop() for server in servers]
    return answers, sum(peaks)


def ask(plate: Plate, client: AnchorwellClient, erm_client: AnchorwellClient, clock: Clock) -> Answers:
    """Adapt one plate to its controls and classify its treated wells, four ways."""
    size = plate.pixel_size_um
    with clock.stage("upload controls, adapt") as tell:
        client.adapt(plate.name, plate.controls, pixel_size_um=size, progress=tell)
    with clock.stage("classify, adapted") as tell:
        adapted = client.predict(plate.name, plate.treated, pixel_size_um=size, progress=tell)
    with clock.stage("classify, source") as tell:
        source = client.predict(plate.name, plate.treated, pixel_size_um=size, context="source", progress=tell)
    with clock.stage("classify, ERM") as tell:
        unadapted = erm_client.predict(plate.name, plate.treated, pixel_size_um=size, context="source", progress=tell)
    with clock.stage("the same, AdaBN") as tell:
        erm_client.adapt(plate.name, plate.controls, pixel_size_um=size)
        adabn = erm_client.predict(plate.name, plate.treated, pixel_size_um=size, progress=tell)
    return Answers(unadapted=unadapted, adabn=adabn, source=source, adapted=adapted)


# --- plates ----------------------------------------------------------------------------------------------------------


def read_plate(folder: Path) -> Plate:
    """Read a simulated plate's folder: which files are controls, the pixel size, and the labels to score with."""
    platemap = (folder / "platemap.csv").read_text(encoding="utf-8")
    roles = parse_platemap(platemap)
    rows = {row["well"]: row["label"] for row in csv.DictReader(platemap.splitlines())}
    with (folder / "load_data.csv").open(encoding="utf-8") as table:
        resolution = float(next(csv.DictReader(table))["Metadata_ImageResolutionX"])  # metres per pixel, as in JUMP
    files = sorted((folder / "images").glob("*.tif"))
    role = {path: roles[parse_file_name(path.name).well] for path in files}
    return Plate(
        name=folder.name,
        controls=tuple(path for path in files if role[path] == "control"),
        treated=tuple(path for path in files if role[path] == "treated"),
        pixel_size_um=resolution * 1e6,
        labels={well: label for well, label in rows.items() if roles[well] == "treated"},
    )


def accuracy(plates: list[Plate], predictions: list[Prediction]) -> float:
    """Share of the wells that have a class whose answer is that class."""
    hits = []
    for plate, prediction in zip(plates, predictions, strict=True):
        called = {answer.well: answer.label for answer in prediction.wells}
        hits += [called[well] == plate.labels[well] for well in plate.scored]
    return round(sum(hits) / len(hits), 4)


def plate_picture(plate: Plate, answers: Answers) -> PlatePicture:
    """Pair the unadapted and the adapted calls of one plate for drawing."""

    def calls(prediction: Prediction) -> dict[str, Call]:
        return {
            answer.well: Call(answer.label, answer.probability, like_control=bool(answer.resembles_controls))
            for answer in prediction.wells
        }

    return PlatePicture(plate.name, plate.labels, {
        "ERM, unadapted": calls(answers.unadapted), "CS-ARM-BN, adapted": calls(answers.adapted),
    })  # fmt: skip


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """``anchorwell serve`` as its own process, on a free loopback port with the embedded store."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        command = [
            str(Path(sys.executable).with_name("anchorwell")), "serve", "--bundle", str(bundle),
            "--data", str((folder / bundle.name).resolve()), "--port", "0", "--device", "cpu",
        ]  # fmt: skip
        self.log = folder / f"{bundle.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 (our own program)
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"ready at (http://\S+)", self.log.read_text(encoding="utf-8"))
            if found:
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise SystemExit(f"the server did not start; {self.log} says why:\n{self.log.read_text(encoding='utf-8')}")

    def stop(self) -> float:
        """Stop the server; returns its peak memory in MB."""
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii"))
        self.process.terminate()
        code = self.process.wait(timeout=30)
        if code not in (0, -signal.SIGTERM):  # uvicorn shuts down, then passes the signal on
            raise SystemExit(f"the server ended with code {code}; {self.log} says why")
        return int(peak[1]) / 1024 if peak else 0.0


def own_peak_mb() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- what is shown ---------------------------------------------------------------------------------------------------


def show(summary: dict[str, object], plates: list[Plate], answers: list[Answers], picture: Path) -> None:
    """Print accuracies, what inactive wells got, and where the files are."""
    table = Table(title=f"Accuracy per well, {summary['wells']} wells of 8 classes (chance 0.125)", title_justify="left")
    table.add_column("what answers")
    table.add_column("accuracy", justify="right")
    table.add_row("ERM network, unadapted", f"{summary['unadapted_accuracy']:.3f}")
    table.add_row("ERM network on each plate's DMSO statistics (AdaBN)", f"{summary['adabn_accuracy']:.3f}")
    table.add_row("CS-ARM-BN network on its source statistics", f"{summary['source_accuracy']:.3f}")
    table.add_row("CS-ARM-BN network, adapted to each plate's DMSO wells", f"[bold]{summary['adapted_accuracy']:.3f}[/]")
    console.print()
    console.print(table)
    for kind, wells in (("inactive compounds", {"inactive"}), ("the 8 classes", set(CLASSES))):
        marked, total = marked_like_controls(plates, answers, wells)
        console.print(f"Wells of {kind} marked resembles_controls: {marked} of {total}")
    seconds = summary["seconds"]
    assert isinstance(seconds, dict)
    console.print("Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    console.print(f"Peak memory: {summary['peak_rss_mb']} MB")
    console.print(f"Picture: {picture}   Figures: {OUT / 'summary.json'}")


def marked_like_controls(plates: list[Plate], answers: list[Answers], labels: set[str]) -> tuple[int, int]:
    """Count the wells of some labels, and those of them that the adapted answers mark as resembling the controls."""
    marks = [
        bool(answer.resembles_controls)
        for plate, given in zip(plates, answers, strict=True)
        for answer in given.adapted.wells
        if plate.labels[answer.well] in labels
    ]
    return sum(marks), len(marks)


if __name__ == "__main__":
    main()
