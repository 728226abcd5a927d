"""Cost: operations are counted right, statistics weigh what they weigh, and every way is measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.network import NetworkSpec, ResNet
from model.statistics import BatchNormStatistics
from training.cost import WAYS, Workload, cost_markdown, flops, kept_bytes, peak_bytes, write_cost

SMALL = Workload(NetworkSpec(channels=2, classes=3, depth=18, width=4, antialiased=True), 64, 8, 4, minibatch=4, steps=10)


def convolutions(spec: NetworkSpec, size: int) -> int:
    """Operations of one image's pass, from the shapes that its convolutions and its classifier see."""
    counted = 0

    def count(module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        places = output[0, 0].numel() if output.ndim == 4 else 1
        counted += 2 * weight.numel() * places

    network = ResNet(spec)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, spec.channels, size, size), lambda x, _: x)
    return counted


def test_operations_are_those_of_the_convolutions_and_grow_with_the_images() -> None:
    found = flops(SMALL)
    assert tuple(found) == WAYS
    image = convolutions(SMALL.spec, SMALL.size)
    assert found["forward"] == 8 * image
    assert found["measure"] == 4 * image
    assert flops(replace(SMALL, treated=80))["forward"] == 80 * image, "more than one chunk"
    assert flops(replace(SMALL, steps=20))["finetune-all"] == 2 * found["finetune-all"]
    assert 2.5 < found["finetune-all"] / (40 * image) <= 3, "a step is a pass and two more backwards, but for the images"
    assert found["finetune-affine"] < found["finetune-all"]
    assert 1 < found["tent"] / found["forward"] < 3


def test_the_papers_network_takes_two_hundred_kilobytes_a_plate() -> None:
    paper = replace(SMALL, spec=NetworkSpec(channels=5, classes=8, depth=50, width=64, antialiased=True))
    kept = kept_bytes(paper)
    assert kept["measure"] == 212_480 + len(BatchNormStatistics(*[torch.zeros(0).numpy()] * 2, 0, 0).to_bytes())
    assert kept["finetune-all"] == 4 * (23_530_696 + 2 * 26_560)
    assert kept["tent"] == 4 * 2 * 26_560
    assert kept["forward"] == 0


def test_memory_is_that_of_a_process_that_does_nothing_else() -> None:
    small, large = (peak_bytes(replace(SMALL, controls=count), "measure") for count in (2, 256))
    assert small[0] > 50e6, "torch alone is more"
    assert large[1] > small[1] + 256 * 2 * 64 * 64, "activations of more images"


def test_every_way_is_measured_and_written_for_the_report(tmp_path: Path) -> None:
    text = write_cost(SMALL, tmp_path, rounds=1)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert [row["way"] for row in cost["rows"]] == list(WAYS)
    assert cost_markdown(cost) == text == (tmp_path / "cost.md").read_text().rstrip()
    assert "| measure | controls |" in text
    for row in cost["rows"]:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["peak_bytes"] >= row["added_bytes"] >= 0


@pytest.mark.parametrize("name", ["controls", "size", "steps"])
def test_a_workload_without_images_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it is 1 or more"):
        replace(SMALL, **{name: 0})
    with pytest.raises(ValueError, match="width is 0; it is 1 or more"):
        replace(SMALL, spec=replace(SMALL.spec, width=0))


def test_no_rounds_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds is 0; it is 1 or more"):
        write_cost(SMALL, tmp_path / "out", rounds=0)
    assert not (tmp_path / "out").exists()


def test_a_table_of_costs_is_not_left_beside_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the new values are written leaves the old ones whole."""
    (tmp_path / "cost.json").write_text("old")
    (tmp_path / "cost.md").write_text("old")

    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.cost.measure_cost", lambda *_: {})
    monkeypatch.setattr("training.cost.cost_markdown", lambda _: "new")
    monkeypatch.setattr("training.cost.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write_cost(SMALL, tmp_path, rounds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    assert (tmp_path / "cost.json").read_text() == "old"
