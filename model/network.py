"""The ResNet whose batch-normalisation layers take their statistics from a chosen context or from given values (torch).

A forward pass is told, by a ``Normaliser``, where statistics come from. Nothing is switched by ``train()``/``eval()``, no
state is kept: the same network serves every context of the method. An ``Ensemble`` of equal networks is one network to all
that measure, calibrate, export and serve; it does not know how its members' answers are averaged.

Architectures: He et al. 2016 (ResNet-18/34/50), with anti-aliased downsampling as specified by Sanchez-Fernandez et al.
2026 where asked for: 3 x 3 convolutions keep stride 1 and a 2 x 2 average pool follows.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from model.statistics import BN_EPSILON, blended

EPS = BN_EPSILON
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of each of the four stages, by depth."""


@dataclass(frozen=True)
class NetworkSpec:
    """Which network: depth 18, 34 or 50; input channels; classes; width of the first stage; downsampling; final pooling.

    ``pooling`` ``mean`` is the mean over the last map. ``mean-of-7x7`` is the published network's: a 7 x 7 average pool of
    stride 1, then the mean of what is left, which weighs an 8 x 8 map's middle more than its rim and takes no smaller map
    than 7 x 7 (224 pixels).
    """

    channels: int
    classes: int
    depth: Literal[18, 34, 50] = 18
    width: int = 64
    antialiased: bool = False
    pooling: Literal["mean", "mean-of-7x7"] = "mean"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


# --- where statistics come from --------------------------------------------------------------------------------------


class Normaliser(Protocol):
    """Normalises one BN layer's input; layers call it in network order."""

    def __call__(self, x: Tensor, layer: "BatchNorm") -> Tensor:
        """Normalise (rows, features, height, width) and apply the layer's scale and shift."""
        ...


@dataclass(frozen=True)
class PriorTensors:
    """What each layer's measured statistics are blended with: mean, variance and weight, (features,) each."""

    mean: Tensor
    variance: Tensor
    weight: Tensor


class FromContext:
    """Statistics of the rows ``context`` (a slice; all rows when None), normalising every row; gradients flow through.

    With a ``prior`` each layer normalises by the blend of both, so that later layers are measured on inputs normalised so.
    Records each layer's mean and population variance, blended if they are; ``statistics()`` returns them concatenated.
    """

    def __init__(
        self, context: slice | None = None, *, stop_gradient: bool = False, prior: PriorTensors | None = None
    ) -> None:
        self.context = context if context is not None else slice(None)
        self.stop_gradient = stop_gradient
        self.prior = prior
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def __call__(self, x: Tensor, layer: "BatchNorm") -> Tensor:
        fused = torch.is_grad_enabled() and not self.stop_gradient and self.prior is None
        if fused and x.device.type in ("cpu", "cuda"):
            normalised, mean, variance = _ByContext.apply(x, layer.weight, layer.bias, self.context)  # type: ignore[no-untyped-call]
            self.means.append(mean)
            self.variances.append(variance)
            return normalised  # type: ignore[no-any-return]
        rows = x[self.context]
        mean = rows.mean(dim=(0, 2, 3), dtype=_exact(x.dtype))
        variance = (rows - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        if self.stop_gradient:
            mean, variance = mean.detach(), variance.detach()
        if self.prior is not None:
            at, prior = layer.place, self.prior
            mean, variance = blended(mean, variance, prior.mean[at], prior.variance[at], prior.weight[at])
        self.means.append(mean)
        self.variances.append(variance)
        # F.batch_norm has no gradient for the statistics it is given.
        scale = layer.weight * torch.rsqrt(variance + EPS)
        written_out: Tensor = x * scale[:, None, None] + (layer.bias - mean * scale)[:, None, None]
        return written_out.to(x.dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all layers, (features,) each."""
        return torch.cat(self.means), torch.cat(self.variances)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics of values of a type are computed in: float32 for bfloat16."""
    return torch.promote_types(dtype, torch.float32)


class _ByContext(torch.autograd.Function):
    """What ``FromContext`` computes, for training: torch's fused kernels, and ``x`` alone kept for the way back.

    With n context elements a feature, z the normalised input, and sums over ALL rows, the gradient of x is that of given
    statistics, less scale / n * (sum(g) + z * sum(g * z)) on the context rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, context: slice) -> tuple[Tensor, Tensor, Tensor]:
        rows = x[context]
        running = [torch.zeros_like(weight, dtype=_exact(x.dtype)) for _ in range(2)]  # their type is the statistics' type
        mean, variance = torch.ops.aten.batch_norm_update_stats(rows, *running, 0.0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.context, ctx.elements = context, rows.numel() // rows.shape[1]
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=EPS), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_mean: Tensor | None, of_variance: Tensor | None) -> tuple[Any, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        if gradient is None:
            gradient = torch.zeros_like(x)
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, EPS, [True, True, True]
        )
        deviation = torch.rsqrt(variance + EPS)
        to_mean = -weight * deviation * of_bias
        to_variance = -0.5 * weight * deviation.square() * of_weight
        if of_mean is not None:
            to_mean = to_mean + of_mean
        if of_variance is not None:
            to_variance = to_variance + of_variance
        slope = 2 * to_variance / ctx.elements
        offset = to_mean / ctx.elements - slope * mean
        share = torch.addcmul(offset[:, None, None], x[ctx.context], slope[:, None, None])
        of_x[ctx.context].add_(share)
        return of_x, of_weight, of_bias, None


class Given:
    """Statistics given for all layers at once: mean and variance, (features,) each."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean = mean
        self.variance = variance

    def __call__(self, x: Tensor, layer: "BatchNorm") -> Tensor:
        at = layer.place
        return F.batch_norm(x, self.mean[at], self.variance[at], layer.weight, layer.bias, training=False, eps=EPS)


class Running:
    """Conventional BN (ERM): minibatch statistics that update the layer's running ones, or the running ones as is.

    The running statistics average about 1 / ``momentum`` steps: torch's own 0.1 is noisy where a step sees few plates.
    """

    def __init__(self, *, update: bool, momentum: float = 0.02) -> None:
        self.update = update
        self.momentum = momentum

    def __call__(self, x: Tensor, layer: "BatchNorm") -> Tensor:
        return F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
            training=self.update, momentum=self.momentum, eps=EPS,
        )  # fmt: skip


class PerInstance:
    """Instance normalisation: each row by its own mean and variance over space, a map of one pixel the bias."""

    def __call__(self, x: Tensor, layer: "BatchNorm") -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(x, layer.weight, layer.bias, None, None, True, 0.0, EPS, cudnn)


# --- layers ----------------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """A BN layer's parameters and its place, ``offset``, in the concatenated statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.offset = 0
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    @property
    def place(self) -> slice:
        """Where its features lie in the concatenated statistics."""
        return slice(self.offset, self.offset + self.features)

    def forward(self, x: Tensor, norm: Normaliser) -> Tensor:
        """Normalise as ``norm`` says."""
        return norm(x, self)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Shortcut(nn.Module):
    """The identity, or a 1 x 1 convolution and BN where the shape changes (average-pooled first when anti-aliased)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, antialiased: bool) -> None:
        super().__init__()
        self.pool = stride if antialiased else 1
        self.conv = _convolution(inputs, outputs, 1, 1 if antialiased else stride)
        self.bn = BatchNorm(outputs)

    def forward(self, x: Tensor, norm: Normaliser) -> Tensor:
        """Bring the block's input to its output's shape."""
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        out: Tensor = self.bn(self.conv(x), norm)
        return out


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, antialiased: bool) -> None:
        super().__init__()
        self.pool = stride if antialiased else 1
        self.conv1 = _convolution(inputs, width, 3, 1 if antialiased else stride)
        self.bn1 = BatchNorm(width)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = BatchNorm(width)
        changes = stride != 1 or inputs != width
        self.shortcut = Shortcut(inputs, width, stride, antialiased=antialiased) if changes else None

    def forward(self, x: Tensor, norm: Normaliser) -> Tensor:
        """Return relu(residual + shortcut)."""
        out = F.relu(self.bn1(self.conv1(x), norm))
        if self.pool > 1:
            out = F.avg_pool2d(out, self.pool)
        out = self.bn2(self.conv2(out), norm)
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x, norm)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions (ResNet-50); the pool follows the second one's activation when anti-aliased."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, antialiased: bool) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.pool = stride if antialiased else 1
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = BatchNorm(width)
        self.conv2 = _convolution(width, width, 3, 1 if antialiased else stride)
        self.bn2 = BatchNorm(width)
        self.conv3 = _convolution(width, outputs, 1)
        self.bn3 = BatchNorm(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = Shortcut(inputs, outputs, stride, antialiased=antialiased) if changes else None

    def forward(self, x: Tensor, norm: Normaliser) -> Tensor:
        """Return relu(residual + shortcut)."""
        out = F.relu(self.bn1(self.conv1(x), norm))
        out = F.relu(self.bn2(self.conv2(out), norm))
        if self.pool > 1:
            out = F.avg_pool2d(out, self.pool)
        out = self.bn3(self.conv3(out), norm)
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x, norm)))


class ResNet(nn.Module):
    """ResNet-18/34/50 for any number of channels and any width.

    ``forward`` maps images (rows, channels, height, width) to logits (rows, classes) and embeddings (rows, dim).
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        block: type[BasicBlock | Bottleneck] = Bottleneck if spec.depth >= 50 else BasicBlock  # noqa: PLR2004
        self.conv1 = _convolution(spec.channels, spec.width, 7, 2)
        self.bn1 = BatchNorm(spec.width)
        blocks: list[nn.Module] = []
        inputs = spec.width
        for stage, count in enumerate(STAGES[spec.depth]):
            width = spec.width * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, width, stride, antialiased=spec.antialiased))
                inputs = width * block.expansion
        self.blocks = nn.ModuleList(blocks)
        self.embedding_dim = inputs
        self.classifier = nn.Linear(inputs, spec.classes)
        self._initialise()
        self.features = self.number_layers()

    def forward(self, images: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
        """Classify images with the statistics that ``norm`` says; returns (logits, embeddings)."""
        x = self._map(images, norm)
        if self.spec.pooling == "mean-of-7x7":
            x = F.avg_pool2d(x, 7, stride=1)
        embedding = x.mean(dim=(2, 3))
        return self.classifier(embedding), embedding

    def _map(self, images: Tensor, norm: Normaliser) -> Tensor:
        """Return the last map, (rows, dim, height, width)."""
        x = F.relu(self.bn1(self.conv1(images), norm))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x, norm)
        return x

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def number_layers(self, first: int = 0) -> int:
        """Give every BN layer its offset, from ``first``, in the order in which a pass calls them; return the next one's."""
        following = first

        def number(x: Tensor, layer: BatchNorm) -> Tensor:
            nonlocal following
            layer.offset = following
            following += layer.features
            return x

        with torch.no_grad():
            self._map(self.conv1.weight.new_zeros(1, self.spec.channels, 64, 64), number)
        return following

    @property
    def layers(self) -> list[BatchNorm]:
        """The BN layers in the order of the concatenated statistics."""
        return sorted((m for m in self.modules() if isinstance(m, BatchNorm)), key=lambda layer: layer.offset)

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Concatenate the running (ERM) mean and variance of all layers, (features,) each."""
        return torch.cat([m.running_mean for m in self.layers]), torch.cat([m.running_var for m in self.layers])


class Ensemble(nn.Module):
    """Networks of one architecture, asked together; features and embeddings are the members', member 0's first.

    ``forward`` maps images (rows, channels, height, width) to logits (rows, members, classes) and embeddings (rows, dim);
    members run one after the other. It holds copies: the networks it is made of keep their own numbering of BN features.

    Args:
        networks: the members, with equal specs.
        shifts, scales: (members, channels), applied as ``image * scale + shift`` to what each member takes, where members
            were trained on differently normalised images; None where all take the same.

    Raises:
        ValueError: there is no network, or their specs differ.
    """

    shifts: Tensor | None
    scales: Tensor | None

    def __init__(self, networks: Sequence[ResNet], *, shifts: Tensor | None = None, scales: Tensor | None = None) -> None:
        super().__init__()
        if len({network.spec for network in networks}) != 1:
            raise ValueError("an ensemble needs one network or more, all of one architecture")
        self.spec = networks[0].spec
        self.members = nn.ModuleList(deepcopy(network) for network in networks)
        self.embedding_dim = sum(network.embedding_dim for network in networks)
        self.features = 0
        for network in self.networks:
            self.features = network.number_layers(self.features)
        self.register_buffer("shifts", shifts)
        self.register_buffer("scales", scales)

    def forward(self, images: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
        """Classify images with the statistics that ``norm`` says; returns (logits, embeddings)."""
        answers = [network(self._input(images, number), norm) for number, network in enumerate(self.networks)]
        return torch.stack([logits for logits, _ in answers], dim=1), torch.cat([dims for _, dims in answers], dim=1)

    @property
    def networks(self) -> list[ResNet]:
        """The members, whose BN layers are numbered through."""
        return [cast("ResNet", member) for member in self.members]

    @property
    def layers(self) -> list[BatchNorm]:
        """The members' BN layers in the order of the concatenated statistics."""
        return [layer for network in self.networks for layer in network.layers]

    def _input(self, images: Tensor, number: int) -> Tensor:
        if self.shifts is None or self.scales is None:
            return images
        return images * self.scales[number, :, None, None] + self.shifts[number, :, None, None]

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """Concatenate the members' running (ERM) mean and variance, (features,) each."""
        means, variances = zip(*(network.running_statistics() for network in self.networks), strict=True)
        return torch.cat(means), torch.cat(variances)


Network = ResNet | Ensemble
"""Whatever classifies images with statistics from a ``Normaliser``."""
