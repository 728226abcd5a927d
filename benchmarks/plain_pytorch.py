"""What a lab would write by itself: PyTorch alone, batch normalisation in train mode on the controls, then treated sites.

A yardstick, and frozen: it was written before the service was made faster, shares no code with it, and is not to be tuned.
It reads TIFFs with tifffile, prepares them as published (Sanchez-Fernandez et al. 2026: halve by nearest neighbour, each
plane's 99.99th percentile to 8 bit, shift and divide by channel, centre crop), measures the controls in one forward pass
and classifies the rest in minibatches, decoding in two worker processes.

Run: ``python -m benchmarks.plain_pytorch SITES.json WEIGHTS.pt OUT.npz``. SITES.json has ``controls`` and ``treated``, lists
of sites, each the paths of its planes in channel order; ``mean``, ``std`` and ``classes``. WEIGHTS.pt is a state dict.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SIZE = 256
MINIBATCH = 32


class Sites(Dataset[torch.Tensor]):
    """Prepared sites (channels, 256, 256)."""

    def __init__(self, paths: list[list[str]], mean: list[float], std: list[float]) -> None:
        self.paths = paths
        self.mean = np.array(mean, np.float32)[:, None, None]
        self.std = np.array(std, np.float32)[:, None, None]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        planes = []
        for path in self.paths[index]:
            plane = tifffile.imread(path)[::2, ::2].astype(np.float32)
            low, high = plane.min(), np.percentile(plane, 99.99)
            plane = np.clip((plane - low) / (high - low), 0, 1)
            planes.append((plane * 255).astype(np.uint8))
        site = np.stack(planes).astype(np.float32) / 255
        site = (site - self.mean) / self.std
        top, left = (site.shape[1] - SIZE) // 2, (site.shape[2] - SIZE) // 2
        return torch.from_numpy(site[:, top : top + SIZE, left : left + SIZE].copy())


class Shortcut(nn.Module):
    """Average pool, 1 x 1 convolution, batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.conv(self.pool(x)))
        return out


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1; anti-aliased."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = Shortcut(inputs, 4 * width, stride) if stride > 1 or inputs != 4 * width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.pool(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        added: torch.Tensor = self.relu(out + (x if self.shortcut is None else self.shortcut(x)))
        return added


class ResNet50(nn.Module):
    """The published network."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks, inputs = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for number in range(count):
                blocks.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not number else 1))
                inputs = 256 * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(self.relu(self.bn1(self.conv1(images)))))
        logits: torch.Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def adapt(network: ResNet50, images: torch.Tensor) -> None:
    """Replace the running statistics by those of the controls, in one forward pass."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(images)
    network.eval()


def main() -> None:
    """Adapt to a plate's controls and classify its treated sites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plate = json.loads(arguments.sites.read_text())
    network = ResNet50(len(plate["mean"]), plate["classes"])
    network.load_state_dict(torch.load(arguments.weights, weights_only=True), strict=False)
    started = time.perf_counter()
    controls = DataLoader(Sites(plate["controls"], plate["mean"], plate["std"]), MINIBATCH, num_workers=arguments.workers)
    adapt(network, torch.cat(list(controls)))
    adapted = time.perf_counter()
    treated = DataLoader(Sites(plate["treated"], plate["mean"], plate["std"]), MINIBATCH, num_workers=arguments.workers)
    with torch.no_grad():
        logits = torch.cat([network(images) for images in treated])
    ended = time.perf_counter()
    np.savez(arguments.out, logits=logits.numpy(), adapt_s=adapted - started, classify_s=ended - adapted)


if __name__ == "__main__":
    main()
