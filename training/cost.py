"""Cost: what adapting to one batch takes, beside the plain forward pass and beside fine-tuning on that batch.

forward          classify the batch's treated images with statistics that are given: what is paid anyway
measure          one pass over the control images: all that adapting by statistics adds
tent             entropy minimisation (Wang et al. 2021): one pass over the treated images in minibatches, each normalised by
                 its own statistics, with a gradient step on BN scale and shift alone; needs no labels
finetune-affine  ``steps`` steps of cross-entropy on labelled wells of the batch, on BN scale and shift alone
finetune-all     the same on all weights

Knows nothing of accuracy: what each is worth stands elsewhere. Time and memory are torch's, on the machine that measured;
the service runs on another engine.
"""

import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from torch.utils.flop_counter import FlopCounterMode

from model.network import BatchNorm, FromContext, Given, NetworkSpec, ResNet, Running
from model.statistics import BatchNormStatistics
from training.plates import write_whole
from training.results import COST

WAYS = ("forward", "measure", "tent", "finetune-affine", "finetune-all")
_NEEDS = MappingProxyType(
    {
        "forward": "nothing",
        "measure": "controls",
        "tent": "all treated images at once",
        "finetune-affine": "labelled wells of the batch",
        "finetune-all": "labelled wells of the batch",
    }
)
_FLOAT = 4
_CHUNK = 64


@dataclass(frozen=True)
class Workload:
    """One batch: treated and control images of ``size`` pixels, and how fine-tuning would go about it.

    Raises:
        ValueError: a number of it is less than 1.
    """

    spec: NetworkSpec
    size: int
    treated: int
    controls: int
    minibatch: int = 32
    steps: int = 100

    def __post_init__(self) -> None:
        _require_one("size", self.size)
        for name in ("treated", "controls", "minibatch", "steps"):
            _require_one(name, getattr(self, name))
        for name in ("channels", "classes", "width"):
            _require_one(name, getattr(self.spec, name))

    @property
    def tent_steps(self) -> int:
        """Minibatches of the treated images; the last may be smaller."""
        return -(-self.treated // self.minibatch)


def _require_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it is 1 or more")


class _Bench:
    """A network and images of a workload, on one device, and the five ways to run them."""

    def __init__(self, workload: Workload, device: str) -> None:
        torch.manual_seed(0)
        self.workload = workload
        with torch.device(device):
            self.network = ResNet(workload.spec)
        self.given = Given(*(value.clone() for value in self.network.running_statistics()))
        self.optimiser: torch.optim.Optimizer | None = None

    def images(self, count: int) -> Tensor:
        """Noise: what an image shows does not change its cost."""
        weight = self.network.conv1.weight
        return torch.randn(count, self.workload.spec.channels, self.workload.size, self.workload.size, device=weight.device)

    def trained(self, way: str) -> list[torch.nn.Parameter]:
        """Parameters that a gradient step of ``way`` changes."""
        if way == "finetune-all":
            return list(self.network.parameters())
        layers = [module for module in self.network.modules() if isinstance(module, BatchNorm)]
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]

    def prepare(self, way: str) -> Callable[[], None]:
        """Return what runs ``way`` once: the whole of forward and measure, one minibatch's step of the others."""
        work = self.workload
        if way == "forward":
            images = self.images(min(_CHUNK, work.treated))
            return lambda: self._forward(images, work.treated)
        if way == "measure":
            images = self.images(work.controls)
            return lambda: self._measure(images)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        trained = [parameter.requires_grad_(True) for parameter in self.trained(way)]
        self.optimiser = torch.optim.Adam(trained, lr=1e-3)
        images = self.images(min(work.minibatch, work.treated) if way == "tent" else work.minibatch)
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return lambda: self._step(images, None if way == "tent" else labels)

    @torch.no_grad()
    def _forward(self, images: Tensor, count: int) -> None:
        for at in range(0, count, len(images)):
            self.network(images[: count - at], self.given)

    @torch.no_grad()
    def _measure(self, images: Tensor) -> None:
        norm = FromContext()
        self.network(images, norm)
        norm.statistics()

    def _step(self, images: Tensor, labels: Tensor | None) -> None:
        assert self.optimiser is not None
        logits, _ = self.network(images, FromContext() if labels is None else Running(update=True))
        if labels is None:
            loss = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
        else:
            loss = F.cross_entropy(logits, labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def repeats(self, way: str) -> float:
        """How often ``prepare``'s callable runs for a whole batch; TENT's last minibatch counts by its size."""
        if way in ("forward", "measure"):
            return 1.0
        work = self.workload
        return work.treated / min(work.minibatch, work.treated) if way == "tent" else float(work.steps)


def flops(workload: Workload) -> dict[str, float]:
    """Floating-point operations of each way for one batch: convolutions and matrix products, a multiply-add counting two.

    Counted from torch's operators on tensors without data; normalisation and activations are left out.
    """
    bench = _Bench(workload, "meta")
    found = {}
    for way in WAYS:
        once = bench.prepare(way)
        with FlopCounterMode(display=False) as counter:
            once()
        found[way] = counter.get_total_flops() * bench.repeats(way)
    return found


def kept_bytes(workload: Workload) -> dict[str, int]:
    """Bytes that must be kept for a batch so that its next well is answered alike: statistics, or changed parameters."""
    bench = _Bench(workload, "meta")
    features = bench.network.features
    values = np.zeros(features, np.float32)
    statistics = len(BatchNormStatistics(values, values, workload.controls, 1).to_bytes())
    affine, everything = (sum(p.numel() for p in bench.trained(way)) * _FLOAT for way in ("tent", "finetune-all"))
    running = 2 * features * _FLOAT
    return {
        "forward": 0, "measure": statistics, "tent": affine, "finetune-affine": affine + running,
        "finetune-all": everything + running,
    }  # fmt: skip


def seconds(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way for one batch, one value a round; the ways take turns, so that the machine's moods fall on all.

    A way of many like steps is timed by one of them.
    """
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    bench = _Bench(workload, "cpu")
    for number in range(rounds + 1):  # the first is not counted: memory is made and kernels are chosen in it
        for way in WAYS:
            once = bench.prepare(way)
            gc.collect()
            started = time.perf_counter()
            once()
            if number:
                found[way].append((time.perf_counter() - started) * bench.repeats(way))
    return found


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(workload: Workload, way: str) -> tuple[int, int]:
    """Run ``way`` once in a process of its own: (its largest resident size, what of that the run itself added)."""
    program = "import sys; from training.cost import measure_memory; measure_memory(sys.argv[1], sys.argv[2])"
    content = json.dumps({**asdict(workload), "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-c", program, content, way], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed: {done.stderr[-2000:]}")
    before, peak = json.loads(done.stdout)
    return peak, max(0, peak - before)


def measure_memory(content: str, way: str) -> None:
    """Print [resident bytes before, largest resident bytes] of one run of ``way``: the child's part of ``peak_bytes``."""
    values = json.loads(content)
    torch.set_num_threads(values.pop("threads"))
    bench = _Bench(Workload(**{**values, "spec": NetworkSpec(**values["spec"])}), "cpu")
    once = bench.prepare(way)
    gc.collect()
    before = _resident("VmRSS")
    once()
    print(json.dumps([before, _resident("VmHWM")]))  # noqa: T201 (read by the parent)


def _resident(name: str) -> int:
    """Resident bytes now (VmRSS) or at most (VmHWM); where there is no /proc, the largest so far for both.

    ``ru_maxrss`` alone would not do: on Linux a child inherits its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(lines[name].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- report ----------------------------------------------------------------------------------------------------------


def measure_cost(workload: Workload, rounds: int = 5) -> dict[str, Any]:
    """Measure everything: plain values, for ``cost.json`` and ``cost_markdown``.

    Raises:
        ValueError: fewer rounds than one.
    """
    _require_one("rounds", rounds)
    operations, kept, times = flops(workload), kept_bytes(workload), seconds(workload, rounds)
    rows = []
    for way in WAYS:
        peak, added = peak_bytes(workload, way)
        low, median, high = (float(value) for value in np.quantile(times[way], [0.25, 0.5, 0.75]))
        rows.append({
            "way": way, "needs": _NEEDS[way], "flops": operations[way], "seconds": median, "seconds_low": low,
            "seconds_high": high, "kept_bytes": kept[way], "peak_bytes": peak, "added_bytes": added,
        })  # fmt: skip
    cores = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine = {**cores, "torch": torch.__version__}
    return {"workload": asdict(workload), "rounds": rounds, "machine": machine, "rows": rows}


def write_cost(workload: Workload, out: Path, rounds: int) -> str:
    """Measure and write ``cost.json`` and ``cost.md`` into a folder; returns the Markdown.

    Raises:
        ValueError: see ``measure_cost``.
    """
    cost = measure_cost(workload, rounds)
    text = cost_markdown(cost)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cost.md").unlink(missing_ok=True)  # so that it does not stand beside values of another measurement
    write_whole(out / COST, (json.dumps(cost, indent=1) + "\n").encode())
    write_whole(out / "cost.md", f"{text}\n".encode())
    return text


def cost_markdown(cost: Mapping[str, Any]) -> str:
    """Set a measured cost as a table, each way beside the plain forward pass."""
    work, machine, spec = cost["workload"], cost["machine"], cost["workload"]["spec"]
    plain = cost["rows"][0]
    lines = [
        "| way | needs | GFLOP | of forward | seconds (quartiles) | of forward | MB kept a batch | peak MB (of it added) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['way']} | {row['needs']} | {row['flops'] / 1e9:,.1f} | {row['flops'] / plain['flops']:.2f} | "
            f"{row['seconds']:.2f} ({row['seconds_low']:.2f} to {row['seconds_high']:.2f}) | "
            f"{row['seconds'] / plain['seconds']:.2f} | {row['kept_bytes'] / 1e6:.3f} | "
            f"{row['peak_bytes'] / 1e6:,.0f} ({row['added_bytes'] / 1e6:,.0f}) |"
            for row in cost["rows"]
        ),
    ]
    told = (
        f"One batch of {work['treated']} treated and {work['controls']} control images of {spec['channels']} x "
        f"{work['size']} x {work['size']} pixels; ResNet-{spec['depth']} of width {spec['width']}. Fine-tuning takes "
        f"{work['steps']} steps, TENT one pass over the treated images, in minibatches of {work['minibatch']}. Operations "
        "are those of convolutions and matrix products, a multiply-add counting two. Seconds: medians and quartiles of "
        f"{cost['rounds']} interleaved rounds in torch {machine['torch']} on {machine['threads']} threads of "
        f"{machine['cores']} {machine['processor']} cores; the time of many like steps is that of one, times their number. "
        "Memory: the largest "
        "resident size of a process that did this alone, in brackets what it added to what the process, its network and its "
        "images had. Kept: statistics, or the parameters that were changed and running statistics. Accuracy is no part of "
        "this table."
    )
    return f"{told}\n\n" + "\n".join(lines)
